"""A whole model folder of tiny random weights, for tests of everything above the models."""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from tiny_tokenizer import write_tiny_tokenizer

from khala_mlx.config import KhalaConfig
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec
from khala_mlx.model.superres import SuperRes


def write_tiny_model(folder: Path, config: KhalaConfig | None = None, seed: int = 0) -> Path:
    """Write config, tokenizer and random weights; the codec's output stays around 0.1."""
    config = config or KhalaConfig.tiny()
    mx.random.seed(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    write_tiny_tokenizer(folder / "tokenizer.json")
    parts = {
        "backbone": Backbone(config.backbone, config.tokens),
        "superres": SuperRes(config.superres, config.tokens),
        "codec": Codec(config.codec),
    }
    for name, part in parts.items():
        tensors = dict(tree_flatten(part.parameters()))
        mx.save_safetensors(str(folder / f"{name}.safetensors"), tensors)
    return folder
