"""The layout of Vinpolar's PyTorch port: two safetensors files, two JSONs, decoder_weights.pt."""

from __future__ import annotations

from pathlib import Path

from khala_mlx.config import BackboneConfig, SuperResConfig
from khala_mlx.convert.formats.safetensors import read
from khala_mlx.convert.layouts.codec import codec_part
from khala_mlx.convert.layouts.megatron_args import from_json
from khala_mlx.convert.layouts.parts import Held, Opened, Part, naming, token_layout
from khala_mlx.convert.layouts.transformer import PART_NAMES, Config, Names, Target, assemble
from khala_mlx.errors import ConvertError

CODEC = "decoder_weights.pt"
HUB_PATTERNS = ("khala_*.safetensors", "*_megatron_args.json", CODEC)


def weights_file(part: str) -> str:
    """Name of the file with a transformer's tensors."""
    return f"khala_{part}.safetensors"


def names(layers: int) -> Names:
    """The port's names."""
    rules: dict[str, Target] = {"embed.weight": "embed_tokens.weight"}
    for layer in range(layers):
        at = f"layers.{layer}."
        rules[f"{at}input_norm.weight"] = f"{at}input_layernorm.weight"
        rules[f"{at}post_attn_norm.weight"] = f"{at}post_attention_layernorm.weight"
        for kind in ("weight", "bias"):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                rules[f"{at}attn.{name}.{kind}"] = f"{at}self_attn.{name}.{kind}"
            for name in ("gate_proj", "up_proj", "down_proj"):
                rules[f"{at}mlp.{name}.{kind}"] = f"{at}mlp.{name}.{kind}"
    rules["norm.weight"] = "norm.weight"
    rules["lm_head.weight"] = "lm_head.weight"
    return rules


def open_vinpolar(root: Path) -> Opened:
    """Read the folder's structure; tensors stay in their files."""
    with naming("codec"):
        codec = codec_part(_existing(root / CODEC))
    layout = token_layout(codec.config)
    backbone = _transformer(root, BackboneConfig, layout.backbone_vocab)
    superres = _transformer(root, SuperResConfig, layout.superres_vocab)
    return Opened("vinpolar", backbone, superres, codec)


def _transformer(root: Path, kind: type[Config], vocab: int) -> Part[Config]:
    part = PART_NAMES[kind]
    with naming(part):
        weights = Held(read(_existing(root / weights_file(part))))
        told = root / f"{part}_megatron_args.json"
        return assemble(kind, weights, "layers.", names, from_json(told), vocab, files=(told,))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConvertError(f"{path.name} is missing from the source.")
    return path
