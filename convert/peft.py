"""Adapters in PEFT's layout: adapter_model.safetensors and adapter_config.json.

`lora_A` is [r, in], `lora_B` [out, r], the scale lora_alpha / r; DoRA's `lora_magnitude_vector` is
[out]. Names are those of a Llama in transformers, or of the PyTorch port's modules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.config import LINEARS, read_object
from khala_mlx.convert.formats.safetensors import Entry, Output
from khala_mlx.convert.formats.safetensors import write as write_tensors
from khala_mlx.convert.formats.tensors import Tensor, require_float, to_float32
from khala_mlx.errors import KhalaError
from khala_mlx.storage.adapter import Adapter, Pair, module_key
from khala_mlx.text import listed, shown

FILES = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"

# What PEFT takes where a setting is missing.
_DEFAULTS = {"r": 8, "lora_alpha": 8}
# Longer or more repetitive expressions than anyone writes could match for ever.
_LONGEST_KEY, _MOST_REPEATS = 200, 6

_PREFIX = "base_model.model.model."
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?(layers\.\d{1,6}\.)(?:self_attn|attn|mlp)\.(\w+)\."
    r"(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
# Settings that mean other maths, with the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": (None, "LORA"),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
}


def parse(name: str, tensors: Mapping[str, Tensor], folder: Path) -> Adapter:
    """The adapter of these tensors and of adapter_config.json in `folder`.

    Raises:
        KhalaError: naming every tensor and setting that is not LoRA or DoRA on linear layers.
    """
    about = read_object(folder / CONFIG)
    if odd := [key for key, plain in _PLAIN.items() if about.get(key) not in plain]:
        raise KhalaError(
            f"The adapter {shown(name)} does more than LoRA and DoRA: {CONFIG} sets {listed(odd)}."
        )
    about = {**_DEFAULTS, **about}
    if not is_positive(about["r"]) or not is_positive(about["lora_alpha"]):
        raise KhalaError(f"{CONFIG} of {shown(name)} gives no sensible r and lora_alpha.")
    layers, modules = _by_layer(name, tensors, dora=bool(about.get("use_dora")))
    alphas = _checked_pattern(about.get("alpha_pattern"))
    scale = _scale(about, about["lora_alpha"], about["r"])
    pairs = {}
    for path, parts in layers.items():
        found = pair(parts["lora_A"], parts["lora_B"])
        # One scale for all; what a layer has on top of it goes into its matrix.
        alpha = _pattern_value(alphas, modules[path], about["lora_alpha"])
        own = _scale(about, alpha, found.a.shape[1]) / scale
        m = values(parts["lora_magnitude_vector"]) if "lora_magnitude_vector" in parts else None
        pairs[path] = Pair(found.a, found.b if own == 1 else found.b * np.float32(own), m)
    return Adapter(name, scale, pairs)


def write(adapter: Adapter, folder: Path) -> None:
    """Write both files into an existing folder."""
    tensors: dict[str, np.ndarray] = {}
    for path, pair in sorted(adapter.pairs.items()):
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = np.ascontiguousarray(pair.a.T)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = np.ascontiguousarray(pair.b.T)
        if pair.m is not None:
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = pair.m
    outputs = [
        Output((Entry(name, "float32", array.shape),), partial(iter, [array]))
        for name, array in tensors.items()
    ]
    write_tensors(folder / FILES[0], outputs, lambda _: None)
    text = json.dumps(_config(adapter), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def pair(a: Tensor, b: Tensor) -> Pair:
    """A pair from torch's matrices A [r, in] and B [out, r]."""
    for tensor in (a, b):
        if len(tensor.shape) != 2:
            raise KhalaError(f"{shown(tensor.name)} is not a matrix.")
    return Pair(np.ascontiguousarray(values(a).T), np.ascontiguousarray(values(b).T))


def values(tensor: Tensor) -> np.ndarray:
    """All values, as float32."""
    require_float(tensor)
    return to_float32(tensor.whole(), tensor)


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def _by_layer(
    name: str, tensors: Mapping[str, Tensor], *, dora: bool
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Return the tensors of each layer, and the name of its module in the base model."""
    layers: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, str] = {}
    odd = []
    for key, tensor in tensors.items():
        match = _NAME.fullmatch(key)
        if match is None or match[2] not in LINEARS:
            odd.append(key)
        else:
            path = match[1] + module_key(match[2])
            layers.setdefault(path, {})[match[3]] = tensor
            modules[path] = key[: match.start(3) - 1].removeprefix("base_model.model.")
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if dora else set())
    odd += [path for path, parts in layers.items() if not wanted <= set(parts)]
    if odd:
        raise KhalaError(
            f"The adapter {shown(name)} holds tensors that belong to no linear layer of the "
            f"backbone, or whose partner is missing: {listed(sorted(odd))}."
        )
    return layers, modules


def _scale(about: Mapping[str, Any], alpha: float, rank: int) -> float:
    """Return alpha / r of a layer, or alpha / sqrt(r) for rank-stabilised LoRA."""
    return float(alpha / (math.sqrt(rank) if about.get("use_rslora") else rank))


def _checked_pattern(pattern: Any) -> dict[str, float]:
    """Return alpha_pattern if its keys are names or plain expressions, and its values numbers."""
    found = pattern if isinstance(pattern, dict) else {}
    for key, value in found.items():
        repeats = len(re.findall(r"[*+{]", str(key)))
        quantified_group = re.search(r"\)[*+{]", str(key))
        try:
            re.compile(key)
            fine = len(key) <= _LONGEST_KEY and repeats <= _MOST_REPEATS and not quantified_group
        except (re.error, TypeError, RecursionError):
            fine = False
        if not fine or not is_positive(value):
            raise KhalaError(
                f"alpha_pattern has the key {shown(key)}, which is not a name of a layer nor a "
                "plain expression, or its value is not a number above 0."
            )
    return found


def _pattern_value(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first key that matches the end of a module's name, as in PEFT."""
    for key, value in pattern.items():
        if re.match(rf"(?:.*\.)?(?:{key})$", module):
            return value
    return default


def _config(adapter: Adapter) -> dict[str, Any]:
    ranks = {path: pair.a.shape[1] for path, pair in adapter.pairs.items()}
    rank = max(ranks.values())
    others = {path: own for path, own in ranks.items() if own != rank}

    def alpha(rank: int) -> float:
        value = adapter.scale * rank
        return int(value) if value.is_integer() else value

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha(rank),
        "rank_pattern": others,
        "alpha_pattern": {path: alpha(own) for path, own in others.items()},
        "lora_dropout": 0.0,
        # In full, so that PEFT puts an adapter on these layers and no others.
        "target_modules": sorted(adapter.pairs),
        "use_dora": adapter.dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
