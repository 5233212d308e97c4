"""The tensors a model folder holds, and their shapes, as its config dictates."""

from __future__ import annotations

from khala_mlx.config import CodecConfig, TransformerConfig

Shapes = dict[str, tuple[int, ...]]

RESIDUAL_UNITS = 3


def transformer_shapes(config: TransformerConfig) -> Shapes:
    """backbone.safetensors and superres.safetensors."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    shapes: Shapes = {"embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        at = f"layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        shapes[at + "self_attn.o_proj.weight"] = (hidden, queries)
        shapes[at + "self_attn.o_proj.bias"] = (hidden,)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        for name in ("gate", "up"):
            shapes[f"{at}mlp.{name}_proj.weight"] = (ffn, hidden)
            shapes[f"{at}mlp.{name}_proj.bias"] = (ffn,)
        shapes[at + "mlp.down_proj.weight"] = (hidden, ffn)
        shapes[at + "mlp.down_proj.bias"] = (hidden,)
    shapes["norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def is_fc1_bias(name: str) -> bool:
    """Whether the bias is one that `fc1_bias` doubles."""
    return name.endswith((".gate_proj.bias", ".up_proj.bias"))


def codec_shapes(config: CodecConfig) -> Shapes:
    """codec.safetensors, convolutions as [out, kernel, in], transposed ones too."""
    shapes: Shapes = {}
    width = config.encoder_dim
    shapes |= _conv("encoder.conv_in", width, 7, config.channels)
    for index, stride in enumerate(config.encoder_strides):
        at = f"encoder.blocks.{index}"
        for unit in range(RESIDUAL_UNITS):
            shapes |= _unit(f"{at}.units.{unit}", width)
        shapes[f"{at}.snake.alpha"] = (width,)
        shapes |= _conv(f"{at}.down", 2 * width, 2 * stride, width)
        width *= 2
    shapes["encoder.snake.alpha"] = (width,)
    shapes |= _conv("encoder.conv_out", config.latent_dim, 3, width)
    shapes["quantizer.codebooks"] = (
        config.num_codebooks,
        config.codebook_size,
        config.latent_dim,
    )
    width = config.decoder_dim * 2 ** len(config.decoder_rates)
    shapes |= _conv("decoder.conv_in", width, 7, config.latent_dim)
    for index, rate in enumerate(config.decoder_rates):
        at = f"decoder.blocks.{index}"
        shapes[f"{at}.snake.alpha"] = (width,)
        shapes |= _conv(f"{at}.up", width // 2, 2 * rate, width)
        width //= 2
        for unit in range(RESIDUAL_UNITS):
            shapes |= _unit(f"{at}.units.{unit}", width)
    shapes["decoder.snake.alpha"] = (width,)
    shapes |= _conv("decoder.conv_out", config.channels, 7, width)
    return shapes


def _unit(at: str, width: int) -> Shapes:
    return {
        f"{at}.snake1.alpha": (width,),
        **_conv(f"{at}.conv1", width, 7, width),
        f"{at}.snake2.alpha": (width,),
        **_conv(f"{at}.conv2", width, 1, width),
    }


def _conv(at: str, out: int, kernel: int, into: int) -> Shapes:
    return {f"{at}.weight": (out, kernel, into), f"{at}.bias": (out,)}
