"""Stored results of a model, to see whether its numerics hold on another machine.

Upstream's answer to noise on other hardware is to use its container. Here a model folder may hold
what each stage gave where it was known to be right; `check` runs the stages on the same inputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx import tokens
from khala_mlx.errors import KhalaError
from khala_mlx.files import appears_whole
from khala_mlx.pipeline import Khala

FILE = "goldens.safetensors"
_PROMPT = {"tags": "waltz, slow, happy", "lyrics": "do re mi\nfa sol la", "minutes": 1}
_FRAMES = 16
# Superres runs once for each layer that is compared, not for all.
_LAYERS = 6
# Below these the stage computes something else. 16-bit and packed weights flip a few close
# decisions; noise agrees in about one token of a thousand, and has no SNR.
LEAST_TOKENS, LEAST_LAYERS, LEAST_SNR = 0.8, 0.7, 30.0


def record(khala: Khala) -> Path:
    """Store in the model's folder what it gives here.

    Raises:
        KhalaError: if there are goldens already, or the folder cannot be written.
    """
    bb_ids, sr_ids = khala.prompt_ids(**_PROMPT)  # type: ignore[arg-type]
    coarse = khala.compose(bb_ids, max_frames=_FRAMES, min_frames=_FRAMES, top_k=1)
    codes = khala.refine(sr_ids, coarse, top_k=1)
    arrays = {
        "backbone_ids": np.asarray(bb_ids, np.int32),
        "superres_ids": np.asarray(sr_ids, np.int32),
        "codes": codes.astype(np.int32),
        "wave": khala.render(codes).astype(np.float32),
    }
    from safetensors.numpy import save

    told = {"fingerprint": khala.fingerprint, "dtype": khala.dtype}
    path = khala.folder / FILE
    with appears_whole(path) as temporary:
        temporary.write_bytes(save(arrays, {"khala": json.dumps(told)}))
    return path


def check(khala: Khala) -> dict[str, Any]:
    """How far the stages here agree with the goldens of the model's folder.

    Returns:
        {tokens, superres: shares of equal argmax under the golden context; codec_snr_db; holds}.

    Raises:
        KhalaError: if there are none, or they are damaged or of other weights.
    """
    arrays = _read(khala)
    codes = arrays["codes"]
    told = {
        "tokens": round(_token_agreement(khala, arrays["backbone_ids"], codes), 4),
        "superres": round(_layer_agreement(khala, arrays["superres_ids"], codes), 4),
        "codec_snr_db": round(_snr(arrays["wave"], khala.render(codes)), 1),
    }
    least = {"tokens": LEAST_TOKENS, "superres": LEAST_LAYERS, "codec_snr_db": LEAST_SNR}
    return {**told, "holds": all(told[name] >= wanted for name, wanted in least.items())}


def _read(khala: Khala) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    path = khala.folder / FILE
    if not path.is_file():
        raise KhalaError(
            f"{khala.folder} has no goldens: store them with `khala models verify MODEL --record` "
            "on a machine that is known to sing right, and copy the folder."
        )
    try:
        with safe_open(path, framework="np") as file:
            told = json.loads((file.metadata() or {})["khala"])
            names = ("backbone_ids", "superres_ids", "codes", "wave")
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise KhalaError(f"{path} is damaged: remove it and record it anew.") from error
    if not isinstance(told, dict) or told.get("fingerprint") != khala.fingerprint:
        raise KhalaError(f"{path} is of other weights: remove it and record it anew.")
    layout = khala.config.tokens
    tokens.check_codes(
        arrays["codes"], layers=layout.num_codebooks, codebook_size=layout.codebook_size
    )
    return arrays


def _token_agreement(khala: Khala, ids: np.ndarray, codes: np.ndarray) -> float:
    """Share of coarse codes that are the likeliest of their window, given those before."""
    layout = khala.config.tokens
    starts = layout.audio_start + layout.codebook_size * np.arange(layout.num_coarse)
    sung = (codes[: layout.num_coarse] + starts[:, None]).T.reshape(-1)
    context = np.concatenate([ids, sung])[None]
    logits = khala.backbone(context)[0, len(ids) - 1 : -1]
    right = 0
    for at, row in enumerate(logits):
        start = starts[at % layout.num_coarse]
        right += int(start + row[start : start + layout.codebook_size].argmax() == sung[at])
    return right / len(sung)


def _layer_agreement(khala: Khala, ids: np.ndarray, codes: np.ndarray) -> float:
    """Share of fine codes that superres chooses, each layer given the golden ones before."""
    coarse, layers = khala.config.tokens.num_coarse, len(codes)
    chosen = np.unique(np.linspace(coarse, layers - 1, _LAYERS).astype(int))
    equal = []
    for layer in chosen:
        made = khala.refine(
            ids, codes[:coarse], refined=codes[coarse:layer], layers=int(layer) + 1, top_k=1
        )
        equal.append(np.mean(made[layer] == codes[layer]))
    return float(np.mean(equal))


def _snr(golden: np.ndarray, ours: np.ndarray) -> float:
    if golden.shape != ours.shape:
        return -np.inf
    golden = golden.astype(np.float64)
    signal, noise = (max(float(np.sum(x**2)), 1e-30) for x in (golden, golden - ours))
    return float(np.clip(10 * (np.log10(signal) - np.log10(noise)), -200, 200))
