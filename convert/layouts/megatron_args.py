"""Megatron's arguments: the few that shapes do not show, and those that would mean other maths."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khala_mlx.config import TransformerConfig
from khala_mlx.convert.formats.pickle_objects import Object
from khala_mlx.convert.formats.torch_file import TorchZip
from khala_mlx.errors import ConvertError
from khala_mlx.text import listed, shown

MOST_BYTES = 16 << 20

# Khala's values (docs/released-model.md). Anything else is another architecture.
_REQUIRED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "qk_layernorm": False,
    "multi_latent_attention": False,
    "num_experts": None,
}


@dataclass(frozen=True)
class Arguments:
    """Checked values; None where the file does not say."""

    what: str
    heads: int
    kv_heads: int | None
    head_dim: int | None
    layers: int | None
    hidden: int | None
    ffn: int | None
    norm_eps: float
    rope_base: float
    notes: tuple[str, ...]


def from_common(path: Path) -> Arguments:
    """From Megatron's common.pt, whose pickle is read without running it."""
    what = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise ConvertError(f"{shown(what)} is missing; it holds the number of attention heads.")
    root = TorchZip(path).root
    found = root.get("args") if isinstance(root, dict) else None
    values = found.state if isinstance(found, Object) else found
    if not isinstance(values, dict):
        raise ConvertError(f"{shown(what)} holds no Megatron arguments.")
    return parse(values, what)


def from_json(path: Path) -> Arguments:
    """From the *_megatron_args.json of the PyTorch port."""
    return parse(read_json(path), path.name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of reasonable size."""
    what = shown(path.name)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConvertError(f"{what} is too large to be Khala's.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConvertError(f"{what} is missing.") from error
    except OSError as error:
        raise ConvertError(f"{what} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{what} is not valid JSON.") from error
    if not isinstance(values, dict):
        raise ConvertError(f"{what} holds no JSON object.")
    return values


def parse(values: Mapping[Any, Any], what: str) -> Arguments:
    """Check the arguments.

    Raises:
        ConvertError: if one is malformed or describes another architecture, or heads are not given.
    """
    what = shown(what)
    other = [
        f"{key} = {shown(values[key])}"
        for key, needed in _REQUIRED.items()
        if _plain(values.get(key, needed)) and values.get(key, needed) != needed
    ]
    if other:
        raise ConvertError(f"{what} describes another architecture than Khala's: {listed(other)}.")
    heads = _count(values, "num_attention_heads", what)
    if heads is None:
        raise ConvertError(f"{what} does not give num_attention_heads.")
    grouped = values.get("group_query_attention", True)
    notes: list[str] = []
    return Arguments(
        what=what,
        heads=heads,
        # Megatron leaves num_query_groups at 1 when it does not group.
        kv_heads=_count(values, "num_query_groups", what) if grouped else heads,
        head_dim=_count(values, "kv_channels", what),
        layers=_count(values, "num_layers", what),
        hidden=_count(values, "hidden_size", what),
        ffn=_count(values, "ffn_hidden_size", what),
        norm_eps=_number(values, "norm_epsilon", TransformerConfig.norm_eps, what, notes),
        rope_base=_number(values, "rotary_base", TransformerConfig.rope_base, what, notes),
        notes=tuple(notes),
    )


def _plain(value: Any) -> bool:
    # An enum reads as an inert object; it cannot be compared and shapes decide.
    return value is None or isinstance(value, (str, int, float))


def _count(values: Mapping[Any, Any], key: str, what: str) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 < value < 2**31:
        raise ConvertError(f"{what} gives {key} as {shown(value)}, which is not a sensible count.")
    return value


def _number(
    values: Mapping[Any, Any], key: str, default: float, what: str, notes: list[str]
) -> float:
    value = values.get(key)
    if value is None:
        notes.append(f"{what} does not give {key}; {default:g} is taken, the released value.")
        return default
    if type(value) not in (int, float) or not 0 < value < 1e12 or not math.isfinite(value):
        raise ConvertError(f"{what} gives {key} as {shown(value)}, which is not a sensible number.")
    return float(value)
