"""Find a model folder, check and load its tensors. Strict: there is no way around it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from khala_mlx.config import WEIGHTS_LICENCE, KhalaConfig
from khala_mlx.errors import KhalaWarning, WeightsError
from khala_mlx.storage import hub
from khala_mlx.storage.paths import model_name, models_folder
from khala_mlx.text import is_plain_name, listed, shown

PARTS = ("backbone", "superres", "codec")
Part = TypeVar("Part", bound=nn.Module)

# MLX's CPU backend multiplies quantized matrices slower than plain ones, in 16 bits 10 to 60 times.
# There a part that takes at most this many bytes in float32 is dequantized. Users who quantize a
# larger one do not have the memory.
CPU_UNPACKED_BYTES = 2**30

# What `fingerprint` reads of each file; the first sample begins with the header.
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def find_model(source: str | Path) -> Path:
    """The folder of a model: the one in the box, a local folder, one downloaded, a Hub snapshot.

    Raises:
        KhalaError: if there is none, saying how to make one.
    """
    if not isinstance(source, (str, Path)):
        raise WeightsError(f"A model is named by text or a path, not by {shown(source)}.")
    if source == "demo":
        return Path(__file__).parents[1] / "demo"
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
    except RuntimeError as error:
        raise WeightsError(f"There is no model folder {source}, nor such a user.") from error
    except OSError as error:
        raise WeightsError(f"{shown(source)} is not a model folder: {error.strerror}.") from error
    if is_file:
        raise WeightsError(f"{path} is a file; a model is a folder made by `khala convert`.")
    downloaded = models_folder() / model_name(str(source))
    if not path.exists() and is_plain_name(downloaded.name) and downloaded.is_dir():
        path = downloaded
    if not path.exists():
        if not hub.is_repo_id(str(source)):
            raise WeightsError(
                f"There is no model folder {source}, nor is that the name of a Hub repository."
            )
        path = hub.download(str(source), lambda names: ("*.json", "*.safetensors", "*.md")).folder
        warnings.warn(
            f"{source} holds a model's weights under a licence of their own, see its page; the "
            f"released Khala weights are under {WEIGHTS_LICENCE}.",
            KhalaWarning,
            stacklevel=3,
        )
    if not (path / "config.json").is_file():
        raise WeightsError(
            f"{source} is not a model folder: it has no config.json. Convert checkpoints with "
            f"`khala convert {source} DEST`."
        )
    return path


def working_dtype(config: KhalaConfig) -> str:
    """What the language models compute in: what they are stored in, on the CPU backend float32."""
    return "float32" if mx.default_device() == mx.cpu else config.dtype


def part_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of one part: a single file, or those its index names.

    Raises:
        WeightsError: if a file is missing, or an index is malformed or points elsewhere.
    """
    index = folder / f"{part}.safetensors.index.json"
    if not index.exists():
        single = folder / f"{part}.safetensors"
        if not single.is_file():
            raise WeightsError(f"{folder} does not have {single.name}; convert the model again.")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is not a safetensors index.") from error
    if not files or any(Path(name).name != name for name in names):
        raise WeightsError(f"{index} names files outside its own folder.")
    if missing := [path.name for path in files if not path.is_file()]:
        raise WeightsError(f"{folder} does not have {', '.join(missing)}; convert the model again.")
    return files


