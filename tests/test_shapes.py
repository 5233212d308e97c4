"""How many shapes the arrays of one song have: each is a buffer kept for nothing else."""

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from khala_mlx import Khala
from khala_mlx.errors import KhalaWarning
from khala_mlx.model import codec, ops
from khala_mlx.model.cache import file_limit_kept

LEAVES = [nn.Linear, nn.Embedding, nn.RMSNorm, codec.Conv, codec.Snake, codec.Upsample]
PROMPT = np.array([1, 2, 3, 4, 5])


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[tuple[int, ...]]]:
    """By layer, what has gone in so far."""
    seen: dict[str, set[tuple[int, ...]]] = defaultdict(set)

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def watch(self: nn.Module, x: mx.array) -> Any:
            seen[f"{type(self).__name__} {id(self)}"].add(tuple(x.shape))
            return call(self, x)

        return watch

    for leaf in LEAVES:
        monkeypatch.setattr(leaf, "__call__", watched(leaf.__call__))
    with file_limit_kept():
        from mlx_lm.models.cache import KVCache

    update = KVCache.update_and_fetch

    def update_and_watch(self: Any, keys: mx.array, values: mx.array) -> Any:
        result = update(self, keys, values)
        seen["cache"].add(tuple(self.keys.shape))
        return result

    monkeypatch.setattr(KVCache, "update_and_fetch", update_and_watch)
    return seen


def most(shapes: dict[str, set[tuple[int, ...]]]) -> int:
    """The most of any layer; forgets them."""
    count = max(map(len, shapes.values()))
    shapes.clear()
    return count


@pytest.mark.parametrize("frames", [9, 40])
def test_composing(tiny: Khala, shapes: Any, frames: int) -> None:
    tiny.compose(PROMPT, max_frames=frames, min_frames=frames)
    assert len(shapes["cache"]) == 2
    # The prompt, and one row a step, however long the song.
    assert most(shapes) == 2
    tiny.compose_many(PROMPT, seeds=range(4), max_frames=frames, min_frames=1)
    # The songs of a batch may end one by one.
    assert most(shapes) <= 2 + 4


@pytest.mark.parametrize("frames", [9, 40, 600])
def test_refining(tiny: Khala, shapes: Any, frames: int) -> None:
    room = tiny.config.superres.context - len(PROMPT)
    layout, random = tiny.config.tokens, np.random.default_rng(0)
    coarse = random.integers(0, layout.codebook_size, (layout.num_coarse, frames))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KhalaWarning)
        tiny.refine(PROMPT, coarse, codebooks=min(layout.num_codebooks, layout.num_coarse + 3))
    embedded = shapes.pop(f"Embedding {id(tiny.superres.embed_tokens)}")
    # The prompt, the marker of a layer, the codes of a layer; in windows their own length.
    assert len(embedded) <= 3 + (frames > room)
    # All steps, and all windows, are of one size.
    assert most(shapes) == 1


@pytest.mark.parametrize("frames", [9, 40])
def test_rendering(tiny: Khala, shapes: Any, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, random = tiny.config.tokens, np.random.default_rng(0)
    codes = random.integers(0, layout.codebook_size, (layout.num_codebooks, frames))
    for tile in (ops.TILE["cpu"], 1 << 10):
        monkeypatch.setitem(ops.TILE, "cpu", tile)
        tiny.render(codes, chunk_frames=4)
        # All blocks are of one size, and so are the tiles they are cut into.
        assert most(shapes) == 1
