"""Stored results of a model, to see whether its numerics hold on another machine.

Upstream's answer to noise on other hardware is to use its container. Here a model folder may hold
what each stage gave where it was known to be right; `check` runs the stages on the same inputs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx import token_ids as tokens
from khala_mlx.errors import KhalaError
from khala_mlx.pipeline.khala import Khala
from khala_mlx.storage.atomic import appears_whole

FILE = "goldens.safetensors"
_PROMPT = {"tags": "waltz, slow, happy", "lyrics": "do re mi\nfa sol la", "minutes": 1}
_FRAMES = 16
# Far more than the prompt has in any tokenizer.
_MOST_IDS = 1000
# Superres runs once for each layer that is compared, not for all.
_LAYERS = 6
# Beyond these a stage computes something else (measured: docs/parity.md). The share of equal best
# tokens alone would not show it: a song leads on to its next token even where a layer is missing.
LEAST_EQUAL = 0.8
MOST_NATS = {"backbone": 0.003, "superres": 0.01}
LEAST_SNR = 40.0


def record(khala: Khala) -> Path:
    """Store in the model's folder what it gives here.

    Raises:
        KhalaError: if there are goldens already, or the folder cannot be written.
    """
    bb_ids, sr_ids = khala.prompt_ids(**_PROMPT)  # type: ignore[arg-type]
    coarse = khala.compose(bb_ids, max_frames=_FRAMES, min_frames=_FRAMES)
    codes = khala.refine(sr_ids, coarse)
    arrays: dict[str, np.ndarray] = {
        "backbone_ids": np.asarray(bb_ids, np.int32),
        "superres_ids": np.asarray(sr_ids, np.int32),
        "codes": codes.astype(np.int32),
        "backbone": _backbone_nats(khala, bb_ids, codes).astype(np.float16),
        "superres": _superres_nats(khala, sr_ids, codes).astype(np.float16),
        "wave": khala.render(codes).astype(np.float32),
    }
    from safetensors.numpy import save

    told = {"fingerprint": khala.parts.fingerprint, "dtype": khala.parts.dtype}
    path = khala.parts.folder / FILE
    with appears_whole(path) as temporary:
        temporary.write_bytes(save(arrays, {"khala": json.dumps(told)}))
    return path


def check(khala: Khala) -> dict[str, Any]:
    """How far the stages here agree with the goldens of the model's folder.

    Returns:
        {backbone_equal, superres_equal: shares of equal best tokens; backbone_nats,
        superres_nats: mean Kullback-Leibler divergence from the golden; codec_snr_db; holds}.

    Raises:
        KhalaError: if there are none, or they are damaged or of other weights.
    """
    arrays = _read(khala)
    codes = arrays["codes"]
    told: dict[str, Any] = {}
    for part, of in (("backbone", _backbone_nats), ("superres", _superres_nats)):
        equal, nats = _distance(arrays[part], of(khala, arrays[f"{part}_ids"], codes))
        told |= {f"{part}_equal": round(equal, 4), f"{part}_nats": round(nats, 5)}
    told["codec_snr_db"] = round(_snr(arrays["wave"], khala.render(codes)), 1)
    return {**told, "holds": holds(told)}


def holds(told: dict[str, Any]) -> bool:
    """Whether figures of `check` are those of a model that computes what it should."""
    equal = all(told[f"{part}_equal"] >= LEAST_EQUAL for part in MOST_NATS)
    near = all(told[f"{part}_nats"] <= most for part, most in MOST_NATS.items())
    return bool(equal and near and told["codec_snr_db"] >= LEAST_SNR)


def _read(khala: Khala) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    path = khala.parts.folder / FILE
    if not path.is_file():
        raise KhalaError(
            f"{khala.parts.folder} has no stored reference outputs. Store them with "
            "`khala models verify MODEL --record` on a machine with correct numerics, and copy the "
            "folder."
        )
    try:
        with safe_open(path, framework="np") as file:
            told = json.loads((file.metadata() or {})["khala"])
            names = ("backbone_ids", "superres_ids", "codes", "backbone", "superres", "wave")
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise KhalaError(f"{path} is damaged: remove it and record it again.") from error
    if not isinstance(told, dict) or told.get("fingerprint") != khala.parts.fingerprint:
        raise KhalaError(f"{path} is of other weights: remove it and record it again.")
    layout = khala.config.tokens
    tokens.check_codes(arrays["codes"], codebooks=layout.num_codebooks, size=layout.codebook_size)
    if not _fit_together(arrays, khala):
        raise KhalaError(f"{path} is damaged: remove it and record it again.")
    return arrays


def _fit_together(arrays: dict[str, np.ndarray], khala: Khala) -> bool:
    """Whether goldens have the shapes that `record` gives them, and numbers that are some."""
    layout, codec = khala.config.tokens, khala.config.codec
    frames, codes = arrays["codes"].shape[1], layout.codebook_size
    shapes = {
        "backbone": (frames * layout.num_coarse, codes),
        "superres": (frames * _LAYERS, codes),
        "wave": (frames * codec.hop, codec.channels),
    }
    return (
        frames == _FRAMES
        and all(arrays[name].shape == shape for name, shape in shapes.items())
        and all(arrays[name].dtype.kind == "f" for name in shapes)
        and all(np.isfinite(arrays[name]).all() for name in shapes)
        and all(0 < arrays[f"{part}_ids"].size <= _MOST_IDS for part in MOST_NATS)
        and all(arrays[f"{part}_ids"].ndim == 1 for part in MOST_NATS)
    )


def _backbone_nats(khala: Khala, ids: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Log probabilities [N, C] of the codes of each coarse token's layer, given those before."""
    layout = khala.config.tokens
    song = tokens.interleave(layout, codes[: layout.num_coarse])
    logits = khala.backbone(np.concatenate([ids, song])[None])[0, len(ids) - 1 : -1]
    windows = [tokens.window(layout, layer) for layer in range(layout.num_coarse)]
    rows = [row[slice(*windows[at % layout.num_coarse])] for at, row in enumerate(logits)]
    return _log_softmax(np.stack(rows))


def _superres_nats(khala: Khala, ids: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Log probabilities [N, C] of the codes of some fine layers, given the layers before."""
    coarse, layers = khala.config.tokens.num_coarse, len(codes)
    chosen = np.linspace(coarse, layers - 1, _LAYERS).astype(int).tolist()
    logits = mx.concatenate(khala.superres.logits(ids, codes, chosen))
    return _log_softmax(np.array(logits.astype(mx.float32)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    nats: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return nats


def _distance(golden: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """Share of rows [N, C] with the same best code, and the mean divergence from the golden."""
    if golden.shape != ours.shape or not np.isfinite(ours).all():
        return 0.0, math.inf
    golden = golden.astype(np.float32)
    equal = golden.argmax(axis=-1) == ours.argmax(axis=-1)
    # Rounded to 16 bits the golden may lie off by less than nothing.
    nats = (np.exp(golden) * (golden - ours)).sum(axis=-1).mean()
    return float(equal.mean()), max(0.0, float(nats))


def _snr(golden: np.ndarray, ours: np.ndarray) -> float:
    if golden.shape != ours.shape:
        return -np.inf
    golden = golden.astype(np.float64)
    signal, noise = (max(float(np.sum(x**2)), 1e-30) for x in (golden, golden - ours))
    return float(np.clip(10 * (np.log10(signal) - np.log10(noise)), -200, 200))
