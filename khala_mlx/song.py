"""A finished song: its sound, its codes, and all that is needed to make it again."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from khala_mlx import audio
from khala_mlx.config import Strict
from khala_mlx.errors import ConfigError, KhalaError, KhalaWarning
from khala_mlx.files import appears_whole, check_destination
from khala_mlx.prompt import Prompt

SIDECAR_VERSION = 1


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
        """The request recorded in a song.json; fields it lacks have their defaults.

        Raises:
            KhalaError: if the file cannot be read, is no sidecar, or holds wrong values.
        """
        try:
            sidecar = json.loads(path.read_text(encoding="utf-8"))
            recorded = sidecar["request"]
            values = {**cls().to_dict(), **recorded}
        except OSError as error:
            raise KhalaError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise KhalaError(f"{path} is no song.json written by khala.") from error
        try:
            return cls.from_dict(values, str(path))
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
        overwrite: bool = False,
    ) -> Path:
        """Write the sound (wav, flac, ogg, mp3 by suffix), song.json and song.take.safetensors.

        Samples beyond full scale are reported as a KhalaWarning; by default the song is then
        scaled down to -1 dBFS instead of clipped. `bit_depth` is "16", "24" or "float".

        Raises:
            KhalaError: if one of the three files exists (and `overwrite` is false), the suffix or
                depth cannot be served, or writing fails.
        """
        path = Path(path)
        audio.check_output(path, bit_depth)
        audio.check_waveform(self.waveform)
        check_free(path, overwrite=overwrite)
        waveform, levels = audio.fit_scale(self.waveform, normalize=normalize)
        self.metadata["output"] = {"file": path.name, "bit_depth": bit_depth, **levels}
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
        # WAV comments over 2045 characters vanish silently, so only a short note goes in;
        # the sidecar holds everything.
        request = self.metadata.get("request", {})
        about = request.get("description") or request.get("tags") or request.get("genre") or "song"
        note = f"Made with khala-mlx, seed {request.get('seed')}; AI-generated."
        return {"title": str(about)[:200], "comment": note}


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


def warn_other_model(sidecar: Path, identity: str) -> None:
    """Warn if a song.json names another model than the one of this `identity`."""
    model = json.loads(sidecar.read_text(encoding="utf-8")).get("model")
    recorded = model.get("config_sha256") if isinstance(model, dict) else None
    if recorded and recorded != identity:
        warnings.warn(
            f"{sidecar} was made by another model ({model.get('name')}): the song will differ.",
            KhalaWarning,
            stacklevel=2,
        )


def warn_other_adapters(sidecar: Path, adapters: list[dict[str, Any]]) -> None:
    """Warn if a song.json names other adapters than these (see Khala.adapters)."""
    model = json.loads(sidecar.read_text(encoding="utf-8")).get("model")
    found = model.get("adapters") if isinstance(model, dict) else None
    recorded = [each for each in found or [] if isinstance(each, dict)]

    def effect(every: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
        return [(each.get("sha256"), each.get("scale")) for each in every]

    if effect(recorded) != effect(adapters):
        told = ", ".join(f"{each.get('name')} at {each.get('scale')}" for each in recorded)
        warnings.warn(
            f"{sidecar} was made with other adapters ({told or 'none'}): the song will differ.",
            KhalaWarning,
            stacklevel=2,
        )
