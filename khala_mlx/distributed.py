"""Processes that share work, one a machine or several on one (`mlx.launch`)."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from khala_mlx.errors import KhalaError


class Processes:
    """The processes of a launch; one of them, rank 0, leads: it alone reports."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    @classmethod
    def launched(cls) -> Self:
        """Those that `mlx.launch` started, or this one alone."""
        return cls(mx.distributed.init())

    @property
    def leads(self) -> bool:
        """Whether this is the one that reports."""
        return self.rank == 0

    @property
    def part(self) -> slice:
        """Which of the batches that all of them draw alike are this process's own."""
        return slice(self.rank, None, self.size)

    def summed(self, tree: Any) -> Any:
        """A tree of arrays, each the sum of those of all processes."""
        if self.size == 1:
            return tree
        total = tree_map(lambda array: array * self.size, nn.average_gradients(tree, self.group))
        # A wait for other processes must not lie within a graph of the GPU.
        mx.eval(total)
        return total

    def from_leader(self, tree: Any) -> Any:
        """The tree as it is in the process that leads."""
        return self.summed(tree if self.leads else tree_map(mx.zeros_like, tree))

    def agree(self, told: str, what: str) -> None:
        """Check that all processes have the same text.

        Raises:
            KhalaError: naming `what` they do not share.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256(told.encode()).hexdigest()
        if set(self.gathered(digest)) != {digest}:
            raise KhalaError(f"The {self.size} processes do not start from the same {what}.")

    def gathered(self, value: Any) -> list[Any]:
        """Return what each process has for `value`, anything that fits JSON, by rank."""
        if self.size == 1:
            return [value]
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = self._gather(np.array([len(text)], np.int32))[:, 0]
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: len(text)] = text
        rows = zip(self._gather(padded), lengths, strict=True)
        return [json.loads(row[:length].tobytes()) for row, length in rows]

    def _gather(self, row: np.ndarray) -> np.ndarray:
        """[N] of each process -> [size, N]."""
        # On the CPU: a GPU that waits for other processes is stopped by its watchdog.
        rows = mx.distributed.all_gather(mx.array(row)[None], group=self.group, stream=mx.cpu)
        return np.array(rows)
