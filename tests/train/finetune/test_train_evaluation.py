"""`khala train evaluate`: nats of held-out songs, intervals, pairs; from Python and by command."""

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import pytest
import soundfile
from click.testing import CliRunner, Result
from tiny_songs import random_adapter, write_songs

from khala_mlx import Khala, KhalaError
from khala_mlx.audio.loudness import integrated, true_peak
from khala_mlx.cli import main
from khala_mlx.config import KhalaConfig
from khala_mlx.convert import export_adapter
from khala_mlx.train.data.prepared import Prepared, read_prepared
from khala_mlx.train.finetune.evaluate import Nats, artists_of, compare, song_nats
from khala_mlx.train.finetune.listening_test import Trial, matched, write_page

CONFIG = KhalaConfig.tiny()
RATE = CONFIG.codec.sample_rate


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_songs(tmp_path_factory.mktemp("songs") / "coded", [9, 12, 20, 9], held_out=3)


def held_out(folder: Path, data: Path) -> Prepared:
    return read_prepared(folder, CONFIG, data, "valid")


@pytest.mark.parametrize("whole", [False, True])
def test_a_song_costs_what_its_logits_say(tiny: Khala, data: Path, whole: bool) -> None:
    examples = held_out(tiny.parts.folder, data).examples
    found = song_nats(tiny.backbone, examples, whole_vocabulary=whole)
    layout = CONFIG.tokens
    for example, nats, count in zip(examples, found.nats, found.tokens, strict=True):
        ids = example.coarse_sequence(layout)
        logits = tiny.backbone(ids[None, :-1])[0].astype(np.float64)
        expected = 0.0
        for turn, position in enumerate(range(len(example.backbone_prompt), len(ids))):
            start = layout.audio_start + layout.codebook_size * (turn % 2)
            chosen = [layout.end_of_song, *range(start, start + layout.codebook_size)]
            row = logits[position - 1]
            expected += np.logaddexp.reduce(row if whole else row[chosen]) - row[ids[position]]
        assert count == len(ids) - len(example.backbone_prompt)
        assert nats == pytest.approx(expected, rel=1e-5)


