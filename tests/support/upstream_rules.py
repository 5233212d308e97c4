"""Upstream's own ways of calling the stages, for comparisons with its goldens."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from khala_mlx.model import superres
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec
from khala_mlx.model.sampling import Sampling


def _split(named: dict[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    names = {field.name for field in fields(Sampling)}
    sampling = {name: value for name, value in named.items() if name in names}
    return Sampling(**sampling), {n: v for n, v in named.items() if n not in names}


def write_tokens(model: Backbone, ids: Any, *, key: mx.array, **named: Any) -> np.ndarray:
    """Token ids [n] that the backbone samples behind a prompt, for one key."""
    sampling, rest = _split(named)
    return model.generate_many(ids, sampling, keys=[key], **rest)[0]


def compose_one(model: Backbone, ids: Any, *, key: mx.array, **named: Any) -> np.ndarray:
    """Coarse codes [num_coarse, T] behind a prompt, for one key."""
    sampling, rest = _split(named)
    return model.compose_many(ids, sampling, keys=[key], **rest)[0]


def use_draws(
    monkeypatch: pytest.MonkeyPatch, key: mx.array, draws: Mapping[int, np.ndarray]
) -> None:
    """Let refine use these draws [T, top_k] of each codebook instead of its own under `key`."""
    keys = mx.random.split(key, max(draws) + 1).tolist()
    codebooks = {tuple(each): codebook for codebook, each in enumerate(keys)}

    def given(key: mx.array, shape: tuple[int, ...]) -> mx.array:
        drawn = mx.array(draws[codebooks[tuple(key.tolist())]])
        assert drawn.shape == shape
        return drawn

    monkeypatch.setattr(superres, "exponential", given)


def decode_crossfade(
    codec: Codec, codes: np.ndarray, *, chunk_frames: int = 1920, overlap_frames: int = 480
) -> np.ndarray:
    """Samples as upstream's worker makes them: chunks without neighbours, cross-faded.

    Without an overlap upstream keeps the last chunk alone, and so does this.
    """
    samples = np.empty((0, codec.config.channels), dtype=np.float32)
    for first in range(0, codes.shape[1], chunk_frames - overlap_frames):
        chunk = codec.decode(codes[:, first : first + chunk_frames])
        overlap = min(overlap_frames * codec.config.hop, len(chunk))
        if overlap == 0 or len(samples) == 0:
            samples = chunk
            continue
        # Upstream's fade: linear, both ends of the ramp included, never longer than the chunk.
        ramp = np.linspace(1, 0, overlap, dtype=np.float32)[:, None]
        mixed = samples[-overlap:] * ramp + chunk[:overlap] * (1 - ramp)
        samples = np.concatenate([samples[:-overlap], mixed, chunk[overlap:]])
    return samples
