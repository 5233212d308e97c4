"""One pass over a source file: its SHA-256, and the CRC-32 of each zip entry that is used."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from khala_mlx.convert.formats.tensors import Extent
from khala_mlx.errors import ConvertError
from khala_mlx.text import shown

PIECE = 8 << 20


def checked_sha256(
    path: Path, extents: Iterable[Extent] = (), on_bytes: Callable[[int], None] | None = None
) -> str:
    """The file's SHA-256.

    Raises:
        ConvertError: if it cannot be read, or the values in an extent do not match their CRC-32.
    """
    # torch can leave checksums out and then writes 0.
    wanted = {(extent.start, extent.stop): extent.crc for extent in extents if extent.crc}
    waiting = sorted(wanted, reverse=True)
    running: dict[tuple[int, int], int] = {}
    digest = hashlib.sha256()
    position = 0
    try:
        with path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(PIECE))
            while count := file.readinto(buffer):
                piece = buffer[:count]
                digest.update(piece)
                while waiting and waiting[-1][0] < position + count:
                    running[waiting.pop()] = 0
                for span in list(running):
                    start, stop = span
                    inside = piece[max(0, start - position) : max(0, stop - position)]
                    running[span] = zlib.crc32(inside, running[span])
                    if stop <= position + count and running.pop(span) != wanted[span]:
                        raise ConvertError(
                            f"{shown(path.name)} is damaged: its bytes {start} to {stop} do not "
                            "match their checksum."
                        )
                position += count
                if on_bytes:
                    on_bytes(count)
    except OSError as error:
        raise ConvertError(f"{shown(path.name)} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()
