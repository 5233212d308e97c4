"""A tensor that stays in its file until rows of it are asked for, and exact changes of dtype.

bfloat16 has no NumPy type: it travels as uint16, the `dtype` beside it says so.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.errors import ConvertError
from khala_mlx.text import shown

BLOCK_BYTES = 16 << 20

# How each dtype that weights may have travels in memory.
CARRIERS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "uint8": np.dtype("u1"),
}


@dataclass(frozen=True)
class Extent:
    """Bytes [start, stop) of a file that a tensor's values lie in, with their CRC-32 if known."""

    path: Path
    start: int
    stop: int
    crc: int = 0


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: `read(start, stop)` gives rows of its first axis, as stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], np.ndarray]
    extents: tuple[Extent, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * CARRIERS[self.dtype].itemsize

    def whole(self) -> np.ndarray:
        """Every row at once, for the codec's smaller tensors."""
        return self.read(0, self.shape[0])


def mapped(path: Path, offset: int, length: int) -> np.ndarray:
    """Bytes [offset, offset + length) of a file as uint8, mapped for as long as the array lives.

    Small maps that go away keep what counts as resident down to a block; a map of a whole file
    counts all that was ever read.
    """
    if length == 0:
        return np.empty(0, np.uint8)
    first = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb") as file:
            window = mmap.mmap(
                file.fileno(), offset - first + length, access=mmap.ACCESS_READ, offset=first
            )
    except (OSError, ValueError) as error:
        raise ConvertError(f"{shown(path.name)} cannot be read or is truncated.") from error
    return np.frombuffer(window, np.uint8, length, offset - first)


def stored(
    name: str, shape: Sequence[int], dtype: str, path: Path, offset: int, crc: int = 0
) -> Tensor:
    """A tensor whose values lie in C order from `offset` of a file on."""
    shape = tuple(shape)
    carrier = CARRIERS[dtype]
    row = math.prod(shape[1:]) * carrier.itemsize

    def read(start: int, stop: int) -> np.ndarray:
        raw = mapped(path, offset + start * row, (stop - start) * row)
        return raw.view(carrier).reshape(stop - start, *shape[1:])

    length = math.prod(shape) * carrier.itemsize
    return Tensor(name, shape, dtype, read, (Extent(path, offset, offset + length, crc),))


def pick_rows(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Rows [start, stop) of `tensor` for each range, one after the other."""
    rows = sum(stop - start for start, stop in ranges)

    def read(start: int, stop: int) -> np.ndarray:
        parts, passed = [], 0
        for first, last in ranges:
            low, high = max(start - passed, 0), min(stop - passed, last - first)
            if low < high:
                parts.append(tensor.read(first + low, first + high))
            passed += last - first
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return replace(tensor, shape=(rows, *tensor.shape[1:]), read=read)


def blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Row ranges of some BLOCK_BYTES each that cover the tensor."""
    rows = tensor.shape[0]
    step = max(1, BLOCK_BYTES // max(1, tensor.bytes // max(1, rows)))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def require_float(tensor: Tensor) -> None:
    """Refuse anything but float32, float16 and bfloat16."""
    if tensor.dtype not in ("float32", "float16", "bfloat16"):
        raise ConvertError(f"{shown(tensor.name)} is {shown(tensor.dtype)}, no float to convert.")


def to_float32(raw: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Stored values as float32, exactly.

    Raises:
        ConvertError: if one is NaN or infinite.
    """
    if tensor.dtype == "bfloat16":
        values = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ConvertError(f"{shown(tensor.name)} holds NaN or infinite values.")
    return values


def narrow(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Finite float32 values in `dtype`, rounded to nearest even.

    Raises:
        ConvertError: if one becomes infinite.
    """
    if dtype == "float32":
        return values
    halves: np.ndarray
    if dtype == "float16":
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        fits = np.isfinite(halves).all()
    else:
        bits = np.ascontiguousarray(values).view(np.uint32)
        # Adding half of the last kept bit, less one when that bit is even, carries as it should.
        halves = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        fits = not ((halves & 0x7F80) == 0x7F80).any()
    if not fits:
        raise ConvertError(
            f"{shown(name)} holds {np.abs(values).max():.6g}, too large for {dtype}; "
            "convert to another dtype."
        )
    return halves
