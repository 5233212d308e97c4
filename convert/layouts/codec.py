"""Upstream's DAC codec: names, sizes from shapes, weight norm folded into plain weights.

It comes as a Lightning checkpoint (`state_dict`, keys under `generator.`) or as the generator's
own state dict. Discriminators, optimisers and the quantiser's training statistics stay behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.config import DILATIONS, CodecConfig
from khala_mlx.convert.formats.pickle_objects import TensorRef
from khala_mlx.convert.formats.tensors import Tensor, blocks, to_float32
from khala_mlx.convert.formats.torch_file import TorchZip
from khala_mlx.convert.layouts.parts import (
    Part,
    count_blocks,
    require_floats,
    require_names,
    require_shapes,
)
from khala_mlx.errors import ConvertError
from khala_mlx.storage.shapes import codec_shapes
from khala_mlx.text import shown

GENERATOR = "generator."
_QUANTIZER = "quantizer.vq_layer_"
# Training statistics, and second names of the codebooks, which upstream loads before the first.
_EXTRAS = ("_codebook.inited", "_codebook.cluster_size", "_codebook.embed_avg", "quantizer.embed_")


def needed_entries(path: Path) -> set[str]:
    """Which entries of a codec checkpoint `codec_part` reads, by its directory and pickle alone.

    Raises:
        ConvertError: naming every tensor that is missing.
    """
    archive = TorchZip(path)
    values, prefix = _state(archive.root, archive.what)
    inner = [name.removeprefix(prefix) for name in values if name.startswith(prefix)]
    wanted = _names(inner).sources()
    require_names(wanted, inner)
    refs = [values[prefix + name] for name in wanted]
    return {f"data/{ref.storage.key}" for ref in refs if isinstance(ref, TensorRef)}


@dataclass
class _Names:
    """The model folder's prefixes and upstream's, by kind."""

    convs: dict[str, str] = field(default_factory=dict)
    transposed: dict[str, str] = field(default_factory=dict)
    snakes: dict[str, str] = field(default_factory=dict)
    codebooks: list[str] = field(default_factory=list)

    def sources(self) -> list[str]:
        """Every tensor upstream must hold."""
        convs = [*self.convs.values(), *self.transposed.values()]
        return [
            *(f"{at}.{kind}" for at in convs for kind in ("weight_g", "weight_v", "bias")),
            *(f"{at}.alpha" for at in self.snakes.values()),
            *self.codebooks,
        ]


def codec_part(path: Path) -> Part[CodecConfig]:
    """Open a codec checkpoint; its pickle is read without running it.

    Raises:
        ConvertError: naming every missing, or every misshapen tensor.
    """
    archive = TorchZip(path)
    values, prefix = _state(archive.root, archive.what)
    inner = [name.removeprefix(prefix) for name in values if name.startswith(prefix)]
    names = _names(inner)
    require_names(names.sources(), inner)
    tensors = {name: archive.tensor(values[prefix + name], name) for name in names.sources()}
    require_floats(tensors.values())
    config = _config(names, tensors)
    _check_shapes(names, tensors, config)
    used = {prefix + name for name in names.sources()}
    left = [name for name in values if name not in used]
    folded = _folded(names, tensors)
    return Part(
        name="codec",
        config=config,
        tensors={name: folded[name] for name in codec_shapes(config)},
        unused=tuple(name for name in left if not _is_extra(name, prefix)),
        ignored=tuple(name for name in left if _is_extra(name, prefix)),
    )


def _is_extra(name: str, prefix: str) -> bool:
    return not name.startswith(prefix) or any(extra in name for extra in _EXTRAS)


def _state(root: Any, what: str) -> tuple[dict[str, Any], str]:
    """The state dict and the prefix of the generator's keys in it."""
    values = root.get("state_dict", root) if isinstance(root, dict) else None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConvertError(f"{what} holds no state dict.")
    lightning = any(name.startswith(GENERATOR) for name in values)
    return values, GENERATOR if lightning else ""


def _names(there: list[str]) -> _Names:
    # Each half is a conv, its blocks, a snake and a conv, numbered through.
    encoder = max(1, count_blocks(there, "encoder.block.") - 3)
    decoder = max(1, count_blocks(there, "decoder.model.") - 3)
    names = _Names()
    names.convs["encoder.conv_in"] = "encoder.block.0"
    for index in range(encoder):
        here, upstream = f"encoder.blocks.{index}", f"encoder.block.{index + 1}.block"
        for unit in range(len(DILATIONS)):
            _unit(names, f"{here}.units.{unit}", f"{upstream}.{unit}.block")
        names.snakes[f"{here}.snake"] = f"{upstream}.{len(DILATIONS)}"
        names.convs[f"{here}.down"] = f"{upstream}.{len(DILATIONS) + 1}"
    names.snakes["encoder.snake"] = f"encoder.block.{encoder + 1}"
    names.convs["encoder.conv_out"] = f"encoder.block.{encoder + 2}"
    names.convs["decoder.conv_in"] = "decoder.model.0"
    for index in range(decoder):
        here, upstream = f"decoder.blocks.{index}", f"decoder.model.{index + 1}.block"
        names.snakes[f"{here}.snake"] = f"{upstream}.0"
        names.transposed[f"{here}.up"] = f"{upstream}.1"
        for unit in range(len(DILATIONS)):
            _unit(names, f"{here}.units.{unit}", f"{upstream}.{unit + 2}.block")
    names.snakes["decoder.snake"] = f"decoder.model.{decoder + 1}"
    names.convs["decoder.conv_out"] = f"decoder.model.{decoder + 2}"
    layers = max(1, count_blocks(there, _QUANTIZER))
    names.codebooks = [f"{_QUANTIZER}{layer}._codebook.embed" for layer in range(layers)]
    return names


