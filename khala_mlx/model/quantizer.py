"""Residual vector quantizer: each codebook quantizes the residual of the ones before."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Quantizer(nn.Module):
    """`num_codebooks` Euclidean codebooks of `codebook_size` rows, in one tensor [K, N, D]."""

    def __init__(self, num_codebooks: int, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.codebooks = mx.random.normal((num_codebooks, codebook_size, dim))

    def encode(self, latents: mx.array, count: int | None = None) -> mx.array:
        """Return codes [k, ...] of latents [..., D] for the first k = `count` codebooks."""
        residual = latents.astype(mx.float32)
        codes = []
        for rows in self.codebooks[:count]:
            codebook = rows.astype(mx.float32)
            codes.append(nearest(residual, codebook))
            residual = residual - codebook[codes[-1]]
        return mx.stack(codes)

    def decode(self, codes: mx.array) -> mx.array:
        """Return the sum [..., D] of the rows of codes [k, ...] of the first k codebooks."""
        rows = self.codebooks[0][codes[0]]
        total = rows.astype(mx.float32)
        for index in range(1, codes.shape[0]):
            total = total + self.codebooks[index][codes[index]]
        return total.astype(rows.dtype)


def nearest(points: mx.array, codebook: mx.array) -> mx.array:
    """Return indices [...] of the rows of codebook [N, D] nearest to points [..., D].

    Of |x - e|^2 = |x|^2 - 2 x e + |e|^2 the first term is the same for all rows. Leaving it out
    keeps digits. The first of several equal rows is chosen.
    """
    return mx.argmax(points @ codebook.T - 0.5 * mx.square(codebook).sum(-1), axis=-1)
