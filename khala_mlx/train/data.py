"""Training data: sound files for the codec, coded songs with their words for the models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.audio import read_audio
from khala_mlx.errors import KhalaError

SPLITS = ("train", "valid")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")


@dataclass(frozen=True)
class Sounds:
    """Random crops of the sound files of a folder, each read when it is drawn."""

    lengths: Mapping[Path, int]
    sample_rate: int
    channels: int

    @classmethod
    def of(cls, folder: Path, sample_rate: int, channels: int) -> Sounds:
        """All sound files below `folder`, sorted, so that a draw means the same every time."""
        import soundfile

        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUNDS)
        if not files:
            raise KhalaError(f"{folder} holds no sound files ({', '.join(SOUNDS)}).")
        return cls({path: soundfile.info(path).frames for path in files}, sample_rate, channels)

    def crops(
        self, rng: np.random.Generator, count: int, samples: int, grid: int = 1
    ) -> np.ndarray:
        """`count` crops [count, samples, C]; shorter files are padded with silence.

        They start at multiples of `grid` samples.
        """
        return np.stack([self._crop(rng, samples, grid) for _ in range(count)])

    def _crop(self, rng: np.random.Generator, samples: int, grid: int) -> np.ndarray:
        path = list(self.lengths)[rng.integers(len(self.lengths))]
        starts = max(0, self.lengths[path] - samples) // grid + 1
        start = grid * int(rng.integers(starts))
        crop = read_audio(path, self.sample_rate, self.channels, start=start, samples=samples)
        return np.pad(crop, [(0, samples - len(crop)), (0, 0)])


@dataclass(frozen=True)
class CodedSong:
    """A song as codes [K, T] with the words that go with it."""

    codes: np.ndarray
    tags: str
    lyrics: str
    about: dict[str, Any]


def read_coded(folder: Path, split: str) -> list[CodedSong]:
    """The songs of `split` in a prepared folder: metadata.jsonl beside codes/NAME.npz."""
    index = folder / "metadata.jsonl"
    try:
        lines = index.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise KhalaError(f"{index} cannot be read: {error.strerror}.") from error
    songs = []
    for line in lines:
        entry = json.loads(line)
        if entry.get("split", "train") == split:
            with np.load(folder / "codes" / f"{entry['id']}.npz", allow_pickle=False) as stored:
                codes = stored["codes"]
            songs.append(CodedSong(codes, entry.get("tags", ""), entry.get("lyrics", ""), entry))
    if not songs:
        raise KhalaError(f"{folder} holds no songs of the split {split}.")
    return songs
