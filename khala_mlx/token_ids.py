"""All token-id arithmetic: windows, markers, interleaving. Plain integers and NumPy, no MLX."""

from __future__ import annotations

from typing import Any

import numpy as np

from khala_mlx.config import TokenLayout
from khala_mlx.errors import KhalaError


def window(layout: TokenLayout, layer: int) -> tuple[int, int]:
    """Ids [start, stop) of the codes of RVQ layer `layer`."""
    if not 0 <= layer < layout.num_codebooks:
        raise KhalaError(f"Layer {layer} is outside 0..{layout.num_codebooks - 1}.")
    start = layout.audio_start + layout.codebook_size * layer
    return start, start + layout.codebook_size


def marker(layout: TokenLayout, layer: int) -> int:
    """Id that tells superres to predict `layer`; it overwrites the last text token."""
    window(layout, layer)
    return layout.marker_base - layer


def interleave(layout: TokenLayout, coarse: np.ndarray) -> np.ndarray:
    """Coarse codes [2, T] to the backbone's ids [2T]: q0, q1, q0, q1, ..."""
    coarse = check_codes(
        coarse, layers=layout.num_coarse, codebook_size=layout.codebook_size
    ).astype(np.int64)
    starts = [window(layout, layer)[0] for layer in range(layout.num_coarse)]
    return (coarse + np.array(starts)[:, None]).T.reshape(-1).astype(np.int64)


def deinterleave(layout: TokenLayout, ids: np.ndarray) -> np.ndarray:
    """The backbone's ids [S] to coarse codes [2, T]; an unfinished last frame is dropped.

    Raises:
        KhalaError: if an id lies outside the window of its layer. Upstream decodes such ids to
            codes outside 0..1023 and crashes later.
    """
    ids = np.asarray(ids, dtype=np.int64)
    frames = len(ids) // layout.num_coarse
    rows = ids[: frames * layout.num_coarse].reshape(frames, layout.num_coarse).T
    starts = np.array([window(layout, layer)[0] for layer in range(layout.num_coarse)])
    codes = rows - starts[:, None]
    if bad := np.argwhere((codes < 0) | (codes >= layout.codebook_size)).tolist():
        layer, frame = min(bad, key=lambda position: (position[1], position[0]))
        raise KhalaError(
            f"The backbone wrote token {rows[layer, frame]} at frame {frame}, not a code of "
            f"codebook {layer}. Keep to the reachable tokens or lower the temperature."
        )
    return codes


def check_codes(codes: Any, *, layers: int, codebook_size: int, fewer: bool = False) -> np.ndarray:
    """Codes as an array [layers, T], T >= 1, integers that each lie inside their codebook.

    With `fewer` the first k <= layers will do.

    Raises:
        KhalaError: for anything else.
    """
    array = plain_array(codes, "Codes")
    least = 1 if fewer else layers
    if array.ndim != 2 or not least <= array.shape[0] <= layers:
        wanted = f"1..{layers}" if fewer else f"{layers}"
        raise KhalaError(f"Codes must be an array of shape [{wanted}, T], got {list(array.shape)}.")
    if array.dtype.kind not in "iu":
        raise KhalaError(f"Codes must be integers, got {array.dtype}.")
    if array.shape[1] == 0:
        raise KhalaError("Codes must hold at least one frame.")
    if array.min() < 0 or array.max() >= codebook_size:
        raise KhalaError(
            f"Codes must lie in 0..{codebook_size - 1}, got {array.min()}..{array.max()}."
        )
    return array


def check_begun(layout: TokenLayout, coarse: Any, refined: Any = None) -> np.ndarray:
    """Coarse codes [num_coarse, T], and those refined so far [n, T] behind them, as [k, T].

    Raises:
        KhalaError: if either is none, as `check_codes` tells, or their lengths differ.
    """
    size = layout.codebook_size
    # One type for all: NumPy joins int64 and uint64 to floats.
    codes = check_codes(coarse, layers=layout.num_coarse, codebook_size=size).astype(np.int64)
    refined = np.empty((0, 0)) if refined is None else plain_array(refined, "Codes")
    if refined.ndim and len(refined) == 0:
        return codes
    fine = layout.num_codebooks - layout.num_coarse
    refined = check_codes(refined, layers=fine, codebook_size=size, fewer=True)
    if refined.shape[1] != codes.shape[1]:
        raise KhalaError(
            f"The refined codes have {refined.shape[1]} frames, the coarse ones {codes.shape[1]}."
        )
    return np.concatenate([codes, refined.astype(np.int64)])


def check_prompt(ids: Any) -> np.ndarray:
    """Token ids of a prompt as an array [P]; which of them there are is the model's to say.

    Raises:
        KhalaError: if they are none, or no whole numbers.
    """
    array = plain_array(ids, "Token ids")
    if array.ndim == 1 and array.size == 0:
        raise KhalaError("Token ids must hold at least one token.")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise KhalaError(
            f"Token ids must be integers of shape [P], got {array.dtype} of shape "
            f"{list(array.shape)}."
        )
    return array


def plain_array(given: Any, what: str) -> np.ndarray:
    """Return an array, or lists that make one; `what` names it in the error for anything else."""
    try:
        return np.asarray(given)
    except ValueError as error:
        raise KhalaError(f"{what} must be an array whose rows have the same length.") from error
