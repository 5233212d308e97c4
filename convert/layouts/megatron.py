"""Upstream's own layout: Megatron's backbone/ and superresolution/, Lightning's codec *.ckpt."""

from __future__ import annotations

from pathlib import Path

from khala_mlx.config import BackboneConfig, SuperResConfig
from khala_mlx.convert.formats.dcp import DistCheckpoint
from khala_mlx.convert.layouts.codec import codec_part
from khala_mlx.convert.layouts.megatron_args import from_common
from khala_mlx.convert.layouts.parts import Opened, Part, naming, token_layout
from khala_mlx.convert.layouts.transformer import PART_NAMES, Config, Names, Target, assemble, qkv
from khala_mlx.errors import ConvertError
from khala_mlx.text import listed, shown

FOLDERS = {"backbone": "backbone", "superres": "superresolution"}
CODEC_PATTERN = "dac_rvq_*.ckpt"
LATEST = "latest_checkpointed_iteration.txt"
HUB_PATTERNS = (
    *(
        f"{folder}/{name}"
        for folder in FOLDERS.values()
        for name in (LATEST, "*/.metadata", "*/*.distcp", "*/common.pt", "*/metadata.json")
    ),
    "*.ckpt",
)

_LAYER = "decoder.layers."


def names(layers: int) -> Names:
    """Megatron's names; weight_w is the gate of SwiGLU, weight_v what it lets through."""
    rules: dict[str, Target] = {"embedding.word_embeddings.weight": "embed_tokens.weight"}
    for layer in range(layers):
        there, here = f"{_LAYER}{layer}.", f"layers.{layer}."
        norm = "layer_norm_weight"
        rules[f"{there}self_attention.linear_qkv.{norm}"] = f"{here}input_layernorm.weight"
        rules[f"{there}mlp.linear_fc1.{norm}"] = f"{here}post_attention_layernorm.weight"
        for kind in ("weight", "bias"):
            rules[f"{there}self_attention.linear_qkv.{kind}"] = qkv(layer, kind)
            rules[f"{there}self_attention.linear_proj.{kind}"] = f"{here}self_attn.o_proj.{kind}"
            rules[f"{there}mlp.linear_fc1.{kind}_w"] = f"{here}mlp.gate_proj.{kind}"
            rules[f"{there}mlp.linear_fc1.{kind}_v"] = f"{here}mlp.up_proj.{kind}"
            rules[f"{there}mlp.linear_fc2.{kind}"] = f"{here}mlp.down_proj.{kind}"
    rules["decoder.final_layernorm.weight"] = "norm.weight"
    rules["output_layer.weight"] = "lm_head.weight"
    return rules


def is_extra(name: str) -> bool:
    """Training state that rides along in a checkpoint."""
    return "_extra_state" in name or name.startswith(("rng_state", "optim"))


def open_megatron(root: Path) -> Opened:
    """Read the folder's structure; tensors stay in their files."""
    with naming("codec"):
        codec = codec_part(_codec_file(root))
    layout = token_layout(codec.config)
    backbone = _transformer(root, BackboneConfig, layout.backbone_vocab)
    superres = _transformer(root, SuperResConfig, layout.superres_vocab)
    return Opened("megatron", backbone, superres, codec)


def _transformer(root: Path, kind: type[Config], vocab: int) -> Part[Config]:
    part = PART_NAMES[kind]
    with naming(part):
        folder = iteration_folder(root / FOLDERS[part])
        common = folder / "common.pt"
        return assemble(
            kind,
            DistCheckpoint(folder),
            _LAYER,
            names,
            from_common(common),
            vocab,
            is_extra=is_extra,
            files=(folder / ".metadata", common),
        )


def iteration_folder(folder: Path) -> Path:
    """The iteration that latest_checkpointed_iteration.txt names, or the only one there is."""
    what = shown(folder.name)
    if not folder.is_dir():
        raise ConvertError(f"the source has no folder {what}.")
    latest = folder / LATEST
    if latest.is_file():
        text = latest.read_text(encoding="utf-8", errors="replace")[:100].strip()
        number = text.isascii() and text.isdigit() and len(text) < 10
        if not number and text != "release":
            raise ConvertError(f"{what}/{LATEST} names no iteration but {shown(text)}.")
        found = folder / (f"iter_{int(text):07d}" if number else text)
        if not found.is_dir():
            raise ConvertError(f"{what}/{LATEST} names {found.name}, which is missing.")
        return found
    every = sorted(path for path in folder.glob("iter_*") if path.is_dir())
    if len(every) != 1:
        told = listed(path.name for path in every) or "none"
        raise ConvertError(f"{what} has no {LATEST} and not just one iteration: {told}.")
    return every[0]


def _codec_file(root: Path) -> Path:
    """dac_rvq_*.ckpt, or else the only *.ckpt there is."""
    for pattern in (CODEC_PATTERN, "*.ckpt"):
        found = sorted(root.glob(pattern))
        if len(found) > 1:
            raise ConvertError(
                f"the source has several codecs, keep one: {listed(path.name for path in found)}."
            )
        if found:
            return found[0]
    raise ConvertError(f"the source has no codec ({CODEC_PATTERN}).")
