"""The song that another one continues: a take's codes, or any sound file through the codec."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.audio.files import read_audio, sound_length
from khala_mlx.audio.tags import clean
from khala_mlx.config import CodecConfig
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.prompt.request import Request
from khala_mlx.song.record import Record
from khala_mlx.song.take import Take
from khala_mlx.text import clock_time, shown


@dataclass(frozen=True)
class Prefix:
    """The beginning of a song, taken from another one.

    Attributes:
        codes: int [k, T0], k at least the coarse codebooks.
        info: file, frames, seconds and the sha256 of the codes, for the record.
    """

    codes: np.ndarray
    info: dict[str, Any]


@dataclass(frozen=True)
class Continuation:
    """The song to continue, read once.

    Attributes:
        take: the take, or None for a sound file.
        request: the request it was made from; the default request where that is unknown.
        until: seconds of it to keep, or None for all.
    """

    path: Path
    take: Take | None
    request: Request
    until: float | None

    @classmethod
    def open(cls, path: Path, until: float | None = None) -> Continuation:
        """Read a take, or the record of a sound file.

        Raises:
            KhalaError: if the take cannot be read or is not composed yet.
        """
        if path.suffix != ".safetensors":
            return cls(path, None, _recorded_request(path), until)
        take = Take.load(path)
        take.check_composed(path)
        return cls(path, take, take.request, until)

    def frames(self, codec: CodecConfig) -> int:
        """Return the frames that are kept. Loads no model.

        Raises:
            KhalaError: if `until` is not inside the song.
        """
        if self.take is not None:
            total = self.take.codes.shape[1]
        else:
            total = sound_length(self.path, codec.sample_rate) // codec.hop
        if not total:
            raise KhalaError(f"{self.path} is shorter than one frame, {codec.hop} samples.")
        rate = codec.frame_rate
        frames = total if self.until is None else math.floor(self.until * rate)
        if not 1 <= frames <= total:
            raise KhalaError(
                f"--from must be inside {self.path}: above 0 and at most "
                f"{clock_time(total / rate)}."
            )
        return frames

    def prefix(self, codec: CodecConfig, encode: Callable[[np.ndarray], np.ndarray]) -> Prefix:
        """Return the codes that are kept.

        Args:
            encode: turns samples [L, C] into codes [K, T]; called for sound files only.

        Raises:
            KhalaError: if the file cannot be read or nothing of it is kept.
        """
        frames = self.frames(codec)
        codes = (self._encoded(codec, encode) if self.take is None else self.take.codes)[:, :frames]
        return Prefix(
            codes,
            {
                "file": clean(self.path.name),
                "frames": frames,
                # Rounded up, so that the same frames are kept `until` these seconds.
                "seconds": math.ceil(1000 * frames / codec.frame_rate) / 1000,
                "codes_sha256": hashlib.sha256(codes.astype("<i4").tobytes()).hexdigest(),
            },
        )

    def warn_other_model(self, identity: str) -> None:
        """Warn if another model than the one of this identity made the take."""
        model = self.take.metadata["model"] if self.take else {}
        if model.get("config_sha256", identity) != identity:
            warnings.warn(
                f"{self.path} was made by another model ({shown(model.get('name'))}). If that has "
                "another codec, the prefix will be noise.",
                KhalaWarning,
                stacklevel=2,
            )

    def _encoded(
        self, codec: CodecConfig, encode: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        waveform = read_audio(self.path, codec.sample_rate, codec.channels)
        # Whole frames: the codec would pad the last one with silence, in the middle of the song.
        whole = len(waveform) // codec.hop * codec.hop
        return encode(waveform[:whole])


def continued_request(request: Request, seconds: float, most_minutes: int) -> Request:
    """Return `request` for a song that continues `seconds` of another: its length is set again."""
    minutes = int(seconds) // 60 + 1
    return replace(
        request,
        minutes=min(max(request.minutes, minutes), most_minutes),
        seconds=None,
        min_seconds=0.0,
        refine_seed=None,
    )


def _recorded_request(sound: Path) -> Request:
    try:
        return Record.read(sound).request
    except KhalaError:
        return Request()
