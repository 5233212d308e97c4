"""Coded songs as the token sequences the models learn from, laid out as in generation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from khala_mlx import token_ids as tokens
from khala_mlx.config import TokenLayout
from khala_mlx.errors import KhalaError
from khala_mlx.prompt.prompt import Prompt, build_ids, cleaned
from khala_mlx.prompt.tokenizer import Tokenizer
from khala_mlx.train.data.dataset import SPLITS, CodedSong, read_coded


@dataclass(frozen=True)
class Example:
    """One song: prompts as ids [P], codes [K, T], and whether its end is there."""

    backbone_prompt: np.ndarray
    superres_prompt: np.ndarray
    codes: np.ndarray
    whole: bool

    def coarse_sequence(self, layout: TokenLayout) -> np.ndarray:
        """Prompt, interleaved coarse codes and, if the song is whole, the end of the song."""
        audio = tokens.interleave(layout, self.codes[: layout.num_coarse])
        end = [layout.end_of_song] if self.whole else []
        return np.concatenate([self.backbone_prompt, audio, end])


def prompt_of(tags: str, lyrics: str, instrumental: bool, minutes: int) -> Prompt:
    """The prompt that generation builds from these words, cleaned.

    Raises:
        PromptError: if generation would refuse them.
    """
    return cleaned(Prompt(tags=tags, lyrics=lyrics, instrumental=instrumental, minutes=minutes))


def examples_of(
    songs: Sequence[CodedSong],
    layout: TokenLayout,
    tokenizer: Tokenizer,
    room_behind: Callable[[int, int], int],
) -> list[Example]:
    """Songs cut on whole frames to the trained window; the end stays where all fits.

    `room_behind` gives the frames that fit behind prompts of these lengths (backbone, superres).
    """
    examples = []
    for song in songs:
        minutes = min(song.about.get("minutes", 1), layout.max_minutes)
        instrumental = song.about.get("instrumental", False)
        prompt = prompt_of(song.tags, song.lyrics, instrumental, minutes)
        backbone, superres = build_ids(prompt, layout, tokenizer)
        room = room_behind(len(backbone), len(superres))
        if room < 1:
            raise KhalaError(f"The prompt of {song.about.get('id')} fills the trained window.")
        codes = song.codes.astype(np.int64)
        examples.append(Example(backbone, superres, codes[:, :room], codes.shape[1] <= room))
    return examples


def read_examples(
    folder: Path, layout: TokenLayout, room_behind: Callable[[int, int], int]
) -> list[list[Example]]:
    """The examples of each of SPLITS in a prepared folder, by the tokenizer that lies in it.

    Raises:
        KhalaError: if there are none, or `room_behind` says that a prompt is too long.
    """
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    tokenizer.check(layout)
    return [
        examples_of(read_coded(folder, split), layout, tokenizer, room_behind) for split in SPLITS
    ]


def check_prompt(length: int, limit: int) -> None:
    """Refuse to learn from a prompt of `length` tokens that generation would refuse.

    Raises:
        KhalaError: if it is above the `limit` of the model.
    """
    if length > limit:
        raise KhalaError(
            f"A song's prompt takes {length} tokens where max_prompt is {limit}: prepare the songs "
            f"again with --max-prompt {limit}, which leaves such songs out."
        )


def padded(sequences: Sequence[np.ndarray], multiple: int = 32) -> np.ndarray:
    """Sequences [S] as rows [B, S], -1 behind their ends, S rounded up so that shapes repeat."""
    longest = max(len(sequence) for sequence in sequences)
    rows = np.full((len(sequences), -(-longest // multiple) * multiple), -1, dtype=np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    return rows


class Alike:
    """Draws batches of songs whose superres rows line up, so that no mask is needed."""

    def __init__(self, examples: Sequence[Example]) -> None:
        groups: dict[tuple[int, int], list[Example]] = defaultdict(list)
        for example in examples:
            groups[len(example.superres_prompt), example.codes.shape[1]].append(example)
        self.groups = [groups[shape] for shape in sorted(groups)]
        sizes = np.array([len(group) for group in self.groups], dtype=np.float64)
        self.shares = sizes / sizes.sum()

    def draw(self, rng: np.random.Generator, count: int) -> list[Example]:
        """At most `count` different songs of one shape; every song is as likely."""
        group = self.groups[rng.choice(len(self.groups), p=self.shares)]
        chosen = rng.choice(len(group), min(count, len(group)), replace=False)
        return [group[index] for index in chosen]
