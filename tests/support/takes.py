"""Several takes of one request, for tests."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from khala_mlx import Khala, Request, Take


def begin_all(
    khala: Khala, request: Request, seeds: Iterable[int], prefix: np.ndarray | None = None
) -> list[Take]:
    """A fresh take of `request` for each seed."""
    return [khala.begin(replace(request, seed=seed), prefix) for seed in seeds]
