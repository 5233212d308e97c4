"""What `khala info` shows of a song, a codes file, a take or a model folder."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.audio import tags
from khala_mlx.audio.files import load_codes, quiet_decoder, read_sound
from khala_mlx.audio.loudness import MOST_CHANNELS, levels
from khala_mlx.audio.plot import check_picture, draw
from khala_mlx.config import KhalaConfig
from khala_mlx.errors import AudioError, KhalaError
from khala_mlx.model.weights import PARTS, part_files
from khala_mlx.prompt.request import Request
from khala_mlx.prompt.scope import Scope
from khala_mlx.song.record import Record, sidecar_path
from khala_mlx.song.song import take_path
from khala_mlx.song.take import Take

# No honest safetensors header is larger; the format's own reader has the same limit.
_MAX_HEADER = 100_000_000
# Fields of a request that mean something with 0 and False, too.
_TELLING = ("seed", "refine_seed", "reachable_only")


def describe(path: Path) -> dict[str, Any]:
    """A flat report of whatever `path` is; no model is loaded."""
    if path.is_dir():
        return _model(path)
    if not path.is_file():
        raise KhalaError(f"There is no file or folder {path}.")
    if path.suffix == ".npz":
        codes = load_codes(path)
        return {"kind": "codes", "layers": codes.shape[0], "frames": codes.shape[1]}
    if path.suffix == ".safetensors":
        return _take(path)
    return _sound(path)


def picture(path: Path, plot: Path) -> None:
    """Draw a sound with the codes beside it, a take or a codes file.

    Raises:
        KhalaError: if there is nothing to draw, or matplotlib is missing.
    """
    check_picture(plot)
    if path.is_dir():
        raise KhalaError(f"{path} is a model; only sounds, takes and codes can be drawn.")
    if path.suffix == ".npz":
        draw(plot, title=path.name, codes=load_codes(path))
        return
    if path.suffix == ".safetensors":
        draw(plot, title=path.name, codes=_take_codes(path))
        return
    waveform, rate = read_sound(path)
    take = take_path(path)
    codes = _take_codes(take) if take.is_file() else None
    frame_rate = None if codes is None else codes.shape[1] * rate / len(waveform)
    draw(plot, title=path.name, sound=(waveform, rate), codes=codes, frame_rate=frame_rate)


def _model(folder: Path) -> dict[str, Any]:
    config = KhalaConfig.load(folder / "config.json")
    report: dict[str, Any] = {"kind": "model", "dtype": config.dtype, "fc1_bias": config.fc1_bias}
    bits = sorted({how.bits for how in config.quantization.values()})
    report["quantized"] = ", ".join(f"{b} bit" for b in bits) or "no"
    for part in PARTS:
        files = part_files(folder, part)
        headers = [_header(path) for path in files]
        numbers = sum(
            math.prod(entry["shape"])
            for h in headers
            for n, entry in h.items()
            if n != "__metadata__"
        )
        size = sum(path.stat().st_size for path in files)
        report[part] = f"{numbers / 1e6:.1f} M stored numbers, {size / 2**20:.1f} MiB"
    if scope := Scope.load(folder):
        report["knows"] = scope.summary
    layout, codec = config.tokens, config.codec
    report["codes"] = f"{layout.num_codebooks} layers of {layout.codebook_size}"
    report["sound"] = (
        f"{codec.sample_rate} Hz, {codec.channels} channels, {codec.frame_rate:.3f} frames/s"
    )
    report["windows"] = f"{config.backbone.context} tokens, {config.superres.context} rows"
    report["licence"] = config.licence
    report["source"] = config.source.get("repo") or config.source.get("layout") or "unknown"
    return report


def _sound(path: Path) -> dict[str, Any]:
    import soundfile

    try:
        with quiet_decoder():
            found = soundfile.info(os.fsencode(path))
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(
            f"{path} is not a sound file, codes file, take or model folder."
        ) from error
    waveform, rate = read_sound(path)
    report: dict[str, Any] = {
        "kind": "sound",
        "seconds": round(len(waveform) / rate, 3),
        "sample_rate": rate,
        "channels": waveform.shape[1],
        "format": f"{found.format} {found.subtype}",
    }
    if waveform.shape[1] <= MOST_CHANNELS:
        report |= levels(waveform, rate)
    there = tags.read(path)
    report |= {name: there[name] for name in ("title", "artist", "comment") if name in there}
    if "record" in there or sidecar_path(path).is_file():
        report |= _provenance(path)
    return report


def _provenance(path: Path) -> dict[str, Any]:
    """Return the record of a sound; a damaged one does not hide the sound itself."""
    try:
        return _song(Record.read(path).values, str(path))
    except KhalaError as error:
        return {"record": f"none that can be read: {error}"}


def _song(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    request = Request.from_record(record, where)
    told = {name: value for name, value in request.to_dict().items() if _is_said(name, value)}
    if "seconds" in told:
        # The longest it could become, not how long it is.
        told["max_seconds"] = told.pop("seconds")
    model = record.get("model")
    if isinstance(model, dict):
        told |= {name: model.get(name) for name in ("name", "licence") if model.get(name)}
        told["model"] = told.pop("name", "unknown")
    told |= {name: record[name] for name in ("generator", "created") if name in record}
    return told


def _is_said(name: str, value: Any) -> bool:
    """Return whether a field of a request says more than that nothing was asked."""
    return bool(value) or (name in _TELLING and value is not None)


def _take(path: Path) -> dict[str, Any]:
    take = Take.load(path)
    told = {"kind": "take", "layers": take.codebooks, "of_layers": take.num_codebooks}
    told |= {"frames": take.codes.shape[1], "whole": take.whole}
    if isinstance(seconds := take.metadata.get("seconds"), (int, float)):
        told["seconds"] = seconds
    return told | _song(take.metadata, str(path))


def _take_codes(path: Path) -> np.ndarray:
    codes = Take.load(path).codes
    if not codes.size:
        raise KhalaError(f"{path} holds no codes yet.")
    return codes


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__" and not all(isinstance(n, int) for n in entry["shape"]):
                    raise ValueError
    except (
        OSError,
        ValueError,
        struct.error,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise KhalaError(f"{path} is not a complete safetensors file.") from error
    return dict(header)
