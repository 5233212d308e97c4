"""The beginning that a song goes on from: a take's codes, or any sound through the codec."""

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
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.prompt.duration import clock_time
from khala_mlx.prompt.request import Request
from khala_mlx.song.record import read_request
from khala_mlx.song.take import Take
from khala_mlx.text import resuming, shown


@dataclass(frozen=True)
class Beginning:
    """What a song goes on from.

    Attributes:
        codes: int [k, T0], k at least the coarse layers.
        request: what was asked for when it was made, where that is known.
        told: file, frames, seconds and the sha256 of the codes, for the sidecar.
    """

    codes: np.ndarray
    request: Request
    told: dict[str, Any]


def read_beginning(
    khala: Any,
    source: str | Path,
    until: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Beginning:
    """The codes of a take or a sound file before `until` seconds, or all of them.

    Raises:
        KhalaError: if the file cannot be read or holds nothing before that point.
    """
    source = Path(source)
    if _is_take(source):
        codes, request = _of_take(khala, source)
    else:
        codes, request = _of_sound(khala, source, on_progress)
    frames = _frames_before(khala, source, codes.shape[1], until)
    codes = codes[:, :frames]
    told = {
        "file": clean(source.name),
        "frames": frames,
        # Up, so that `until` these seconds are so many frames again.
        "seconds": math.ceil(1000 * frames / khala.config.codec.frame_rate) / 1000,
        "codes_sha256": hashlib.sha256(codes.astype("<i4").tobytes()).hexdigest(),
    }
    return Beginning(codes, request, told)


def measure_beginning(khala: Any, source: Path, until: float | None) -> tuple[int, Request]:
    """Frames and request of what `read_beginning` would read; no model is loaded for it."""
    if _is_take(source):
        codes, request = _of_take(khala, source)
        total = codes.shape[1]
    else:
        config = khala.config.codec
        total, request = sound_length(source, config.sample_rate) // config.hop, _asked(source)
    return _frames_before(khala, source, total, until), request


def _is_take(source: Path) -> bool:
    return source.suffix == ".safetensors"


def _frames_before(khala: Any, source: Path, total: int, until: float | None) -> int:
    rate = khala.config.codec.frame_rate
    frames = total if until is None else math.floor(until * rate)
    if not 1 <= frames <= total:
        raise KhalaError(
            f"{source} lasts {clock_time(total / rate)}: --from has to lie inside it, and above 0."
        )
    return frames


def longer(request: Request, seconds: float, most_minutes: int) -> Request:
    """`request` without the length it had, its minutes such that `seconds` can go on."""
    minutes = int(seconds) // 60 + 1
    return replace(
        request,
        minutes=min(max(request.minutes, minutes), most_minutes),
        seconds=None,
        min_seconds=0.0,
        refine_seed=None,
    )


def _of_take(khala: Any, path: Path) -> tuple[np.ndarray, Request]:
    take = Take.load(path)
    if not take.layers:
        raise KhalaError(f"{path} holds no codes yet: go on with `{resuming(path)}`.")
    model = take.metadata["model"]
    if model.get("config_sha256", khala.identity) != khala.identity:
        warnings.warn(
            f"{path} was made by another model ({shown(model.get('name'))}); if that had another "
            "codec, the beginning will be noise.",
            KhalaWarning,
            stacklevel=3,
        )
    return take.codes, take.request


def _of_sound(
    khala: Any, path: Path, on_progress: Callable[[int, int], None] | None
) -> tuple[np.ndarray, Request]:
    config = khala.config.codec
    waveform = read_audio(path, config.sample_rate, config.channels)
    # Whole frames: the codec would fill the last one up with silence, amid the song.
    whole = len(waveform) // config.hop * config.hop
    if not whole:
        raise KhalaError(f"{path} is shorter than one frame, {config.hop} samples.")
    codes = khala.codec.encode(waveform[:whole], on_progress=on_progress)
    return codes, _asked(path)


def _asked(sound: Path) -> Request:
    try:
        return read_request(sound)
    except KhalaError:
        return Request()
