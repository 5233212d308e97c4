"""Finished training runs as a source: three folders, each with one part and its sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from khala_mlx.config import (
    BackboneConfig,
    CodecConfig,
    KhalaConfig,
    SuperResConfig,
    TokenLayout,
    TransformerConfig,
)
from khala_mlx.convert.layouts.megatron_args import read_json
from khala_mlx.convert.layouts.model_folder import CONFIG, AnyConfig, open_part
from khala_mlx.convert.layouts.parts import Opened, Part, naming
from khala_mlx.convert.outputs import Packing
from khala_mlx.convert.tokenizer import Tokenizer, checked
from khala_mlx.errors import ConfigError, ConvertError
from khala_mlx.prompt.tokenizer import Tokenizer as RuntimeTokenizer
from khala_mlx.storage.shapes import Shapes, codec_shapes, transformer_shapes
from khala_mlx.text import listed, shown

LAYOUT = "training runs"

Sizes = TypeVar("Sizes", bound=TransformerConfig)


def open_runs(runs: Mapping[str, Path], licence: str) -> Opened:
    """Read what the runs of codec, backbone and superres say; tensors stay in their files.

    Raises:
        KhalaError: if a run is missing, unfinished or damaged, or two do not fit together.
    """
    codec = CodecConfig.from_dict(_told(runs, "codec")["codec"], _config_of(runs, "codec"))
    backbone, tokens = _language_model(runs, "backbone", BackboneConfig)
    superres, again = _language_model(runs, "superres", SuperResConfig)
    _require_same(tokens, again)
    try:
        # The biases of fc1 are trained as they count, once.
        config = KhalaConfig(
            tokens, backbone, superres, codec, dtype="float32", fc1_bias="single", licence=licence
        )
    except ConfigError as error:
        raise ConvertError(f"The runs do not fit together: {error}") from error
    return Opened(
        LAYOUT,
        _part(runs, "backbone", backbone, transformer_shapes(backbone)),
        _part(runs, "superres", superres, transformer_shapes(superres)),
        _part(runs, "codec", codec, codec_shapes(codec)),
        config,
    )


def fitting_tokenizer(path: Path, tokens: TokenLayout) -> Tokenizer:
    """The tokenizer of a model of one's own; it need not be Llama 3.1's.

    Raises:
        KhalaError: if it cannot be read, or its ids disagree with the token layout.
    """
    found = checked(path, "given", tokens)
    RuntimeTokenizer.from_file(path).check(tokens)
    return dataclasses.replace(found, notes=())


def require_whole_packing(opened: Opened, packing: Packing) -> None:
    """Refuse a group size that leaves matrices unpacked: small models have narrow rows."""
    if not packing.recipe:
        return
    sizes = listed(packing.recipe.group_sizes)
    for part in (opened.backbone, opened.superres):
        widths = {each.shape[1] for each in part.tensors.values() if len(each.shape) == 2}
        largest = max(packing.recipe.group_sizes)
        if left := sorted(width for width in widths if width % largest):
            raise ConvertError(
                f"The {part.name} has rows of {listed(left)}, which do not divide into groups of "
                f"{sizes}; quantise in smaller groups or not at all."
            )


def _config_of(runs: Mapping[str, Path], part: str) -> str:
    return str(runs[part] / CONFIG)


def _told(runs: Mapping[str, Path], part: str) -> dict[str, Any]:
    """config.json of a run; an unfinished one has none, that of a model folder holds more."""
    folder, about = runs[part], {}
    if (folder / CONFIG).is_file() and (folder / f"{part}.safetensors").is_file():
        about = read_json(folder / CONFIG)
    if part not in about or set(about) - {part, "tokens"}:
        raise ConvertError(f"{shown(str(folder))} holds no finished {part} run.")
    return about


def _language_model(
    runs: Mapping[str, Path], part: str, sizes: type[Sizes]
) -> tuple[Sizes, TokenLayout]:
    about, where = _told(runs, part), _config_of(runs, part)
    if "tokens" not in about:
        raise ConvertError(
            f"{shown(where)} is missing the token layout, an earlier version wrote it; repeat "
            f"`khala train {part}` with --resume, which adds it."
        )
    return sizes.from_dict(about[part], where), TokenLayout.from_dict(about["tokens"], where)


def _require_same(backbone: TokenLayout, superres: TokenLayout) -> None:
    names = [field.name for field in dataclasses.fields(TokenLayout)]
    differing = [name for name in names if getattr(backbone, name) != getattr(superres, name)]
    if differing:
        raise ConvertError(
            "The backbone and superres were trained with different token layouts: "
            f"{listed(differing)} differ."
        )


def _part(
    runs: Mapping[str, Path], part: str, config: AnyConfig, shapes: Shapes
) -> Part[AnyConfig]:
    found = open_part(runs[part], part, config, shapes)
    with naming(part):
        if found.unused:
            raise ConvertError(f"{len(found.unused)} tensors are unknown: {listed(found.unused)}.")
    return dataclasses.replace(found, root=runs[part])
