"""A song: its sound, its codes, and the record of how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.audio import files as audio
from khala_mlx.audio import player
from khala_mlx.audio.mastering import Mastering
from khala_mlx.audio.tags import clean
from khala_mlx.errors import AudioError
from khala_mlx.song.record import sidecar_path
from khala_mlx.song.take import SUFFIX, Take
from khala_mlx.storage.atomic import appears_whole, check_destination
from khala_mlx.text import shown

_LONGEST_TITLE = 200
# Left out of the tags, so that the same song is the same file.
_OF_ONE_RUN = ("output", "created", "timings")


@dataclass
class Song:
    """A song in memory.

    Attributes:
        waveform: float32 [L, C], about -1..1.
        sample_rate: samples a second.
        codes: integers [K, T]; fewer than K codebooks if it is a draft.
        metadata: the record of how it was made, as in song.json.
        take: the take that the song was made from.
    """

    waveform: np.ndarray
    sample_rate: int
    codes: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)
    take: Take | None = None

    def __repr__(self) -> str:
        size = f"{self.duration:.2f} s at {self.sample_rate} Hz"
        return f"<Song: {size}, codes {list(np.shape(self.codes))}>"

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.waveform) / self.sample_rate

    def save(
        self,
        path: str | Path,
        *,
        normalize: bool = True,
        bit_depth: str = "16",
        loudness: float | None = None,
        fade: float = 0.0,
        title: str = "",
        artist: str = "",
        overwrite: bool = False,
        finishing: bool = False,
    ) -> Path:
        """Write the sound (wav, flac, ogg, mp3 by suffix), song.json and song.take.safetensors.

        A song that would clip is scaled down to -1 dBFS by default; either way a KhalaWarning
        reports it.

        Args:
            bit_depth: "16", "24" or "float".
            loudness: target in LUFS, reached as closely as a true peak of -1 dBTP allows.
            fade: length of the fade-out in seconds.
            title, artist: for the file's tags; the default title is the description or the tags.
            overwrite: replace files that exist.
            finishing: replace the take and song.json: they are this song's own unfinished ones.

        Raises:
            KhalaError: if one of the three files exists, the suffix or bit depth is not supported,
                or writing fails.
        """
        path = Path(path)
        audio.check_output(path, bit_depth)
        audio.check_waveform(self.waveform)
        self._check()
        mastering = Mastering(normalize, loudness, fade, bit_depth)
        if finishing:
            check_destination(path)
        else:
            check_free(path, overwrite=overwrite)
        waveform, levels = mastering.apply(self.waveform, self.sample_rate)
        named = {n: clean(str(text)) for n, text in (("title", title), ("artist", artist)) if text}
        file = {"file": clean(path.name), "bit_depth": bit_depth}
        self.metadata["output"] = {**file, **named, **levels}
        replace = overwrite or finishing
        # Nested, so that a failure while writing any of the three leaves none of them. The sound
        # appears last: if it exists, all three do.
        with (
            appears_whole(path, overwrite=overwrite) as sound,
            appears_whole(sidecar_path(path), overwrite=replace) as sidecar,
            appears_whole(take_path(path), overwrite=replace) as take,
        ):
            (self.take or self._own_take()).write(take)
            text = json.dumps(self.metadata, indent=2, ensure_ascii=False)
            sidecar.write_text(text + "\n", encoding="utf-8")
            audio.encode_audio(
                sound, path, waveform, self.sample_rate, bit_depth=bit_depth, tags=self._tags()
            )
        return path

    def play(self) -> None:
        """Play the song on the default device and wait for the end."""
        waveform = audio.fit_scale(self.waveform, normalize=True)[0]
        player.play(player.Track.whole(waveform, self.sample_rate))

    def _check(self) -> None:
        """Raise AudioError for values that no file can store; users may build songs themselves."""
        rate, codes = self.sample_rate, self.codes
        if not isinstance(rate, (int, np.integer)) or not 0 < rate < 2**31:
            raise AudioError(f"sample_rate must be a whole number above 0, got {shown(rate)}.")
        if not isinstance(codes, np.ndarray) or codes.ndim != 2 or codes.dtype.kind not in "iu":
            raise AudioError("The codes of a song must be an array of integers [K, T].")

    def _own_take(self) -> Take:
        return Take(self.metadata, self.codes, num_codebooks=len(self.codes))

    def _tags(self) -> dict[str, str]:
        request, model = self.metadata.get("request", {}), self.metadata.get("model", {})
        output = self.metadata.get("output", {})
        about = request.get("description") or request.get("tags") or request.get("genre") or ""
        record = {n: v for n, v in self.metadata.items() if n not in _OF_ONE_RUN}
        # config_sha256 stands for the checksums of the source.
        record["model"] = {n: v for n, v in model.items() if n != "source"}
        return {
            "title": output.get("title") or str(about)[:_LONGEST_TITLE] or "song",
            "artist": output.get("artist", ""),
            "lyrics": request.get("lyrics", ""),
            "comment": f"Made with khala-mlx, seed {request.get('seed')}; AI-generated.",
            "licence": _licence_tag(model),
            "prompt": about,
            "seed": str(request.get("seed", "")),
            "model": model.get("name", ""),
            # ASCII, which the tags of every format store alike.
            "record": json.dumps(record, separators=(",", ":")),
        }


def _licence_tag(model: Mapping[str, Any]) -> str:
    licence = model.get("licence")
    return f"Made with weights under {licence}" if licence else ""


def take_path(path: Path) -> Path:
    """song.wav -> song.take.safetensors"""
    return path.with_suffix(SUFFIX)


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Raise KhalaError if the song, its record or its take exists or could not be written."""
    if not overwrite:
        for each in (path, sidecar_path(path), take_path(path)):
            check_destination(each)
