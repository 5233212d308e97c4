"""How much memory each stage takes, from sizes alone.

Weights and key-value caches are counted exactly. The arrays at work in a pass follow the shapes of
one layer; how many of each are there at once is fitted to peaks measured on MLX's CPU backend
(docs/performance.md), for MLX allocates ahead of the work. On the GPU no attention scores are
written out for heads of the usual sizes; nothing else is known to differ, and nothing was measured
there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from khala_mlx.config import CodecConfig, KhalaConfig, TransformerConfig
from khala_mlx.model.attention import SCORE_BYTES, writes_scores
from khala_mlx.model.ops import TILE
from khala_mlx.model.receptive_field import UNITS_HALO, decoder_halo
from khala_mlx.model.weights import CPU_DEQUANTIZED_BYTES
from khala_mlx.performance import cost as counts
from khala_mlx.storage.adapter import NO_ADAPTERS, Extent

_FLOAT32 = 4
# Arrays of [rows, hidden], [rows, inner], [rows, queries] and [rows, keys] at work in a layer,
# when its attention is one kernel and when it is evaluated chunk by chunk.
_WHOLE = (4.2, 2.25, 7.5, 4.6)
_CHUNKED = {"compose": (2.1, 0.0, 4.2, 2.0), "refine": (2.1, 0.0, 6.2, 2.0)}
# The feed-forward part alone, which comes after the chunks.
_INNER = (10.4, 2.0)
# Arrays of [rows, widest] in it that LoRA makes besides, and DoRA besides that.
_ADAPTED, _LENGTHENED = 2.0, 2.0
# Sums of embeddings [frames, hidden] in float32: the old, the new, what is added.
_SUMS = 2.5
# Arrays of a tile, and of the largest whole signal, at work in the codec's decoder: in one tile,
# and in several.
_ONE_TILE, _TILES, _WHOLES = 10.5, 10.3, 3.8


@dataclass(frozen=True)
class Setting:
    """How the language models compute.

    Attributes:
        dtype: of activations and plain weights.
        on_cpu: whether on MLX's CPU backend.
        kv_bits: quantization of the key-value cache, or None.
        adapters: what is on the backbone.
    """

    dtype: str
    on_cpu: bool
    kv_bits: int | None = None
    adapters: Extent = NO_ADAPTERS

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return counts.WIDTHS[self.dtype]


def as_held(config: KhalaConfig, part: str, setting: Setting) -> KhalaConfig:
    """Return `config` with the quantization in memory: small models are dequantized."""
    plain = replace(config, quantization={})
    small = counts.transformer_bytes(plain, part, _FLOAT32) <= CPU_DEQUANTIZED_BYTES
    return plain if setting.on_cpu and small else config


def weight_bytes(config: KhalaConfig, part: str, setting: Setting) -> int:
    """The parameters of "backbone", "superres" or "codec" as they lie in memory."""
    if part == "codec":
        return counts.codec_bytes(config.codec)
    held = as_held(config, part, setting)
    added = _FLOAT32 * setting.adapters.parameters if part == "backbone" else 0
    return counts.transformer_bytes(held, part, setting.width) + added


def compose_bytes(
    config: KhalaConfig, setting: Setting, prompt: int, max_tokens: int, songs: int = 1
) -> int:
    """The most that composing needs beside the weights: reading the prompt, or writing.

    The codes of a beginning that the song continues from are read like the prompt, and count in it.
    """
    sizes, width = config.backbone, setting.width
    read = counts.cache_bytes(sizes, prompt, width, None)
    reading = read + _pass_bytes(sizes, prompt, setting, "compose")
    written = counts.cache_bytes(sizes, prompt + max_tokens, width, setting.kv_bits)
    # Keys or values of a layer are copied when a song of several ends.
    copied = (songs - 1) * written // (2 * sizes.num_layers)
    return _head_bytes(config, setting) + max(reading, songs * written + copied)


def judge_bytes(config: KhalaConfig, setting: Setting, tokens: int) -> int:
    """The most that judging a song of `tokens` tokens, prompt included, needs beside the weights.

    It is one pass without a cache; see Backbone.nats_per_token.
    """
    return _head_bytes(config, setting) + _pass_bytes(config.backbone, tokens, setting, "compose")


def refine_bytes(config: KhalaConfig, setting: Setting, prompt: int, frames: int) -> int:
    """The most that refining one song needs beside the weights; windows do not grow with it."""
    sizes = config.superres
    frames = min(frames, max(1, sizes.context - prompt))
    sums = int(_SUMS * _FLOAT32 * frames * sizes.hidden_size)
    return sums + _pass_bytes(sizes, prompt + frames, setting, "refine")


def expected_bytes(config: KhalaConfig, frames: int) -> int:
    """What choosing codes by expectation needs beside refining: codebooks, logits and latents."""
    sizes = config.codec
    codebooks = sizes.num_codebooks * sizes.codebook_size * sizes.latent_dim
    # Probabilities and distances; means, what is owed before and after, and chosen rows.
    rows = frames * (2 * sizes.codebook_size + 4 * sizes.latent_dim)
    return _FLOAT32 * (codebooks + rows)


def render_bytes(config: CodecConfig, chunk_frames: int, *, on_cpu: bool) -> int:
    """The most that rendering needs beside the weights and the sound."""
    widest = config.decoder_dim * 2 ** (len(config.decoder_rates) - 1)
    rows = chunk_frames + sum(decoder_halo(config))
    # The quantized weights of the largest upsampling, and what it makes.
    first = 2 * widest * 2 * config.decoder_rates[0] * widest
    packed = _FLOAT32 * (first + 4 * rows * config.decoder_rates[0] * widest)
    whole = _FLOAT32 * rows * config.hop * config.decoder_dim
    tiles = -(-whole // (_FLOAT32 * TILE["cpu" if on_cpu else "gpu"]))
    if tiles == 1:
        return max(packed, int(_ONE_TILE * whole))
    halo = _FLOAT32 * sum(UNITS_HALO) * config.decoder_dim
    return max(packed, int(_WHOLES * whole + _TILES * (whole / tiles + halo)))


def _head_bytes(config: KhalaConfig, setting: Setting) -> int:
    """Copies of the rows of the backbone's head that can follow."""
    layers = config.tokens.num_coarse
    rows = counts.reachable_rows(config)
    return layers * rows * config.backbone.hidden_size * setting.width


