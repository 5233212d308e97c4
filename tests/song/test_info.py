"""`khala info` on files of other programs, strangers' tags among them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from khala_mlx.audio.tags import write
from khala_mlx.cli import main
from khala_mlx.cli.terminal import report
from khala_mlx.errors import AudioError
from khala_mlx.song.info import describe


def sound(path: Path, rate: int = 44100, **how: Any) -> Path:
    wave = np.sin(np.arange(rate) / 9).astype(np.float32)[:, None] * [0.3, 0.2]
    soundfile.write(os.fsencode(path), wave, rate, **how)
    return path


def info(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["info", *map(str, arguments)])


@pytest.mark.parametrize("rate", [1, 3, 100, 3999])
def test_a_rate_too_low_for_the_filters(tmp_path: Path, rate: int) -> None:
    told = describe(sound(tmp_path / "slow.wav", rate))
    assert told["loudness_lufs"] is None
    assert told["peak_dbfs"] is None or told["true_peak_dbtp"] >= told["peak_dbfs"]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_numbers_that_are_none_are_told(tmp_path: Path, wrong: float) -> None:
    wave = np.full((44100, 1), 0.1, np.float32)
    wave[500] = wrong
    soundfile.write(tmp_path / "a.wav", wave, 44100, subtype="FLOAT")
    with pytest.raises(AudioError, match="a.wav has NaN or infinite samples"):
        describe(tmp_path / "a.wav")


def test_a_strangers_json_beside_it_hides_nothing(tmp_path: Path) -> None:
    sound(tmp_path / "a.flac")
    (tmp_path / "a.json").write_text('{"id": 1}')
    told = describe(tmp_path / "a.flac")
    assert told["peak_dbfs"] == pytest.approx(-10.5, abs=0.1)
    assert "a.json is not a song.json" in told["record"]


@pytest.mark.parametrize("record", ["no json", '{"a": 1}', '{"request": {"evil": 1}}'])
def test_a_damaged_record_hides_nothing(tmp_path: Path, record: str) -> None:
    write(sound(tmp_path / "a.flac"), {"title": "T", "record": record})
    told = describe(tmp_path / "a.flac")
    assert told["title"] == "T"
    assert "none that can be read: " in told["record"]
    assert "song.json" not in told["record"]


def test_tags_cannot_steer_the_terminal(tmp_path: Path) -> None:
    record = {"request": {"lyrics": "la\nseed 9"}, "generator": "\ud800\x9b2J"}
    tags = {"title": "a\x1b]0;b\x07\nseconds 99\r\tc", "record": json.dumps(record)}
    write(sound(tmp_path / "a.flac"), tags)
    result = info(tmp_path / "a.flac")
    assert result.exit_code == 0, result.stderr
    assert not set(result.stdout) & set("\x1b\x07\r\x9b")
    starts = [line.split(" ")[0] for line in result.stdout.splitlines()]
    assert starts.count("seconds") == starts.count("seed") == 1
    assert "    seconds 99" in result.stdout
    told = json.loads(info(tmp_path / "a.flac", "--json").stdout)
    assert told["title"] == tags["title"]
    assert told["generator"] == "\ud800\x9b2J"


def test_seed_0_and_the_whole_vocabulary_are_told(tmp_path: Path) -> None:
    record = {"request": {"seed": 0, "reachable_only": False, "instrumental": False}}
    write(sound(tmp_path / "a.flac"), {"record": json.dumps(record)})
    told = describe(tmp_path / "a.flac")
    assert (told["seed"], told["reachable_only"]) == (0, False)
    assert not {"instrumental", "min_seconds", "refine_seed"} & set(told)


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    report({"a": float("nan"), "b": {"c": [float("inf"), 1.5]}}, True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None,
        "b": {"c": [None, 1.5]},
    }


def test_names_too_long_for_any_file() -> None:
    result = info("a" * 5000)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: A file's name cannot be so long: aaa")
    assert len(result.stderr) < 300


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.wav")
    try:
        sound(path)
    except soundfile.SoundFileError:
        pytest.skip("this file system has no such names")
    assert info(path).exit_code == 0
    assert info(path, "--json").exit_code == 0
