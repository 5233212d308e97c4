"""Measures how much each matrix suffers from quantization, and finds the best mixed one.

One matrix at a time is replaced by its quantization, and the distance of the model's
predictions from its own is measured on songs it writes itself. Small changes add up, so that bits
can be given to where they help most. mlx-lm's dynamic_quant estimates the same from gradients,
which need several times the memory of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx import token_ids as tokens
from khala_mlx.config import Quantization
from khala_mlx.errors import KhalaError
from khala_mlx.performance import cost as counts
from khala_mlx.pipeline.khala import Khala
from khala_mlx.prompt.prompt import Prompt

# What a matrix may have; MLX quantizes to 2 bits too, with bad results.
BITS = (3, 4, 5, 6, 8)
# What the songs are asked for: words, so that the rows of text count too, and none.
_PROMPTS = (
    Prompt(tags="slow rock, electric guitar", lyrics="[verse]\nthe lights go out\nover the town"),
    Prompt(tags="piano, calm", instrumental=True),
)
# Interval of the fine codebooks whose codes are judged.
_EVERY = 8
_HALVINGS = 60

Distances = Mapping[str, Mapping[int, float]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Song:
    """What the models read: prompts [P], [Q] and codes [K, T] of a song."""

    backbone_ids: np.ndarray
    superres_ids: np.ndarray
    codes: np.ndarray


def mixed(
    khala: Khala,
    bits: float,
    *,
    group_size: int = 64,
    dtype: str = "bfloat16",
    frames: int = 64,
    on_progress: Progress | None = None,
) -> dict[str, Quantization]:
    """Return how to quantize each matrix so that `bits` per weight are used on average.

    Each language model keeps to the average by itself. Scales are not counted: a mixed model is as
    large as one quantized uniformly to `bits` in groups of the same size.

    Args:
        dtype: what scales will be stored in.
        frames: how much song is written to measure on, for each of two prompts.

    Raises:
        KhalaError: if the model is quantized already, nothing can be quantized, or `bits`
            is out of reach.
    """
    if khala.config.quantization:
        raise KhalaError(
            "The model is quantized already; a mixed quantization is chosen from a plain one."
        )
    if not BITS[0] < bits <= BITS[-1]:
        raise KhalaError(f"bits must lie above {BITS[0]} and up to {BITS[-1]}, got {bits}.")
    sizes = {
        name: into * out
        for name, (into, out) in counts.quantizable(khala.config).items()
        if into % group_size == 0
    }
    if not sizes:
        raise KhalaError(f"Nothing can be quantized: no row divides into groups of {group_size}.")
    total, done = len(sizes) * len(BITS), 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    songs = _songs(khala, frames)
    chosen: dict[str, int] = {}
    for part, judge in (("backbone", _backbone_judge), ("superres", _superres_judge)):
        own = {name: size for name, size in sizes.items() if name.startswith(f"{part}.")}
        if own:
            model = getattr(khala, part)
            measured = _measured(model, part, own, judge(model, songs), group_size, dtype, step)
            chosen |= allot(measured, own, bits)
        khala.parts.release(part)
    return {name: Quantization(width, group_size) for name, width in chosen.items()}


def allot(distances: Distances, sizes: Mapping[str, int], bits: float) -> dict[str, int]:
    """The bits of each matrix that make the sum of the distances least, `bits` on average at most.

    Args:
        distances: of each matrix, by bits.
        sizes: weights of each matrix.
    """
    budget = bits * sum(sizes.values())

    def at(price: float) -> dict[str, int]:
        """What is best where a bit of one weight costs `price`."""
        return {
            name: min(by_bits, key=lambda b: (by_bits[b] + price * b * sizes[name], b))
            for name, by_bits in distances.items()
        }

    def spent(chosen: Mapping[str, int]) -> float:
        return sum(width * sizes[name] for name, width in chosen.items())

    low, high = 0.0, 1.0
    while spent(at(high)) > budget and high < 1e30:
        high *= 16
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5 if low else high / 16
        low, high = (middle, high) if spent(at(middle)) > budget else (low, middle)
    return _filled(at(high), distances, sizes, budget)


def _filled(
    chosen: dict[str, int], distances: Distances, sizes: Mapping[str, int], budget: float
) -> dict[str, int]:
    """What is left of the budget, given where it helps most for its size."""
    left = budget - sum(width * sizes[name] for name, width in chosen.items())
    while True:
        steps = [
            ((by_bits[chosen[name]] - by_bits[more]) / cost, name, more, cost)
            for name, by_bits in distances.items()
            for more in by_bits
            if 0 < (cost := (more - chosen[name]) * sizes[name]) <= left
        ]
        if not steps or max(steps)[0] <= 0:
            return chosen
        _, name, more, cost = max(steps)
        chosen, left = {**chosen, name: more}, left - cost


def _measured(
    model: Any,
    part: str,
    names: Mapping[str, int],
    judge: Callable[[], float],
    group_size: int,
    dtype: str,
    step: Callable[[], None],
) -> dict[str, dict[int, float]]:
    """Nats from the whole model, by matrix and by bits."""
    layers = dict(model.named_modules())
    found: dict[str, dict[int, float]] = {}
    for name in names:
        found[name] = {}
        for bits in BITS:
            how = Quantization(bits, group_size)
            with _packed(layers[name.removeprefix(f"{part}.")], how, dtype):
                found[name][bits] = judge()
            step()
    return found


@contextmanager
def _packed(layer: Any, how: Quantization, dtype: str) -> Iterator[None]:
    """Within, the layer has the weights that its quantized form stands for."""
    whole = layer.weight
    stored = whole.astype(getattr(mx, dtype))
    packed = mx.quantize(stored, group_size=how.group_size, bits=how.bits)
    layer.weight = mx.dequantize(*packed, group_size=how.group_size, bits=how.bits).astype(
        whole.dtype
    )
    try:
        yield
    finally:
        layer.weight = whole


def _songs(khala: Khala, frames: int) -> list[_Song]:
    """Songs by the model itself: what its predictions are about when it is used."""
    asked = [khala.prompt_ids(**vars(prompt)) for prompt in _PROMPTS]
    coarse = [
        khala.compose(ids, max_frames=frames, min_frames=frames, seed=seed)
        for seed, (ids, _) in enumerate(asked)
    ]
    return [
        _Song(ids, fine_ids, khala.refine(fine_ids, codes, seed=seed))
        for seed, ((ids, fine_ids), codes) in enumerate(zip(asked, coarse, strict=True))
    ]


def _backbone_judge(model: Any, songs: Sequence[_Song]) -> Callable[[], float]:
    """The mean distance of the next token's probabilities from what they are now."""

    def read(song: _Song) -> mx.array:
        written = tokens.interleave(model.layout, song.codes[: model.layout.num_coarse])
        ids = np.concatenate([song.backbone_ids, written])[None, :-1]
        hidden = model.hidden(mx.array(ids.astype(np.int32)))[0, len(song.backbone_ids) - 1 :]
        return _log_probabilities(model.lm_head(hidden))

    return _distance([partial(read, song) for song in songs])


def _superres_judge(model: Any, songs: Sequence[_Song]) -> Callable[[], float]:
    """The mean distance of the probabilities of fine codes, of some layers, from what they are."""
    layers = range(model.layout.num_coarse, model.layout.num_codebooks, _EVERY)

    def read(song: _Song) -> mx.array:
        logits = model.logits(song.superres_ids, song.codes, layers)
        return _log_probabilities(mx.concatenate(logits))

    return _distance([partial(read, song) for song in songs])


def _log_probabilities(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _distance(reads: Sequence[Callable[[], mx.array]]) -> Callable[[], float]:
    """A function that gives the mean divergence, in nats, from what `reads` give at first."""
    wanted = [read() for read in reads]
    mx.eval(wanted)

    def divergence() -> float:
        found = [
            (mx.exp(full) * (full - read())).sum(-1).mean()
            for full, read in zip(wanted, reads, strict=True)
        ]
        return float(np.array(mx.stack(found)).mean())

    return divergence
