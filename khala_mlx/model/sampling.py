"""Upstream's two sampling rules, under explicit keys."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx.config import check_whole
from khala_mlx.errors import KhalaError
from khala_mlx.text import shown

# The float32 two steps below 1: its product with any total is below that total.
_LARGEST_DRAW = 1 - 2.0**-23
# The largest float; long before, all tokens are equally likely.
_HOTTEST = sys.float_info.max


@dataclass(frozen=True)
class Sampling:
    """How the backbone draws its tokens.

    Attributes:
        temperature: above 0; below 1 likely tokens become likelier.
        top_k: sample from the k most likely tokens; 1 is greedy.
        reachable_only: sample from the tokens that can follow; otherwise from the whole
            vocabulary, as upstream does.
        kv_bits: 8 or 4 quantizes the key-value cache, which changes the song.

    Raises:
        KhalaError: if temperature or top_k is out of range.
    """

    temperature: float = 1.0
    top_k: int = 50
    reachable_only: bool = True
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", check_whole("top_k", self.top_k, 1))
        object.__setattr__(self, "temperature", _checked_temperature(self.temperature))


@dataclass(frozen=True)
class Detail:
    """How superres chooses its codes.

    Attributes:
        top_k: sample from the k most likely codes; 1 is greedy.
        expected: choose codes by expectation instead of drawing them; see Expected.

    Raises:
        KhalaError: if top_k is out of range.
    """

    top_k: int = 10
    expected: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", check_whole("top_k", self.top_k, 1))


def _checked_temperature(temperature: Any) -> float:
    # NumPy compares in its own, smaller type.
    plain = temperature.item() if isinstance(temperature, np.generic) else temperature
    number = isinstance(plain, (int, float)) and not isinstance(plain, bool)
    if not number or not 0 < plain <= _HOTTEST:
        raise KhalaError(
            f"temperature must be above 0, got {shown(temperature)}. Use top_k=1 to be greedy."
        )
    return float(plain)


# The worker's published defaults.
DEFAULT_SAMPLING, DEFAULT_DETAIL = Sampling(), Detail()


def stage_key(seed: int, stage: int) -> mx.array:
    """Return the key of one stage, so that later stages can run again without earlier ones."""
    return mx.random.split(mx.random.key(check_whole("seed", seed, 0, 2**64 - 1)), 2)[stage]


def top_k_logits(logits: mx.array, top_k: int, temperature: float) -> mx.array:
    """Return logits [..., V] / temperature in float32, with -inf below the k-th largest.

    All ties with the k-th largest are kept, as upstream keeps them.
    """
    logits = logits.astype(mx.float32) / temperature
    size = logits.shape[-1]
    if top_k >= size:
        return logits
    kth = mx.partition(logits, size - top_k, axis=-1)[..., size - top_k, None]
    return mx.where(logits < kth, -mx.inf, logits)


def usable(logits: mx.array) -> mx.array:
    """Return whether rows of logits [..., V] can be drawn from, bool [...].

    A GPU that is out of memory silently returns zeros (ml-explore/mlx#3979), and weights that
    overflow give NaN. In both cases the largest logit does not exceed the smallest.
    """
    return logits.max(axis=-1) > logits.min(axis=-1)


def uniform_draws(key: mx.array, count: int) -> mx.array:
    """Return draws [count], uniform in [0, 1), each under its own key."""
    draw = mx.vmap(lambda one: mx.random.uniform(shape=(), key=one))
    return draw(mx.random.split(key, count))


def sample(logits: mx.array, draws: mx.array, *, top_k: int, temperature: float) -> mx.array:
    """Return indices [...] by the backbone's rule from logits [..., V] and uniform draws [...].

    top_k=1 is argmax. Otherwise the cumulative distribution is inverted, so that a row depends only
    on its own draw, not on the rest of the batch.
    """
    if top_k == 1:
        return mx.argmax(logits, axis=-1)
    weights = mx.softmax(top_k_logits(logits, top_k, temperature), axis=-1, precise=True)
    # Zero where nothing can be drawn: a parallel sum may not rise evenly over equal values.
    below = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0.0)
    # Without the limit, the largest draw times the total could round up to the total.
    threshold = mx.minimum(draws, _LARGEST_DRAW)[..., None] * below.max(axis=-1, keepdims=True)
    return mx.argmax(below > threshold, axis=-1)


def sample_by_race(logits: mx.array, draws: mx.array, top_k: int) -> mx.array:
    """Return indices by the superres rule: argmax(softmax(top k of logits) / draws).

    Args:
        logits: [T, V].
        draws: [T, top_k] from Exponential(1), for the candidates in falling order of logit.

    Returns:
        indices [T].
    """
    best = mx.argpartition(-logits, top_k - 1, axis=-1)[..., :top_k]
    values = mx.take_along_axis(logits, best, axis=-1)
    order = mx.argsort(-values, axis=-1)
    probabilities = mx.softmax(mx.take_along_axis(values, order, axis=-1), axis=-1, precise=True)
    winner = mx.argmax(probabilities / draws, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(order, winner, axis=-1)
    return mx.take_along_axis(best, chosen, axis=-1).squeeze(-1)


def exponential(key: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Return draws from Exponential(1), never 0."""
    # uniform is in [0, 1), so 1 - u is in (0, 1]; the bound protects the division of the race.
    return mx.maximum(-mx.log(1.0 - mx.random.uniform(shape=shape, key=key)), 1e-20)
