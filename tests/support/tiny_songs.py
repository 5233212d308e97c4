"""A prepared folder of coded songs, and adapters of random values, for models of any size."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tiny_tokenizer import write_tiny_tokenizer

from khala_mlx.config import KhalaConfig
from khala_mlx.storage.adapter import Adapter, Pair
from khala_mlx.storage.shapes import linear_sizes


def write_songs(
    folder: Path, frames: Sequence[int], held_out: int = 0, codes: int = 16, seed: int = 0
) -> Path:
    """Random songs of so many frames each, the first `held_out` of them in the split valid."""
    (folder / "codes").mkdir(parents=True)
    write_tiny_tokenizer(folder / "tokenizer.json")
    rng, lines = np.random.default_rng(seed), []
    for number, length in enumerate(frames):
        name = f"s{number}"
        np.savez(folder / "codes" / f"{name}.npz", codes=rng.integers(0, codes, (8, length)))
        split = "valid" if number < held_out else "train"
        lines.append({"id": name, "split": split, "tags": "pop", "lyrics": "do re"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def random_adapter(
    config: KhalaConfig,
    name: str = "some",
    *,
    seed: int = 0,
    rank: int = 3,
    dora: bool = False,
    size: float = 0.3,
    base: str | None = None,
) -> Adapter:
    """An adapter for every layer that changes what the model says."""
    rng = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * size).astype(np.float32)

    pairs = {
        path: Pair(values(into, rank), values(rank, out), 1 + np.abs(values(out)) if dora else None)
        for path, (into, out) in linear_sizes(config.backbone).items()
    }
    return Adapter(name, 2.0, pairs, base)
