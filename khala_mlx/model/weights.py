"""Find a model folder, and load its tensors strictly: every mismatch is an error."""

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
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.model.transformer import matrix
from khala_mlx.storage import hub
from khala_mlx.storage.paths import model_name, models_folder
from khala_mlx.text import is_plain_name, listed, shown

PARTS = ("backbone", "superres", "codec")
Part = TypeVar("Part", bound=nn.Module)

# MLX's CPU backend multiplies quantized matrices slower than plain ones, in 16 bits 10 to 60 times.
# On it a part of at most this many bytes in float32 is dequantized. Users who quantize a larger one
# do not have the memory.
CPU_DEQUANTIZED_BYTES = 2**30

# Samples that `fingerprint` reads of each file; the first holds the header.
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def find_model(source: str | Path) -> Path:
    """Return the folder of a model: "demo", a local folder, a downloaded model or a Hub repository.

    Raises:
        KhalaError: if there is no such model, with the way to get one.
    """
    if not isinstance(source, (str, Path)):
        raise KhalaError(f"A model must be text or a path, got {shown(source)}.")
    if source == "demo":
        return Path(__file__).parents[1] / "demo"
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
    except RuntimeError as error:
        raise KhalaError(f"There is no model folder {source}: its user does not exist.") from error
    except OSError as error:
        raise KhalaError(f"{shown(source)} is not a model folder: {error.strerror}.") from error
    if is_file:
        raise KhalaError(f"{path} is a file. Choose a folder made by `khala convert`.")
    downloaded = models_folder() / model_name(str(source))
    if not path.exists() and is_plain_name(downloaded.name) and downloaded.is_dir():
        path = downloaded
    if not path.exists():
        if not hub.is_repo_id(str(source)):
            raise KhalaError(f"There is no model folder or Hub repository {source}.")
        path = hub.download(str(source), lambda names: ("*.json", "*.safetensors", "*.md")).folder
        warnings.warn(
            f"The weights of {source} have their own licence, see its page. The released Khala "
            f"weights are under {WEIGHTS_LICENCE}.",
            KhalaWarning,
            stacklevel=3,
        )
    if not (path / "config.json").is_file():
        raise KhalaError(
            f"{source} is not a model folder: it has no config.json. Convert checkpoints with "
            f"`khala convert {source} DEST`."
        )
    return path


def working_dtype(config: KhalaConfig) -> str:
    """Return the dtype that the language models compute in: float32 on the CPU backend."""
    return "float32" if mx.default_device() == mx.cpu else config.dtype


def part_files(folder: Path, part: str) -> list[Path]:
    """Return the safetensors files of one part: a single file, or those in its index.

    Raises:
        KhalaError: if a file is missing, or an index is malformed or points elsewhere.
    """
    index = folder / f"{part}.safetensors.index.json"
    if not index.exists():
        single = folder / f"{part}.safetensors"
        if not single.is_file():
            raise KhalaError(f"{folder} does not have {single.name}. Convert the model again.")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KhalaError(f"{index} is not a safetensors index.") from error
    if not files or any(Path(name).name != name for name in names):
        raise KhalaError(f"{index} names files outside its own folder.")
    if missing := [path.name for path in files if not path.is_file()]:
        raise KhalaError(f"{folder} does not have {', '.join(missing)}. Convert the model again.")
    return files


def fingerprint(folder: Path) -> str:
    """Return a sha256 of config.json and of samples of all tensors, which identifies a model.

    Reading all bytes, gigabytes of them, would take longer than making a short song.

    Raises:
        KhalaError: if a file is missing.
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
    """Load the tensors of safetensors files lazily; duplicates and damage are errors."""
    tensors: dict[str, mx.array] = {}
    for path in files:
        try:
            loaded = mx.load(str(path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise KhalaError(f"{path} is not a complete safetensors file.") from error
        assert isinstance(loaded, dict)
        if doubled := sorted(set(tensors) & set(loaded)):
            raise KhalaError(f"{path} repeats tensors: {listed(doubled)}.")
        tensors.update(loaded)
    return tensors


def load_part(
    model: Part, folder: Path, part: str, config: KhalaConfig, dtype: mx.Dtype | None = None
) -> Part:
    """Fill `model` with the tensors of `part` in `folder` and evaluate them.

    Layers that config.json lists as quantized are quantized first. With `dtype` every float tensor
    is cast to it, also the scales of quantized ones. On the CPU backend a part of at most
    CPU_DEQUANTIZED_BYTES is then dequantized, to `dtype` too.

    Raises:
        KhalaError: listing every missing, unknown and misshapen tensor at once.
    """
    # Known only before quantization: quantized tensors have other sizes.
    plain_bytes = sum(array.size * 4 for _, array in tree_flatten(model.parameters()))
    quantized = quantize_layers(model, part, config)
    fill_part(model, folder, part, dtype)
    if quantized and mx.default_device() == mx.cpu and plain_bytes <= CPU_DEQUANTIZED_BYTES:
        _dequantize(model, dtype)
    return model


def quantize_layers(model: nn.Module, part: str, config: KhalaConfig) -> bool:
    """Quantize the layers that config.json lists for `part`, and return whether there are any.

    Raises:
        KhalaError: if a layer cannot be quantized as it says.
    """
    chosen = {
        name.removeprefix(f"{part}."): how
        for name, how in config.quantization.items()
        if name.startswith(f"{part}.")
    }
    for how in set(chosen.values()):
        try:
            nn.quantize(
                model,
                how.group_size,
                how.bits,
                mode=how.mode,
                class_predicate=lambda path, _, how=how: chosen.get(path) == how,
            )
        except (ValueError, AttributeError) as error:
            raise KhalaError(f"The quantization in config.json fails: {error}") from error
    return bool(chosen)


def fill_part(model: Part, folder: Path, part: str, dtype: mx.Dtype | None = None) -> Part:
    """Fill a model whose layers are quantized already with the tensors of `part`."""
    tensors = read_tensors(part_files(folder, part))
    expected = dict(tree_flatten(model.parameters()))
    if problems := _differences(expected, tensors):
        raise KhalaError(f"The {part} in {folder} does not match its config.json: {problems}.")
    model.load_weights(list(tensors.items()), strict=True)
    del tensors, expected
    if dtype is not None:
        model.set_dtype(dtype)
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise KhalaError(f"The {part} in {folder} cannot be read: {error}") from error
    model.eval()
    return model


def _dequantize(model: nn.Module, dtype: mx.Dtype | None) -> None:
    """Replace quantized layers by plain ones with the values they stand for."""
    layers = [
        (name, _plain(layer, dtype))
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    ]
    model.update_modules(tree_unflatten(layers))
    model.eval()
    mx.eval(model.parameters())


def _plain(layer: nn.Module, dtype: mx.Dtype | None) -> nn.Module:
    """Return the nn.Linear or nn.Embedding of a quantized layer."""
    weight = matrix(layer, dtype)
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
