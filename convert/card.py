"""The model card of a model folder: README.md with the front matter the Hub reads."""

from __future__ import annotations

from khala_mlx.config import WEIGHTS_LICENCE, KhalaConfig
from khala_mlx.convert.layouts import training_runs as trained
from khala_mlx.convert.tokenizer import SHA256

_HUB_IDS = {WEIGHTS_LICENCE: "cc-by-nc-4.0", "Apache-2.0": "apache-2.0"}

_CARD = """\
---
license: {licence_id}
library_name: mlx
pipeline_tag: text-to-audio
tags:
- mlx
- khala
- music-generation
{base}---

# Khala for MLX

{what} in the form that
[khala-mlx](https://pypi.org/project/khala-mlx/) reads.

| | |
|---|---|
| source | {source} |
| dtype of the language models | {dtype} |
| quantisation | {quantization} |
| fc1 bias | {fc1_bias} |
| sound | {rate} Hz, {channels} channels, {codebooks} codebooks of {size} |

    khala generate --model THIS_FOLDER --tags "slow rock" --output song.wav

## Licence

{terms}"""

_CONVERTED = """\
- The weights are licensed under {licence}; they are a conversion of {source} and stay under its
  terms.
"""
_TRAINED = """\
- The weights are licensed under {licence}.
"""
_LLAMA = """\
- `tokenizer.json` is the tokenizer of Llama 3.1, (c) Meta, under the Llama 3.1 Community Licence.
"""


def card(config: KhalaConfig) -> str:
    """The text of README.md."""
    repo, revision = config.source.get("repo"), config.source.get("revision")
    source = f"{repo} at revision {revision}" if repo else "a local copy of Khala's weights"
    what, terms = "Weights of the Khala song generator (arXiv 2605.01790)", _CONVERTED + _LLAMA
    # Converting a trained model again keeps what it came from.
    if config.source.get("layout") == trained.LAYOUT:
        source = "trained with `khala train`"
        what = "Weights of a song model after Khala's recipe (arXiv 2605.01790),"
        terms = _TRAINED + (_LLAMA if _has_llamas_tokenizer(config) else "")
    packed = [
        f"{how.bits} bits in groups of {how.group_size}"
        + ("" if how.mode == "affine" else f" ({how.mode})")
        for how in dict.fromkeys(config.quantization.values())
    ]
    return _CARD.format(
        licence_id=_HUB_IDS.get(config.licence, "other"),
        base=f"base_model: {repo}\n" if repo else "",
        what=what,
        source=source,
        dtype=config.dtype,
        quantization=", ".join(packed) or "none",
        fc1_bias=config.fc1_bias,
        rate=config.codec.sample_rate,
        channels=config.codec.channels,
        codebooks=config.codec.num_codebooks,
        size=config.codec.codebook_size,
        terms=terms.format(licence=config.licence, source=source),
    )


def _has_llamas_tokenizer(config: KhalaConfig) -> bool:
    tokenizer = config.source.get("tokenizer")
    return isinstance(tokenizer, dict) and tokenizer.get("sha256") in SHA256
