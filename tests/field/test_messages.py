"""What people see: few lines for many characters, numbers as they typed them, no class names."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub.errors import OfflineModeIsEnabled

from khala_mlx import Khala, Request
from khala_mlx.cli import main
from khala_mlx.storage.hub import plain_reason


def test_a_chinese_verse_is_one_doubt(tiny: Khala) -> None:
    """The tiny tokenizer needs three bytes for each character."""
    verse = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"
    doubts = tiny.preview(Request(tags="pop", lyrics=verse, seconds=0.5))["suspicious"]
    assert len(doubts) == 1
    assert "and 19 other characters takes 3 tokens or more" in doubts[0]


@pytest.mark.parametrize("seed", ["-1", "18446744073709551616", "99999999999999999999999"])
def test_a_seed_out_of_range_is_shown(tiny_folder: Path, seed: str) -> None:
    arguments = ["generate", "-m", str(tiny_folder), "--seed", seed, "--dry-run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert f"got {seed}." in result.stderr


def test_reasons_are_words() -> None:
    class ReadTimeout(Exception):
        pass

    for error in (OfflineModeIsEnabled("x"), ReadTimeout(), ConnectionError(), ValueError("odd")):
        assert type(error).__name__ not in plain_reason(error)


@pytest.mark.extended
def test_three_at_once_get_names_of_their_own(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["generate", "-m", str(tiny_folder), "--tags", "pop", "--instrumental"]
    command: list[Any] = [sys.executable, "-m", "khala_mlx.cli", *asked, "--seconds", "0.1"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert len(list(tmp_path.glob("song*.wav"))) == 3
    assert len(list(tmp_path.glob("song*.take.safetensors"))) == 3


def test_the_same_name_twice_is_refused_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["generate", "-m", str(tiny_folder), "--tags", "pop", "--instrumental", "-o", "a.wav"]
    command: list[Any] = [sys.executable, "-m", "khala_mlx.cli", *asked, "--seconds", "0.1"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1], errors
    assert sum("exists already" in error for error in errors) == 1
