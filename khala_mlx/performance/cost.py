"""The least work each stage can be done with: bytes read and floating-point operations.

From sizes alone. A multiplication and its addition count as two operations; element-wise work and
softmax are left out, as they are bound by memory and small.
"""

from __future__ import annotations

import math
from dataclasses import replace

from khala_mlx.config import CodecConfig, KhalaConfig, Quantization, TransformerConfig
from khala_mlx.storage.shapes import Shapes, codec_shapes, linear_sizes, transformer_shapes

# Bytes of an element.
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT32 = 4
_TABLES = ("embed_tokens", "lm_head")


def quantizable(config: KhalaConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every matrix that can be quantized, by its name in config.json."""
    return {
        f"{part}.{path}": size
        for part, sizes in (("backbone", config.backbone), ("superres", config.superres))
        for path, size in (
            *linear_sizes(sizes).items(),
            *((table, (sizes.hidden_size, sizes.vocab_size)) for table in _TABLES),
        )
    }


def quantized(config: KhalaConfig, how: Quantization) -> KhalaConfig:
    """`config` with every matrix quantized whose rows divide into groups."""
    names = [n for n, (into, _) in quantizable(config).items() if into % how.group_size == 0]
    return replace(config, quantization=dict.fromkeys(names, how))


def transformer_bytes(config: KhalaConfig, part: str, width: int) -> int:
    """Return the bytes of all parameters of "backbone" or "superres"."""
    sizes = config.backbone if part == "backbone" else config.superres
    return _bytes_of(config, part, transformer_shapes(sizes), width)


def codec_bytes(config: CodecConfig) -> int:
    """Return the bytes of all parameters of the codec, which is float32 in memory."""
    return _FLOAT32 * sum(map(math.prod, codec_shapes(config).values()))


def cache_bytes(sizes: TransformerConfig, tokens: int, width: int, kv_bits: int | None) -> int:
    """Keys and values of `tokens` tokens in all layers of one song."""
    values = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * tokens
    if kv_bits is None:
        return values * width
    group = 64 if sizes.head_dim % 64 == 0 else 32
    return values * kv_bits // 8 + values // group * 2 * width


def compose_bytes(
    config: KhalaConfig, cached: int, width: int, *, songs: int = 1, kv_bits: int | None = None
) -> int:
    """Bytes read for the next token of each of `songs` songs behind `cached` tokens."""
    sizes = config.backbone
    shapes = transformer_shapes(sizes)
    # Each song reads one row of the embeddings, and all read the rows of the head that can follow.
    del shapes["embed_tokens.weight"]
    shapes["lm_head.weight"] = (reachable_rows(config), sizes.hidden_size)
    weights = _bytes_of(config, "backbone", shapes, width)
    own = sizes.hidden_size * width + cache_bytes(sizes, cached + 1, width, kv_bits)
    return weights + songs * own


def compose_flops(config: KhalaConfig, cached: int) -> int:
    """Operations for the next token of one song behind `cached` tokens."""
    sizes = config.backbone
    attention = 4 * sizes.num_heads * sizes.head_dim * (cached + 1)
    head = 2 * sizes.hidden_size * reachable_rows(config)
    return sum(2 * i * o for i, o in linear_sizes(sizes).values()) + (
        sizes.num_layers * attention + head
    )


def prompt_flops(config: KhalaConfig, prompt: int) -> int:
    """Return the operations of a prefill of the backbone; only the last row is projected."""
    return _pass_flops(config.backbone, prompt, 1, causal=True)


def refine_flops(config: KhalaConfig, prompt: int, frames: int) -> int:
    """Operations of one step of superres."""
    sizes = config.superres
    head = 2 * sizes.hidden_size * config.tokens.codebook_size * frames
    return _pass_flops(sizes, prompt + frames, frames, causal=False) + head


def render_flops(config: CodecConfig, frames: int) -> int:
    """Return the operations that turn frames into sound."""
    flops, rows, rates = 0, frames, iter(config.decoder_rates)
    for name, shape in codec_shapes(config).items():
        if name.startswith("decoder.") and name.endswith(".weight"):
            flops += 2 * math.prod(shape) * rows
            if name.endswith(".up.weight"):
                # Every row that comes in meets each tap once, and `rate` rows go out.
                rows *= next(rates)
    return flops


def reachable_rows(config: KhalaConfig) -> int:
    """Rows of the backbone's head that can follow: a layer's codes and the end of the song."""
    return config.tokens.codebook_size + 1


def _bytes_of(config: KhalaConfig, part: str, shapes: Shapes, width: int) -> int:
    """Return the bytes of the tensors of `part`, quantized where config.json says so.

    The affine modes keep a scale and a bias for each group, the others one byte.
    """
    total = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        how = config.quantization.get(f"{part}.{name.removesuffix('.weight')}")
        if how is None:
            total += size * width
        else:
            per_group = 2 * width if how.mode == "affine" else 1
            total += size * how.bits // 8 + per_group * size // how.group_size
    return total


def _pass_flops(sizes: TransformerConfig, rows: int, wanted: int, *, causal: bool) -> int:
    """Return the operations of a pass over `rows` rows; only the last `wanted` are returned."""
    layer = list(linear_sizes(sizes).items())[: len(linear_sizes(sizes)) // sizes.num_layers]
    for_all = sum(2 * i * o for name, (i, o) in layer if "k_proj" in name or "v_proj" in name)
    for_wanted = sum(2 * i * o for _, (i, o) in layer) - for_all
    score = 4 * sizes.num_heads * sizes.head_dim
    every = score * (rows * (rows + 1) // 2 if causal else rows * rows)
    last = score * wanted * rows - (score * wanted * (wanted - 1) // 2 if causal else 0)
    whole = (sizes.num_layers - 1) * (rows * (for_all + for_wanted) + every)
    return whole + rows * for_all + wanted * for_wanted + last
