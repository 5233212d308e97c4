"""A model folder with adapters worked into its backbone; all else is copied as it is.

W becomes W + scale * (A B)^T, and with DoRA its rows get the lengths m, row block by row block.
Quantized layers that an adapter changes are written dequantized: their grid is coarser than what
adapters add, so quantizing them again would round most of it away.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.config import KhalaConfig, Quantization
from khala_mlx.convert.card import card
from khala_mlx.convert.formats.safetensors import Entry, Output
from khala_mlx.convert.formats.tensors import Tensor, blocks, narrow, to_float32
from khala_mlx.convert.layouts.model_folder import CONFIG, stored_tensors
from khala_mlx.convert.outputs import unpacked
from khala_mlx.convert.run import written
from khala_mlx.convert.write import Progress, write_files, write_json
from khala_mlx.errors import ConvertError, KhalaError
from khala_mlx.storage.adapter import Adapter, Pair
from khala_mlx.text import listed

Share = tuple[Pair, float, float]


def fuse(
    model: str | Path,
    adapters: Sequence[tuple[Adapter, float]],
    destination: str | Path,
    *,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model folder `destination`: `model` with each adapter worked in at its strength.

    Raises:
        KhalaError: if an adapter does not fit, or a folder cannot be read or written; nothing is
            left at `destination` then.
    """
    root = Path(model).expanduser()
    config = KhalaConfig.load(root / CONFIG)
    for adapter, strength in adapters:
        adapter.check(config, strength)
    adapters = [each for each in adapters if each[1]]
    shares: dict[str, list[Share]] = defaultdict(list)
    for adapter, strength in adapters:
        for path, pair in adapter.pairs.items():
            shares[path].append((pair, adapter.scale, strength))

    def work(folder: Path) -> dict[str, Any]:
        tensors = stored_tensors(root, "backbone")
        outputs = _outputs(tensors, shares, config)
        _copy_rest(root, folder)
        _write(outputs, folder, on_progress)
        fused = _config(config, shares, adapters)
        write_json(folder / CONFIG, fused.to_dict())
        (folder / "README.md").write_text(card(fused), encoding="utf-8")
        return {
            "layers": len(shares),
            "unpacked": len(config.quantization) - len(fused.quantization),
            "adapters": [adapter.name for adapter, _ in adapters],
            "bytes": sum(path.stat().st_size for path in folder.iterdir()),
            "warnings": [],
        }

    return written(destination, work)


def _outputs(
    tensors: dict[str, Tensor], shares: dict[str, list[Share]], config: KhalaConfig
) -> list[Output]:
    if missing := sorted(f"{path}.weight" for path in shares if f"{path}.weight" not in tensors):
        raise ConvertError(f"The model's backbone does not have {listed(missing)}.")
    outputs = []
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        how = config.quantization.get(f"backbone.{path}")
        if path not in shares or leaf == "bias":
            outputs.append(_as_it_is(tensor))
        elif leaf == "weight":
            plain = tensor if how is None else _plain(path, tensors, how)
            dtype = tensor.dtype if how is None else config.dtype
            outputs.append(_changed(plain, shares[path], dtype))
        # What is left, scales and biases of the quantization, goes with it.
    return outputs


def _as_it_is(tensor: Tensor) -> Output:
    def make() -> Iterator[np.ndarray]:
        for start, stop in blocks(tensor):
            yield tensor.read(start, stop)

    return Output((Entry(tensor.name, tensor.dtype, tensor.shape),), make)


def _plain(path: str, tensors: dict[str, Tensor], how: Quantization) -> Tensor:
    """The float32 matrix that a quantized layer stands for."""
    weight, scales = tensors[f"{path}.weight"], tensors[f"{path}.scales"]
    biases = tensors.get(f"{path}.biases")

    def read(start: int, stop: int) -> np.ndarray:
        parts = [each for each in (weight, scales, biases) if each is not None]
        return unpacked([(each.read(start, stop), each.dtype) for each in parts], how)

    shape = (weight.shape[0], weight.shape[1] * 32 // how.bits)
    return Tensor(weight.name, shape, "float32", read)


def _changed(tensor: Tensor, shares: Sequence[Share], dtype: str) -> Output:
    def make() -> Iterator[np.ndarray]:
        for start, stop in blocks(tensor):
            rows = to_float32(tensor.read(start, stop), tensor)
            with np.errstate(over="ignore", invalid="ignore"):
                fused = _fused(rows, shares, slice(start, stop))
            if not np.isfinite(fused).all():
                raise KhalaError(
                    f"The adapters are too strong for {tensor.name}: it would hold values that are "
                    "not finite."
                )
            yield narrow(fused, dtype, tensor.name)

    return Output((Entry(tensor.name, dtype, tensor.shape),), make)


def _fused(rows: np.ndarray, shares: Sequence[Share], taken: slice) -> np.ndarray:
    """Rows [n, in] of a matrix [out, in] with the rows `taken` of every adapter's change added."""
    total = rows
    for pair, scale, strength in shares:
        changed = rows + ((pair.a * np.float32(scale)) @ pair.b[:, taken]).T
        if pair.m is not None:
            lengths = np.linalg.norm(changed, axis=1, keepdims=True)
            changed = changed * (pair.m[taken, None] / lengths)
        total = total + np.float32(strength) * (changed - rows)
    return total


def _config(
    config: KhalaConfig,
    shares: dict[str, list[Share]],
    adapters: Sequence[tuple[Adapter, float]],
) -> KhalaConfig:
    record = [
        {"name": adapter.name, "sha256": adapter.sha256, "scale": strength}
        for adapter, strength in adapters
    ]
    earlier = config.source.get("fused")
    earlier = list(earlier) if isinstance(earlier, (list, tuple)) else []
    kept = {
        name: how
        for name, how in config.quantization.items()
        if name.removeprefix("backbone.") not in shares
    }
    source = {**config.source, "fused": [*earlier, *record]}
    return dataclasses.replace(config, quantization=kept, source=source)


def _copy_rest(root: Path, folder: Path) -> None:
    for path in sorted(root.iterdir()):
        ours = path.name.startswith(("superres", "codec")) and ".safetensors" in path.name
        if path.is_file() and (ours or path.name.startswith("tokenizer")):
            shutil.copyfile(path, folder / path.name)


def _write(outputs: list[Output], folder: Path, on_progress: Progress | None) -> None:
    total, done = sum(output.bytes for output in outputs), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress:
            on_progress("fuse", done, total)

    write_files("backbone", outputs, folder, count)
