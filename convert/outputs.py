"""How a tensor becomes bytes of the model folder: dtype, scale, quantisation, file by file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from khala_mlx.config import Quantization
from khala_mlx.convert.formats.safetensors import Entry, Output
from khala_mlx.convert.formats.tensors import Tensor, blocks, narrow, to_float32
from khala_mlx.convert.layouts.parts import Part
from khala_mlx.convert.recipe import Recipe
from khala_mlx.errors import ConvertError
from khala_mlx.storage.shapes import is_fc1_bias
from khala_mlx.text import shown

# A file may not be larger on some hosts; beyond it a part is cut into several.
LARGEST_FILE = 5_000_000_000


@dataclass(frozen=True)
class Packing:
    """What tensors are stored as: the transformers' in `dtype` or quantized, the codec's apart."""

    dtype: str
    fc1_scale: float = 1.0
    recipe: Recipe = field(default_factory=Recipe)
    codec_dtype: str = "float32"


def transformer_outputs(part: Part[Any], packing: Packing) -> list[Output]:
    """Every tensor of a transformer as it is to be written."""
    outputs = []
    for name, tensor in part.tensors.items():
        scale = packing.fc1_scale if is_fc1_bias(name) else 1.0
        if how := packing.recipe.how(part.name, name, tensor.shape):
            outputs.append(_quantised(name, tensor, packing.dtype, how))
        else:
            outputs.append(_plain(name, tensor, packing.dtype, scale))
    return outputs


def codec_outputs(part: Part[Any], packing: Packing) -> list[Output]:
    """Every tensor of the codec; it computes in float32 whatever it is stored in."""
    return [_whole(name, tensor, packing.codec_dtype) for name, tensor in part.tensors.items()]


def packed_layers(part: Part[Any], packing: Packing) -> dict[str, Quantization]:
    """config.json's `quantization` for one part."""
    return {
        f"{part.name}.{name.removesuffix('.weight')}": how
        for name, tensor in part.tensors.items()
        if (how := packing.recipe.how(part.name, name, tensor.shape))
    }


def files(part: str, outputs: Sequence[Output]) -> list[tuple[str, list[Output]]]:
    """Which file takes which tensors; Hugging Face's names when there are several."""
    shards: list[list[Output]] = [[]]
    for output in outputs:
        held = sum(each.bytes for each in shards[-1])
        if shards[-1] and held + output.bytes > LARGEST_FILE:
            shards.append([])
        shards[-1].append(output)
    if len(shards) == 1:
        return [(f"{part}.safetensors", shards[0])]
    return [
        (f"{part}-{number:05d}-of-{len(shards):05d}.safetensors", shard)
        for number, shard in enumerate(shards, 1)
    ]


def index(part_files: Sequence[tuple[str, list[Output]]]) -> dict[str, Any]:
    """The index of a part cut into several files, in Hugging Face's format."""
    entries = [
        (file, entry) for file, shard in part_files for out in shard for entry in out.entries
    ]
    return {
        "metadata": {"total_size": sum(entry.bytes for _, entry in entries)},
        "weight_map": {entry.name: file for file, entry in entries},
    }


def _plain(name: str, tensor: Tensor, dtype: str, scale: float) -> Output:
    def make() -> Iterator[np.ndarray]:
        for start, stop in blocks(tensor):
            yield _converted(tensor, start, stop, dtype, scale)

    return Output((Entry(name, dtype, tensor.shape),), make)


def _whole(name: str, tensor: Tensor, dtype: str) -> Output:
    def make() -> Iterator[np.ndarray]:
        yield narrow(to_float32(tensor.whole(), tensor), dtype, tensor.name)

    return Output((Entry(name, dtype, tensor.shape),), make)


def _converted(tensor: Tensor, start: int, stop: int, dtype: str, scale: float) -> np.ndarray:
    raw = tensor.read(start, stop)
    values = to_float32(raw, tensor)
    if scale != 1.0:
        with np.errstate(over="ignore"):
            values = values * np.float32(scale)
        if not np.isfinite(values).all():
            raise ConvertError(f"{shown(tensor.name)} is too large to be doubled.")
    elif tensor.dtype == dtype:
        return raw
    return narrow(values, dtype, tensor.name)


def _quantised(name: str, tensor: Tensor, dtype: str, how: Quantization) -> Output:
    rows, columns = tensor.shape
    stem = name.removesuffix(".weight")
    groups = (rows, columns // how.group_size)
    entries = [Entry(name, "uint32", (rows, columns * how.bits // 32))]
    if how.mode == "affine":
        entries += [Entry(f"{stem}.{which}", dtype, groups) for which in ("scales", "biases")]
    else:
        # Powers of two, a byte each; these modes have no biases.
        entries.append(Entry(f"{stem}.scales", "uint8", groups))

    def make() -> Iterator[np.ndarray]:
        beside: list[list[np.ndarray]] = []
        for start, stop in blocks(tensor):
            packed, *rest = _pack(_converted(tensor, start, stop, dtype, 1.0), dtype, how)
            beside.append(rest)
            yield packed
        for pieces in zip(*beside, strict=True):
            yield from pieces

    return Output(tuple(entries), make)


def _pack(values: np.ndarray, dtype: str, how: Quantization) -> list[np.ndarray]:
    # MLX is needed, and loaded, only for this.
    import mlx.core as mx

    array = mx.array(values).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(values)
    arrays = mx.quantize(array, group_size=how.group_size, bits=how.bits, mode=how.mode)
    # NumPy has no bfloat16.
    plain = [each.view(mx.uint16) if each.dtype == mx.bfloat16 else each for each in arrays]
    return [np.array(each) for each in plain]


def unpacked(pieces: Sequence[tuple[np.ndarray, str]], how: Quantization) -> np.ndarray:
    """Rows of a matrix in float32 from those of its weight, scales and, if any, biases."""
    import mlx.core as mx

    weight, scales, *biases = [
        mx.array(values).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(values)
        for values, dtype in pieces
    ]
    plain = mx.dequantize(
        weight,
        scales,
        biases[0] if biases else None,
        group_size=how.group_size,
        bits=how.bits,
        mode=how.mode,
    )
    return np.array(plain.astype(mx.float32))
