"""Adapters of the backbone as files in mlx-lm's layout, and the check that one fits a model.

This file knows shapes and names; model/lora.py applies adapters to layers.
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
from khala_mlx.errors import KhalaError
from khala_mlx.storage.atomic import appears_whole
from khala_mlx.storage.shapes import linear_sizes
from khala_mlx.text import listed, shown

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Pair:
    """The arrays of an adapter for one linear layer, float32: y + scale * x A B.

    Attributes:
        a: [in, r].
        b: [r, out].
        m: DoRA's norms of the rows of the changed matrix, [out]; None for LoRA.
    """

    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None = None


@dataclass(frozen=True)
class Extent:
    """The size of what adapters add to a backbone, float32 in memory.

    Attributes:
        parameters: count of numbers in all pairs.
        widest: the largest input or output width of an adapted layer.
        dora: whether one of them is DoRA.
    """

    parameters: int = 0
    widest: int = 0
    dora: bool = False


NO_ADAPTERS = Extent()


@dataclass(frozen=True)
class Adapter:
    """A LoRA or DoRA adapter; keys of `pairs` are paths such as layers.0.self_attn.q_proj.

    `base` identifies the backbone it was trained on (see `backbone_id`), if that is known.
    """

    name: str
    scale: float
    pairs: Mapping[str, Pair]
    base: str | None = None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a folder with adapters.safetensors and adapter_config.json, as mlx-lm writes them.

        Raises:
            KhalaError: if one is missing, damaged, or of another kind than LoRA and DoRA.
        """
        about = read_object(folder / CONFIG)
        kind, how = about.get("fine_tune_type", "lora"), about.get("lora_parameters")
        scale: Any = how.get("scale") if isinstance(how, dict) else None
        if kind not in ("lora", "dora") or not is_finite(scale):
            raise KhalaError(f"{folder / CONFIG} is not a LoRA or DoRA config of mlx-lm.")
        base = about.get("base")
        known = base.get("backbone") if isinstance(base, dict) else None
        return cls(folder.resolve().name, float(scale), pairs_of(_arrays(folder / WEIGHTS)), known)

    @property
    def sha256(self) -> str:
        """The digest of all values, names and the scale; adapters of the same effect share it."""
        digest = hashlib.sha256(repr(self.scale).encode())
        for path, leaf, array in self.leaves():
            digest.update(f"{path}.{leaf} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def dora(self) -> bool:
        """Whether this is DoRA."""
        return any(pair.m is not None for pair in self.pairs.values())

    @property
    def extent(self) -> Extent:
        """The size of what it adds to a backbone."""
        pairs = self.pairs.values()
        return Extent(
            sum(array.size for _, _, array in self.leaves()),
            max((max(pair.a.shape[0], pair.b.shape[1]) for pair in pairs), default=0),
            self.dora,
        )

    def about(self) -> dict[str, Any]:
        """Return adapter_config.json in mlx-lm's terms; only `base` is of this package."""
        layers = {int(path.split(".")[1]) for path in self.pairs}
        keys = {path.split(".", 2)[2] for path in self.pairs}
        about: dict[str, Any] = {
            "fine_tune_type": "dora" if self.dora else "lora",
            "num_layers": max(layers) - min(layers) + 1,
            "lora_parameters": {
                "rank": max(pair.a.shape[1] for pair in self.pairs.values()),
                "scale": self.scale,
                "dropout": 0.0,
                "keys": sorted(keys),
            },
        }
        return about if self.base is None else {**about, "base": {"backbone": self.base}}

    def leaves(self) -> Iterable[tuple[str, str, np.ndarray]]:
        """Yield (layer path, lora_a, lora_b or m, values) of every array, sorted by path."""
        for path, pair in sorted(self.pairs.items()):
            yield path, "lora_a", pair.a
            yield path, "lora_b", pair.b
            if pair.m is not None:
                yield path, "m", pair.m

    def check(self, config: KhalaConfig, strength: float = 1.0) -> None:
        """Check that this adapter fits a model at this strength.

        Raises:
            KhalaError: naming every unknown layer, every misshapen array, every array that is not
                finite; or if values overflow when scaled, or the backbone is another.
        """
        sizes = linear_sizes(config.backbone)
        if not self.pairs:
            raise KhalaError(f"The adapter {shown(self.name)} is empty.")
        if unknown := sorted(set(self.pairs) - set(sizes)):
            raise KhalaError(
                f"The adapter {shown(self.name)} is for layers that the backbone does not have: "
                f"{listed(unknown)}."
            )
        if wrong := [t for path, pair in self.pairs.items() for t in _wrong(path, pair, sizes)]:
            raise KhalaError(
                f"The adapter {shown(self.name)} does not fit the backbone: {listed(wrong)}."
            )
        if bad := [f"{path}.{leaf}" for path, leaf, a in self.leaves() if not np.isfinite(a).all()]:
            raise KhalaError(
                f"The adapter {shown(self.name)} contains NaN or infinity: {listed(bad)}."
            )
        factor = abs(self.scale * strength)
        largest = max(float(np.abs(pair.b).max(initial=0)) for pair in self.pairs.values())
        if not (math.isfinite(factor) and largest * factor <= float(np.finfo(np.float32).max)):
            raise KhalaError(
                f"The adapter {shown(self.name)} overflows at scale {self.scale:g} and strength "
                f"{strength:g}. Use a lower strength."
            )
        if self.base is not None and self.base != backbone_id(config):
            raise KhalaError(
                f"The adapter {shown(self.name)} was trained on another backbone "
                f"({self.base[:12]}, this one is {backbone_id(config)[:12]})."
            )


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number; JSON may hold integers beyond any float."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and bool(abs(value) < 2.0**1023)


def module_key(module: str) -> str:
    """Return the path of a linear layer inside its block: q_proj -> self_attn.q_proj."""
    return f"{'self_attn' if module in ATTENTION_LINEARS else 'mlp'}.{module}"


def backbone_id(config: KhalaConfig) -> str:
    """Return a sha256 that model folders share if their backbones are the same weights.

    It covers sizes, token layout, biases and the checksums of the source files. It leaves out dtype
    and quantization: an adapter trained on 4-bit weights fits the weights before quantization.
    """
    files = config.source.get("files")
    files = files if isinstance(files, dict) else {}
    identity = {
        "backbone": config.backbone.to_dict(),
        "tokens": config.tokens.to_dict(),
        "fc1_bias": config.fc1_bias,
        "files": {name: sha for name, sha in files.items() if "backbone" in name},
        "fused": config.source.get("fused"),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def pairs_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Pair]:
    """Group arrays under mlx-lm's names, with or without `model.`, into pairs by layer path.

    Raises:
        KhalaError: naming every array that is not part of a pair.
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
        raise KhalaError(f"The adapter has arrays that are not part of a LoRA pair: {listed(odd)}.")
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


def _arrays(path: Path) -> dict[str, np.ndarray]:
    import mlx.core as mx

    if not path.is_file():
        raise KhalaError(f"{path} is missing. Choose a folder made by `khala train lora`.")
    try:
        loaded: Any = mx.load(str(path), format="safetensors")
        return {name: np.array(array.astype(mx.float32)) for name, array in loaded.items()}
    except (RuntimeError, ValueError) as error:
        raise KhalaError(f"{path} is not a complete safetensors file.") from error


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
