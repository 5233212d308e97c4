"""A finished song: its sound, its codes, and all that is needed to make it again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from khala_mlx import audio, tags
from khala_mlx.config import Strict
from khala_mlx.errors import ConfigError, KhalaError, KhalaWarning
from khala_mlx.files import appears_whole, check_destination
from khala_mlx.finish import Finish
from khala_mlx.names import shown
from khala_mlx.prompt import Prompt

SIDECAR_VERSION = 1
_LONGEST_TITLE = 200
# Left out of the tags, so that the same song is the same file.
_OF_ONE_RUN = ("output", "created", "timings")


@dataclass(frozen=True)
class Request(Strict):
    """Everything one asks for when asking for a song; with the model, it determines the song."""

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

    def __post_init__(self) -> None:
        self.check_types("The request")

    @property
    def prompt(self) -> Prompt:
        """The part of the request that the models read."""
        return Prompt(**{f.name: getattr(self, f.name) for f in fields(Prompt)})

    @classmethod
    def from_sidecar(cls, path: Path) -> Self:
        """The request recorded in a song.json or a sound file; see `recorded`.

        Raises:
            KhalaError: if the file cannot be read, is no record, or holds wrong values.
        """
        return cls.from_record(recorded(path), str(path))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> Self:
        """The request in what `recorded` found at `where`; fields it lacks have their defaults.

        Raises:
            KhalaError: if it holds wrong values.
        """
        try:
            return cls.from_dict({**cls().to_dict(), **record["request"]}, where)
        except ConfigError as error:
            raise KhalaError(str(error)) from error


@dataclass
class Song:
    """A song in memory.

    Attributes:
        waveform: float32 [L, C], about -1..1.
        sample_rate: samples a second.
        codes: integers [K, T].
        metadata: the content of the sidecar.
    """

    waveform: np.ndarray
    sample_rate: int
    codes: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)

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
    ) -> Path:
        """Write the sound (wav, flac, ogg, mp3 by suffix), song.json and song.take.safetensors.

        Samples beyond full scale are reported as a KhalaWarning; by default the song is then
        scaled down to -1 dBFS instead of clipped.

        Args:
            bit_depth: "16", "24" or "float".
            loudness: LUFS to bring the song to, as far as a true peak of -1 dBTP allows.
            fade: seconds over which the end fades out.
            title, artist: for the file's tags; the title is by default what was asked for.

        Raises:
            KhalaError: if one of the three files exists (and `overwrite` is false), the suffix or
                depth cannot be served, or writing fails.
        """
        path = Path(path)
        audio.check_output(path, bit_depth)
        audio.check_waveform(self.waveform)
        finish = Finish(normalize, loudness, fade, bit_depth)
        check_free(path, overwrite=overwrite)
        waveform, levels = finish.apply(self.waveform, self.sample_rate)
        named = {name: text for name, text in (("title", title), ("artist", artist)) if text}
        self.metadata["output"] = {"file": path.name, "bit_depth": bit_depth, **named, **levels}
        # Nested, so that a failure while writing any of the three leaves none of them.
        with (
            appears_whole(take_path(path), overwrite=overwrite) as take,
            appears_whole(sidecar_path(path), overwrite=overwrite) as sidecar,
        ):
            self._write_take(take)
            text = json.dumps(self.metadata, indent=2, ensure_ascii=False)
            sidecar.write_text(text + "\n", encoding="utf-8")
            audio.write_audio(
                path,
                waveform,
                self.sample_rate,
                bit_depth=bit_depth,
                tags=self._tags(),
                overwrite=overwrite,
            )
        return path

    def play(self) -> None:
        """Play on the default device and wait for the end."""
        audio.play(audio.fit_scale(self.waveform, normalize=True)[0], self.sample_rate)

    def _write_take(self, path: Path) -> None:
        import mlx.core as mx

        arrays = {"codes": mx.array(self.codes.astype(np.int32))}
        if coarse := self.metadata.get("num_coarse"):
            arrays["coarse"] = mx.array(self.codes[:coarse].astype(np.int32))
        text = json.dumps({**self.metadata, "refined_layers": len(self.codes)}, ensure_ascii=False)
        mx.save_safetensors(str(path), arrays, {"khala": text})

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


def sidecar_path(path: Path) -> Path:
    """song.wav -> song.json"""
    return path.with_suffix(".json")


def take_path(path: Path) -> Path:
    """song.wav -> song.take.safetensors"""
    return path.with_suffix(".take.safetensors")


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Refuse if the song, its sidecar or its take exists already or could not be written."""
    if not overwrite:
        for each in (path, sidecar_path(path), take_path(path)):
            check_destination(each)


def recorded(path: Path) -> dict[str, Any]:
    """The record of a song: a song.json, or that in the tags of a sound file or lying beside it.

    Raises:
        KhalaError: if there is none.
    """
    try:
        if path.suffix.lower() not in audio.SUFFIXES:
            return _record(path.read_text(encoding="utf-8"))
        path.stat()
        if text := tags.read(path).get("record"):
            return _record(text)
        return _record(sidecar_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        if path.suffix.lower() in audio.SUFFIXES and path.is_file():
            raise KhalaError(
                f"{path} holds no record of how it was made, and no {sidecar_path(path).name} lies "
                "beside it."
            ) from error
        raise KhalaError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KhalaError(f"{path} is no song.json written by khala.") from error


def _record(text: str) -> dict[str, Any]:
    record = json.loads(text)
    if not isinstance(record["request"], dict):
        raise TypeError
    return dict(record)


def warn_other_model(path: Path, identity: str) -> None:
    """Warn if the record of a song names another model than the one of this `identity`."""
    model = recorded(path).get("model")
    known = model.get("config_sha256") if isinstance(model, dict) else None
    if isinstance(model, dict) and known and known != identity:
        warnings.warn(
            f"{path} was made by another model ({shown(model.get('name'))}): the song will differ.",
            KhalaWarning,
            stacklevel=2,
        )


def warn_other_adapters(sidecar: Path, adapters: list[dict[str, Any]]) -> None:
    """Warn if a song.json names other adapters than these (see Khala.adapters)."""
    model = recorded(sidecar).get("model")
    found = model.get("adapters") if isinstance(model, dict) else None
    named = [each for each in found or [] if isinstance(each, dict)]

    def effect(every: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
        return [(each.get("sha256"), each.get("scale")) for each in every]

    if effect(named) != effect(adapters):
        told = ", ".join(f"{each.get('name')} at {each.get('scale')}" for each in named)
        warnings.warn(
            f"{sidecar} was made with other adapters ({told or 'none'}): the song will differ.",
            KhalaWarning,
            stacklevel=2,
        )
