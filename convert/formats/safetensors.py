"""safetensors files, read lazily and written as a stream, so that none is ever held whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.convert.formats.pickle_objects import is_shape
from khala_mlx.convert.formats.tensors import CARRIERS, Tensor, stored
from khala_mlx.errors import ConvertError
from khala_mlx.text import shown

# The released models' headers take 50 KB. The format allows 100 MB, which would take 1 GB to parse.
MAX_HEADER = 16 << 20
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32", "uint8": "U8"}
_DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * CARRIERS[self.dtype].itemsize


@dataclass(frozen=True)
class Output:
    """Tensors that are made together: `make()` yields their values in order, in pieces."""

    entries: tuple[Entry, ...]
    make: Callable[[], Iterator[np.ndarray]]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)


def write(path: Path, outputs: Sequence[Output], on_bytes: Callable[[int], None]) -> None:
    """Write a file: the header first, then the values as they are made.

    Raises:
        OSError: if it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for entry in (entry for output in outputs for entry in output.entries):
        offsets = [end, end + entry.bytes]
        header[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for output in outputs:
            written = 0
            for values in output.make():
                piece = np.ascontiguousarray(values)
                file.write(piece.reshape(-1).view(np.uint8).data)
                written += piece.nbytes
                on_bytes(piece.nbytes)
            if written != output.bytes:
                raise RuntimeError(f"{output.entries[0].name}: {written} bytes, not {output.bytes}")


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, lazily.

    Raises:
        ConvertError: if the file is truncated, or its header malformed or untrue.
    """
    what = shown(path.name)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ConvertError(f"{what} is not a safetensors file or is truncated.")
            header = json.loads(file.read(length), object_pairs_hook=_unique(what))
    except OSError as error:
        raise ConvertError(f"{what} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{what} has a malformed safetensors header.") from error
    if not isinstance(header, dict):
        raise ConvertError(f"{what} has a malformed safetensors header.")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _tensor(name, entry, path, 8 + length)
        spans.append(span)
    _check_spans(sorted(spans), size - 8 - length, what)
    return tensors


def _unique(what: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                raise ConvertError(f"{what} holds {shown(key)} twice.")
            made[key] = value
        return made

    return build


def _tensor(name: str, entry: Any, path: Path, start: int) -> tuple[Tensor, tuple[int, int]]:
    fields = entry if isinstance(entry, dict) else {}
    code, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    shape = tuple(shape) if isinstance(shape, list) else None
    offsets = tuple(offsets) if isinstance(offsets, list) else ()
    if not isinstance(code, str) or not is_shape(shape) or not is_shape(offsets):
        raise ConvertError(f"{shown(path.name)} describes {shown(name)} in a malformed way.")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ConvertError(f"{shown(path.name)} describes {shown(name)} in a malformed way.")
    if code not in _DTYPES:
        # Harmless while nothing needs it; reading its values is an error.
        return Tensor(name, shape, code, _unreadable), offsets
    tensor = stored(name, shape, _DTYPES[code], path, start + offsets[0])
    if tensor.bytes != offsets[1] - offsets[0]:
        raise ConvertError(
            f"{shown(path.name)} gives {shown(name)} bytes that do not fit its shape."
        )
    return tensor, offsets


def _unreadable(start: int, stop: int) -> np.ndarray:
    raise ConvertError("A tensor of a type that is not a float cannot be converted.")


def _check_spans(spans: list[tuple[int, int]], length: int, what: str) -> None:
    end = 0
    for start, stop in spans:
        if start != end:
            raise ConvertError(f"{what} has tensors that overlap or leave gaps.")
        end = stop
    if end > length:
        raise ConvertError(f"{what} is truncated: {length} of {end} bytes of values are there.")
    if end < length:
        raise ConvertError(f"{what} holds {length - end} bytes that belong to no tensor.")
