"""Attention over heads, in memory that grows with the rows and not with their square.

Queries are [B, N, Q, D], keys and values [B, G, S, D] with G dividing N. On the GPU MLX's fused
kernel does all the work; elsewhere it writes all scores out, so that the queries go in chunks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import mlx.core as mx

Attend = Callable[[mx.array, mx.array, mx.array], mx.array]

# Sizes of a head whose attention is one kernel on the GPU, for any number of queries.
FUSED_HEADS = (64, 80, 128)
# Bytes of scores in one chunk of queries.
SCORE_BYTES = 64 * 2**20
# The same for gradients: they hold about four times as much, for several chunks.
TRAINING_SCORE_BYTES = 16 * 2**20
# If this variable is set, attention uses plain products. That separates a fused kernel that is
# wrong on some GPU (ml-explore/mlx#4022) from a fault elsewhere.
MANUAL_ATTENTION = "KHALA_MANUAL_ATTENTION"
# On the GPU products with quantized values are only whole for heads of a multiple of this: the last
# columns of others are not written once 1024 tokens are cached (ml-explore/mlx#4250).
_WHOLE_COLUMNS = 64


def writes_scores(head_dim: int, *, on_cpu: bool) -> bool:
    """Return whether MLX's attention over heads of this size writes its scores out, O(S^2)."""
    return on_cpu or head_dim not in FUSED_HEADS


def attend(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, causal: bool, training: bool = False
) -> mx.array:
    """Return the attention [B, N, Q, D] of queries over keys and values, in O(S) memory.

    With `causal` the last query sees the last key.
    """
    mask = "causal" if causal and q.shape[2] > 1 else None
    row = 4 * q.shape[0] * q.shape[1] * k.shape[2]
    rows = max(1, SCORE_BYTES // row)
    by_hand = bool(os.environ.get(MANUAL_ATTENTION))
    kernel = attend_by_hand if by_hand else mx.fast.scaled_dot_product_attention
    whole: Attend = partial(kernel, scale=scale, mask=mask)
    written = by_hand or writes_scores(q.shape[3], on_cpu=mx.default_device() == mx.cpu)
    if not written or q.shape[2] <= rows:
        return whole(q, k, v)
    if training:
        return in_chunks(whole, max(1, TRAINING_SCORE_BYTES // row), causal=causal)(q, k, v)
    done = []
    for _, *chunk in _chunks(q, k, v, rows, causal):
        done.append(whole(*chunk))
        # Left to one evaluation, the scores of all chunks would be allocated together.
        mx.eval(done[-1])
    return mx.concatenate(done, axis=2)


def attend_by_hand(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: str | None
) -> mx.array:
    """Compute what the fused kernel does from plain products, with all scores [B, N, Q, S]."""
    batch, groups = k.shape[:2]
    grouped = (q * scale).reshape(batch, groups, -1, *q.shape[2:])
    scores = grouped @ k[:, :, None].swapaxes(-1, -2)
    if mask == "causal":
        queries, keys = scores.shape[-2:]
        seen = mx.arange(keys) <= mx.arange(keys - queries, keys)[:, None]
        scores = mx.where(seen, scores, mx.array(-mx.inf, scores.dtype))
    weights = mx.softmax(scores, axis=-1, precise=True)
    return (weights @ v[:, :, None]).reshape(q.shape)


def attend_quantized(q: mx.array, k: Any, v: Any, cache: Any, *, scale: float) -> mx.array:
    """Return the attention of one query a row over the quantized keys and values of `cache`."""
    how = {"group_size": cache.group_size, "bits": cache.bits}
    if q.shape[3] % _WHOLE_COLUMNS and mx.default_device() != mx.cpu:
        known = [mx.dequantize(*quantized, **how) for quantized in (k, v)]
        return mx.fast.scaled_dot_product_attention(q, *known, scale=scale)
    from mlx_lm.models.base import quantized_scaled_dot_product_attention

    attended: mx.array = quantized_scaled_dot_product_attention(
        q, k, v, scale=scale, mask=None, **how
    )
    return attended


def in_chunks(whole: Attend, rows: int, *, causal: bool) -> Attend:
    """Return `whole` on chunks of `rows` queries, with the scores computed again for gradients.

    Nothing is evaluated here: an array that is evaluated while gradients are taken is kept with
    everything before it. Instead each chunk waits for the one before, so that only a few are held
    at a time.
    """

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        done: list[mx.array] = []
        for _, queries, keys, values in _chunks(q, k, v, rows, causal):
            if done:
                (queries,) = mx.depends([queries], done[-1:])
            done.append(whole(queries, keys, values))
        return mx.concatenate(done, axis=2)

    @attention.vjp
    def backward(
        primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = primals
        of_q: list[mx.array] = []
        of_k, of_v = mx.zeros_like(k), mx.zeros_like(v)
        for taken, queries, keys, values in _chunks(q, k, v, rows, causal):
            coming = cotangent[:, :, taken]
            if of_q:
                queries, coming = mx.depends([queries, coming], [of_q[-1], of_k, of_v])
            gradients: Any = mx.vjp(whole, [queries, keys, values], [coming])[1]
            of_q.append(gradients[0])
            of_k, of_v = _added(of_k, gradients[1]), _added(of_v, gradients[2])
        return mx.concatenate(of_q, axis=2), of_k, of_v

    return cast(Attend, attention)


def _chunks(
    q: mx.array, k: mx.array, v: mx.array, rows: int, causal: bool
) -> Iterator[tuple[slice, mx.array, mx.array, mx.array]]:
    """Yield each slice of at most `rows` queries, its queries, and the keys and values it sees."""
    for start in range(0, q.shape[2], rows):
        taken = slice(start, min(start + rows, q.shape[2]))
        seen = k.shape[2] - q.shape[2] + taken.stop if causal else k.shape[2]
        yield taken, q[:, :, taken], k[:, :, :seen], v[:, :, :seen]


def _added(total: mx.array, part: mx.array) -> mx.array:
    """Return total [B, G, S, D] with `part` added, which covers its first rows."""
    rows = part.shape[2]
    return mx.concatenate([total[:, :, :rows] + part, total[:, :, rows:]], axis=2)