def _unit(names: _Names, here: str, upstream: str) -> None:
    names.snakes[f"{here}.snake1"] = f"{upstream}.0"
    names.convs[f"{here}.conv1"] = f"{upstream}.1"
    names.snakes[f"{here}.snake2"] = f"{upstream}.2"
    names.convs[f"{here}.conv2"] = f"{upstream}.3"


def _config(names: _Names, tensors: dict[str, Tensor]) -> CodecConfig:
    def conv(upstream: str) -> tuple[int, int, int]:
        shape = tensors[f"{upstream}.weight_v"].shape
        if len(shape) != 3:
            raise ConvertError(
                f"{shown(upstream)}.weight_v is not a convolution but {list(shape)}."
            )
        return shape[0], shape[1], shape[2]

    encoder_dim, channels, _ = conv(names.convs["encoder.conv_in"])
    _, decoder_dim, _ = conv(names.convs["decoder.conv_out"])
    latent_dim, _, _ = conv(names.convs["encoder.conv_out"])
    book = tensors[names.codebooks[0]].shape
    return CodecConfig(
        channels=channels,
        encoder_dim=encoder_dim,
        # A stride is half its kernel.
        encoder_strides=tuple(
            conv(upstream)[2] // 2
            for here, upstream in names.convs.items()
            if here.endswith(".down")
        ),
        decoder_dim=decoder_dim,
        decoder_rates=tuple(conv(upstream)[2] // 2 for upstream in names.transposed.values()),
        latent_dim=latent_dim,
        num_codebooks=len(names.codebooks),
        codebook_size=book[0] if book else 0,
    )


def _check_shapes(names: _Names, tensors: dict[str, Tensor], config: CodecConfig) -> None:
    ours = codec_shapes(config)
    wanted: dict[str, tuple[int, ...]] = {}
    for here, upstream in (names.convs | names.transposed).items():
        out, kernel, into = ours[f"{here}.weight"]
        first, second = (into, out) if here in names.transposed else (out, into)
        wanted[f"{upstream}.weight_v"] = (first, second, kernel)
        wanted[f"{upstream}.weight_g"] = (first, 1, 1)
        wanted[f"{upstream}.bias"] = (out,)
    for here, upstream in names.snakes.items():
        wanted[f"{upstream}.alpha"] = (1, *ours[f"{here}.alpha"], 1)
    wanted |= dict.fromkeys(names.codebooks, ours["quantizer.codebooks"][1:])
    require_shapes(
        [
            (name, tensors[name].shape, shape)
            for name, shape in wanted.items()
            if tensors[name].shape != shape
        ],
    )


def _folded(names: _Names, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for here, upstream in (names.convs | names.transposed).items():
        made[f"{here}.weight"] = fold_weight_norm(
            tensors[f"{upstream}.weight_g"],
            tensors[f"{upstream}.weight_v"],
            transposed=here in names.transposed,
        )
        made[f"{here}.bias"] = tensors[f"{upstream}.bias"]
    for here, upstream in names.snakes.items():
        made[f"{here}.alpha"] = _flat(tensors[f"{upstream}.alpha"])
    made["quantizer.codebooks"] = _stacked([tensors[name] for name in names.codebooks])
    return made


def fold_weight_norm(g: Tensor, v: Tensor, *, transposed: bool) -> Tensor:
    """The convolution g * v / |v| as [out, kernel, in] float32; |v| is over all axes but the first.

    torch has [out, in, kernel], or [in, out, kernel] when transposed.
    """
    first, second, kernel = v.shape
    shape = (second, kernel, first) if transposed else (first, kernel, second)

    def read(start: int, stop: int) -> np.ndarray:
        gains = to_float32(g.whole(), g).reshape(-1)
        out = np.empty(shape, np.float32)
        for low, high in blocks(v):
            values = to_float32(v.read(low, high), v)
            # Summed in double and rounded once, so that the order of summation cannot matter.
            squares = np.square(values, dtype=np.float64).sum(axis=(1, 2))
            norms = np.sqrt(squares).astype(np.float32)
            if not norms.all():
                raise ConvertError(f"{shown(v.name)} has a row of zeros, which has no weight norm.")
            with np.errstate(over="ignore", invalid="ignore"):
                values = values * (gains[low:high] / norms)[:, None, None]
            if not np.isfinite(values).all():
                raise ConvertError(f"{shown(v.name)} overflows when its weight norm is folded.")
            if transposed:
                out[:, :, low:high] = values.transpose(1, 2, 0)
            else:
                out[low:high] = values.transpose(0, 2, 1)
        return out[start:stop]

    return Tensor(v.name, shape, "float32", read, g.extents + v.extents)


def _flat(tensor: Tensor) -> Tensor:
    def read(start: int, stop: int) -> np.ndarray:
        return tensor.whole().reshape(-1)[start:stop]

    return Tensor(tensor.name, (tensor.size,), tensor.dtype, read, tensor.extents)


def _stacked(tensors: list[Tensor]) -> Tensor:
    def read(start: int, stop: int) -> np.ndarray:
        return np.stack([to_float32(each.whole(), each) for each in tensors[start:stop]])

    extents = tuple(extent for each in tensors for extent in each.extents)
    return Tensor(
        _QUANTIZER[:-1] + "s", (len(tensors), *tensors[0].shape), "float32", read, extents
    )
