"""`khala train`, from sound files to three trained parts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from tiny_tokenizer import write_tiny_tokenizer
from tiny_training import TINY

from khala_mlx import Khala
from khala_mlx.cli import main
from khala_mlx.config import BackboneConfig, SuperResConfig, TokenLayout

PARTS = ("codec", "backbone", "superres")
SCHEDULE = {"steps": 4, "batch_size": 2, "warmup": 1, "checkpoint_every": 2, "validate_every": 2}


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("valid", 2)):
        (tmp_path / "songs" / split).mkdir(parents=True)
        for number in range(count):
            path = tmp_path / "songs" / split / f"{number}.wav"
            soundfile.write(path, rng.uniform(-0.1, 0.1, (9000, 2)), 44100)
            path.with_suffix(".caption.txt").write_text("noise")
            path.with_suffix(".lyrics.txt").write_text("sh\nsh")
    return tmp_path / "songs"


def settings(path: Path, **sections: Any) -> Path:
    path.write_text(json.dumps({"schedule": SCHEDULE, **sections}))
    return path


@pytest.mark.extended
def test_from_sound_to_three_parts(songs: Path, tmp_path: Path) -> None:
    layout = TokenLayout.tiny().to_dict()
    codec = {**TINY.to_dict(), "schedule": SCHEDULE, "quantise_after": 2}
    config = settings(tmp_path / "codec.json", **codec)
    result = run("codec", "--data", songs, "--out", tmp_path / "codec", "--config", config)
    assert result.exit_code == 0, result.stderr
    assert "mel_correlation" in result.stdout
    tokenizer = write_tiny_tokenizer(tmp_path / "tokenizer.json")
    coded = tmp_path / "coded"
    prepare = ["prepare", songs, coded, "--codec", tmp_path / "codec", "--tokenizer", tokenizer]
    for _ in range(2):
        result = run(*prepare, "--json")
        assert result.exit_code == 0, result.stderr
        told = json.loads(result.stdout)
        assert told["folder"] == str(coded)
        assert (told["train"]["songs"], told["valid"]["songs"]) == (3, 2)

    config = settings(
        tmp_path / "backbone.json", tokens=layout, backbone=BackboneConfig.tiny().to_dict()
    )
    backbone = tmp_path / "backbone"
    options = ["--data", coded, "--out", backbone, "--config", config]
    assert run("backbone", *options).exit_code == 0
    assert "--resume" in run("backbone", *options).stderr
    # Nothing is left to do, and that is fine.
    assert run("backbone", *options, "--resume").exit_code == 0

    config = settings(
        tmp_path / "superres.json", tokens=layout, superres=SuperResConfig.tiny().to_dict(),
        backbone=str(backbone),
    )  # fmt: skip
    result = run(
        "superres", "--data", coded, "--out", tmp_path / "superres", "--config", config, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert set(json.loads(result.stdout)) == {"folder", "refine_loss", "align_loss"}
    for part in PARTS:
        assert (tmp_path / part / f"{part}.safetensors").exists()

    model = tmp_path / "model"
    options = [each for part in PARTS for each in (f"--{part}", tmp_path / part)]
    result = run("pack", model, *options, "--tokenizer", tokenizer)
    assert result.exit_code == 0, result.stderr
    song = Khala.from_pretrained(model).generate(seconds=0.05, min_seconds=0.05, seed=1)
    assert song.codes.shape[0] == 8


def test_prepare_with_a_models_codec(tiny_folder: Path, songs: Path, tmp_path: Path) -> None:
    coded = tmp_path / "coded"
    result = run("prepare", songs, coded, "--model", tiny_folder)
    assert result.exit_code == 0, result.stderr
    codes = list((coded / "codes").iterdir())
    assert {np.load(each)["codes"].shape[0] for each in codes} == {8}
    assert len(codes) == 5
    (coded / "tokenizer.json").write_text("{}")
    assert "another tokenizer" in run("prepare", songs, coded, "--model", tiny_folder).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["prepare", "songs", "out"], 2, "either --model"),
        (["prepare", "songs", "out", "--codec", "run"], 2, "either --model"),
        (["prepare", "songs", "out", "--codec", "run", "--tokenizer", "t"], 1, "no finished codec"),
        (["codec", "--data", "absent", "--out", "out"], 1, "no sound files"),
        (["codec", "--data", "absent"], 2, "--out"),
        (["backbone", "--data", "absent", "--out", "out"], 1, "tokenizer.json cannot be read"),
        (["superres", "--data", "absent", "--out", "out"], 1, "tokenizer.json cannot be read"),
        (["codec", "--data", "a", "--out", "o", "--config", "absent"], 1, "absent cannot be read"),
    ],
)
def test_wrong_use_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
