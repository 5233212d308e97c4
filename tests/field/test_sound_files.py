"""Sound as people bring it: more channels than two, samples that are not numbers, broken files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from khala_mlx import KhalaError, KhalaWarning
from khala_mlx.audio.files import downmix, read_audio, read_sound

RATE = 44100


@pytest.mark.parametrize("channels", [3, 4, 5, 6, 7, 8])
def test_more_channels_are_mixed_down_with_a_remark(tmp_path: Path, channels: int) -> None:
    wave = 0.1 * np.random.default_rng(0).normal(size=(500, channels)).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", wave, RATE, subtype="FLOAT")
    with pytest.warns(KhalaWarning, match=f"has {channels} channels"):
        mixed = read_audio(tmp_path / "x.wav", RATE, 2)
    if channels == 6:
        left = wave[:, 0] + 0.5**0.5 * (wave[:, 2] + wave[:, 4])
        assert np.allclose(mixed[:, 0], left, atol=1e-6)
    elif channels < 6:
        assert np.allclose(mixed, wave.mean(axis=1, keepdims=True), atol=1e-6)
    assert mixed.shape == (500, 2)


def test_low_frequency_effects_are_left_out() -> None:
    for channels in (6, 8):
        wave = np.zeros((4, channels), np.float32)
        wave[:, 3] = 1
        assert not downmix(wave, 2).any()
        assert downmix(wave, 1).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_numbers_are_named_by_their_time(tmp_path: Path, value: float) -> None:
    wave = np.zeros((70 * 8000, 1), np.float32)
    wave[65 * 8000] = value
    soundfile.write(tmp_path / "x.wav", wave, 8000, subtype="FLOAT")
    for read in (read_sound, lambda path: read_audio(path, 8000, 2)):
        with pytest.raises(KhalaError, match=r"the first at 1:05 \(65\.000 s\)"):
            read(tmp_path / "x.wav")


def test_a_broken_mp3_gives_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "x.mp3", 0.1 * rng.normal(size=(RATE, 2)), RATE)
    data = bytearray((tmp_path / "x.mp3").read_bytes())
    data[len(data) // 3 : len(data) // 2] = rng.bytes(len(data) // 2 - len(data) // 3)
    for content in (bytes(data[:700]), bytes(data), b"ID3" + bytes(100)):
        (tmp_path / "x.mp3").write_bytes(content)
        result = subprocess.run(
            [sys.executable, "-m", "khala_mlx.cli", "info", str(tmp_path / "x.mp3")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert len(result.stderr.splitlines()) <= 1, result.stderr
        assert result.stderr == "" or result.stderr.startswith("Error: ")
