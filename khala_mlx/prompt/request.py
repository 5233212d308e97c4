"""A request: everything a user asks for when asking for a song."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from khala_mlx.config import Strict
from khala_mlx.errors import ConfigError, KhalaError
from khala_mlx.prompt.prompt import Prompt


@dataclass(frozen=True)
class Request(Strict):
    """Everything one asks for when asking for a song; with the model, it determines the song.

    `refine_seed` makes the detail alone again; by default `seed` serves both. `kv_bits`, 8 or 4,
    quantizes the backbone's key-value cache, which changes the song. `refine_expected` chooses the
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
    def from_record(cls, record: Mapping[str, Any], where: str) -> Self:
        """Return the request of a record read from `where`; missing fields take their defaults.

        Raises:
            KhalaError: if it holds wrong values.
        """
        try:
            return cls.from_dict({**cls().to_dict(), **record["request"]}, where)
        except ConfigError as error:
            raise KhalaError(str(error)) from error
