"""Megatron's torch_dist checkpoints: torch.distributed.checkpoint's .metadata and .distcp files.

.metadata says which chunks a tensor was cut into, and in which file, at which offset, each lies;
a chunk is a torch.save zip of its own. Chunks may be cut along any axis and lie in any file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.convert.formats.pickle_objects import Global, Object, is_shape
from khala_mlx.convert.formats.pickles import MAX_BYTES, loads
from khala_mlx.convert.formats.tensors import CARRIERS, Extent, Tensor
from khala_mlx.convert.formats.torch_file import TorchZip
from khala_mlx.errors import ConvertError
from khala_mlx.text import is_plain_name, listed, shown

# Checking that chunks do not overlap compares every pair.
MOST_CHUNKS = 4096

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Piece:
    """Where a chunk is stored."""

    file: str
    offset: int
    length: int


class DistCheckpoint:
    """A folder with a .metadata; `names` are its tensors, `tensor(name)` reads one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.what = f"{shown(folder.name)}/.metadata"
        root = loads(_bytes(folder / ".metadata", self.what), self.what)
        tensors = root.get("state_dict_metadata") if isinstance(root, Object) else None
        pieces = root.get("storage_data") if isinstance(root, Object) else None
        if not isinstance(tensors, dict) or not isinstance(pieces, dict):
            raise ConvertError(f"{self.what} describes no checkpoint.")
        self._tensors = {
            name: entry
            for name, entry in tensors.items()
            if isinstance(name, str)
            and isinstance(entry, Object)
            and entry.get("chunks") is not None
        }
        self.names = sorted(self._tensors)
        self._pieces: dict[tuple[str, tuple[int, ...]], _Piece] = {}
        self._ends: dict[str, int] = {}
        self._index(pieces)

    def _index(self, pieces: dict[Any, Any]) -> None:
        for key, info in pieces.items():
            name = key.get("fqn") if isinstance(key, Object) else None
            if not isinstance(name, str):
                continue
            piece = self._piece(name, info)
            end = piece.offset + piece.length
            self._ends[piece.file] = max(end, self._ends.get(piece.file, 0))
            # What is not a tensor has no offset.
            if is_shape(offsets := key.get("offset")):
                if (name, offsets) in self._pieces:
                    raise ConvertError(f"{self.what} stores a chunk of {shown(name)} twice.")
                self._pieces[name, offsets] = piece

    def _piece(self, name: str, info: Any) -> _Piece:
        fields = info if isinstance(info, Object) else Object("nothing")
        file, place = fields.get("relative_path"), (fields.get("offset"), fields.get("length"))
        if not isinstance(file, str) or not is_shape(place):
            raise ConvertError(f"{self.what} does not say where {shown(name)} is stored.")
        if not is_plain_name(file):
            raise ConvertError(f"{self.what} points outside its folder: {shown(file)}.")
        if fields.get("transform_descriptors"):
            raise ConvertError(f"{shown(name)} is stored compressed, which is not supported.")
        return _Piece(file, *place)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        size = self._tensors[name].get("size")
        if not is_shape(size):
            raise ConvertError(f"{self.what} gives {shown(name)} no shape.")
        return tuple(size)

    def tensor(self, name: str) -> Tensor:
        """One tensor, put together from its chunks as its rows are read.

        Raises:
            ConvertError: if a chunk or its file is missing, or the chunks do not fill the tensor.
        """
        shape = self.shape(name)
        boxes = self._boxes(name, shape)
        parts = [(box, self._chunk(name, box)) for box in boxes]
        dtypes = sorted({part.dtype for _, part in parts})
        if len(dtypes) != 1:
            raise ConvertError(
                f"the chunks of {shown(name)} have several dtypes: {listed(dtypes)}."
            )
        self._check_dtype(name, dtypes[0])
        if len(parts) == 1:
            return parts[0][1]
        extents = tuple(extent for _, part in parts for extent in part.extents)
        return _assembled(name, shape, dtypes[0], parts, extents)

    def _boxes(self, name: str, shape: tuple[int, ...]) -> list[Box]:
        chunks = self._tensors[name].get("chunks")
        boxes: list[Box] = []
        for chunk in chunks if isinstance(chunks, list) else [None]:
            offsets = chunk.get("offsets") if isinstance(chunk, Object) else None
            sizes = chunk.get("sizes") if isinstance(chunk, Object) else None
            if not is_shape(offsets) or not is_shape(sizes):
                raise ConvertError(f"{self.what} describes the chunks of {shown(name)} wrongly.")
            if not len(offsets) == len(sizes) == len(shape) or any(
                start + length > end
                for start, length, end in zip(offsets, sizes, shape, strict=True)
            ):
                raise ConvertError(f"a chunk of {shown(name)} reaches outside the tensor.")
            boxes.append((offsets, sizes))
        _check_cover(name, shape, boxes)
        return boxes

    def _chunk(self, name: str, box: Box) -> Tensor:
        piece = self._pieces.get((name, box[0]))
        if piece is None:
            raise ConvertError(f"{self.what} stores no chunk of {shown(name)} at {list(box[0])}.")
        path = self.folder / piece.file
        if not path.is_file():
            raise ConvertError(f"{shown(piece.file)} is missing from {shown(self.folder.name)}.")
        if (size := path.stat().st_size) < (end := self._ends[piece.file]):
            raise ConvertError(f"{shown(piece.file)} is truncated: it has {size} of {end} bytes.")
        archive = TorchZip(path, piece.offset, piece.length)
        tensor = archive.tensor(archive.root, name)
        if tensor.shape != box[1]:
            raise ConvertError(
                f"a chunk of {shown(name)} has the shape {list(tensor.shape)}, .metadata says "
                f"{list(box[1])}."
            )
        return tensor

    def _check_dtype(self, name: str, dtype: str) -> None:
        properties = self._tensors[name].get("properties")
        state = properties.state if isinstance(properties, Object) else None
        claimed = state[0] if isinstance(state, tuple) and state else None
        if isinstance(claimed, Global) and claimed.name != f"torch.{dtype}":
            raise ConvertError(f"{shown(name)} is {dtype}, .metadata says {shown(claimed.name)}.")


