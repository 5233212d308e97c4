"""Processes that train one model together, each on its part of every step (`mlx.launch`)."""

from __future__ import annotations

import hashlib
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from khala_mlx.errors import KhalaError


class Processes:
    """The processes of a training; one of them, rank 0, leads: it alone writes and reports."""

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
        """Whether this is the one that writes."""
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
        """Make sure that all processes tell the same.

        Raises:
            KhalaError: naming `what` they do not share.
        """
        if self.size == 1:
            return
        digest = np.frombuffer(hashlib.sha256(told.encode()).digest(), np.uint32)
        gathered = mx.distributed.all_gather(mx.array(digest)[None], group=self.group)
        if (np.array(gathered) != digest).any():
            raise KhalaError(f"The {self.size} processes do not start from the same {what}.")
