"""The record of how a song was made: song.json beside it, or the tags of its sound file."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khala_mlx.audio import tags
from khala_mlx.audio.files import SUFFIXES
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.prompt.request import Request
from khala_mlx.text import shown

RECORD_VERSION = 1
# No record comes near it, whatever the lyrics.
_MOST_BYTES = 1 << 26


def sidecar_path(path: Path) -> Path:
    """song.wav -> song.json"""
    return path.with_suffix(".json")


@dataclass(frozen=True)
class Record:
    """How a song was made, as read from `path`.

    Attributes:
        values: the content of song.json; "request" is always a mapping.
    """

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a song.json, or the record in the tags of a sound file or beside it.

        Raises:
            KhalaError: if there is none, or it is damaged.
        """
        where = path
        try:
            if path.suffix.lower() not in SUFFIXES:
                return cls(path, _parse(_text(path)))
            path.stat()
            if text := tags.read(path).get("record"):
                return cls(path, _parse(text))
            where = sidecar_path(path)
            return cls(path, _parse(_text(where)))
        except OSError as error:
            if path.suffix.lower() in SUFFIXES and path.is_file():
                raise KhalaError(
                    f"{path} has no record of how it was made, and there is no "
                    f"{sidecar_path(path).name} beside it."
                ) from error
            raise KhalaError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if where.suffix.lower() in SUFFIXES:
                raise KhalaError(f"The record of how {path} was made is damaged.") from error
            raise KhalaError(f"{where} is not a song.json written by khala.") from error

    @functools.cached_property
    def request(self) -> Request:
        """The request of the song.

        Raises:
            KhalaError: if its values are invalid.
        """
        return Request.from_record(self.values, str(self.path))

    @property
    def model(self) -> Mapping[str, Any]:
        """The model that made the song; empty if unknown."""
        return _mapping(self.values.get("model"))

    @property
    def continued(self) -> Mapping[str, Any]:
        """The continuation prefix that the song started with; empty if it had none."""
        return _mapping(self.values.get("continued"))

    def warn_differences(
        self,
        identity: str,
        adapters: Sequence[Mapping[str, Any]],
    ) -> None:
        """Warn if another model or other adapters made the song; see Khala.adapters."""
        known = self.model.get("config_sha256")
        if known and known != identity:
            _warn(f"{self.path} was made by another model ({shown(self.model.get('name'))})")
        found = self.model.get("adapters")
        named = [each for each in (found if isinstance(found, list) else []) if _mapping(each)]
        if _effect(named) != _effect(adapters):
            names = ", ".join(
                f"{shown(each.get('name'))} at {shown(each.get('scale'))}" for each in named
            )
            _warn(f"{self.path} was made with other adapters ({names or 'none'})")

    def warn_other_prefix(self, codes_sha256: str | None) -> None:
        """Warn if the song continued another prefix than the one of this digest, or no other."""
        if not self.continued or self.continued.get("codes_sha256") == codes_sha256:
            return
        how = "with another prefix" if codes_sha256 else "without --continue"
        _warn(
            f"{self.path} continues {shown(self.continued.get('seconds'))} s of "
            f"{shown(self.continued.get('file'))}, and this song is made {how}"
        )


def _effect(adapters: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    return [(each.get("sha256"), each.get("scale")) for each in adapters]


def _warn(difference: str) -> None:
    warnings.warn(f"{difference}: the song will differ.", KhalaWarning, stacklevel=3)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    # /dev/zero and films are not records, and have no place in memory.
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError
    return content.decode("utf-8")


def _parse(text: str) -> dict[str, Any]:
    record = json.loads(text)
    if not isinstance(record["request"], dict):
        raise TypeError
    return dict(record)
