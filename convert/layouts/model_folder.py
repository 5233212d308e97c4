"""A model folder as a source: to change the dtype, the fc1 bias or the quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from khala_mlx.config import CodecConfig, KhalaConfig, TransformerConfig
from khala_mlx.convert.formats.safetensors import read
from khala_mlx.convert.formats.tensors import Tensor
from khala_mlx.convert.layouts.megatron_args import read_json
from khala_mlx.convert.layouts.parts import (
    Opened,
    Part,
    naming,
    require_floats,
    require_names,
    require_shapes,
)
from khala_mlx.errors import ConvertError
from khala_mlx.storage.shapes import Shapes, codec_shapes, transformer_shapes
from khala_mlx.text import is_plain_name, shown

LAYOUT = "khala"
CONFIG = "config.json"
HUB_PATTERNS = (CONFIG, "*.safetensors", "*.safetensors.index.json", "tokenizer*.json")

AnyConfig = TypeVar("AnyConfig", bound=TransformerConfig | CodecConfig)


def open_model_folder(root: Path) -> Opened:
    """Read config.json and the headers; tensors stay in their files."""
    config = KhalaConfig.load(root / CONFIG)
    if config.quantization:
        raise ConvertError(
            "The source is quantised, which cannot be undone; convert from the original weights."
        )
    return Opened(
        LAYOUT,
        open_part(root, "backbone", config.backbone, transformer_shapes(config.backbone)),
        open_part(root, "superres", config.superres, transformer_shapes(config.superres)),
        open_part(root, "codec", config.codec, codec_shapes(config.codec)),
        config,
    )


def open_part(root: Path, part: str, config: AnyConfig, shapes: Shapes) -> Part[AnyConfig]:
    """One part by the names and shapes it must have; errors name the part."""
    with naming(part):
        return _checked_part(root, part, config, shapes)


def _checked_part(root: Path, part: str, config: AnyConfig, shapes: Shapes) -> Part[AnyConfig]:
    index = _index(root, part)
    tensors = stored_tensors(root, part)
    require_names(shapes, tensors)
    require_shapes(
        [
            (name, tensors[name].shape, shape)
            for name, shape in shapes.items()
            if tensors[name].shape != shape
        ],
    )
    unused = tuple(name for name in tensors if name not in shapes)
    found = {name: tensors[name] for name in shapes}
    require_floats(found.values())
    files = (index,) if index.is_file() else ()
    return Part(part, config, found, unused, files=files)


def stored_tensors(root: Path, part: str) -> dict[str, Tensor]:
    """Every tensor of a part by the name it has in its file or files, quantized ones in pieces."""
    index = _index(root, part)
    return _sharded(index) if index.is_file() else read(root / f"{part}.safetensors")


def _index(root: Path, part: str) -> Path:
    return root / f"{part}.safetensors.index.json"


def _sharded(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    files = list(places.values()) if isinstance(places, dict) else [None]
    tensors: dict[str, Tensor] = {}
    for file in sorted({name if isinstance(name, str) else "" for name in files}):
        if not is_plain_name(file):
            raise ConvertError(f"{shown(index.name)} is malformed.")
        for name, tensor in read(index.parent / file).items():
            if name in tensors:
                raise ConvertError(f"{shown(name)} is in two files that {index.name} lists.")
            tensors[name] = tensor
    return tensors
