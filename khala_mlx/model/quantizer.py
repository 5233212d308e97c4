"""Residual vector quantiser: each layer names the codebook row nearest to what is left."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Quantizer(nn.Module):
    """`num_codebooks` Euclidean codebooks of `codebook_size` rows, in one tensor [K, N, D]."""

    def __init__(self, num_codebooks: int, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.codebooks = mx.random.normal((num_codebooks, codebook_size, dim))

    def encode(self, latents: mx.array, layers: int | None = None) -> mx.array:
        """Latents [..., D] to codes [K, ...] of the first `layers` codebooks, greedily."""
        residual = latents.astype(mx.float32)
        codes = []
        for layer in range(self.codebooks.shape[0] if layers is None else layers):
            codebook = self.codebooks[layer].astype(mx.float32)
            codes.append(nearest(residual, codebook))
            residual = residual - codebook[codes[-1]]
        return mx.stack(codes)

    def decode(self, codes: mx.array) -> mx.array:
        """Codes [k, ...] of the first k codebooks to the sum of their rows [..., D]."""
        rows = self.codebooks[0][codes[0]]
        total = rows.astype(mx.float32)
        for layer in range(1, codes.shape[0]):
            total = total + self.codebooks[layer][codes[layer]]
        return total.astype(rows.dtype)


def nearest(points: mx.array, codebook: mx.array) -> mx.array:
    """Index [...] of the row of codebook [N, D] nearest to each of points [..., D], first if tied.

    Of |x - e|^2 = |x|^2 - 2 x e + |e|^2 the first term is the same for all rows; without it no
    digits are lost to it.
    """
    return mx.argmax(points @ codebook.T - 0.5 * mx.square(codebook).sum(-1), axis=-1)
