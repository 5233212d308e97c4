"""Token-id arithmetic (windows, markers, interleaving), and checks of ids and codes. No MLX."""

from __future__ import annotations

from typing import Any

import numpy as np

from khala_mlx.config import TokenLayout
from khala_mlx.errors import KhalaError


def window(layout: TokenLayout, codebook: int) -> tuple[int, int]:
    """Return the ids [start, stop) of the codes of a codebook."""
    if not 0 <= codebook < layout.num_codebooks:
        raise KhalaError(f"Codebook {codebook} is outside 0..{layout.num_codebooks - 1}.")
    start = layout.audio_start + layout.codebook_size * codebook
    return start, start + layout.codebook_size


def marker(layout: TokenLayout, codebook: int) -> int:
    """Return the id that makes superres predict `codebook`; it overwrites the last text token."""
    window(layout, codebook)
    return layout.marker_base - codebook


def interleave(layout: TokenLayout, coarse: np.ndarray) -> np.ndarray:
    """Convert coarse codes [2, T] to the backbone's ids [2T]: q0, q1, q0, q1, ..."""
    codes = check_codes(coarse, codebooks=layout.num_coarse, size=layout.codebook_size)
    return (codes.astype(np.int64) + _coarse_starts(layout)).T.reshape(-1)


def deinterleave(layout: TokenLayout, ids: np.ndarray) -> np.ndarray:
    """Convert the backbone's ids [S] to coarse codes [2, T]; an unfinished last frame is dropped.

    Raises:
        KhalaError: if an id lies outside the window of its codebook. Upstream decodes such ids to
            codes outside 0..1023 and crashes later.
    """
    ids = np.asarray(ids, dtype=np.int64)
    frames = len(ids) // layout.num_coarse
    rows = ids[: frames * layout.num_coarse].reshape(frames, layout.num_coarse).T
    codes = rows - _coarse_starts(layout)
    if bad := np.argwhere((codes < 0) | (codes >= layout.codebook_size)).tolist():
        codebook, frame = min(bad, key=lambda position: (position[1], position[0]))
        raise KhalaError(
            f"The backbone wrote token {rows[codebook, frame]} at frame {frame}, not a code of "
            f"codebook {codebook}. Keep to the reachable tokens or lower the temperature."
        )
    return codes


def _coarse_starts(layout: TokenLayout) -> np.ndarray:
    return np.array([[window(layout, codebook)[0]] for codebook in range(layout.num_coarse)])


def check_codes(codes: Any, *, codebooks: int, size: int, fewer: bool = False) -> np.ndarray:
    """Return codes as an array [codebooks, T], T >= 1, of integers from 0 to size - 1.

    With `fewer` the first k <= codebooks are enough.

    Raises:
        KhalaError: for anything else.
    """
    array = plain_array(codes, "Codes")
    least = 1 if fewer else codebooks
    if array.ndim != 2 or not least <= array.shape[0] <= codebooks:
        wanted = f"1..{codebooks}" if fewer else f"{codebooks}"
        raise KhalaError(f"Codes must be an array of shape [{wanted}, T], got {list(array.shape)}.")
    if array.dtype.kind not in "iu":
        raise KhalaError(f"Codes must be integers, got {array.dtype}.")
    if array.shape[1] == 0:
        raise KhalaError("Codes must hold at least one frame.")
    if array.min() < 0 or array.max() >= size:
        raise KhalaError(f"Codes must lie in 0..{size - 1}, got {array.min()}..{array.max()}.")
    return array


def join_codes(layout: TokenLayout, coarse: Any, refined: Any = None) -> np.ndarray:
    """Return coarse codes [num_coarse, T] and the refined codes [n, T] behind them as [k, T].

    Raises:
        KhalaError: if `check_codes` refuses either, or their lengths differ.
    """
    size = layout.codebook_size
    # One type for all: NumPy joins int64 and uint64 to floats.
    codes = check_codes(coarse, codebooks=layout.num_coarse, size=size).astype(np.int64)
    refined = np.empty((0, 0)) if refined is None else plain_array(refined, "Codes")
    if refined.ndim and len(refined) == 0:
        return codes
    fine = layout.num_codebooks - layout.num_coarse
    refined = check_codes(refined, codebooks=fine, size=size, fewer=True)
    if refined.shape[1] != codes.shape[1]:
        raise KhalaError(
            f"The refined codes have {refined.shape[1]} frames, the coarse ones {codes.shape[1]}."
        )
    return np.concatenate([codes, refined.astype(np.int64)])


def check_ids(ids: Any, axes: str = "[P]") -> np.ndarray:
    """Return token ids as an array with these axes; each model checks its own vocabulary.

    Raises:
        KhalaError: if there are none, or they are not integers of such a shape.
    """
    array = plain_array(ids, "Token ids")
    ndim = axes.count(",") + 1
    if array.ndim == ndim and array.size == 0:
        raise KhalaError("Token ids must hold at least one token.")
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise KhalaError(
            f"Token ids must be integers of shape {axes}, got {array.dtype} of shape "
            f"{list(array.shape)}."
        )
    return array


def plain_array(given: Any, what: str) -> np.ndarray:
    """Return an array, or lists as an array; `what` names them in the error for anything else."""
    try:
        return np.asarray(given)
    except ValueError as error:
        raise KhalaError(f"{what} must be an array whose rows have the same length.") from error
