"""Counts what MLX is asked for: operations of matrix products, and bytes of what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx


class Tally:
    """Counts while it is entered; the work itself is the same.

    Attributes:
        flops: operations of matrix products, quantized ones and attention.
        bytes_read: of weights, biases, norms, keys and values; not of activations.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.bytes_read = 0
        self._counting = False

    @contextmanager
    def counting(self) -> Iterator[Tally]:
        """Count what is asked for inside."""
        kept = [(where, name, getattr(where, name)) for where, name, _ in self._watched()]
        for where, name, count in self._watched():
            setattr(where, name, self._counted(getattr(where, name), count))
        self._counting = True
        try:
            yield self
        finally:
            self._counting = False
            for where, name, function in kept:
                setattr(where, name, function)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what is asked for inside."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def _watched(self) -> list[tuple[Any, str, Callable[..., None]]]:
        return [
            (mx, "addmm", lambda c, a, b, *_, **__: self._product(a, b, c)),
            (mx, "matmul", lambda a, b, *_, **__: self._product(a, b)),
            (mx.array, "__matmul__", lambda a, b: self._product(a, b)),
            (mx, "quantized_matmul", self._packed),
            (mx.fast, "scaled_dot_product_attention", self._attention),
            (mx.fast, "rms_norm", lambda x, weight, *_: self._read(weight)),
        ]

    def _counted(self, function: Callable[..., Any], count: Callable[..., None]) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self._counting:
                count(*arguments, **options)
            return function(*arguments, **options)

        return counted

    def _product(self, a: mx.array, b: mx.array, *also: mx.array) -> None:
        self.flops += 2 * a.size * b.shape[-1]
        self._read(b, *also)

    def _packed(
        self, x: mx.array, w: mx.array, scales: mx.array, biases: Any = None, **options: Any
    ) -> None:
        transposed = options.get("transpose", True)
        groups, rows = scales.shape[-1], scales.shape[-2]
        width = rows if transposed else groups * options.get("group_size", 64)
        self.flops += 2 * x.size * width
        self._read(w, scales, *([] if biases is None else [biases]))

    def _attention(self, q: mx.array, k: mx.array, v: mx.array, **options: Any) -> None:
        rows = q.shape[2]
        hidden = rows * (rows - 1) // 2 if options.get("mask") == "causal" else 0
        pairs = q.shape[0] * q.shape[1] * (rows * k.shape[2] - hidden)
        self.flops += 4 * pairs * q.shape[3]
        self._read(k, v)

    def _read(self, *arrays: mx.array) -> None:
        self.bytes_read += sum(array.nbytes for array in arrays)
