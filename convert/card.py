"""The model card of a model folder: README.md with the front matter the Hub reads."""

from __future__ import annotations

from khala_mlx.config import WEIGHTS_LICENCE, KhalaConfig

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

Weights of the Khala song generator (arXiv 2605.01790) in the form that
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

- The weights are licensed under {licence}; they are a conversion of {source} and stay under its
  terms.
- `tokenizer.json` is the tokenizer of Llama 3.1, (c) Meta, under the Llama 3.1 Community Licence.
"""


def card(config: KhalaConfig) -> str:
    """The text of README.md."""
    repo, revision = config.source.get("repo"), config.source.get("revision")
    source = f"{repo} at revision {revision}" if repo else "a local copy of Khala's weights"
    packed = next(iter(config.quantization.values()), None)
    return _CARD.format(
        licence_id="cc-by-nc-4.0" if config.licence == WEIGHTS_LICENCE else "other",
        base=f"base_model: {repo}\n" if repo else "",
        source=source,
        dtype=config.dtype,
        quantization=f"{packed.bits} bits in groups of {packed.group_size}" if packed else "none",
        fc1_bias=config.fc1_bias,
        rate=config.codec.sample_rate,
        channels=config.codec.channels,
        codebooks=config.codec.num_codebooks,
        size=config.codec.codebook_size,
        licence=config.licence,
    )
