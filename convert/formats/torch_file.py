"""What torch.save writes: a zip of stored entries, alone or inside a larger file.

The pickle in it is read without running it (pickles.py); tensors are views of stored entries,
mapped when rows are asked for. Every offset, length and stride is checked against the file.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from khala_mlx.convert.formats.pickle_objects import TensorRef
from khala_mlx.convert.formats.pickles import MAX_BYTES, loads
from khala_mlx.convert.formats.tensors import CARRIERS, Extent, Tensor, mapped, stored
from khala_mlx.errors import ConvertError
from khala_mlx.text import shown

# A central directory takes some 100 bytes per tensor; zipfile reads it in one go.
MAX_DIRECTORY = 16 << 20
LOCAL_HEADER = 30


class TorchZip:
    """`root` is the pickled data; `tensor(ref, name)` turns a TensorRef in it into a Tensor."""

    def __init__(self, path: Path, offset: int = 0, length: int | None = None) -> None:
        self.path = path
        self.what = shown(path.name)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ConvertError(f"{self.what} cannot be read: {error.strerror}.") from error
        length = size - offset if length is None else length
        if offset + length > size:
            raise ConvertError(
                f"{self.what} is truncated: it has {size} bytes, {offset + length} are needed."
            )
        self._offset, self._length = offset, length
        self._entries = self._directory()
        self.root = self._unpickle()

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        entries: dict[str, zipfile.ZipInfo] = {}
        try:
            with self.path.open("rb") as file:
                window = _Window(file, self._offset, self._length)
                infos = zipfile.ZipFile(cast(IO[bytes], window)).infolist()
        except ConvertError:
            raise
        except Exception as error:
            # zipfile raises half a dozen kinds for a damaged directory.
            raise ConvertError(f"{self.what} is not a torch file or is truncated.") from error
        for info in infos:
            _, _, name = info.filename.partition("/")
            if name in entries:
                raise ConvertError(f"{self.what} holds {shown(name)} twice.")
            entries[name] = info
        return entries

    def _unpickle(self) -> Any:
        start, stop = self._span("data.pkl")
        if stop - start > MAX_BYTES:
            raise ConvertError(f"{self.what} holds a pickle too large to be Khala's.")
        if "byteorder" in self._entries:
            first, last = self._span("byteorder")
            if mapped(self.path, first, min(last - first, 16)).tobytes() != b"little":
                raise ConvertError(f"{self.what} was not written by a little-endian machine.")
        data = mapped(self.path, start, stop - start).tobytes()
        if not _matches(data, self._entries["data.pkl"].CRC):
            raise ConvertError(f"{self.what} is damaged: its pickle does not match its checksum.")
        return loads(data, self.what)

    def _span(self, name: str) -> tuple[int, int]:
        """Where in the file an entry's bytes lie."""
        info = self._entries.get(name)
        if info is None:
            raise ConvertError(f"{self.what} does not have {shown(name)}; it is not a torch file.")
        header = info.header_offset
        if header < 0 or header + LOCAL_HEADER > self._length:
            raise ConvertError(f"{self.what} has a damaged zip directory.")
        local = mapped(self.path, self._offset + header, LOCAL_HEADER).tobytes()
        plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        if local[:4] != b"PK\x03\x04" or not plain or info.file_size != info.compress_size:
            raise ConvertError(f"{self.what} holds {shown(name)} in a way torch does not write.")
        lengths = np.frombuffer(local, "<u2", 2, 26)
        start = header + LOCAL_HEADER + int(lengths.sum(dtype=np.int64))
        if start + info.file_size > self._length:
            raise ConvertError(f"{self.what} is truncated: {shown(name)} reaches past its end.")
        return self._offset + start, self._offset + start + info.file_size

    def tensor(self, ref: Any, name: str) -> Tensor:
        """The tensor `ref` describes.

        Raises:
            ConvertError: if it is not a tensor or reaches outside its storage.
        """
        if not isinstance(ref, TensorRef):
            raise ConvertError(f"{shown(name)} in {self.what} is not a plain tensor.")
        if ref.dtype not in CARRIERS or ref.storage.dtype not in (ref.dtype, "uint8"):
            raise ConvertError(f"{shown(name)} in {self.what} is {shown(ref.dtype)}, not a float.")
        width = CARRIERS[ref.dtype].itemsize
        start, stop = self._span(f"data/{ref.storage.key}")
        count = (stop - start) // width
        # A view that repeats elements could be far larger than its file; nothing saves one.
        last = sum((n - 1) * stride for n, stride in zip(ref.shape, ref.strides, strict=True))
        size = math.prod(ref.shape)
        if size > count or (size and ref.offset + last >= count):
            raise ConvertError(f"{shown(name)} in {self.what} reaches outside its storage.")
        extent = Extent(self.path, start, stop, self._entries[f"data/{ref.storage.key}"].CRC)
        if _is_contiguous(ref):
            tensor = stored(name, ref.shape, ref.dtype, self.path, start + ref.offset * width)
        else:
            tensor = _strided(ref, name, self.path, start, count)
        return replace(tensor, extents=(extent,))


def _matches(data: bytes, crc: int) -> bool:
    # torch can leave checksums out and then writes 0.
    return crc == 0 or zlib.crc32(data) == crc


def _is_contiguous(ref: TensorRef) -> bool:
    expected = 1
    for length, stride in zip(reversed(ref.shape), reversed(ref.strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _strided(ref: TensorRef, name: str, path: Path, start: int, count: int) -> Tensor:
    carrier = CARRIERS[ref.dtype]
    steps = [stride * carrier.itemsize for stride in ref.strides]

    def read(first: int, last: int) -> np.ndarray:
        values = mapped(path, start, count * carrier.itemsize).view(carrier)[ref.offset :]
        view = np.lib.stride_tricks.as_strided(values, ref.shape, steps, writeable=False)
        return np.ascontiguousarray(view[first:last])

    return Tensor(name, ref.shape, ref.dtype, read)


class _Window:
    """Part of a file as a file, for zipfile."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._length)[whence]
        if base + offset < 0:
            raise OSError("negative seek")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int = -1) -> bytes:
        rest = max(0, self._length - self._position)
        count = rest if count < 0 else min(count, rest)
        if count > MAX_DIRECTORY:
            raise ConvertError("The directory of a torch file is too large to be Khala's.")
        self._file.seek(self._offset + self._position)
        data = self._file.read(count)
        self._position += len(data)
        return data
