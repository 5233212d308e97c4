"""Loudness against the test signals of EBU Tech 3341 and the coefficients of BS.1770-4."""

import math
from collections.abc import Callable

import numpy as np
import pyloudnorm
import pytest

from khala_mlx.audio import loudness
from khala_mlx.errors import AudioError

RATE = 48000


def sine(seconds: float, dbfs: float, hertz: float = 1000, rate: int = RATE) -> np.ndarray:
    wave = 10 ** (dbfs / 20) * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    return np.stack([wave, wave], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # EBU Tech 3341, table 1, cases 1 to 5.
        ([(20, -23)], -23.0),
        ([(20, -33)], -33.0),
        ([(10, -36), (60, -23), (10, -36)], -23.0),
        ([(10, -72), (10, -36), (60, -23), (10, -36), (10, -72)], -23.0),
        ([(20, -26), (20.1, -20), (20, -26)], -23.0),
    ],
)
@pytest.mark.parametrize("rate", [44100, 48000])
def test_signals_of_the_ebu(steps: list[tuple[float, float]], expected: float, rate: int) -> None:
    wave = np.concatenate([sine(*step, rate=rate) for step in steps])
    measured = loudness.integrated(wave, rate)
    assert measured == pytest.approx(expected, abs=0.1)


def test_one_channel_at_full_scale() -> None:
    """BS.1770-4: 0 dBFS at 997 Hz in one channel is -3.01 LKFS."""
    wave = sine(5, 0, 997)
    wave[:, 1] = 0
    assert loudness.integrated(wave, RATE) == pytest.approx(-3.01, abs=0.01)
    assert loudness.integrated(wave[:, :1], RATE) == pytest.approx(-3.01, abs=0.01)


def test_filters_are_those_of_the_recommendation() -> None:
    shelf = [1.53512485958697, -2.69169618940638, 1.19839281085285]
    shelf_below = [1, -1.69065929318241, 0.73248077421585]
    high_pass, high_pass_below = [1, -2, 1], [1, -1.99004745483398, 0.99007225036621]
    z = np.exp(-2j * np.pi * np.arange(513) / 1024)
    expected = np.polyval(shelf[::-1], z) / np.polyval(shelf_below[::-1], z)
    expected *= np.polyval(high_pass[::-1], z) / np.polyval(high_pass_below[::-1], z)
    assert np.abs(loudness._k_weighting(1024, RATE) - expected).max() < 1e-6


def test_filtering_in_blocks_equals_the_recursion() -> None:
    wave = np.random.default_rng(0).normal(size=RATE)
    expected = np.zeros(RATE + 2)
    for above, below in (
        ([1.53512485958697, -2.69169618940638, 1.19839281085285], [-1.69065929318241, 0.732480774]),
        ([1, -2, 1], [-1.99004745483398, 0.99007225036621]),
    ):
        source = np.concatenate([[0, 0], wave if not expected.any() else expected[2:]])
        expected = np.zeros(RATE + 2)
        forward = above[0] * source[2:] + above[1] * source[1:-1] + above[2] * source[:-2]
        for i, value in enumerate(forward):
            expected[i + 2] = value - below[0] * expected[i + 1] - below[1] * expected[i]
    assert np.abs(loudness._weighted(wave, RATE) - expected[2:]).max() < 1e-6


def noise(seconds: float, rate: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (int(seconds * rate), 2))


def music(seconds: float, rate: int) -> np.ndarray:
    """Chords of falling notes with rests, louder on one side."""
    time = np.arange(int(seconds * rate)) / rate
    notes = (55, 220, 277, 880, 3520)
    tones = sum(np.sin(2 * np.pi * hertz * time) / hertz**0.5 for hertz in notes)
    wave = 0.8 * tones * np.exp(-4 * (time % 0.75)) * (time % 4 < 3)
    return np.stack([wave, 0.5 * wave], axis=1)


def beside_silence(seconds: float, rate: int) -> np.ndarray:
    return np.concatenate([np.zeros((int(seconds * rate), 2)), noise(seconds, rate)])


# Its default filters are designed in another way, which tells at low rates; De Man's are ours.
@pytest.mark.parametrize(
    ("rate", "filters", "tolerance"),
    [(rate, "K-weighting", 0.2) for rate in (16000, 22050, 32000, 44100, 48000, 96000)]
    + [(rate, "DeMan", 0.01) for rate in (8000, 44100, 48000)],
)
@pytest.mark.parametrize("signal", [noise, music, beside_silence])
def test_agrees_with_pyloudnorm(
    signal: Callable[[float, int], np.ndarray], rate: int, filters: str, tolerance: float
) -> None:
    wave = signal(6.0, rate)
    meter = pyloudnorm.Meter(rate, filter_class=filters)
    for part in (wave, wave[:, :1]):
        ours = loudness.integrated(part.astype(np.float32), rate)
        assert ours == pytest.approx(meter.integrated_loudness(part), abs=tolerance)


@pytest.mark.parametrize(
    ("hertz", "phase", "level"),
    # EBU Tech 3341, cases 15 to 19: tolerance +0.2, -0.4 dB.
    [(RATE / 4, 0, 0.5), (RATE / 4, 45, 0.5), (RATE / 6, 60, 0.5), (RATE / 8, 67.5, 0.5)],
)
def test_true_peak_signals_of_the_ebu(hertz: float, phase: float, level: float) -> None:
    time = np.arange(RATE) / RATE
    wave = level * np.sin(2 * np.pi * hertz * time + np.radians(phase))
    # The EBU's signals fade in and out, as a sine that is cut is none.
    wave *= np.minimum(1, np.minimum(np.arange(RATE), np.arange(RATE)[::-1]) / 2000)
    peak = loudness.true_peak(wave[:, None].astype(np.float32), RATE)
    assert 20 * math.log10(level) - 0.4 < peak < 20 * math.log10(level) + 0.2


def test_true_peak_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = np.random.default_rng(1).normal(size=(100_000, 2)).astype(np.float32)
    whole = loudness.true_peak(wave, RATE)
    monkeypatch.setattr(loudness, "_PIECE", 1)
    assert loudness.true_peak(wave, RATE) == pytest.approx(whole, abs=0.02)


def test_silence_and_short_sounds_have_no_loudness() -> None:
    assert loudness.integrated(np.zeros((RATE, 2), np.float32), RATE) is None
    assert loudness.integrated(sine(0.3, -20), RATE) is None
    assert loudness.levels(np.zeros((9, 2), np.float32), RATE) == {
        "loudness_lufs": None,
        "true_peak_dbtp": None,
        "peak_dbfs": None,
        "clipped_samples": 0,
    }
    with pytest.raises(AudioError, match="1 or 2 channels"):
        loudness.integrated(np.zeros((RATE, 3), np.float32), RATE)


def test_clipped_samples_are_counted() -> None:
    wave = np.clip(sine(1, 3), -1, 1)
    told = loudness.levels(wave, RATE)
    assert told["clipped_samples"] == np.count_nonzero(np.abs(wave) >= 1)
    assert told["peak_dbfs"] == 0
    assert told["true_peak_dbtp"] > 0
