"""Attention for gradients on the CPU backend, where all scores would be written out and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx

Attend = Callable[[mx.array, mx.array, mx.array], mx.array]


def in_chunks(attend: Attend, rows: int, *, causal: bool) -> Attend:
    """`attend` on chunks of `rows` queries, whose scores are made again for the gradients.

    Nothing is evaluated here: what is evaluated while gradients are taken is kept with all that
    led to it. Each chunk waits for the one before instead, so that only a few are held at a time.
    """

    def chunks(
        q: mx.array, k: mx.array, v: mx.array
    ) -> Iterator[tuple[slice, mx.array, mx.array, mx.array]]:
        for start in range(0, q.shape[2], rows):
            taken = slice(start, min(start + rows, q.shape[2]))
            seen = k.shape[2] - q.shape[2] + taken.stop if causal else k.shape[2]
            yield taken, q[:, :, taken], k[:, :, :seen], v[:, :, :seen]

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        done: list[mx.array] = []
        for _, queries, keys, values in chunks(q, k, v):
            if done:
                (queries,) = mx.depends([queries], done[-1:])
            done.append(attend(queries, keys, values))
        return mx.concatenate(done, axis=2)

    @attention.vjp
    def backward(
        primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = primals
        of_q: list[mx.array] = []
        of_k, of_v = mx.zeros_like(k), mx.zeros_like(v)
        for taken, queries, keys, values in chunks(q, k, v):
            coming = cotangent[:, :, taken]
            if of_q:
                queries, coming = mx.depends([queries, coming], [of_q[-1], of_k, of_v])
            gradients: Any = mx.vjp(attend, [queries, keys, values], [coming])[1]
            of_q.append(gradients[0])
            of_k, of_v = _added(of_k, gradients[1]), _added(of_v, gradients[2])
        return mx.concatenate(of_q, axis=2), of_k, of_v

    return cast(Attend, attention)


def _added(total: mx.array, part: mx.array) -> mx.array:
    """total [B, G, S, D] with `part`, which covers its first rows, added."""
    rows = part.shape[2]
    return mx.concatenate([total[:, :, :rows] + part, total[:, :, rows:]], axis=2)
