"""Balance, loudness and peak of a song."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .score import SAMPLE_RATE

VOICE_OVER_BAND = 5.0  # dB, while the voice sings
LOUDNESS = -14.0  # LUFS
PEAK = 10 ** (-3 / 20)
_KNEE = 0.75 * PEAK  # the limiter leaves everything below alone
_FADE = 0.05  # s at the end of the song


def mix(voice: np.ndarray, band: np.ndarray) -> np.ndarray:
    """Balance a voice [L] and a band [L, 2] into a song [L, 2] of the set loudness and peak."""
    sung = voice != 0
    ratio = _rms(voice[sung]) / _rms(band[sung] @ np.ones(2, np.float32) / np.sqrt(2))
    stereo = band * (ratio * 10 ** (-VOICE_OVER_BAND / 20)) + voice[:, None] / np.sqrt(2)
    size = int(_FADE * SAMPLE_RATE)
    stereo[-size:] *= np.linspace(1, 0, size)[:, None]
    return _limit(stereo * 10 ** ((LOUDNESS - loudness(stereo)) / 20)).astype(np.float32)


def loudness(stereo: np.ndarray) -> float:
    """Loudness of a song [L, 2] in LUFS as in ITU-R BS.1770, without its gates."""
    power = np.abs(np.fft.rfft(stereo, axis=0)) ** 2
    weighted = (_k_weighting(len(stereo))[:, None] * power).sum() * 2 / len(stereo) ** 2
    return float(-0.691 + 10 * np.log10(weighted))


def _rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(wave**2)))


def _limit(stereo: np.ndarray) -> np.ndarray:
    size = np.abs(stereo)
    room = PEAK - _KNEE
    bent = _KNEE + room * np.tanh((size - _KNEE) / room)
    return np.where(size > _KNEE, np.sign(stereo) * bent, stereo)


@lru_cache(maxsize=4)
def _k_weighting(samples: int) -> np.ndarray:
    """Power response of the BS.1770 filters at the frequencies of an rfft of `samples`."""
    s = 2j * np.pi * np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    # Analogue prototypes of the standard's two 48 kHz filters (as fitted by De Man, 2014).
    shelf_hz, shelf_q, gain = 1681.974, 0.70718, 10 ** (3.99984 / 20)
    pass_hz, pass_q = 38.1355, 0.50033
    w = 2 * np.pi * shelf_hz
    middle = gain**0.499667
    shelf = (gain * s**2 + middle * w / shelf_q * s + w**2) / (s**2 + w / shelf_q * s + w**2)
    w = 2 * np.pi * pass_hz
    high_pass = s**2 / (s**2 + w / pass_q * s + w**2)
    response: np.ndarray = np.abs(shelf * high_pass) ** 2
    return response
