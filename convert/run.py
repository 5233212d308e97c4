"""The conversion from start to end: find, check, write, describe."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from khala_mlx.config import DTYPES, KhalaConfig, Quantization
from khala_mlx.convert.card import card
from khala_mlx.convert.layouts import model_folder
from khala_mlx.convert.layouts import training_runs as trained
from khala_mlx.convert.layouts.parts import Opened, token_layout
from khala_mlx.convert.outputs import Packing, packed_layers
from khala_mlx.convert.recipe import recipe
from khala_mlx.convert.source import Located, locate
from khala_mlx.convert.tokenizer import Tokenizer
from khala_mlx.convert.tokenizer import find as find_tokenizer
from khala_mlx.convert.write import Progress, write_json, write_part
from khala_mlx.errors import ConvertError, KhalaWarning
from khala_mlx.storage.atomic import appears_whole
from khala_mlx.text import listed, shown

FC1_BIASES = ("double", "single")
CODEC_DTYPES = ("float32", "float16")
# The licence of this package: whoever trains a model of their own may choose another.
OWN_LICENCE = "Apache-2.0"


def convert(
    source: str | Path | Located,
    destination: str | Path,
    *,
    dtype: str = "bfloat16",
    codec_dtype: str = "float32",
    quantize: str | int | None = None,
    quantize_parts: Mapping[str, str | int] | None = None,
    quantize_layers: Mapping[str, Quantization] | None = None,
    group_size: int = 64,
    tokenizer: str | Path | None = None,
    fc1_bias: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Turn published weights into a model folder, or a model folder into another.

    Args:
        source: a folder in upstream's or in Vinpolar's layout, a model folder, or a repository
            on the Hugging Face Hub.
        destination: the folder to make; it must not exist.
        dtype: of the language models: bfloat16, float16 or float32.
        codec_dtype: what the codec is stored in, float32 or float16; it computes in float32.
        quantize: how the language models' matrices are quantized, "4", "6" or "8" bits, "mxfp4" or
            "mxfp8", or None.
        quantize_parts: other choices, or "none", for "embedding", "head", "body" and "superres".
        quantize_layers: how each is quantized, instead: by name, as config.json has it. Layers that
            are not named stay as they are.
        group_size: weights that share a scale (32, 64 or 128).
        tokenizer: a tokenizer.json, a folder or repository with one; by default the one beside
            the source, or else Llama 3.1's from the Hub.
        fc1_bias: "double" or "single"; by default "double", or what a model folder has already.
        on_progress: called with a part's name, the bytes done and the bytes to do.

    Returns:
        A report that can be written as JSON. Its warnings are issued as KhalaWarnings too.

    Raises:
        KhalaError: in one sentence; nothing is left at `destination`.
    """
    _check_options(dtype, codec_dtype, fc1_bias)
    packed_as = recipe(quantize, group_size, quantize_parts, quantize_layers)

    def work(folder: Path) -> dict[str, Any]:
        with _naming_the_source():
            located = locate(source)
            opened = located.open()
        found = fc1_bias or (opened.config.fc1_bias if opened.config else "double")
        packing = Packing(
            dtype,
            _fc1_scale(opened, found),
            packed_as,
            codec_dtype,
        )
        config = _config(opened, packing, found)
        tokens = find_tokenizer(tokenizer, located.root, config.tokens)
        return _write_all(located, opened, packing, config, tokens, folder, on_progress)

    return written(destination, work)


