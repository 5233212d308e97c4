"""Adapters of the backbone as files: mlx-lm's layout, and what must hold for a model to take one.

Knows shapes and names, no models; how a layer works with an adapter on it is in lora.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from khala_mlx.config import ATTENTION_LINEARS, KhalaConfig, read_object
from khala_mlx.errors import AdapterError
from khala_mlx.storage.atomic import appears_whole
from khala_mlx.storage.shapes import linear_sizes
from khala_mlx.text import listed, shown

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Pair:
    """What an adapter holds for one linear layer, float32: y + scale * x A B.

    Attributes:
        a: [in, r].
        b: [r, out].
        m: DoRA's lengths of the rows of the changed matrix, [out]; None for LoRA.
    """

    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None = None


@dataclass(frozen=True)
class Extent:
    """What adapters at work add to a backbone, in memory float32.

    Attributes:
        parameters: numbers in all their pairs.
        widest: the most columns, coming in or going out, of a layer that has one.
        dora: whether lengths of rows are set, too.
    """

    parameters: int = 0
    widest: int = 0
    dora: bool = False


NO_ADAPTERS = Extent()


@dataclass(frozen=True)
class Adapter:
    """A LoRA or DoRA adapter; `pairs` go by the layer's path, layers.0.self_attn.q_proj.

    `base` is the backbone it was trained on (see `backbone_id`), if that is known.
    """

    name: str
    scale: float
    pairs: Mapping[str, Pair]
    base: str | None = None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a folder with adapters.safetensors and adapter_config.json, as mlx-lm writes them.

        Raises:
            AdapterError: if one is missing, damaged, or of another kind than LoRA and DoRA.
        """
        about = read_config(folder / CONFIG)
        kind, how = about.get("fine_tune_type", "lora"), about.get("lora_parameters")
        scale: Any = how.get("scale") if isinstance(how, dict) else None
        if kind not in ("lora", "dora") or not is_finite(scale):
            raise AdapterError(f"{folder / CONFIG} describes no LoRA or DoRA adapter of mlx-lm.")
        base = about.get("base")
        known = base.get("backbone") if isinstance(base, dict) else None
        return cls(folder.resolve().name, float(scale), pairs_of(_arrays(folder / WEIGHTS)), known)

    @property
    def sha256(self) -> str:
        """Of all values, names and the scale: what two adapters with the same effect share."""
        digest = hashlib.sha256(repr(self.scale).encode())
        for path, leaf, array in self.leaves():
            digest.update(f"{path}.{leaf} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def dora(self) -> bool:
        """Whether it sets the lengths of rows, too."""
        return any(pair.m is not None for pair in self.pairs.values())

    @property
    def extent(self) -> Extent:
        """What it adds to a backbone."""
        pairs = self.pairs.values()
        return Extent(
            sum(array.size for _, _, array in self.leaves()),
            max((max(pair.a.shape[0], pair.b.shape[1]) for pair in pairs), default=0),
            self.dora,
        )

    def about(self) -> dict[str, Any]:
        """adapter_config.json in mlx-lm's terms; `base` is this package's own."""
        layers = {int(path.split(".")[1]) for path in self.pairs}
        keys = {path.split(".", 2)[2] for path in self.pairs}
        told: dict[str, Any] = {
            "fine_tune_type": "dora" if self.dora else "lora",
            "num_layers": max(layers) - min(layers) + 1,
            "lora_parameters": {
                "rank": max(pair.a.shape[1] for pair in self.pairs.values()),
                "scale": self.scale,
                "dropout": 0.0,
                "keys": sorted(keys),
            },
        }
        return told if self.base is None else {**told, "base": {"backbone": self.base}}

    def leaves(self) -> Iterable[tuple[str, str, np.ndarray]]:
        """(path of the layer, lora_a, lora_b or m, values) of every array, sorted by path."""
        for path, pair in sorted(self.pairs.items()):
            yield path, "lora_a", pair.a
            yield path, "lora_b", pair.b
            if pair.m is not None:
                yield path, "m", pair.m

    def check(self, config: KhalaConfig, strength: float = 1.0) -> None:
        """Refuse to work, at this strength, on a model that this adapter does not fit.

        Raises:
            AdapterError: naming every layer the model does not have, every misshapen array, and
                arrays that are not finite, or would not be once scaled; or that the adapter
                belongs to another backbone.
        """
        sizes = linear_sizes(config.backbone)
        if not self.pairs:
            raise AdapterError(f"The adapter {shown(self.name)} is empty.")
        if unknown := sorted(set(self.pairs) - set(sizes)):
            raise AdapterError(
                f"The adapter {shown(self.name)} is for layers that the backbone does not have: "
                f"{listed(unknown)}."
            )
        if wrong := [t for path, pair in self.pairs.items() for t in _wrong(path, pair, sizes)]:
            raise AdapterError(
                f"The adapter {shown(self.name)} does not fit the backbone: {listed(wrong)}."
            )
        if bad := [f"{path}.{leaf}" for path, leaf, a in self.leaves() if not np.isfinite(a).all()]:
            raise AdapterError(
                f"The adapter {shown(self.name)} holds values that are not finite: {listed(bad)}."
            )
        factor = abs(self.scale * strength)
        largest = max(float(np.abs(pair.b).max(initial=0)) for pair in self.pairs.values())
        # Not so where either is not a number.
        if not (math.isfinite(factor) and largest * factor <= float(np.finfo(np.float32).max)):
            raise AdapterError(
                f"The adapter {shown(self.name)} cannot be scaled by {self.scale:g}, nor at a "
                f"strength of {strength:g}: its values would not be finite."
            )
        if self.base is not None and self.base != backbone_id(config):
            raise AdapterError(
                f"The adapter {shown(self.name)} was trained on another backbone "
                f"({self.base[:12]}, this one is {backbone_id(config)[:12]})."
            )


def is_finite(value: Any) -> bool:
    """Whether a value, of a file perhaps, is a number that a float holds."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Any whole number can stand in JSON.
    return number and bool(abs(value) < 2.0**1023)


def module_key(module: str) -> str:
    """q_proj -> self_attn.q_proj: where in a layer a linear layer is."""
    return f"{'self_attn' if module in ATTENTION_LINEARS else 'mlp'}.{module}"


def backbone_id(config: KhalaConfig) -> str:
    """A sha256 that model folders share if their backbones are the same weights.

    It covers sizes, token layout, biases and the checksums of what the backbone was made from, but
    neither dtype nor packing: an adapter trained on 4-bit weights fits the ones they were made of.
    """
    files = config.source.get("files")
    files = files if isinstance(files, dict) else {}
    told = {
        "backbone": config.backbone.to_dict(),
        "tokens": config.tokens.to_dict(),
        "fc1_bias": config.fc1_bias,
        "files": {name: sha for name, sha in files.items() if "backbone" in name},
        "fused": config.source.get("fused"),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def pairs_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Pair]:
    """Arrays under mlx-lm's names, with or without its `model.`, as pairs by layer.

    Raises:
        AdapterError: naming every array that belongs to no pair.
    """
    leaves: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        path, _, leaf = name.removeprefix("model.").rpartition(".")
        leaves.setdefault(path, {})[leaf] = array
    odd = [
        f"{path}.{leaf}"
        for path, parts in sorted(leaves.items())
        for leaf in parts
        if not path
        or not {"lora_a", "lora_b"} <= set(parts) <= {"lora_a", "lora_b", "m"}
        or min(parts["lora_a"].ndim, parts["lora_b"].ndim) < 2
    ]
    if odd:
        raise AdapterError(f"The adapter holds arrays that belong to no LoRA pair: {listed(odd)}.")
    return {path: Pair(p["lora_a"], p["lora_b"], p.get("m")) for path, p in leaves.items()}


def save_adapter(
    folder: Path, arrays: Mapping[str, Any], about: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Write adapters.safetensors (from NumPy or MLX arrays) and adapter_config.json."""
    import mlx.core as mx

    with (
        appears_whole(folder / WEIGHTS, overwrite=overwrite) as weights,
        appears_whole(folder / CONFIG, overwrite=overwrite) as config,
    ):
        tensors = {name: mx.array(array) for name, array in arrays.items()}
        mx.save_safetensors(str(weights), tensors, {"format": "mlx"})
        config.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, of mlx-lm or of PEFT."""
    return read_object(path, AdapterError)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    import mlx.core as mx

    if not path.is_file():
        raise AdapterError(f"{path} is missing; a folder made by `khala train lora` has it.")
    try:
        loaded: Any = mx.load(str(path), format="safetensors")
        return {name: np.array(array.astype(mx.float32)) for name, array in loaded.items()}
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"{path} is not a complete safetensors file.") from error


def _wrong(path: str, pair: Pair, sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    into, out = sizes[path]
    rank = pair.a.shape[-1] if pair.a.ndim else 0
    wanted: list[tuple[str, np.ndarray, tuple[int, ...]]] = [
        ("lora_a", pair.a, (into, rank)),
        ("lora_b", pair.b, (rank, out)),
    ]
    if pair.m is not None:
        wanted.append(("m", pair.m, (out,)))
    return [
        f"{path}.{leaf} has shape {list(array.shape)} instead of {list(shape)}"
        for leaf, array, shape in wanted
        if array.shape != shape
    ]
