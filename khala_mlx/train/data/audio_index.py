"""What is known of sound files, so that each must be decoded once: content, length and peak."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from khala_mlx.audio.files import CONVERTED, SILENCE, read_audio, readable, sound_length
from khala_mlx.errors import AudioError
from khala_mlx.storage.atomic import appears_whole
from khala_mlx.train.data.song_folder import Unusable


@dataclass(frozen=True)
class Heard:
    """A sound at the codec's rate: the hash of its samples, how many they are, their peak."""

    sound: str
    samples: int
    peak: float


class Hearing:
    """Reads sound files for a codec of this rate and these channels, and remembers them.

    What a file holds is kept in `record` by the hash of its bytes: whatever its name, it is
    decoded again only to be encoded.
    """

    def __init__(self, record: Path, sample_rate: int, channels: int, max_seconds: float) -> None:
        self.record, self.sample_rate, self.channels = record, sample_rate, channels
        self.max_seconds = max_seconds
        self._format = f"{sample_rate} Hz, {channels} channels"
        self._heard = self._remembered()

    def listen(self, path: Path) -> Heard:
        """What a file holds.

        Raises:
            Unusable: if it cannot be read, is too long (which is looked up first), or is silent.
        """
        if path.suffix.lower() not in CONVERTED:
            with _told_of(path, path):
                self._check_length(sound_length(path, self.sample_rate))
        content = _hash_of_file(path)
        if content not in self._heard:
            wave = self._read(path)
            self._heard[content] = Heard(_hash_of(wave), len(wave), float(np.abs(wave).max()))
        heard = self._heard[content]
        self._check_length(heard.samples)
        if heard.peak < SILENCE:
            raise Unusable("silent", "It is silent.")
        return heard

    def wave(self, path: Path, heard: Heard) -> np.ndarray:
        """The samples [L, C] of a file that was listened to.

        Raises:
            Unusable: if it cannot be read any more, or holds something else by now.
        """
        wave = self._read(path)
        if _hash_of(wave) != heard.sound:
            raise Unusable("unreadable", "It was changed while the songs were prepared.")
        return wave

    def remember(self) -> None:
        """Write down what was heard."""
        files = {content: list(vars(heard).values()) for content, heard in self._heard.items()}
        with appears_whole(self.record, overwrite=True) as temporary:
            temporary.write_text(json.dumps({"format": self._format, "files": files}))

    def _remembered(self) -> dict[str, Heard]:
        try:
            stored = json.loads(self.record.read_text())
            files = stored["files"] if stored["format"] == self._format else {}
            return {
                content: Heard(str(sound), int(samples), float(peak))
                for content, (sound, samples, peak) in files.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # It only saves time.
            return {}

    def _read(self, path: Path) -> np.ndarray:
        # One second more than is wanted shows that a file is too long.
        longest = self.max_seconds + 1
        with (
            _told_of(path, path),
            readable(path, seconds=longest) as source,
            _told_of(source, path),
        ):
            self._check_length(sound_length(source, self.sample_rate))
            return read_audio(source, self.sample_rate, self.channels)

    def _check_length(self, samples: int) -> None:
        minutes = samples / self.sample_rate / 60
        if minutes * 60 > self.max_seconds:
            raise Unusable(
                "too long",
                f"It lasts {minutes:.1f} minutes, where {self.max_seconds / 60:g} are allowed: "
                "cut it, or change --max-minutes.",
            )


@contextmanager
def _told_of(source: Path, path: Path) -> Iterator[None]:
    """Errors of reading `source` say what is wrong with `path`, by its name alone."""
    try:
        yield
    except AudioError as error:
        raise Unusable("unreadable", str(error).replace(str(source), path.name)) from error
    except MemoryError as error:
        raise Unusable("unreadable", f"There is not enough memory for {path.name}.") from error


def _hash_of(waveform: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(waveform).data).hexdigest()


def _hash_of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Unusable("unreadable", f"{path.name} cannot be read: {error.strerror}.") from error