def fingerprint(folder: Path) -> str:
    """A sha256 that tells models apart: of config.json and of samples of all tensors.

    Not of every byte: reading gigabytes would take longer than making a short song.

    Raises:
        WeightsError: if a file is missing.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in (path for part in PARTS for path in part_files(folder, part)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(size * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def read_tensors(files: list[Path]) -> dict[str, mx.array]:
    """All tensors of some safetensors files, lazily; duplicates and damage are errors."""
    tensors: dict[str, mx.array] = {}
    for path in files:
        try:
            loaded = mx.load(str(path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise WeightsError(f"{path} is not a complete safetensors file.") from error
        assert isinstance(loaded, dict)
        if doubled := sorted(set(tensors) & set(loaded)):
            raise WeightsError(f"{path} repeats tensors: {listed(doubled)}.")
        tensors.update(loaded)
    return tensors


def load_part(
    model: Part, folder: Path, part: str, config: KhalaConfig, dtype: mx.Dtype | None = None
) -> Part:
    """Fill `model` with the tensors of `part` in `folder` and evaluate them.

    Layers that config.json lists as quantised are turned into their quantized form first. With
    `dtype` every float tensor is cast to it, scales of quantized ones included. On the CPU backend
    the layers of a part of at most CPU_UNPACKED_BYTES are then dequantized, to `dtype` too.

    Raises:
        WeightsError: listing every missing, unknown and misshapen tensor at once.
    """
    # Known only before quantization: quantized tensors have other sizes.
    unpacked_bytes = sum(array.size * 4 for _, array in tree_flatten(model.parameters()))
    packed = pack_layers(model, part, config)
    fill_part(model, folder, part, dtype)
    if packed and mx.default_device() == mx.cpu and unpacked_bytes <= CPU_UNPACKED_BYTES:
        _unpack(model, dtype)
    return model


def pack_layers(model: nn.Module, part: str, config: KhalaConfig) -> bool:
    """Turn the layers that config.json lists for `part` into their quantized form; were there any?

    Raises:
        WeightsError: if a layer cannot be quantized as it says.
    """
    packed = {
        name.removeprefix(f"{part}."): how
        for name, how in config.quantization.items()
        if name.startswith(f"{part}.")
    }
    for how in set(packed.values()):
        try:
            nn.quantize(
                model,
                how.group_size,
                how.bits,
                mode=how.mode,
                class_predicate=lambda path, _, how=how: packed.get(path) == how,
            )
        except (ValueError, AttributeError) as error:
            raise WeightsError(
                f"config.json asks for a quantisation that fails: {error}"
            ) from error
    return bool(packed)


def fill_part(model: Part, folder: Path, part: str, dtype: mx.Dtype | None = None) -> Part:
    """Fill a model that has its final form with the tensors of `part`; see `load_part`."""
    tensors = read_tensors(part_files(folder, part))
    expected = dict(tree_flatten(model.parameters()))
    if problems := _differences(expected, tensors):
        raise WeightsError(f"The {part} in {folder} does not match its config.json: {problems}.")
    model.load_weights(list(tensors.items()), strict=True)
    del tensors, expected
    if dtype is not None:
        model.set_dtype(dtype)
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise WeightsError(f"The {part} in {folder} cannot be read: {error}") from error
    model.eval()
    return model


def _unpack(model: nn.Module, dtype: mx.Dtype | None) -> None:
    """Replace quantized layers by plain ones that hold the values they stand for."""
    layers = [
        (name, _plain(layer, dtype))
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    ]
    model.update_modules(tree_unflatten(layers))
    model.eval()
    mx.eval(model.parameters())


def _plain(layer: nn.Module, dtype: mx.Dtype | None) -> nn.Module:
    """The nn.Linear or nn.Embedding of a quantized layer."""
    weight = mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=dtype,
    )
    rows, columns = weight.shape
    if isinstance(layer, nn.QuantizedEmbedding):
        plain = nn.Embedding(rows, columns)
    else:
        plain = nn.Linear(columns, rows, bias="bias" in layer)
        if "bias" in layer:
            plain.bias = layer.bias
    plain.weight = weight
    return plain


def _differences(expected: Mapping[str, mx.array], found: Mapping[str, mx.array]) -> str:
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append(f"missing {listed(missing)}")
    if unknown := sorted(set(found) - set(expected)):
        problems.append(f"unknown {listed(unknown)}")
    for name in sorted(set(expected) & set(found)):
        if expected[name].shape != found[name].shape:
            ours, theirs = list(expected[name].shape), list(found[name].shape)
            problems.append(f"{name} has shape {theirs} instead of {ours}")
    return "; ".join(problems)
