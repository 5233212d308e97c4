"""A finished song: its sound, its codes, and all that is needed to make it again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.audio import files as audio
from khala_mlx.audio import player
from khala_mlx.audio.mastering import Finish
from khala_mlx.audio.tags import clean
from khala_mlx.errors import AudioError, KhalaWarning
from khala_mlx.song.record import read_record, sidecar_path
from khala_mlx.song.take import SUFFIX, Take
from khala_mlx.storage.atomic import appears_whole, check_destination
from khala_mlx.text import shown

SIDECAR_VERSION = 1
_LONGEST_TITLE = 200
# Left out of the tags, so that the same song is the same file.
_OF_ONE_RUN = ("output", "created", "timings")


@dataclass
class Song:
    """A song in memory.

    Attributes:
        waveform: float32 [L, C], about -1..1.
        sample_rate: samples a second.
        codes: integers [K, T], or of the first layers alone where it is a draft.
        metadata: the content of the sidecar.
        take: what the song was made from.
    """

    waveform: np.ndarray
    sample_rate: int
    codes: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)
    take: Take | None = None

    @property
    def duration(self) -> float:
        """Seconds."""
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

        Samples beyond full scale are reported as a KhalaWarning; by default the song is then
        scaled down to -1 dBFS instead of clipped.

        Args:
            bit_depth: "16", "24" or "float".
            loudness: LUFS to bring the song to, as far as a true peak of -1 dBTP allows.
            fade: seconds over which the end fades out.
            title, artist: for the file's tags; the title is by default what was asked for.
            finishing: a take and a sidecar that are there are this song's own, from when it was
                begun, and are replaced.

        Raises:
            KhalaError: if one of the three files exists (and `overwrite` is false), the suffix or
                depth cannot be served, or writing fails.
        """
        path = Path(path)
        audio.check_output(path, bit_depth)
        audio.check_waveform(self.waveform)
        self._check()
        finish = Finish(normalize, loudness, fade, bit_depth)
        if finishing:
            check_destination(path)
        else:
            check_free(path, overwrite=overwrite)
        waveform, levels = finish.apply(self.waveform, self.sample_rate)
        named = {n: clean(str(text)) for n, text in (("title", title), ("artist", artist)) if text}
        file = {"file": clean(path.name), "bit_depth": bit_depth}
        self.metadata["output"] = {**file, **named, **levels}
        replace = overwrite or finishing
        # Nested, so that a failure while writing any of the three leaves none of them. The sound
        # appears last: where it is, all is.
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
        """Play on the default device and wait for the end."""
        waveform = audio.fit_scale(self.waveform, normalize=True)[0]
        player.play(player.Track.whole(waveform, self.sample_rate))

    def _check(self) -> None:
        """Refuse what a song of one's own may have been given, and no file holds."""
        rate, codes = self.sample_rate, self.codes
        if not isinstance(rate, (int, np.integer)) or not 0 < rate < 2**31:
            raise AudioError(f"sample_rate has to be a whole number above 0, got {shown(rate)}.")
        if not isinstance(codes, np.ndarray) or codes.ndim != 2 or codes.dtype.kind not in "iu":
            raise AudioError("The codes of a song have to be an array of integers [K, T].")

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
            # ASCII, which every tag of every format holds alike.
            "record": json.dumps(record, separators=(",", ":")),
        }


def _licence_tag(model: Mapping[str, Any]) -> str:
    licence = model.get("licence")
    return f"Made with weights under {licence}" if licence else ""


def take_path(path: Path) -> Path:
    """song.wav -> song.take.safetensors"""
    return path.with_suffix(SUFFIX)


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Refuse if the song, its sidecar or its take exists already or could not be written."""
    if not overwrite:
        for each in (path, sidecar_path(path), take_path(path)):
            check_destination(each)


def warn_other_model(path: Path, identity: str) -> None:
    """Warn if the record of a song names another model than the one of this `identity`."""
    model = read_record(path).get("model")
    known = model.get("config_sha256") if isinstance(model, dict) else None
    if isinstance(model, dict) and known and known != identity:
        warnings.warn(
            f"{path} was made by another model ({shown(model.get('name'))}): the song will differ.",
            KhalaWarning,
            stacklevel=2,
        )


def continued(path: Path) -> dict[str, Any]:
    """What a record tells of the beginning that its song took over; empty if it took none."""
    told = read_record(path).get("continued")
    return told if isinstance(told, dict) else {}


def warn_continued(path: Path, beginning: Mapping[str, Any] | None) -> None:
    """Warn if the song of a record took over another beginning than this, or there is none."""
    told = continued(path)
    if not told or (beginning and told.get("codes_sha256") == beginning["codes_sha256"]):
        return
    how = "with another beginning" if beginning else "without --continue"
    warnings.warn(
        f"The song of {path} goes on from {shown(told.get('file'))}, "
        f"{shown(told.get('seconds'))} s of it: {how} this is another song.",
        KhalaWarning,
        stacklevel=2,
    )


def warn_other_adapters(sidecar: Path, adapters: list[dict[str, Any]]) -> None:
    """Warn if a song.json names other adapters than these (see Khala.adapters)."""
    model = read_record(sidecar).get("model")
    found = model.get("adapters") if isinstance(model, dict) else None
    listed = found if isinstance(found, list) else []
    named = [each for each in listed if isinstance(each, dict)]

    def effect(every: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
        return [(each.get("sha256"), each.get("scale")) for each in every]

    if effect(named) != effect(adapters):
        told = ", ".join(
            f"{shown(each.get('name'))} at {shown(each.get('scale'))}" for each in named
        )
        warnings.warn(
            f"{sidecar} was made with other adapters ({told or 'none'}): the song will differ.",
            KhalaWarning,
            stacklevel=2,
        )
