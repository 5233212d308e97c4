"""Training data: sound files for the codec, coded songs with their words for the models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.audio.files import CONVERTED, is_sound, load_codes, read_audio, sound_length
from khala_mlx.errors import KhalaError

SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Sounds:
    """Random crops of the sound files of a folder, each read when it is drawn."""

    lengths: Mapping[Path, int]
    sample_rate: int
    channels: int

    @classmethod
    def of(cls, folder: Path, sample_rate: int, channels: int) -> Sounds:
        """All sound files below `folder`, sorted, so that a draw means the same every time.

        Those at another rate are resampled whenever they are drawn, as a whole.
        """
        files = [path for path in sound_files(folder) if path.suffix.lower() not in CONVERTED]
        lengths = {path: sound_length(path, sample_rate) for path in files}
        return cls(lengths, sample_rate, channels)

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


def sound_files(folder: Path) -> list[Path]:
    """Return all sound files below `folder`, sorted, but hidden ones (a Mac's `._song.wav`).

    Raises:
        KhalaError: if there are none.
    """
    files = [path for path in folder.rglob("*") if not _hidden(path, folder) and _is_file(path)]
    files = sorted(path for path in files if is_sound(path))
    if not files:
        raise KhalaError(f"{folder} has no sound files. Add wav, flac, mp3 or other sound.")
    return files


def _is_file(path: Path) -> bool:
    # A link that leads nowhere is to be reported, not passed over.
    return path.is_file() or path.is_symlink()


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def read_coded(folder: Path, split: str) -> list[CodedSong]:
    """The songs of `split` in a prepared folder: metadata.jsonl and the codes it names.

    Entries of folders that an earlier version prepared name no codes: they lie in codes/ID.npz.

    Raises:
        KhalaError: if there are none, or the folder cannot be read.
    """
    songs = []
    for entry in _entries(folder, split):
        codes = load_codes(folder / entry.get("codes", f"codes/{entry.get('id')}.npz"))
        if not codes.size:
            raise KhalaError(f"The codes of {entry.get('id')} in {folder} hold nothing.")
        songs.append(CodedSong(codes, entry.get("tags", ""), entry.get("lyrics", ""), entry))
    if not songs:
        raise KhalaError(f"{folder} holds no songs of the split {split}.")
    return songs


def holds(folder: Path, split: str) -> bool:
    """Whether a prepared folder has songs of `split`."""
    return bool(_entries(folder, split))


def _entries(folder: Path, split: str) -> list[dict[str, Any]]:
    index = folder / "metadata.jsonl"
    try:
        text = index.read_text(encoding="utf-8")
    except OSError as error:
        raise KhalaError(f"{index} cannot be read: {error.strerror}.") from error
    try:
        # Lyrics may hold what Python's splitlines takes for the end of a line.
        entries = [json.loads(line) for line in text.split("\n") if line]
        chosen = [entry for entry in entries if entry.get("split", "train") == split]
        for entry in chosen:
            _check_entry(entry)
        return chosen
    except (ValueError, AttributeError, TypeError) as error:
        raise KhalaError(f"{index} is damaged; prepare the songs again.") from error


def _check_entry(entry: Mapping[str, Any]) -> None:
    """ValueError where a field that is read is of another kind than `prepare` writes."""
    for name in ("id", "codes", "tags", "lyrics", "artist"):
        if not isinstance(entry.get(name, ""), str):
            raise ValueError(name)
    if not isinstance(entry.get("minutes", 1), int):
        raise ValueError("minutes")
