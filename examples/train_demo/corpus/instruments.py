"""The band's timbres: additive and band-limited, cached note by note. Nothing above 6 kHz."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .score import SAMPLE_RATE

_TOP = 5_000.0  # Hz; no partial above it, because a small codec spends its codes there
_NOISE_SEED = 7


@dataclass(frozen=True)
class Timbre:
    """Amplitudes of the partials and the envelope (seconds) of a pitched instrument."""

    partials: tuple[float, ...]
    attack: float = 0.008
    release: float = 0.04
    decay: float = 60.0  # time constant of the first partial
    damping: float = 0.0  # how much faster each further partial decays
    tremolo: float = 0.0  # depth, at 6 Hz


def _series(count: int, power: float, step: int = 1) -> tuple[float, ...]:
    return tuple(k**-power if (k - 1) % step == 0 else 0.0 for k in range(1, count + 1))


TIMBRES = {
    "saw bass": Timbre(_series(10, 1.1), decay=0.25, damping=0.3),
    "sine bass": Timbre((1.0, 0.25, 0.05), attack=0.015, decay=0.8),
    "plucked bass": Timbre(_series(6, 1.6), decay=0.3, damping=0.4),
    "triangle bass": Timbre(_series(7, 2.0, step=2)),
    "saw stab": Timbre(_series(12, 1.0), decay=0.12, damping=0.1),
    "saw lead": Timbre(_series(8, 1.0), decay=0.4),
    "accordion": Timbre((1.0, 0.8, 0.7, 0.6, 0.3, 0.3, 0.15, 0.1), attack=0.03, tremolo=0.3),
    "piano": Timbre(_series(9, 1.5), attack=0.004, decay=0.5, damping=0.35),
    "pad": Timbre((1.0, 0.4, 0.12, 0.04), attack=0.18, release=0.15),
    "flute": Timbre((1.0, 0.25, 0.06), attack=0.05, release=0.06),
    "organ": Timbre((1.0, 0.7, 0.0, 0.5, 0.0, 0.3), attack=0.006),
    "melodica": Timbre((1.0, 0.3, 0.6, 0.15, 0.3), attack=0.03, tremolo=0.15),
    "square": Timbre(_series(9, 1.0, step=2), attack=0.003, release=0.01),
}


@lru_cache(maxsize=1024)
def note(name: str, midi: int, samples: int) -> np.ndarray:
    """One note [samples], float32, read-only; drums ignore the pitch."""
    if name in TIMBRES:
        wave = _tone(TIMBRES[name], 440 * 2 ** ((midi - 69) / 12), samples)
    else:
        wave = _DRUMS[name](np.arange(samples) / SAMPLE_RATE)
        wave *= fade(samples, 0.001, 0.01)
    wave = wave.astype(np.float32)
    wave.flags.writeable = False
    return wave


def fade(samples: int, attack: float, release: float) -> np.ndarray:
    """An envelope [samples] with raised-cosine ends of the given seconds: no clicks."""
    envelope = np.ones(samples)
    for seconds, part in ((attack, slice(None)), (release, slice(None, None, -1))):
        size = min(int(seconds * SAMPLE_RATE), samples // 2)
        envelope[part][:size] *= 0.5 - 0.5 * np.cos(np.pi * np.arange(size) / max(size, 1))
    return envelope


@lru_cache(maxsize=64)
def band_noise(samples: int, low: float, high: float) -> np.ndarray:
    """The same band-passed noise [samples] of unit RMS at every call: repeatable, so learnable."""
    spectrum = np.fft.rfft(np.random.default_rng(_NOISE_SEED).standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    centre, half = (low + high) / 2, (high - low) / 2
    spectrum *= np.exp(-(((frequency - centre) / half) ** 4))
    wave: np.ndarray = np.fft.irfft(spectrum, samples)
    wave /= np.sqrt(np.mean(wave**2))
    return wave


def _tone(timbre: Timbre, frequency: float, samples: int) -> np.ndarray:
    time = np.arange(samples) / SAMPLE_RATE
    turn = np.exp(2j * np.pi * frequency * time)
    partial, wave = np.ones_like(turn), np.zeros(samples)
    for k, amplitude in enumerate(timbre.partials, start=1):
        partial = partial * turn
        if amplitude and k * frequency < _TOP:
            rate = (1 + timbre.damping * (k - 1)) / timbre.decay
            wave += amplitude * np.exp(-rate * time) * partial.imag
    wave *= 1 - timbre.tremolo * (0.5 - 0.5 * np.cos(2 * np.pi * 6 * time))
    wave *= fade(samples, timbre.attack, timbre.release)
    return wave / np.linalg.norm(timbre.partials)


def _kick(time: np.ndarray) -> np.ndarray:
    # The pitch falls from 130 to 50 Hz with a time constant of 30 ms.
    phase = 50 * time + 80 * 0.03 * (1 - np.exp(-time / 0.03))
    return np.sin(2 * np.pi * phase) * np.exp(-time / 0.09)


def _snare(time: np.ndarray) -> np.ndarray:
    noise = band_noise(len(time), 700, 3_500) * np.exp(-time / 0.05)
    return 0.5 * noise + 0.6 * np.sin(2 * np.pi * 190 * time) * np.exp(-time / 0.06)


def _hat(time: np.ndarray) -> np.ndarray:
    return band_noise(len(time), 3_500, 5_500) * np.exp(-time / 0.02)


def _rim(time: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * 850 * time) * np.exp(-time / 0.025)


_DRUMS = {"kick": _kick, "snare": _snare, "hat": _hat, "rim": _rim}
