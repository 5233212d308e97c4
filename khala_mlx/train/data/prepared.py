"""Prepared songs for a model: whether they go with it, cut as generation's window wants it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khala_mlx.config import KhalaConfig
from khala_mlx.errors import KhalaError
from khala_mlx.prompt.tokenizer import Tokenizer
from khala_mlx.train.data.dataset import CodedSong, read_coded
from khala_mlx.train.data.sequences import Example, examples_of


@dataclass(frozen=True)
class Prepared:
    """The songs of one split of a prepared folder, as they are and as the backbone reads them."""

    songs: Sequence[CodedSong]
    examples: list[Example]

    @property
    def told(self) -> list[dict[str, Any]]:
        """What metadata.jsonl says of each."""
        return [song.about for song in self.songs]


def read_prepared(
    source: Path, config: KhalaConfig, data: Path, split: str, *, max_seconds: float = 0.0
) -> Prepared:
    """The songs of `split` in `data` for the model folder `source`.

    Args:
        max_seconds: songs are cut to so much sound; 0 is what fits the trained window.

    Raises:
        KhalaError: if there are none, they cannot be read, or were prepared for another model.
    """
    layout, tokenizer = config.tokens, Tokenizer.from_file(source / "tokenizer.json")
    tokenizer.check(layout)
    _check_tokenizer(source / "tokenizer.json", data / "tokenizer.json")
    if not 0 <= max_seconds < math.inf:
        raise KhalaError(f"max_seconds must be a number of seconds, got {max_seconds}.")
    most = int(max_seconds * config.codec.frame_rate)
    if max_seconds and not most:
        raise KhalaError(f"{max_seconds} seconds are less than one frame.")

    def room(backbone: int, _: int) -> int:
        # One token is kept for the end of the song.
        fits = (config.backbone.context - backbone - 1) // layout.num_coarse
        return min(fits, most) if most else fits

    songs = read_coded(data, split)
    for song in songs:
        if song.codes.shape[0] < layout.num_coarse or song.codes.max() >= layout.codebook_size:
            raise KhalaError(f"{data} was prepared with another codec; prepare it with the model.")
    return Prepared(songs, examples_of(songs, layout, tokenizer, room))


def _check_tokenizer(ours: Path, theirs: Path) -> None:
    try:
        same = json.loads(ours.read_text("utf-8")) == json.loads(theirs.read_text("utf-8"))
    except FileNotFoundError as error:
        raise KhalaError(
            f"{theirs.parent} holds no prepared songs; `khala train prepare` makes such a folder."
        ) from error
    except OSError as error:
        raise KhalaError(f"{theirs} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise KhalaError(f"{theirs} is not valid JSON.") from error
    if not same:
        raise KhalaError(f"{theirs} is not the model's; prepare the songs with the model.")
