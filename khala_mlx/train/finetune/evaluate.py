"""`khala train evaluate`: what held-out songs cost a model, with adapters and without.

Nats per audio token over all songs, with intervals from a bootstrap over artists: songs of one
artist are alike, so that it is artists that are drawn, with all of their songs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from khala_mlx.errors import KhalaError
from khala_mlx.model.backbone import Backbone
from khala_mlx.train.data.prepared import Prepared
from khala_mlx.train.data.sequences import Example, padded
from khala_mlx.train.data.splits import groups_of
from khala_mlx.train.finetune.loss import summed_nats, targets_of

# Resamples of the bootstrap, and the percentiles between which 95 of 100 of them lie.
DRAWS, PERCENTILES = 4000, (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its interval of 95 %; None where there is one group alone."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Nats:
    """What each of some songs costs: summed nats and audio tokens, both [N]."""

    nats: np.ndarray
    tokens: np.ndarray


def song_nats(
    model: Backbone,
    examples: Sequence[Example],
    *,
    whole_vocabulary: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Nats:
    """The nats of each song, one after the other; the prompt is not counted."""
    nats, counts = [], []
    for number, example in enumerate(examples, 1):
        rows = padded([example.coarse_sequence(model.layout)])
        targets = targets_of(rows, model.layout, whole_vocabulary=whole_vocabulary)
        hidden = model.hidden(mx.array(rows[:, :-1]))
        lost = float(summed_nats(model, hidden, targets))
        nats.append(lost)
        if not math.isfinite(lost):
            raise KhalaError(
                "The model makes no usable numbers of these songs: the device is out of memory, or "
                "an adapter is too strong."
            )
        counts.append(sum(each.count for each in targets))
        if on_progress is not None:
            on_progress(number, len(examples))
    # Lengths differ from song to song, and so do the buffers that are left.
    mx.clear_cache()
    return Nats(np.array(nats, np.float64), np.array(counts, np.float64))


def artists_of(prepared: Prepared) -> list[str]:
    """What the bootstrap draws: each song's artist, or the song where none is known."""
    return groups_of(
        [
            (about.get("artist", ""), f"{about.get('sound', number)}")
            for number, about in enumerate(prepared.told)
        ]
    )


def compare(
    base: Nats, adapted: Nats | None, groups: Sequence[str], seed: int = 0
) -> dict[str, Estimate]:
    """`nats_per_token` of the base; with adapters `nats_per_token_adapter`, `difference`, `change`.

    The difference is the adapted model's less the base's, `change` is that as a share of the
    base's. They are paired: both models are judged by the same artists in every draw.
    """
    sums = _by_group(np.stack([base.tokens, base.nats, *_maybe(adapted)]), groups)
    count = sums.shape[1]
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)
    resampled = figures(sums @ draws.T)
    ends: list[tuple[float | None, float | None]] = [(None, None)] * len(resampled)
    if count > 1:
        ends = [(low, high) for low, high in np.percentile(resampled, PERCENTILES, axis=1).T]
    names = ("nats_per_token", "nats_per_token_adapter", "difference", "change")
    values = figures(sums.sum(axis=1))
    return {
        name: Estimate(float(value), *(None if end is None else float(end) for end in each))
        for name, value, each in zip(names, values, ends, strict=False)
    }


def figures(sums: np.ndarray) -> np.ndarray:
    """Return the report of `compare`, from sums [2 or 3, ...] of tokens and nats of both models."""
    tokens, base, *adapted = sums
    if not adapted:
        return np.stack([base / tokens])
    difference = adapted[0] - base
    return np.stack([base / tokens, adapted[0] / tokens, difference / tokens, difference / base])


def _maybe(adapted: Nats | None) -> list[np.ndarray]:
    return [] if adapted is None else [adapted.nats]


def _by_group(columns: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Columns [M, N] of songs summed over each group, [M, G]."""
    _, where = np.unique(np.array(groups), return_inverse=True)
    return np.stack([np.bincount(where, weights=column) for column in columns])
