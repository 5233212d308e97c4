"""The tensors of a model folder and their shapes, computed from its config."""

from __future__ import annotations

from khala_mlx.config import DILATIONS, KERNEL, LATENT_KERNEL, CodecConfig, TransformerConfig

Shapes = dict[str, tuple[int, ...]]


def transformer_shapes(config: TransformerConfig) -> Shapes:
    """Return the shapes in backbone.safetensors or superres.safetensors, matrices [out, in]."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block: Shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: Shapes = {"embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        for name, shape in block.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
            if len(shape) == 2:
                shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
    shapes["norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def linear_sizes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return (in, out) of every linear layer that can have an adapter, by its path."""
    return {
        name.removesuffix(".weight"): (shape[1], shape[0])
        for name, shape in transformer_shapes(config).items()
        if name.startswith("layers.") and len(shape) == 2
    }


def is_fc1_bias(name: str) -> bool:
    """Return whether `fc1_bias` doubles this bias."""
    return name.endswith((".gate_proj.bias", ".up_proj.bias"))


def codec_shapes(config: CodecConfig) -> Shapes:
    """Return the shapes in codec.safetensors; convs, also transposed, are [out, kernel, in]."""
    width = config.encoder_dim
    shapes = _conv("encoder.conv_in", width, KERNEL, config.channels)
    for index, stride in enumerate(config.encoder_strides):
        at = f"encoder.blocks.{index}"
        shapes |= _units(at, width)
        shapes[f"{at}.snake.alpha"] = (width,)
        shapes |= _conv(f"{at}.down", 2 * width, 2 * stride, width)
        width *= 2
    shapes["encoder.snake.alpha"] = (width,)
    shapes |= _conv("encoder.conv_out", config.latent_dim, LATENT_KERNEL, width)
    shapes["quantizer.codebooks"] = (
        config.num_codebooks,
        config.codebook_size,
        config.latent_dim,
    )
    width = config.decoder_dim * 2 ** len(config.decoder_rates)
    shapes |= _conv("decoder.conv_in", width, KERNEL, config.latent_dim)
    for index, rate in enumerate(config.decoder_rates):
        at = f"decoder.blocks.{index}"
        shapes[f"{at}.snake.alpha"] = (width,)
        shapes |= _conv(f"{at}.up", width // 2, 2 * rate, width)
        width //= 2
        shapes |= _units(at, width)
    shapes["decoder.snake.alpha"] = (width,)
    shapes |= _conv("decoder.conv_out", config.channels, KERNEL, width)
    return shapes


def _units(at: str, width: int) -> Shapes:
    shapes: Shapes = {}
    for unit in range(len(DILATIONS)):
        for number, kernel in ((1, KERNEL), (2, 1)):
            shapes[f"{at}.units.{unit}.snake{number}.alpha"] = (width,)
            shapes |= _conv(f"{at}.units.{unit}.conv{number}", width, kernel, width)
    return shapes


def _conv(at: str, out: int, kernel: int, into: int) -> Shapes:
    return {f"{at}.weight": (out, kernel, into), f"{at}.bias": (out,)}
