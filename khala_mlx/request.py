"""What one asks for when asking for a song, and where that is recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from khala_mlx import audio, tags
from khala_mlx.config import Strict
from khala_mlx.errors import ConfigError, KhalaError
from khala_mlx.prompt import Prompt

# No record comes near it, whatever the lyrics.
_MOST_BYTES = 1 << 26


@dataclass(frozen=True)
class Request(Strict):
    """Everything one asks for when asking for a song; with the model, it determines the song.

    `refine_seed` makes the detail alone anew; by default `seed` serves both. `kv_bits`, 8 or 4,
    packs the backbone's key-value cache, which changes the song. `refine_expected` chooses the
    detail by expectation (expected.py) instead of drawing it.
    """

    tags: str = ""
    description: str = ""
    genre: str = ""
    lyrics: str = ""
    instrumental: bool = False
    language: str = ""
    minutes: int = 1
    text_mode: str = "same_as_backbone_no_description"
    truncate_lyrics: bool = False
    seconds: float | None = None
    min_seconds: float = 0.0
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 50
    refine_top_k: int = 10
    reachable_only: bool = True
    refine_seed: int | None = None
    kv_bits: int | None = None
    refine_expected: bool = False

    def __post_init__(self) -> None:
        self.check_types("The request")

    @property
    def prompt(self) -> Prompt:
        """The part of the request that the models read."""
        return Prompt(**{f.name: getattr(self, f.name) for f in fields(Prompt)})

    @property
    def detail_seed(self) -> int:
        """The seed that superres draws with."""
        return self.seed if self.refine_seed is None else self.refine_seed

    @classmethod
    def from_sidecar(cls, path: Path) -> Self:
        """The request recorded in a song.json or a sound file; see `recorded`.

        Raises:
            KhalaError: if the file cannot be read, is no record, or holds wrong values.
        """
        return cls.from_record(recorded(path), str(path))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> Self:
        """The request in what `recorded` found at `where`; fields it lacks have their defaults.

        Raises:
            KhalaError: if it holds wrong values.
        """
        try:
            return cls.from_dict({**cls().to_dict(), **record["request"]}, where)
        except ConfigError as error:
            raise KhalaError(str(error)) from error


def sidecar_path(path: Path) -> Path:
    """song.wav -> song.json"""
    return path.with_suffix(".json")


def recorded(path: Path) -> dict[str, Any]:
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
