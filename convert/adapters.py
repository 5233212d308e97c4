"""Adapters in every layout that is in use: mlx-lm's, PEFT's, and the list of Khala's fine-tuners.

The list holds {i}.A [r, in] and {i}.B [out, r] for the linear layers of the PyTorch port, layer by
layer, q k v o gate up down; alone, or in a file of torch.save beside the settings of its run.
Nothing in a pickle is executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from khala_mlx.config import LINEARS
from khala_mlx.convert import peft
from khala_mlx.convert.formats.safetensors import read
from khala_mlx.convert.formats.tensors import Tensor
from khala_mlx.convert.formats.torch_file import TorchZip
from khala_mlx.errors import KhalaError
from khala_mlx.storage.adapter import WEIGHTS, Adapter, Pair, module_key, save_adapter
from khala_mlx.storage.atomic import appears_whole
from khala_mlx.text import listed, shown

FORMATS = ("peft", "mlx")
# What the published scripts train with; a list without settings does not say.
LIST_RANK, LIST_ALPHA = 16, 32

_LISTED = re.compile(r"(\d{1,6})\.([AB])")


def read_adapter(path: str | Path) -> Adapter:
    """An adapter in any layout: mlx-lm's, PEFT's, or a numbered list in a .pt or .safetensors file.

    Raises:
        KhalaError: if there is none, it is damaged, or it does more than LoRA and DoRA on linear
            layers.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return Adapter.load(path)
        for name in peft.FILES:
            if (path / name).is_file():
                return peft.parse(path.resolve().name, _tensors(path / name)[0], path)
        raise KhalaError(
            f"{shown(str(path))} is not an adapter: it holds neither {WEIGHTS} nor {peft.FILES[0]}."
        )
    if not path.is_file():
        raise KhalaError(f"There is no adapter {shown(str(path))}.")
    if path.name == WEIGHTS:
        return Adapter.load(path.parent)
    tensors, about = _tensors(path)
    if any(_LISTED.fullmatch(name) for name in tensors):
        return _list(path.stem, tensors, about)
    return peft.parse(path.resolve().parent.name, tensors, path.parent)


def export_adapter(adapter: Adapter, destination: str | Path, layout: str) -> None:
    """Write an adapter into a new folder, as "peft" or in mlx-lm's layout ("mlx").

    Raises:
        KhalaError: if the folder exists or cannot be written, or the layout cannot hold it.
    """
    if layout not in FORMATS:
        raise KhalaError(f"format must be one of {', '.join(FORMATS)}, got {shown(layout)}.")
    with appears_whole(Path(destination).expanduser(), folder=True) as folder:
        if layout == "peft":
            peft.write(adapter, folder)
        else:
            arrays = {f"{path}.{leaf}": array for path, leaf, array in adapter.leaves()}
            save_adapter(folder, arrays, adapter.about())


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file by name, and what else a torch file holds beside them."""
    if path.suffix == ".safetensors":
        return read(path), {}
    file = TorchZip(path)
    root = file.root if isinstance(file.root, dict) else {}
    state = root.get("lora", root)
    if not isinstance(state, dict) or not state:
        raise KhalaError(f"{shown(path.name)} holds no adapter.")
    about = root if "lora" in root else {}
    return {str(name): file.tensor(ref, str(name)) for name, ref in state.items()}, about


def _list(name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Adapter:
    modules = _targets(about.get("targets"))
    numbers = sorted({int(match[1]) for key in tensors if (match := _LISTED.fullmatch(key))})
    expected = {f"{number}.{leaf}" for number in range(len(numbers)) for leaf in "AB"}
    odd = sorted(expected ^ set(tensors))
    if odd or len(numbers) % len(modules):
        told = listed(odd) or f"{len(numbers)} pairs"
        raise KhalaError(
            f"The adapter {shown(name)} is not complete. Each layer needs {len(modules)} pairs, "
            f"but it has {told}."
        )
    run = about.get("config")
    run = run if isinstance(run, dict) else {}
    rank, alpha = run.get("lora_r", LIST_RANK), run.get("lora_alpha", LIST_ALPHA)
    if not peft.is_positive(rank) or not peft.is_positive(alpha):
        raise KhalaError(f"The adapter {shown(name)} gives no sensible rank and alpha.")
    pairs: dict[str, Pair] = {}
    for number in numbers:
        layer, module = divmod(number, len(modules))
        pairs[f"layers.{layer}.{module_key(modules[module])}"] = peft.pair(
            tensors[f"{number}.A"], tensors[f"{number}.B"]
        )
    return Adapter(name, alpha / rank, pairs)


def _targets(given: Any) -> tuple[str, ...]:
    """Which linear layers a list holds: attention's come first, as the scripts walk the model."""
    if not isinstance(given, (list, tuple)) or not given:
        return LINEARS
    if odd := [each for each in given if each not in LINEARS]:
        raise KhalaError(
            f"The adapter is for layers that the backbone does not have: {listed(odd)}."
        )
    return tuple(sorted(given, key=lambda name: module_key(name).startswith("mlp")))
