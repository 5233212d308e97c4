"""Where a song records how it was made: song.json beside it, or the tags of its sound file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from khala_mlx.audio import files as audio
from khala_mlx.audio import tags
from khala_mlx.errors import KhalaError
from khala_mlx.prompt.request import Request

# No record comes near it, whatever the lyrics.
_MOST_BYTES = 1 << 26


def read_request(path: Path) -> Request:
    """Return the request recorded in a song.json or a sound file; see `read_record`.

    Raises:
        KhalaError: if the file cannot be read, has no record, or its values are invalid.
    """
    return Request.from_record(read_record(path), str(path))


def sidecar_path(path: Path) -> Path:
    """song.wav -> song.json"""
    return path.with_suffix(".json")


def read_record(path: Path) -> dict[str, Any]:
    """The record of a song: a song.json, or that in the tags of a sound file or lying beside it.

    Raises:
        KhalaError: if there is none.
    """
    where = path
    try:
        if path.suffix.lower() not in audio.SUFFIXES:
            return _record(_text(path))
        path.stat()
        if text := tags.read(path).get("record"):
            return _record(text)
        where = sidecar_path(path)
        return _record(_text(where))
    except OSError as error:
        if path.suffix.lower() in audio.SUFFIXES and path.is_file():
            raise KhalaError(
                f"{path} holds no record of how it was made, and no {sidecar_path(path).name} lies "
                "beside it."
            ) from error
        raise KhalaError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if where.suffix.lower() in audio.SUFFIXES:
            raise KhalaError(f"{path} holds a damaged record of how it was made.") from error
        raise KhalaError(f"{where} is no song.json written by khala.") from error


def _text(path: Path) -> str:
    # /dev/zero and films are no records, and have no place in memory.
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError
    return content.decode("utf-8")


def _record(text: str) -> dict[str, Any]:
    record = json.loads(text)
    if not isinstance(record["request"], dict):
        raise TypeError
    return dict(record)