def _bytes(path: Path, what: str) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConvertError(f"{what} is too large to be Khala's.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ConvertError(f"{what} is missing.") from error
    except OSError as error:
        raise ConvertError(f"{what} cannot be read: {error.strerror}.") from error


def _check_cover(name: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
    if len(boxes) > MOST_CHUNKS:
        raise ConvertError(
            f"{shown(name)} is cut into {len(boxes)} chunks, too many to be Khala's."
        )
    if max(shape, default=0) >= 2**31:
        raise ConvertError(f"{shown(name)} has a length too large to be Khala's.")
    starts = np.array([box[0] for box in boxes], np.int64).reshape(len(boxes), len(shape))
    stops = starts + np.array([box[1] for box in boxes], np.int64).reshape(starts.shape)
    for first in range(len(boxes)):
        low = np.maximum(starts[first], starts[first + 1 :])
        high = np.minimum(stops[first], stops[first + 1 :])
        if (low < high).all(axis=1).any():
            raise ConvertError(f"chunks of {shown(name)} overlap.")
    if sum(math.prod(box[1]) for box in boxes) != math.prod(shape):
        raise ConvertError(f"the chunks of {shown(name)} leave holes in it.")


def _assembled(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    parts: list[tuple[Box, Tensor]],
    extents: tuple[Extent, ...],
) -> Tensor:
    def read(start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, *shape[1:]), CARRIERS[dtype])
        for (offsets, sizes), part in parts:
            low, high = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if low < high:
                where = tuple(
                    slice(offset, offset + size)
                    for offset, size in zip(offsets[1:], sizes[1:], strict=True)
                )
                values = part.read(low - offsets[0], high - offsets[0])
                rows[(slice(low - start, high - start), *where)] = values
        return rows

    return Tensor(name, shape, dtype, read, extents)
