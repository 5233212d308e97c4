"""The three stages as one writes them down in PyTorch at first: the yardstick of against_torch.py.

The whole vocabulary is projected, the key-value cache grows by concatenation, all columns are
embedded again at each refine step, convolutions are torch's own. Weights come as NumPy arrays under
khala_mlx's names, [out, in] for linear layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]


def tensors(arrays: dict[str, np.ndarray]) -> Weights:
    """NumPy arrays as torch's, nothing copied."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Transformer:
    """Pre-norm blocks of grouped-query attention and SwiGLU."""

    def __init__(self, weights: Weights, config: Any) -> None:
        self.w, self.config = weights, config
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        self.inverse = (config.rope_base**-half).float()

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] -> [..., O]."""
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """RMS norm over the last axis."""
        return F.rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.config.norm_eps)

    def heads(self, name: str, x: torch.Tensor, first: int | None) -> torch.Tensor:
        """x [B, S, H] -> [B, N, S, D], turned by its positions from `first` on."""
        y = self.linear(name, x)
        y = y.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)
        if first is None:
            return y
        angles = torch.arange(first, first + x.shape[1])[:, None] * self.inverse
        low, high = y.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def body(self, x: torch.Tensor, cache: list[Any] | None, causal: bool) -> torch.Tensor:
        """Embeddings [B, S, H] -> hidden states [B, S, H]; `cache` holds keys and values."""
        for number in range(self.config.num_layers):
            at = f"layers.{number}"
            known = cache[number] if cache else None
            first = known[0].shape[2] if known else 0
            h = self.norm(f"{at}.input_layernorm", x)
            q = self.heads(f"{at}.self_attn.q_proj", h, first)
            k = self.heads(f"{at}.self_attn.k_proj", h, first)
            v = self.heads(f"{at}.self_attn.v_proj", h, None)
            if known:
                k, v = torch.cat([known[0], k], dim=2), torch.cat([known[1], v], dim=2)
            if cache is not None:
                cache[number] = (k, v)
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal and q.shape[2] > 1, enable_gqa=True
            )
            x = x + self.linear(f"{at}.self_attn.o_proj", out.transpose(1, 2).flatten(2))
            h = self.norm(f"{at}.post_attention_layernorm", x)
            gated = F.silu(self.linear(f"{at}.mlp.gate_proj", h)) * self.linear(
                f"{at}.mlp.up_proj", h
            )
            x = x + self.linear(f"{at}.mlp.down_proj", gated)
        return self.norm("norm", x)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> [..., H]."""
        return F.embedding(ids, self.w["embed_tokens.weight"])


@torch.inference_mode()
def compose(model: Transformer, prompt: np.ndarray, count: int, end_of_song: int) -> np.ndarray:
    """`count` tokens behind the prompt [P], greedily over the whole vocabulary, no early end."""
    cache: list[Any] = [None] * model.config.num_layers
    token, written = torch.from_numpy(prompt)[None], []
    for _ in range(count):
        hidden = model.body(model.embed(token), cache, causal=True)
        logits = model.linear("lm_head", hidden[:, -1])
        logits[:, end_of_song] = -torch.inf
        token = logits.argmax(-1, keepdim=True)
        written.append(int(token))
    return np.array(written)


@torch.inference_mode()
def refine(
    model: Transformer, prompt: np.ndarray, coarse: np.ndarray, layers: int, layout: Any
) -> np.ndarray:
    """Codes [layers, T] from coarse [2, T], greedily; upstream's input with all columns."""
    codes = torch.from_numpy(coarse)
    starts = layout.audio_start + layout.codebook_size * torch.arange(layers)
    for layer in range(len(coarse), layers):
        text = torch.from_numpy(prompt).clone()
        text[-1] = layout.marker_base - layer
        audio = model.embed((codes + starts[:layer, None]).T).sum(1)
        hidden = model.body(torch.cat([model.embed(text), audio])[None], None, causal=False)
        logits = model.linear("lm_head", hidden[0, len(text) :])
        first = int(starts[layer])
        chosen = logits[:, first : first + layout.codebook_size].argmax(-1)
        codes = torch.cat([codes, chosen[None]])
    return codes.numpy()


class Decoder:
    """Codes to sound, all at once."""

    def __init__(self, weights: Weights, config: Any, dilations: tuple[int, ...]) -> None:
        self.config, self.dilations = config, dilations
        self.books = weights["quantizer.codebooks"]
        # torch wants [O, I, k], of transposed convs [I, O, k].
        orders = {"up.weight": (2, 0, 1), "weight": (0, 2, 1)}
        self.w = {}
        for name, tensor in weights.items():
            if name.startswith("decoder."):
                order = next((o for end, o in orders.items() if name.endswith(end)), None)
                turned = tensor.permute(order).contiguous() if order else tensor
                self.w[name.removeprefix("decoder.")] = turned

    def conv(self, name: str, x: torch.Tensor, dilation: int = 1) -> torch.Tensor:
        """x [B, I, L] -> [B, O, L]."""
        weight = self.w[f"{name}.weight"]
        reach = dilation * (weight.shape[2] - 1) // 2
        return F.conv1d(x, weight, self.w[f"{name}.bias"], padding=reach, dilation=dilation)

    def snake(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x + sin(alpha x)^2 / alpha."""
        alpha = self.w[f"{name}.alpha"][:, None]
        return x + torch.sin(alpha * x).square() / (alpha + 1e-9)

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes [K, T] -> samples [hop * T, channels]."""
        rows = [
            book[layer] for book, layer in zip(self.books, torch.from_numpy(codes), strict=True)
        ]
        x = self.conv("conv_in", torch.stack(rows).sum(0).T[None])
        for number, rate in enumerate(self.config.decoder_rates):
            at = f"blocks.{number}"
            x = F.conv_transpose1d(
                self.snake(f"{at}.snake", x),
                self.w[f"{at}.up.weight"],
                self.w[f"{at}.up.bias"],
                stride=rate,
                padding=(rate + 1) // 2,
            )
            for unit, dilation in enumerate(self.dilations):
                here = f"{at}.units.{unit}"
                y = self.conv(f"{here}.conv1", self.snake(f"{here}.snake1", x), dilation)
                x = x + self.conv(f"{here}.conv2", self.snake(f"{here}.snake2", y))
        return self.conv("conv_out", self.snake("snake", x))[0].T.numpy()