def test_figures_are_of_all_tokens_alike() -> None:
    base = Nats(np.array([10.0, 30.0]), np.array([10.0, 10.0]))
    adapted = Nats(np.array([5.0, 25.0]), np.array([10.0, 10.0]))
    told = compare(base, adapted, ["a", "b"])
    values = {name: each.value for name, each in told.items()}
    assert values == {
        "nats_per_token": 2.0,
        "nats_per_token_adapter": 1.5,
        "difference": -0.5,
        "change": -0.25,
    }
    # The same difference in both: paired, it has no spread, while the two losses have one.
    assert told["difference"].low == told["difference"].high == -0.5
    assert told["nats_per_token"].low == 1.0
    assert told["nats_per_token"].high == 3.0
    assert set(compare(base, None, ["a", "b"])) == {"nats_per_token"}


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Artists of normal means around 3, songs around these: the interval of the mean covers 3."""
    rng, covered, runs = np.random.default_rng(0), 0, 150
    for run in range(runs):
        means = rng.normal(3, 0.5, 30).repeat(4)
        nats = 100 * (means + rng.normal(0, 0.1, means.size))
        groups = [f"{number}" for number in np.arange(30).repeat(4)]
        found = compare(Nats(nats, np.full(means.size, 100.0)), None, groups, seed=run)
        low, high = found["nats_per_token"].low, found["nats_per_token"].high
        assert low is not None
        assert high is not None
        covered += low < 3 < high
    # 95 % less what the bootstrap loses with 30 groups; over songs it would be about 65 %.
    assert covered / runs > 0.87


def test_one_artist_is_drawn_by_songs_and_one_song_not_at_all(tiny: Khala, data: Path) -> None:
    assert len(set(artists_of(held_out(tiny.parts.folder, data)))) == 3
    songs = held_out(tiny.parts.folder, data).songs
    for artists, groups in ((["A", " a", "b"], 2), (["x", "x", "x"], 3), (["x", "", ""], 3)):
        for song, artist in zip(songs, artists, strict=True):
            song.about["artist"] = artist
        assert len(set(artists_of(Prepared(songs, [])))) == groups
    alone = compare(Nats(np.ones(1), np.ones(1)), None, ["a"])["nats_per_token"]
    assert (alone.value, alone.low, alone.high) == (1.0, None, None)


def evaluate(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["train", "evaluate", *map(str, arguments)])


def test_from_the_command_line(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    export_adapter(random_adapter(CONFIG), tmp_path / "one", "mlx")
    options = ["-m", tiny_folder, "--data", data]
    base = json.loads(evaluate(*options, "--json").stdout)
    assert set(base) == {
        "songs", "artists", "tokens", "nats_per_token", "nats_per_token_low", "nats_per_token_high",
    }  # fmt: skip
    old = write_songs(tmp_path / "old", [12, 9], held_out=2, seed=3)
    adapted = ["--adapter", tmp_path / "one", "--forget", old]
    result = evaluate(*options, *adapted, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert {name: told[name] for name in base} == base
    assert told["forget_songs"] == 2
    for prefix in ("", "forget_"):
        before, after = told[f"{prefix}nats_per_token"], told[f"{prefix}nats_per_token_adapter"]
        assert told[f"{prefix}difference"] == pytest.approx(after - before)
        assert told[f"{prefix}change"] == pytest.approx((after - before) / before)
        assert abs(after - before) > 0.01
    # A scale of 0 is the base.
    off = json.loads(evaluate(*options, *adapted, "--adapter-scale", 0, "--json").stdout)
    assert off["difference"] == off["forget_difference"] == 0
    text = evaluate(*options, *adapted).stdout
    assert re.search(r"^nats_per_token_adapter +\d\.\d{4}  \(\d\.\d{4} to \d\.\d{4}\)$", text, re.M)
    assert re.search(r"^forget_change +[+-][\d.]+ %  \(", text, re.M)


def test_what_cannot_be_evaluated(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    alone = write_songs(tmp_path / "alone", [9])
    assert (
        "holds no songs of the split valid" in evaluate("-m", tiny_folder, "--data", alone).stderr
    )
    options = ["-m", tiny_folder, "--data", data]
    assert "There is no adapter absent" in evaluate(*options, "--adapter", "absent").stderr
    assert "need an --adapter" in evaluate(*options, "--listen", tmp_path / "page").stderr
    damaged = write_songs(tmp_path / "damaged", [9, 9], held_out=1)
    (damaged / "codes" / "s0.npz").write_bytes(b"PK")
    assert "is not a .npz file" in evaluate("-m", tiny_folder, "--data", damaged).stderr
    (damaged / "metadata.jsonl").write_text("{")
    result = evaluate("-m", tiny_folder, "--data", damaged)
    assert result.exit_code == 1
    assert "metadata.jsonl is damaged" in result.stderr


def tone(seconds: float, level: float, frequency: float = 1000.0) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    wave = level * np.sin(2 * np.pi * frequency * time)
    return np.stack([wave, wave], axis=1).astype(np.float32)


def measured(wave: np.ndarray) -> float:
    return float(pyloudnorm.Meter(RATE).integrated_loudness(wave.astype(np.float64)))


def test_sounds_become_equally_loud() -> None:
    (quiet, loud), loudness = matched([tone(2, 0.01), tone(2, 0.9, 500)], RATE)
    assert loudness == -16.0
    for wave in (quiet, loud):
        assert measured(wave) == pytest.approx(-16, abs=0.01)
        # The meter of --loudness and `khala info` agrees.
        assert integrated(wave, RATE) == pytest.approx(-16, abs=0.2)
    # A click on top would clip: both stay below it, and equally loud.
    spiky = tone(2, 0.01)
    spiky[100] = 0.9
    (first, second), loudness = matched([spiky, tone(2, 0.5)], RATE)
    assert loudness is not None
    assert loudness < -16
    assert true_peak(first, RATE) == pytest.approx(-1, abs=0.01)
    for wave in (first, second):
        assert measured(wave) == pytest.approx(loudness, abs=0.01)
    for wave in (tone(0.3, 0.5), np.zeros((2 * RATE, 2), np.float32)):
        (same, other), loudness = matched([wave, tone(2, 0.5)], RATE)
        assert loudness is None
        assert np.array_equal(same, wave)
        assert np.array_equal(other, tone(2, 0.5))


def test_without_the_meter_nothing_is_begun(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)
    # Neither data nor adapter are there: the meter is missed before either is.
    options = ["-m", tiny_folder, "--data", tmp_path / "none", "--adapter", tmp_path / "none"]
    result = evaluate(*options, "--listen", tmp_path / "page")
    assert result.exit_code == 1
    assert "`pip install 'khala-mlx[listen]'`" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "page").exists()


def test_the_page_keeps_its_key_to_itself(tmp_path: Path) -> None:
    prompt = {"tags": "rock & <b>roll</b>", "lyrics": "do\nre"}
    low, high = tone(1, 0.1, 200), tone(1, 0.1, 4000)
    told = write_page(tmp_path / "page", [Trial(prompt, low, high)] * 8, RATE, seed=1)
    assert len(told) == 8
    text = (tmp_path / "page" / "index.html").read_text()
    assert "rock &amp; &lt;b&gt;roll&lt;/b&gt;" in text
    match = re.search(r'atob\("([^"]+)"\)', text)
    assert match is not None
    key = json.loads(base64.b64decode(match[1]))
    assert set(key) == {"A", "B"}
    for number, letter in enumerate(key, 1):
        for each in "AB":
            name = f"{number:02d}{each.lower()}.flac"
            assert f'src="{name}"' in text
            wave, _ = soundfile.read(tmp_path / "page" / name)
            crossings = np.count_nonzero(np.diff(np.signbit(wave[:, 0])))
            assert (crossings > 4000) == (each == letter)
    with pytest.raises(KhalaError, match="exists"):
        write_page(tmp_path / "page", [], RATE)


def test_pairs_are_of_one_prompt_and_one_seed(
    tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    export_adapter(random_adapter(CONFIG), tmp_path / "one", "mlx")
    options = ["-m", tiny_folder, "--data", data, "--adapter", tmp_path / "one", "--pairs", 2]
    result = evaluate(*options, "--listen", tmp_path / "page", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)["listen"]
    assert [each["pair"] for each in told["pairs"]] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == [
        "01a.flac", "01b.flac", "02a.flac", "02b.flac", "index.html",
    ]  # fmt: skip
    # With the adapter turned off both sounds of a pair are the same.
    result = evaluate(*options, "--adapter-scale", 0, "--listen", tmp_path / "same")
    assert result.exit_code == 0, result.stderr
    for pair in ("01", "02"):
        sounds = [(tmp_path / "same" / f"{pair}{each}.flac").read_bytes() for each in "ab"]
        assert sounds[0] == sounds[1]
        sounds = [(tmp_path / "page" / f"{pair}{each}.flac").read_bytes() for each in "ab"]
        assert sounds[0] != sounds[1]
    assert "exists" in evaluate(*options, "--listen", tmp_path / "page").stderr
