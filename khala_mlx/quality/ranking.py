"""Measures to compare songs of one request, and their ranking. It needs no models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A quarter of a second below this level, in dB of full scale, is silent.
_SILENT_DBFS = -50.0
_BLOCK_SECONDS = 0.25
# Frames of the patterns that are looked for twice: 0.19 s of the released codec.
_PATTERN = 4
# Beyond these a song has a fault: shares of its time, of its patterns, of its samples.
MOST_SILENCE, MOST_REPETITION, MOST_CLIPPING = 0.25, 0.6, 0.001
# Shares of words that differ by less are taken for the same: recognisers err by as much.
_COVERAGE_STEP = 0.1


@dataclass(frozen=True)
class Measures:
    """What is measured of one candidate.

    Attributes:
        nats_per_token: the backbone's mean nats per coarse token.
        silence: share of the quarter seconds below -50 dBFS.
        repetition: share of the patterns of four frames of the first layer that came before.
        clipping: share of the samples beyond full scale.
        coverage: share of the lyrics' words that a recogniser heard in their order, if known.
    """

    nats_per_token: float
    silence: float
    repetition: float
    clipping: float
    coverage: float | None = None

    @property
    def faults(self) -> list[str]:
        """The names of the measures that show a broken song."""
        limits = {
            "silence": MOST_SILENCE,
            "repetition": MOST_REPETITION,
            "clipping": MOST_CLIPPING,
        }
        return [name for name, most in limits.items() if getattr(self, name) > most]


def ranked(measures: Sequence[Measures]) -> list[int]:
    """Return places in `measures`, best first.

    Fewer faults come first, then more words, then fewer nats per token.
    """

    def key(place: int) -> tuple[int, float, float, int]:
        each = measures[place]
        words = 0.0 if each.coverage is None else round(each.coverage / _COVERAGE_STEP)
        return len(each.faults), -words, each.nats_per_token, place

    return sorted(range(len(measures)), key=key)


def silence(waveform: np.ndarray, sample_rate: int) -> float:
    """Share of the quarter seconds of samples [L, C] whose level is below -50 dBFS."""
    size = min(len(waveform), round(sample_rate * _BLOCK_SECONDS))
    blocks = waveform[: len(waveform) // size * size].reshape(-1, size * waveform.shape[1])
    power = (blocks.astype(np.float64) ** 2).mean(axis=1)
    return float((power < 10 ** (_SILENT_DBFS / 10)).mean())


def repetition(codes: np.ndarray) -> float:
    """Share of the patterns of four frames of codes [T] that came before in them."""
    if len(codes) <= _PATTERN:
        return 0.0
    patterns = np.lib.stride_tricks.sliding_window_view(codes, _PATTERN)
    return 1 - len(np.unique(patterns, axis=0)) / len(patterns)


def clipping(waveform: np.ndarray) -> float:
    """Share of the samples beyond full scale."""
    return float((np.abs(waveform) > 1.0).mean())
