"""A torch file that has only the entries that the codec needs.

Upstream's codec checkpoint holds discriminators and optimisers, two thirds of its 3.3 GB. A file
of its full size is made with holes in their place; every entry's CRC-32 is checked when it is
converted, as the SHA-256 of the whole file cannot be.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, cast

from khala_mlx.convert.checksums import checked_sha256
from khala_mlx.convert.formats.torch_file import MAX_DIRECTORY
from khala_mlx.convert.layouts.codec import codec_part, needed_entries
from khala_mlx.errors import ConvertError, HubError
from khala_mlx.storage.atomic import appears_whole
from khala_mlx.text import shown

Read = Callable[[int, int], bytes]
Span = tuple[int, int]

# Bytes asked for at once, and the least that is worth a request of its own.
_PIECE, _GAP = 16 << 20, 64 << 10


class _Holey:
    """A file being filled; what is there is recorded beside it, so that it can be continued."""

    def __init__(self, path: Path, size: int, read: Read) -> None:
        self.path, self.size, self._read = path, size, read
        self._journal = path.with_name(path.name + ".json")
        self._there: list[Span] = self._recorded() if path.exists() else []
        with path.open("ab") as file:
            file.truncate(size)

    def _recorded(self) -> list[Span]:
        try:
            spans = json.loads(self._journal.read_text(encoding="utf-8"))
            return [(int(a), int(b)) for a, b in spans if 0 <= int(a) < int(b) <= self.size]
        except (OSError, ValueError, TypeError):
            return []

    def ensure(self, start: int, stop: int, on_bytes: Callable[[int], None]) -> None:
        """Fetch what is missing of the bytes from start to stop."""
        for first, last in _missing(self._there, start, stop):
            for at in range(first, last, _PIECE):
                end = min(at + _PIECE, last)
                data = self._read(at, end)
                if len(data) != end - at:
                    raise HubError(f"{shown(self.path.name)} came incompletely; try again.")
                with self.path.open("r+b") as file:
                    file.seek(at)
                    file.write(data)
                self._there = _joined([*self._there, (at, end)])
                with appears_whole(self._journal, overwrite=True) as temporary:
                    temporary.write_text(json.dumps(self._there), encoding="utf-8")
                on_bytes(end - at)

    def close(self) -> None:
        """Forget what is there; it is all that is needed."""
        self._journal.unlink(missing_ok=True)


class _Window(io.RawIOBase):
    """A _Holey as a file that fetches what is read, for zipfile."""

    def __init__(self, holey: _Holey, on_bytes: Callable[[int], None]) -> None:
        self._holey, self._on_bytes, self._at = holey, on_bytes, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._at, self._holey.size)[whence]
        if base + offset < 0:
            raise OSError("negative seek")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        rest = max(0, self._holey.size - self._at)
        count = rest if count < 0 else min(count, rest)
        if count > MAX_DIRECTORY:
            raise ConvertError("The directory of a torch file is too large to be Khala's.")
        # The end of the file is read in bits: its last pages are fetched at once.
        start = max(0, min(self._at, self._holey.size - _GAP))
        stop = max(self._at + count, min(self._at + _GAP, self._holey.size))
        self._holey.ensure(start, stop, self._on_bytes)
        with self._holey.path.open("rb") as file:
            file.seek(self._at)
            data = file.read(count)
        self._at += len(data)
        return data


def fetch_codec(
    path: Path, size: int, read: Read, on_bytes: Callable[[int], None] = lambda count: None
) -> bool:
    """Make `path`, a codec checkpoint of `size` bytes, with what the codec needs of it.

    Args:
        read: gives the bytes from start to stop; may raise, whereupon a later call continues.
        on_bytes: called with the count of bytes each time some have come.

    Returns:
        False, leaving nothing, if the file has no checksums by which a part can be checked.

    Raises:
        ConvertError: if it is not such a checkpoint.
    """
    partial = path.with_name(path.name + ".partial")
    holey = _Holey(partial, size, read)
    try:
        whole = _fill(holey, on_bytes)
    except ConvertError as error:
        # The next try begins again.
        partial.unlink()
        holey.close()
        raise ConvertError(
            f"{shown(path.name)} was damaged on its way, or is not a codec of Khala's; try again "
            f"({str(error).rstrip('.')})."
        ) from error
    if whole:
        partial.replace(path)
    else:
        partial.unlink()
    holey.close()
    return whole


def _fill(holey: _Holey, on_bytes: Callable[[int], None]) -> bool:
    """Fetch and check what is needed; False if there are no checksums."""
    infos = _directory(holey, on_bytes)
    ends = _ends(infos, holey.size)
    for info in infos:
        if info.filename.partition("/")[2] in ("data.pkl", "byteorder"):
            holey.ensure(info.header_offset, ends[info.header_offset], on_bytes)
    needed = needed_entries(holey.path)
    wanted = [info for info in infos if info.filename.partition("/")[2] in needed]
    if not all(info.CRC for info in wanted if info.file_size):
        return False
    for start, stop in _joined((i.header_offset, ends[i.header_offset]) for i in wanted):
        holey.ensure(start, stop, on_bytes)
    part = codec_part(holey.path)
    checked_sha256(holey.path, {e for tensor in part.tensors.values() for e in tensor.extents})
    return True


def _directory(holey: _Holey, on_bytes: Callable[[int], None]) -> list[zipfile.ZipInfo]:
    try:
        window = _Window(holey, on_bytes)
        return zipfile.ZipFile(cast(IO[bytes], window)).infolist()
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, ValueError) as error:
        raise ConvertError(f"{shown(holey.path.stem)} is not a torch file.") from error


def _ends(infos: list[zipfile.ZipInfo], size: int) -> dict[int, int]:
    """Where the bytes of each entry, named by its start, end at the latest."""
    starts = sorted({min(info.header_offset, size) for info in infos})
    return dict(zip(starts, [*starts[1:], size], strict=True))


def _joined(spans: Iterable[Span]) -> list[Span]:
    """The spans in order, those that touch or nearly touch as one."""
    result: list[Span] = []
    for start, stop in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def _missing(there: list[Span], start: int, stop: int) -> list[Span]:
    result = []
    for first, last in there:
        if last <= start or first >= stop:
            continue
        if first > start:
            result.append((start, first))
        start = max(start, last)
    if start < stop:
        result.append((start, stop))
    return result
