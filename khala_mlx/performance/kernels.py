"""The bare kernels of each stage, with nothing around them: what a device needs at the very least.

They have the same weights, shapes, dtype and quantization as the models: matrix products,
attention, norms and the codec's activations, one after another. There are no positions, caches,
sampling, chunks of sound or checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from khala_mlx.model import ops
from khala_mlx.model.attention import SCORE_BYTES, writes_scores
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec, Conv, DecoderBlock
from khala_mlx.model.receptive_field import decoder_halo
from khala_mlx.model.superres import SuperRes

Kernel = Callable[[], Any]
Layer = Callable[[mx.array], mx.array]


def compose_floor(model: Backbone, cached: int, songs: int) -> tuple[Kernel, int]:
    """One token of each of `songs` songs behind `cached` ones; and the bytes it holds."""
    config, (project, _) = model.config, model.choices(True)[0]
    shape = (songs, config.num_kv_heads, cached + 1, config.head_dim)
    # Memory of its own for every layer, or the cache would be read from that of the processor.
    known = [
        (mx.random.normal(shape).astype(model.dtype), mx.random.normal(shape).astype(model.dtype))
        for _ in model.layers
    ]
    start = mx.zeros((songs, 1, config.hidden_size), dtype=model.dtype)
    mx.eval(known, start)

    def run() -> None:
        x = start
        for layer, (k, v) in zip(model.layers, known, strict=True):
            attention, y = layer.self_attn, _norm(layer.input_layernorm, x)
            q = _heads(_linear(attention.q_proj)(y), config.num_heads)
            # Made, but not written to the cache.
            made = _linear(attention.k_proj)(y), _linear(attention.v_proj)(y)
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=attention.scale)
            x = _rest(layer, mx.depends([out], list(made))[0])
        mx.eval(project(_norm(model.norm, x)[:, -1]))

    return run, sum(k.nbytes + v.nbytes for k, v in known)


def refine_floor(model: SuperRes, prompt: int, frames: int) -> Kernel:
    """One step over `prompt` and `frames` rows, the last layer for the frames only."""
    config, codes = model.config, model.layout.codebook_size
    start = mx.zeros((1, prompt + frames, config.hidden_size), dtype=model.dtype)
    head = model.lm_head.weight[:codes]
    mx.eval(start, head)

    def run() -> None:
        x = start
        for number, layer in enumerate(model.layers):
            wanted = prompt if number + 1 == len(model.layers) else 0
            attention, y = layer.self_attn, _norm(layer.input_layernorm, x)
            q = _heads(_linear(attention.q_proj)(y[:, wanted:]), config.num_heads)
            k = _heads(_linear(attention.k_proj)(y), config.num_kv_heads)
            v = _heads(_linear(attention.v_proj)(y), config.num_kv_heads)
            x = _rest(layer, _attention(q, k, v, attention.scale))
            # Layer by layer, or the arrays of all would be allocated at once.
            mx.eval(x)
        x = _norm(model.norm, x)
        mx.eval(x @ head.T if head.dtype == x.dtype else model.lm_head(x[:, :1]))

    return run


def render_floor(codec: Codec, frames: int) -> Kernel:
    """The convs of `frames` frames as matrix products, and the activations."""
    config = codec.config
    start = mx.random.normal((1, frames, config.latent_dim))
    mx.eval(start)

    def run() -> None:
        x = _conv(codec.decoder.conv_in, start)
        for block in codec.decoder.blocks:
            x = _block(block, x)
            mx.eval(x)
        mx.eval(_conv(codec.decoder.conv_out, codec.decoder.snake(x)))

    return run


def frames_of_a_block(codec: Codec, chunk_frames: int) -> int:
    """Frames that go through the decoder for `chunk_frames` of them."""
    return chunk_frames + sum(decoder_halo(codec.config))


def _block(block: DecoderBlock, x: mx.array) -> mx.array:
    up = block.up
    # Every row meets each tap; which sums make a sample is not an arithmetic.
    x = block.snake(x)
    y = mx.concatenate([x @ up.weight[:, tap].T for tap in range(2 * up.stride)], axis=-1)
    x = y.reshape(x.shape[0], 2 * up.stride * x.shape[1], -1)[:, : up.stride * x.shape[1]]
    # In pieces small enough for the processor's cache.
    rows = max(1, ops.TILE[ops.device_form()] // (x.shape[0] * x.shape[2]))
    tiles = [x[:, first : first + rows] for first in range(0, x.shape[1], rows)]
    for unit in block.units:
        tiles = [_conv(unit.conv2, unit.snake2(_conv(unit.conv1, unit.snake1(t)))) for t in tiles]
    return mx.concatenate(tiles, axis=1)


def _conv(conv: Conv, x: mx.array) -> mx.array:
    if ops.device_form() == "gpu":
        return ops.conv1d(x, conv.weight, padding=conv.padding, dilation=conv.dilation)
    out, taps, width = conv.weight.shape
    if x.shape[0] * x.shape[1] <= out:
        # Of few rows one product of all taps is faster.
        return mx.concatenate([x] * taps, axis=-1) @ conv.weight.reshape(out, taps * width).T
    y = x @ conv.weight[:, 0].T
    for tap in range(1, taps):
        y = mx.addmm(y, x, conv.weight[:, tap].T)
    return y


def _rest(layer: Any, attended: mx.array) -> mx.array:
    """What follows attention [B, N, S, D] in a layer -> [B, S, H]."""
    x = _linear(layer.self_attn.o_proj)(attended.swapaxes(1, 2).flatten(2))
    y = _norm(layer.post_attention_layernorm, x)
    gate, up = _linear(layer.mlp.gate_proj)(y), _linear(layer.mlp.up_proj)(y)
    return _linear(layer.mlp.down_proj)(nn.silu(gate) * up)


def _attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    rows = max(1, SCORE_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
    written = writes_scores(q.shape[3], on_cpu=mx.default_device() == mx.cpu)
    if not written or q.shape[2] <= rows:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    parts = []
    for first in range(0, q.shape[2], rows):
        part = q[:, :, first : first + rows]
        parts.append(mx.fast.scaled_dot_product_attention(part, k, v, scale=scale))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=2)


def _norm(norm: nn.RMSNorm, x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, norm.weight, norm.eps)


def _heads(x: mx.array, heads: int) -> mx.array:
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _linear(layer: nn.Module) -> Layer:
    if type(layer) is nn.Linear:
        return lambda x: mx.addmm(layer.bias, x, layer.weight.T)
    result: Layer = layer
    return result