def _adapting_bytes(setting: Setting, rows: int) -> int:
    """Arrays of adapters at work in the widest layer they are on, in float32 whatever comes in."""
    extent = setting.adapters
    arrays = _ADAPTED + (_LENGTHENED if extent.dora else 0) + (setting.width < _FLOAT32)
    return int(arrays * _FLOAT32 * rows * extent.widest)


def _pass_bytes(sizes: TransformerConfig, rows: int, setting: Setting, stage: str) -> int:
    """Return the largest working memory of a layer in a pass over `rows` rows."""
    arrays = (
        sizes.hidden_size,
        sizes.intermediate_size,
        sizes.num_heads * sizes.head_dim,
        sizes.num_kv_heads * sizes.head_dim,
    )
    written = writes_scores(sizes.head_dim, on_cpu=setting.on_cpu)
    scores = _FLOAT32 * sizes.num_heads * rows * rows if written else 0
    unit = rows * setting.width
    # Only the backbone has any.
    adapting = _adapting_bytes(setting, rows) if stage == "compose" else 0
    if scores <= SCORE_BYTES:
        return scores + int(unit * _times(_WHOLE, arrays)) + adapting // 2
    chunked = SCORE_BYTES + int(unit * _times(_CHUNKED[stage], arrays))
    return max(chunked, int(unit * _times(_INNER, arrays[:2])) + adapting)


def _times(factors: tuple[float, ...], arrays: tuple[int, ...]) -> float:
    return sum(factor * size for factor, size in zip(factors, arrays, strict=True))