def pack(
    destination: str | Path,
    *,
    codec: str | Path,
    backbone: str | Path,
    superres: str | Path,
    tokenizer: str | Path,
    dtype: str = "float32",
    codec_dtype: str = "float32",
    quantize: str | int | None = None,
    quantize_parts: Mapping[str, str | int] | None = None,
    group_size: int = 64,
    licence: str = OWN_LICENCE,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Put the parts of three finished training runs into one model folder.

    Args:
        destination: the folder to make; it must not exist.
        codec, backbone, superres: the folders of the runs.
        tokenizer: the tokenizer.json that they were trained with.
        licence: what config.json and the model card say; one line.

    The other arguments, the report and the errors are those of `convert`.
    """
    _check_options(dtype, codec_dtype, None)
    packed_as = recipe(quantize, group_size, quantize_parts)
    if not licence.strip() or not licence.isprintable():
        raise ConvertError("licence must be one line of text.")
    runs = {"codec": Path(codec), "backbone": Path(backbone), "superres": Path(superres)}

    def work(folder: Path) -> dict[str, Any]:
        packing = Packing(dtype, 1.0, packed_as, codec_dtype)
        with _naming_the_source():
            opened = trained.open_runs(runs, licence)
            trained.require_whole_packing(opened, packing)
            config = _config(opened, packing, "single")
            tokens = trained.fitting_tokenizer(Path(tokenizer), config.tokens)
        # Three folders, not one: each part names its own.
        located = Located(Path(), trained.LAYOUT)
        return _write_all(located, opened, packing, config, tokens, folder, on_progress)

    return written(destination, work)


def written(destination: str | Path, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Let `work` fill the folder and report; the folder appears whole or not at all."""
    destination = Path(destination).expanduser()
    with _without_empty_parents(destination), appears_whole(destination, folder=True) as folder:
        report = work(folder)
    report["destination"] = str(destination)
    for note in report["warnings"]:
        warnings.warn(note, KhalaWarning, stacklevel=3)
    return report


@contextmanager
def _naming_the_source() -> Iterator[None]:
    """Whatever else cannot be read; errors while writing are the destination's."""
    try:
        yield
    except OSError as error:
        raise ConvertError(f"The source cannot be read: {error.strerror}.") from error


def _check_options(dtype: str, codec_dtype: str, fc1_bias: str | None) -> None:
    for name, value, known in (
        ("dtype", dtype, DTYPES),
        ("codec_dtype", codec_dtype, CODEC_DTYPES),
        ("fc1_bias", fc1_bias, (None, *FC1_BIASES)),
    ):
        if value not in known:
            choices = ", ".join(str(each) for each in known if each is not None)
            raise ConvertError(f"{name} must be one of {choices}, got {shown(value)}.")


def _fc1_scale(opened: Opened, wanted: str) -> float:
    """What fc1's biases are multiplied by; foreign files hold them single."""
    there = opened.config.fc1_bias if opened.config else "single"
    return {"single": 1.0, "double": 2.0}[wanted] / {"single": 1.0, "double": 2.0}[there]


def _config(opened: Opened, packing: Packing, fc1_bias: str) -> KhalaConfig:
    layers = packed_layers(opened.backbone, packing) | packed_layers(opened.superres, packing)
    if unknown := sorted(set(packing.recipe.layers) - set(layers)):
        raise ConvertError(f"There are no such layers that can be quantized so: {listed(unknown)}.")
    if packing.recipe and not layers:
        size = listed(packing.recipe.group_sizes)
        raise ConvertError(
            f"Nothing can be quantised, no row divides into groups of {size}; choose smaller "
            "groups or leave it."
        )
    changes: dict[str, Any] = {
        "dtype": packing.dtype,
        "fc1_bias": fc1_bias,
        "quantization": layers,
    }
    if opened.config:
        return dataclasses.replace(opened.config, **changes)
    return KhalaConfig(
        tokens=token_layout(opened.codec.config),
        backbone=opened.backbone.config,
        superres=opened.superres.config,
        codec=opened.codec.config,
        **changes,
    )


def _write_all(
    located: Located,
    opened: Opened,
    packing: Packing,
    config: KhalaConfig,
    tokens: Tokenizer,
    folder: Path,
    on_progress: Progress | None,
) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    checksums: dict[str, str] = {}
    for part in opened.parts:
        parts[part.name], sums = write_part(part, packing, located, folder, on_progress)
        checksums |= sums
    config = dataclasses.replace(config, source=_source(located, opened, config, checksums, tokens))
    tokens.copy_to(folder)
    write_json(folder / "config.json", config.to_dict())
    (folder / "README.md").write_text(card(config), encoding="utf-8")
    return {
        "layout": opened.layout,
        "repo": located.repo,
        "revision": located.revision,
        "dtype": config.dtype,
        "fc1_bias": config.fc1_bias,
        "quantization": packing_report(config),
        "parts": parts,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "unused": {part.name: list(part.unused) for part in opened.parts},
        "ignored": {part.name: list(part.ignored) for part in opened.parts},
        "source_files": checksums,
        "tokenizer": {"origin": tokens.origin, "sha256": tokens.sha256},
        "warnings": _notes(opened, config, tokens),
    }


def packing_report(config: KhalaConfig) -> dict[str, Any] | None:
    """How many layers are quantized, and how most of them are."""
    counted = Counter(config.quantization.values())
    if not counted:
        return None
    most, _ = counted.most_common(1)[0]
    told = {**dataclasses.asdict(most), "layers": len(config.quantization)}
    return told if len(counted) == 1 else {**told, "mixed": len(counted)}


def _source(
    located: Located,
    opened: Opened,
    config: KhalaConfig,
    checksums: dict[str, str],
    tokens: Tokenizer,
) -> dict[str, Any]:
    """Where the weights come from; a model folder's own record is kept."""
    record: dict[str, Any] = {"layout": opened.layout}
    if located.repo:
        record |= {"repo": located.repo, "revision": located.revision}
    record["files"] = checksums
    if opened.config and opened.layout == model_folder.LAYOUT:
        record = {
            **config.source,
            "converted_from": {
                **record,
                "dtype": opened.config.dtype,
                "fc1_bias": opened.config.fc1_bias,
            },
        }
    return record | {"tokenizer": {"origin": tokens.origin, "sha256": tokens.sha256}}


def _notes(opened: Opened, config: KhalaConfig, tokens: Tokenizer) -> list[str]:
    notes = []
    for part in opened.parts:
        if part.unused:
            told = f"{len(part.unused)} unknown tensors, left out: {listed(part.unused)}."
            notes.append(f"The {part.name} holds {told}")
    notes += dict.fromkeys(note for part in opened.parts for note in part.notes)
    notes += tokens.notes
    if opened.config and opened.config.dtype != "float32" and config.dtype == "float32":
        notes.append(f"The source is {opened.config.dtype}; float32 only makes it larger.")
    return notes


@contextmanager
def _without_empty_parents(destination: Path) -> Iterator[None]:
    """Remove parent folders that were made for a destination that never came."""
    missing: list[Path] = []
    try:
        missing += [parent for parent in destination.parents if not parent.exists()]
        yield
    except BaseException as error:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            # Such as a name too long even to look for.
            raise ConvertError(f"{destination} cannot be written: {error.strerror}.") from error
        raise
