"""The least work each stage can be done with: bytes read and floating-point operations.

From sizes alone. A multiplication and its addition count as two operations; element-wise work and
softmax are left out, as they are bound by memory and small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from khala_mlx.config import CodecConfig, KhalaConfig, Quantization, TransformerConfig
from khala_mlx.model.receptive_field import DILATIONS, KERNEL, LATENT_KERNEL
from khala_mlx.storage.adapter import linear_sizes

# Bytes of an element.
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT32 = 4
_TABLES = ("embed_tokens", "lm_head")


def packed_bytes(config: KhalaConfig, path: str, into: int, out: int, width: int) -> int:
    """Bytes of a matrix [out, into] named `part.path`, quantized if config.json says so.

    The affine modes keep a scale and a bias for each group, the others one byte.
    """
    how = config.quantization.get(path)
    if how is None:
        return into * out * width
    per_group = 2 * width if how.mode == "affine" else 1
    return into * out * how.bits // 8 + per_group * into * out // how.group_size


def packable(config: KhalaConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every matrix that can be quantized, by its name in config.json."""
    return {
        f"{part}.{path}": size
        for part, sizes in (("backbone", config.backbone), ("superres", config.superres))
        for path, size in (
            *linear_sizes(sizes).items(),
            *((table, (sizes.hidden_size, sizes.vocab_size)) for table in _TABLES),
        )
    }


def packed(config: KhalaConfig, how: Quantization) -> KhalaConfig:
    """`config` with every matrix quantized whose rows divide into groups."""
    names = [n for n, (into, _) in packable(config).items() if into % how.group_size == 0]
    return replace(config, quantization=dict.fromkeys(names, how))


def transformer_bytes(config: KhalaConfig, part: str, width: int) -> int:
    """Bytes of all parameters of "backbone" or "superres"."""
    sizes = config.backbone if part == "backbone" else config.superres
    total = _body_bytes(config, part, sizes, width)
    for table in _TABLES:
        total += packed_bytes(config, f"{part}.{table}", sizes.hidden_size, sizes.vocab_size, width)
    return total


def codec_bytes(config: CodecConfig) -> int:
    """Bytes of all parameters of the codec, which is float32 in memory."""
    codebooks = config.num_codebooks * config.codebook_size * config.latent_dim
    encoder = sum(i * o * k + o + a for i, o, k, a in _encoder_convs(config))
    decoder = sum(i * o * k + o + a for i, o, k, a, _ in _decoder_convs(config))
    return _FLOAT32 * (codebooks + encoder + decoder)


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
    head = packed_bytes(
        config, "backbone.lm_head", sizes.hidden_size, reachable_rows(config), width
    )
    weights = _body_bytes(config, "backbone", sizes, width) + head
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
    """Operations to read a prompt of the backbone, of which only the last row is projected."""
    return _pass_flops(config.backbone, prompt, 1, causal=True)


def refine_flops(config: KhalaConfig, prompt: int, frames: int) -> int:
    """Operations of one step of superres."""
    sizes = config.superres
    head = 2 * sizes.hidden_size * config.tokens.codebook_size * frames
    return _pass_flops(sizes, prompt + frames, frames, causal=False) + head


def render_flops(config: CodecConfig, frames: int) -> int:
    """Operations to turn frames into sound."""
    return sum(2 * i * o * k * int(rows * frames) for i, o, k, _, rows in _decoder_convs(config))


def reachable_rows(config: KhalaConfig) -> int:
    """Rows of the backbone's head that can follow: a layer's codes and the end of the song."""
    return config.tokens.codebook_size + 1


def _body_bytes(config: KhalaConfig, part: str, sizes: TransformerConfig, width: int) -> int:
    linears = linear_sizes(sizes)
    norms = (2 * sizes.num_layers + 1) * sizes.hidden_size
    total = width * (norms + sum(out for _, out in linears.values()))
    for path, (into, out) in linears.items():
        total += packed_bytes(config, f"{part}.{path}", into, out, width)
    return total


def _pass_flops(sizes: TransformerConfig, rows: int, wanted: int, *, causal: bool) -> int:
    """A pass over `rows` rows of which only the last `wanted` leave the last layer."""
    layer = list(linear_sizes(sizes).items())[: len(linear_sizes(sizes)) // sizes.num_layers]
    for_all = sum(2 * i * o for name, (i, o) in layer if "k_proj" in name or "v_proj" in name)
    for_wanted = sum(2 * i * o for _, (i, o) in layer) - for_all
    score = 4 * sizes.num_heads * sizes.head_dim
    every = score * (rows * (rows + 1) // 2 if causal else rows * rows)
    last = score * wanted * rows - (score * wanted * (wanted - 1) // 2 if causal else 0)
    whole = (sizes.num_layers - 1) * (rows * (for_all + for_wanted) + every)
    return whole + rows * for_all + wanted * for_wanted + last


def _unit_convs(width: int) -> Iterator[tuple[int, int, int, int]]:
    for _ in DILATIONS:
        yield width, width, KERNEL, width
        yield width, width, 1, width


def _encoder_convs(config: CodecConfig) -> Iterator[tuple[int, int, int, int]]:
    """(in, out, kernel, alphas of the snake before it) of every conv."""
    width = config.encoder_dim
    yield config.channels, width, KERNEL, 0
    for stride in config.encoder_strides:
        yield from _unit_convs(width)
        yield width, 2 * width, 2 * stride, width
        width *= 2
    yield width, config.latent_dim, LATENT_KERNEL, width


def _decoder_convs(config: CodecConfig) -> Iterator[tuple[int, int, int, int, float]]:
    """(in, out, kernel, alphas, rows a frame of `in * kernel` products) of every conv."""
    width = config.decoder_dim * 2 ** len(config.decoder_rates)
    yield config.latent_dim, width, KERNEL, 0, 1
    rows = 1
    for rate in config.decoder_rates:
        # Every input row meets each of the 2 * rate taps once.
        yield width, width // 2, 2 * rate, width, rows
        width, rows = width // 2, rows * rate
        for conv in _unit_convs(width):
            yield (*conv, rows)
    yield width, config.channels, KERNEL, width, rows
