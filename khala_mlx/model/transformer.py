"""The decoder-only transformer under both language models.

Pre-norm blocks of grouped-query attention and SwiGLU; every linear layer has a bias, the output
head has none (paper section 3; upstream's Megatron arguments). Parameter names follow mlx-lm, so
that its LoRA layers find them. This file does not know prompts, codes or sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from khala_mlx.config import TransformerConfig
from khala_mlx.errors import KhalaError
from khala_mlx.model.attention import attend, attend_quantized
from khala_mlx.token_ids import check_ids

# Rows of a pass from which on each layer is evaluated before the next.
EVALUATED_ROWS = 256


class Attention(nn.Module):
    """Grouped-query attention with half-split rotary positions over the whole head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        # `base=` drifts by 3e-4 at position 4000; explicit wavelengths do not.
        exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
        self._freqs = mx.array((config.rope_base**exponents).astype(np.float32))
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries)
        self.k_proj = nn.Linear(config.hidden_size, keys)
        self.v_proj = nn.Linear(config.hidden_size, keys)
        self.o_proj = nn.Linear(queries, config.hidden_size)

    def __call__(self, x: mx.array, cache: Any, causal: bool, start: int) -> mx.array:
        """Attend from rows `start`.. of x [B, S, H] to all rows: [B, S - start, H]."""
        offset = cache.offset if cache is not None else 0
        q = self._rotate(self._heads(self.q_proj(x[:, start:]), self.num_heads), offset + start)
        k = self._rotate(self._heads(self.k_proj(x), self.num_kv_heads), offset)
        v = self._heads(self.v_proj(x), self.num_kv_heads)
        if cache is None:
            out = attend(q, k, v, scale=self.scale, causal=causal, training=self.training)
        else:
            known = cache.update_and_fetch(k, v)
            if isinstance(known[0], tuple):
                out = attend_quantized(q, known[0], known[1], cache, scale=self.scale)
            else:
                out = attend(q, *known, scale=self.scale, causal=causal)
        return self.o_proj(out.swapaxes(1, 2).flatten(2))

    def _heads(self, x: mx.array, heads: int) -> mx.array:
        return x.reshape(*x.shape[:2], heads, self.head_dim).swapaxes(1, 2)

    def _rotate(self, x: mx.array, offset: int) -> mx.array:
        return mx.fast.rope(
            x,
            self.head_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._freqs,
        )


class MLP(nn.Module):
    """SwiGLU. Conversion folds the double fc1 bias of the released runs into the biases."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, cache: Any, causal: bool, start: int = 0) -> mx.array:
        """Return the residual stream of rows `start`.. of x [B, S, H]: [B, S - start, H]."""
        attended = self.self_attn(self.input_layernorm(x), cache, causal, start)
        x = x[:, start:] + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Embedding, blocks, final norm and an untied head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations: that of the norms, which are never quantized."""
        return self.norm.weight.dtype

    def body(
        self, x: mx.array, *, causal: bool, cache: list[Any] | None = None, start: int = 0
    ) -> mx.array:
        """Return hidden states [B, S - start, H] after the last norm for embeddings [B, S, H].

        `start` skips the last layer's queries and feed-forward for rows that are not projected.
        """
        caches = cache if cache is not None else [None] * len(self.layers)
        for layer, layer_cache in zip(self.layers[:-1], caches[:-1], strict=True):
            x = layer(x, layer_cache, causal)
            if not self.training and x.shape[0] * x.shape[1] >= EVALUATED_ROWS:
                # MLX allocates ahead of the work: in one evaluation the arrays of several layers
                # would be in memory together.
                mx.eval(x)
        return self.norm(self.layers[-1](x, caches[-1], causal, start))

    def embed(self, ids: mx.array) -> mx.array:
        """Return float32 embeddings [..., H] of ids [...]; -1 is padding and embeds to zero.

        A row of superres input is the sum of its columns (docs/released-model.md). With 16-bit
        weights float32 keeps 63 additions exact enough.
        """
        known = (ids >= 0)[..., None]
        rows = self.embed_tokens(mx.maximum(ids, 0)).astype(mx.float32)
        return mx.where(known, rows, 0.0)

    def checked_ids(self, ids: Any, axes: str) -> mx.array:
        """Return `ids` as int32; a gather outside the table would return garbage silently."""
        array = check_ids(ids, axes)
        if array.min() < -1 or array.max() >= self.config.vocab_size:
            raise KhalaError(
                f"Token ids must lie in -1..{self.config.vocab_size - 1}, got "
                f"{array.min()}..{array.max()}."
            )
        return mx.array(array.astype(np.int32))


def projector(head: nn.Module, rows: mx.array | slice) -> Callable[[mx.array], mx.array]:
    """Return a function from hidden states [..., H] to float32 logits of some rows of `head`.

    It reads only those rows of the weights, also of a quantized head. A head of another kind (an
    adapter) is applied whole.
    """
    if type(head) is nn.Linear:
        weight = head.weight[rows]
        return lambda x: (x @ weight.T).astype(mx.float32)
    if type(head) is nn.QuantizedLinear:
        weight, scales = head.weight[rows], head.scales[rows]
        biases = head.biases[rows] if head.get("biases") is not None else None
        return lambda x: mx.quantized_matmul(
            x,
            weight,
            scales=scales,
            biases=biases,
            transpose=True,
            group_size=head.group_size,
            bits=head.bits,
            mode=head.mode,
        ).astype(mx.float32)
    return lambda x: head(x)[..., rows].astype(mx.float32)


def matrix(layer: nn.Module, dtype: mx.Dtype | None = None) -> mx.array:
    """Return the weights [out, in] of a layer; quantized ones are dequantized, to `dtype`."""
    if not isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return layer.weight
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=dtype,
    )


def like_input(result: mx.array, given: Any) -> Any:
    """Return `result` as float32 NumPy, unless an mx.array was given."""
    if isinstance(given, mx.array):
        return result
    return np.array(result.astype(mx.float32))
