"""The singer: seven syllables by formant synthesis, each with its own consonant and vowel.

Harmonics of the sung pitch are weighted by three resonances whose frequencies glide from target to
target; noise makes the consonants. One singer without variation: the same syllable on the same
pitch and length is the same sound, which keeps the corpus learnable by a small codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .instruments import band_noise, fade
from .score import SAMPLE_RATE, TICK, Score

_FRAME = 128  # samples between values of the formants
_TOP = 5_000.0  # Hz
_BANDWIDTHS = np.array([110.0, 150.0, 220.0])  # Hz; wide, for harmonics are 130-260 Hz apart
_GAP = 0.05  # s of silence before the next syllable
_CALM = 0.6  # s; in shorter notes the consonants shrink too
_VIBRATO = (5.0, 0.004)  # Hz, share of the pitch


@dataclass(frozen=True)
class Shape:
    """A position of the mouth: three formants (Hz) and their gains."""

    formants: tuple[float, float, float]
    gains: tuple[float, float, float]


@dataclass(frozen=True)
class Hiss:
    """A consonant's noise: start and length in seconds, band in Hz, RMS next to the vowel's 1."""

    start: float
    seconds: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Sound:
    """A syllable: (seconds, shape, loudness) targets, seconds below 0 count from the end."""

    targets: tuple[tuple[float, str, float], ...]
    hisses: tuple[Hiss, ...] = ()


SHAPES = {
    "a": Shape((760, 1450, 2600), (1.0, 0.9, 0.35)),
    "ah": Shape((680, 1080, 2600), (1.0, 0.9, 0.2)),
    "e": Shape((500, 1850, 2600), (1.0, 0.8, 0.5)),
    "i": Shape((290, 2200, 2900), (1.0, 0.9, 0.7)),
    "o": Shape((470, 820, 2500), (1.0, 0.8, 0.1)),
    "u": Shape((330, 680, 2300), (1.0, 0.6, 0.05)),
    "oh": Shape((560, 950, 2500), (1.0, 0.9, 0.15)),
    "bar": Shape((220, 1700, 2600), (1.0, 0.02, 0.01)),
    "d": Shape((330, 1700, 2700), (1.0, 0.8, 0.4)),
    "r": Shape((350, 1150, 1500), (1.0, 0.8, 0.7)),
    "hum": Shape((240, 1000, 2200), (1.0, 0.05, 0.03)),
    "l": Shape((340, 1250, 2800), (1.0, 0.25, 0.3)),
    "dark l": Shape((360, 700, 2800), (1.0, 0.35, 0.2)),
}

SOUNDS = {
    "do": Sound(
        ((0, "bar", 0.4), (0.05, "bar", 0.4), (0.06, "d", 0.8), (0.15, "o", 1), (-0.1, "u", 1)),
        (Hiss(0.045, 0.03, 2_500, 4_000, 0.4),),
    ),
    # The dip is the tap of a rolled r.
    "re": Sound(
        (
            (0, "r", 0.6),
            (0.05, "r", 0.7),
            (0.07, "r", 0.1),
            (0.09, "r", 0.8),
            (0.2, "e", 1),
        )
    ),
    "mi": Sound(((0, "hum", 0.6), (0.14, "hum", 0.7), (0.16, "i", 1))),
    "fa": Sound(((0, "a", 0), (0.13, "a", 0), (0.15, "a", 1)), (Hiss(0, 0.15, 900, 3_500, 0.3),)),
    "sol": Sound(
        (
            (0, "oh", 0),
            (0.15, "oh", 0),
            (0.17, "oh", 1),
            (-0.25, "oh", 1),
            (-0.17, "dark l", 0.7),
        ),
        (Hiss(0, 0.17, 3_800, 5_500, 0.35),),
    ),
    "la": Sound(((0, "l", 0.6), (0.11, "l", 0.7), (0.16, "ah", 1))),
    "ti": Sound(
        ((0, "i", 0), (0.1, "i", 0), (0.12, "i", 1)),
        (Hiss(0.02, 0.03, 3_000, 5_000, 0.9), Hiss(0.05, 0.07, 1_800, 3_600, 0.3)),
    ),
}


def sing(score: Score) -> np.ndarray:
    """The voice [samples], at no particular level."""
    voice = np.zeros(score.samples, np.float32)
    for sung in score.notes:
        first = round(sung.start * TICK)
        wave = syllable(sung.text, sung.midi, round(sung.ticks * TICK))[: len(voice) - first]
        voice[first : first + len(wave)] += wave
    return voice


@lru_cache(maxsize=512)
def syllable(text: str, midi: int, samples: int) -> np.ndarray:
    """One sung syllable [samples], float32, read-only; its vowel has an RMS of about 1."""
    length = samples - int(_GAP * SAMPLE_RATE)
    sound = SOUNDS[text]
    wave = np.zeros(samples)
    wave[:length] = _voiced(sound, 440 * 2 ** ((midi - 69) / 12), length)
    for hiss in sound.hisses:
        rate = SAMPLE_RATE * _haste(length)
        start, size = int(hiss.start * rate), int(hiss.seconds * rate)
        noise = band_noise(size, hiss.low, hiss.high) * fade(size, 0.006, 0.02)
        wave[start : start + size] += hiss.level * noise
    result = wave.astype(np.float32)
    result.flags.writeable = False
    return result


def _haste(samples: int) -> float:
    return min(1.0, samples / SAMPLE_RATE / _CALM)


def _voiced(sound: Sound, pitch: float, samples: int) -> np.ndarray:
    """The harmonics of a syllable [samples], faded in and out."""
    count = int(_TOP / pitch)
    weights = _weights(sound, pitch * np.arange(1, count + 1), samples)
    time = np.arange(samples) / SAMPLE_RATE
    rate, depth = _VIBRATO
    sway = depth * (1 - np.cos(2 * np.pi * rate * time)) / (2 * np.pi * rate)
    turn = np.exp(2j * np.pi * pitch * (time + sway))
    harmonic, wave = np.ones_like(turn), np.zeros(samples)
    for k in range(count):
        harmonic = harmonic * turn
        # Quadratic phases keep the harmonics from peaking together.
        phase = np.exp(1j * np.pi * k**2 / count)
        wave += _to_samples(weights[:, k], samples) * (harmonic * phase).imag
    wave *= fade(samples, 0.01, 0.07)
    return wave


def _weights(sound: Sound, harmonics: np.ndarray, samples: int) -> np.ndarray:
    """Amplitudes [frames, K] of the harmonics (Hz) [K], of the targets' loudness in each frame."""
    end, haste = samples / SAMPLE_RATE, _haste(samples)
    at = [t * haste + (end if t < 0 else 0) for t, _, _ in sound.targets]
    frames = np.arange(samples // _FRAME + 2) * _FRAME / SAMPLE_RATE
    shapes = [SHAPES[name] for _, name, _ in sound.targets]
    formants = _glide(frames, at, [shape.formants for shape in shapes])
    gains = _glide(frames, at, [shape.gains for shape in shapes])
    distance = (harmonics[None, :, None] - formants[:, None, :]) / (_BANDWIDTHS / 2)
    weights: np.ndarray = (gains[:, None, :] / np.sqrt(1 + distance**2)).sum(-1)
    weights *= np.clip((_TOP - harmonics) / 1_000, 0, 1)
    weights *= np.sqrt(2) / np.linalg.norm(weights, axis=1, keepdims=True)
    weights *= _glide(frames, at, [(loudness,) for _, _, loudness in sound.targets])
    return weights


def _glide(frames: np.ndarray, at: list[float], values: Sequence[tuple[float, ...]]) -> np.ndarray:
    """Values [frames, N] at the frames' times, in straight lines between those `at` the targets."""
    return np.stack([np.interp(frames, at, column) for column in zip(*values, strict=True)], axis=1)


def _to_samples(values: np.ndarray, samples: int) -> np.ndarray:
    ramp = np.arange(_FRAME) / _FRAME
    lines: np.ndarray = values[:-1, None] + np.diff(values)[:, None] * ramp
    return lines.reshape(-1)[:samples]
