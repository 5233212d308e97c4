"""From a foreign transformer checkpoint to a Part: sizes from shapes, all tensors accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from khala_mlx.config import BackboneConfig, SuperResConfig, TransformerConfig
from khala_mlx.convert.formats.tensors import Tensor, pick_rows
from khala_mlx.convert.layouts.megatron_args import Arguments
from khala_mlx.convert.layouts.parts import (
    Checkpoint,
    Part,
    count_blocks,
    require_floats,
    require_names,
    require_shapes,
)
from khala_mlx.errors import ConvertError
from khala_mlx.storage.shapes import Shapes, transformer_shapes
from khala_mlx.text import shown

# The trained windows are these classes' defaults: Megatron's seq_length is 16384 for both
# models, though superres was trained on 8192 rows.
Config = TypeVar("Config", BackboneConfig, SuperResConfig)

# The model folder's name of what a source tensor holds, or three for Megatron's fused q, k, v.
Target = str | tuple[str, str, str]
Names = Mapping[str, Target]

PART_NAMES: dict[type[TransformerConfig], str] = {
    BackboneConfig: "backbone",
    SuperResConfig: "superres",
}
# Megatron pads to a multiple of 128 times the tensor-parallel size.
MOST_PADDING = 128 * 64
VOCAB_TARGETS = ("embed_tokens.weight", "lm_head.weight")


def qkv(layer: int, kind: str) -> tuple[str, str, str]:
    """The model folder's names of one layer's query, key and value weights (or biases)."""
    at = f"layers.{layer}.self_attn."
    return f"{at}q_proj.{kind}", f"{at}k_proj.{kind}", f"{at}v_proj.{kind}"


def assemble(
    kind: type[Config],
    checkpoint: Checkpoint,
    layer_prefix: str,
    names: Callable[[int], Names],
    arguments: Arguments,
    vocab: int,
    *,
    is_extra: Callable[[str], bool] = lambda name: False,
    files: tuple[Path, ...] = (),
) -> Part[Config]:
    """Check a checkpoint against its arguments and Khala's shapes, and rename its tensors.

    Rows of the vocabulary beyond `vocab` are Megatron's padding and are dropped.

    Raises:
        ConvertError: naming every missing, or every misshapen tensor.
    """
    part: str = PART_NAMES[kind]
    layers = count_blocks(checkpoint.names, layer_prefix)
    rules = names(max(1, layers))
    require_names(rules, checkpoint.names)
    sources = {target: name for name, target in rules.items()}
    config = _config(kind, checkpoint, sources, layers, arguments, vocab)
    shapes = transformer_shapes(config)
    _check_shapes(checkpoint, rules, shapes)
    tensors: dict[str, Tensor] = {}
    for name, target in rules.items():
        tensor = checkpoint.tensor(name)
        if isinstance(target, str):
            tensors[target] = pick_rows(tensor, [(0, shapes[target][0])])
        else:
            tensors |= zip(target, _unfused(tensor, config), strict=True)
    require_floats(tensors.values())
    left = [name for name in checkpoint.names if name not in rules]
    dropped = max(checkpoint.shape(sources[name])[0] for name in VOCAB_TARGETS) - vocab
    notes = arguments.notes
    if dropped > MOST_PADDING:
        notes += (f"The {part} has {dropped} rows too many to be padding: is it the right model?",)
    return Part(
        name=part,
        config=config,
        tensors={name: tensors[name] for name in shapes},
        unused=tuple(name for name in left if not is_extra(name)),
        ignored=tuple(name for name in left if is_extra(name)),
        dropped_rows=dropped,
        files=files,
        notes=notes,
    )


def _config(
    kind: type[Config],
    checkpoint: Checkpoint,
    sources: Mapping[Target, str],
    layers: int,
    arguments: Arguments,
    vocab: int,
) -> Config:
    def matrix(target: Target) -> tuple[int, int]:
        shape = checkpoint.shape(sources[target])
        if len(shape) != 2:
            raise ConvertError(f"{shown(sources[target])} is not a matrix but {list(shape)}.")
        return shape[0], shape[1]

    _, hidden = matrix("embed_tokens.weight")
    ffn, _ = matrix("layers.0.mlp.gate_proj.weight")
    _, query_rows = matrix("layers.0.self_attn.o_proj.weight")
    fused = qkv(0, "weight")
    key_rows = (matrix(fused)[0] - query_rows) // 2 if fused in sources else matrix(fused[1])[0]
    head_dim = arguments.head_dim or max(1, query_rows // arguments.heads)
    kv_heads = arguments.kv_heads or key_rows // head_dim
    for what, told, found in (
        ("num_layers", arguments.layers, layers),
        ("hidden_size", arguments.hidden, hidden),
        ("ffn_hidden_size", arguments.ffn, ffn),
        ("num_attention_heads times kv_channels", arguments.heads * head_dim, query_rows),
        ("num_query_groups times kv_channels", kv_heads * head_dim, key_rows),
    ):
        if told is not None and told != found:
            raise ConvertError(f"{arguments.what} says {what} is {told}, the tensors say {found}.")
    return kind(
        vocab_size=vocab,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=arguments.heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=ffn,
        norm_eps=arguments.norm_eps,
        rope_base=arguments.rope_base,
    )


def _check_shapes(checkpoint: Checkpoint, rules: Names, shapes: Shapes) -> None:
    wrong = []
    for name, target in rules.items():
        shape = checkpoint.shape(name)
        if isinstance(target, str):
            wanted = shapes[target]
        else:
            wanted = (sum(shapes[each][0] for each in target), *shapes[target[0]][1:])
        padded = target in VOCAB_TARGETS and len(shape) == 2 and shape[0] > wanted[0]
        if shape != wanted and not (padded and shape[1:] == wanted[1:]):
            wrong.append((name, shape, wanted))
    require_shapes(wrong)


def _unfused(tensor: Tensor, config: TransformerConfig) -> list[Tensor]:
    """q, k and v out of linear_qkv, whose rows are [q x (heads / groups), k, v] for each group."""
    dim = config.head_dim
    queries = config.num_heads // config.num_kv_heads * dim
    starts = [group * (queries + 2 * dim) for group in range(config.num_kv_heads)]
    return [
        pick_rows(tensor, [(start + first, start + last) for start in starts])
        for first, last in (
            (0, queries),
            (queries, queries + dim),
            (queries + dim, queries + 2 * dim),
        )
    ]
