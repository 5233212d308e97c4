"""How far a quantized model is from the one it came from, on a song the latter writes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx import token_ids as tokens
from khala_mlx.errors import KhalaError
from khala_mlx.pipeline.khala import Khala

# Positions whose logits over the whole vocabulary are held at a time.
_ROWS = 64


def against(model: Khala, full: Khala, *, frames: int = 64, seed: int = 0) -> dict[str, Any]:
    """Compare on `frames` frames that `full` composes and refines from an empty prompt.

    Both read the same codes at every place, so that one difference does not become many.

    Returns:
        kl_nats: mean Kullback-Leibler divergence of the backbone's next token, from `full`.
        top1_agreement: share of places where both backbones like the same token best.
        codes_changed: share of the fine codes that superres, asked greedily, chooses otherwise.

    Raises:
        KhalaError: if the two models are not of one shape.
    """
    for part in ("tokens", "backbone", "superres"):
        if getattr(model.config, part) != getattr(full.config, part):
            raise KhalaError(f"The models cannot be compared: their {part} have other sizes.")
    bb_ids, sr_ids = full.prompt_ids()
    coarse = full.compose(bb_ids, max_frames=frames, min_frames=frames, seed=seed)
    ids = np.concatenate([bb_ids, tokens.interleave(full.config.tokens, coarse)])
    wanted = _log_probabilities(full, ids, len(bb_ids))
    full.parts.release("backbone")
    found = _log_probabilities(model, ids, len(bb_ids))
    model.parts.release("backbone")
    codes = full.refine(sr_ids, coarse, seed=seed)
    best = _greedy(full, sr_ids, codes)
    full.parts.release("superres")
    changed = _greedy(model, sr_ids, codes) != best
    model.parts.release("superres")
    return {
        "frames": coarse.shape[1],
        "kl_nats": float((np.exp(wanted) * (wanted - found)).sum(-1).mean()),
        "top1_agreement": float((wanted.argmax(-1) == found.argmax(-1)).mean()),
        "codes_changed": float(changed.mean()),
    }


def _log_probabilities(khala: Khala, ids: np.ndarray, prompt: int) -> np.ndarray:
    """Log probabilities [n, V] of every token behind the prompt, float32."""
    model = khala.backbone
    hidden = model.hidden(mx.array(ids[None, :-1].astype(np.int32)))[0, prompt - 1 :]
    rows = []
    for first in range(0, hidden.shape[0], _ROWS):
        logits = model.lm_head(hidden[first : first + _ROWS]).astype(mx.float32)
        rows.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
    return np.concatenate(rows)


def _greedy(khala: Khala, ids: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The best code of every fine layer [K - coarse, T], each behind the given layers before it."""
    first = khala.config.tokens.num_coarse
    best = [
        khala.refine(ids, codes[:first], refined=codes[first:layer], codebooks=layer + 1, top_k=1)[
            layer
        ]
        for layer in range(first, len(codes))
    ]
    return np.stack(best)
