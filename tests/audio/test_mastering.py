import warnings

import numpy as np
import pytest

from khala_mlx.audio import loudness
from khala_mlx.audio.mastering import Mastering, fade_out, fade_part
from khala_mlx.errors import AudioError, KhalaWarning

RATE = 44100


def noise(seconds: float = 3, level: float = 0.02) -> np.ndarray:
    wave = np.random.default_rng(0).normal(size=(int(seconds * RATE), 2))
    return (level * wave).astype(np.float32)


@pytest.mark.parametrize("target", [-14.0, -23.0, -40.0])
def test_loudness_is_reached(target: float) -> None:
    wave = (0.1 * np.sin(np.arange(3 * RATE) / 20)[:, None] * np.ones((1, 2))).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finished, report = Mastering(loudness=target).apply(wave, RATE)
    assert loudness.integrated(finished, RATE) == pytest.approx(target, abs=0.01)
    assert report["loudness_lufs"] == pytest.approx(target, abs=0.01)


def test_the_true_peak_goes_first() -> None:
    wave = noise()
    wave[50_000] = 0.9
    with pytest.warns(KhalaWarning, match=r"The song reaches -\d+\.\d LUFS, not -14"):
        finished, report = Mastering(loudness=-14).apply(wave, RATE)
    assert loudness.true_peak(finished, RATE) == pytest.approx(-1.0, abs=0.02)
    assert report["samples_over"] == 0
    assert report["loudness_lufs"] < -20


def test_a_loud_song_is_turned_down_without_clipping() -> None:
    finished, report = Mastering(loudness=-23).apply(noise(level=0.5), RATE)
    assert np.abs(finished).max() < 1
    assert report["samples_over"] == 0


def test_silence_is_left_alone() -> None:
    silence = np.zeros((RATE, 2), np.float32)
    with pytest.warns(KhalaWarning, match="left as it is"):
        finished, report = Mastering(loudness=-14).apply(silence, RATE)
    assert np.array_equal(finished, silence)
    assert "loudness_lufs" not in report


def test_fading() -> None:
    wave = np.ones((RATE, 2), np.float32)
    faded = fade_out(wave, RATE, 0.5)
    assert np.all(faded[: RATE // 2] == 1)
    assert np.all(np.diff(faded[RATE // 2 :, 0]) <= 0)
    assert faded[RATE * 3 // 4, 0] == pytest.approx(0.5, abs=1e-3)
    assert np.all(faded[-1] == 0)
    assert wave[-1, 0] == 1
    assert fade_out(wave, RATE, 9.0)[RATE // 10, 0] < 1
    assert np.array_equal(fade_out(wave, RATE, 1e308), fade_out(wave, RATE, 9.0))
    assert Mastering(fade=0.5).apply(wave, RATE)[1]["fade_seconds"] == 0.5


@pytest.mark.parametrize("seconds", [0.0, 0.2, 9.0])
@pytest.mark.parametrize("size", [1, 999, 40_000])
def test_fading_block_by_block(seconds: float, size: int) -> None:
    wave = noise(0.3 if size == 1 else 1)
    blocks = [
        fade_part(wave[start : start + size], start, len(wave), RATE, seconds)
        for start in range(0, len(wave), size)
    ]
    assert np.array_equal(np.concatenate(blocks), fade_out(wave, RATE, seconds))


def test_nothing_asked_nothing_done() -> None:
    wave = noise()
    finished, report = Mastering().apply(wave, RATE)
    assert finished is wave
    assert set(report) == {"peak_dbfs", "samples_over", "gain_db"}


@pytest.mark.parametrize("wrong", [{"loudness": 3}, {"loudness": float("nan")}, {"fade": -1}])
def test_wrong_values(wrong: dict[str, float]) -> None:
    with pytest.raises(AudioError, match="must be"):
        Mastering(**wrong)
