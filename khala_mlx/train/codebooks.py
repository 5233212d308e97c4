"""Learning the codebooks: k-means start, moving averages, replacement of dead codes.

Codebooks are not descended: each row follows the mean of the residuals it is chosen for.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from khala_mlx.model.quantizer import Quantizer, nearest


def fit_layer(points: mx.array, size: int, rng: np.random.Generator, rounds: int = 10) -> mx.array:
    """k-means of points [n, D] to a codebook [size, D]; empty clusters restart on far points."""
    centres = points[mx.array(rng.choice(points.shape[0], size, replace=points.shape[0] < size))]
    for _ in range(rounds):
        codes = nearest(points, centres)
        counts, sums = _cluster(points, codes, size)
        centres = mx.where(counts[:, None] > 0, sums / mx.maximum(counts, 1)[:, None], centres)
        empty = np.flatnonzero(np.array(counts) == 0)
        if len(empty):
            errors = mx.square(points - centres[codes]).sum(-1)
            farthest = mx.argsort(-errors)[: len(empty)]
            centres[mx.array(empty[: farthest.shape[0]])] = points[farthest]
        mx.eval(centres)
    return centres


def fit(quantizer: Quantizer, latents: mx.array, layers: int, rng: np.random.Generator) -> None:
    """Fit the first `layers` codebooks to latents [n, D], each to what the ones before leave."""
    codebooks = list(quantizer.codebooks)
    residual = latents
    for layer in range(layers):
        codebooks[layer] = fit_layer(residual, quantizer.codebooks.shape[1], rng)
        residual = residual - codebooks[layer][nearest(residual, codebooks[layer])]
        mx.eval(residual)
    quantizer.codebooks = mx.stack(codebooks)


def straight_through(
    quantizer: Quantizer, latents: mx.array, layers: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Quantise latents [..., D] with `layers` codebooks, with the gradient of the identity.

    Returns:
        The quantised latents, the commitment loss, and the sum of the first two layers (also
        straight through), which auxiliary losses look at.
    """
    codes = quantizer.encode(mx.stop_gradient(latents), max(layers, 2))
    codebooks = mx.stop_gradient(quantizer.codebooks)
    total = mx.zeros_like(latents)
    coarse = total
    for layer in range(max(layers, 2)):
        row = codebooks[layer][codes[layer]]
        coarse = coarse + row if layer < 2 else coarse
        total = total + row if layer < layers else total
    commitment = mx.square(latents - total).mean() if layers else mx.zeros(())
    pass_on = lambda quantised: latents + mx.stop_gradient(quantised - latents)  # noqa: E731
    return (pass_on(total) if layers else latents), commitment, pass_on(coarse)


def start_averages(quantizer: Quantizer, layers: int) -> dict[str, mx.array]:
    """Moving averages that agree with the codebooks as they are."""
    counts = mx.ones((layers, quantizer.codebooks.shape[1]))
    return {"ema_count": counts, "ema_sum": mx.array(quantizer.codebooks[:layers])}


def follow(
    quantizer: Quantizer,
    averages: dict[str, mx.array],
    latents: mx.array,
    *,
    decay: float,
    dead_below: float,
    rng: np.random.Generator,
) -> dict[str, mx.array]:
    """Move the codebooks that `averages` cover towards latents [n, D].

    A code that is chosen less than `dead_below` times a step, on average, starts again on a
    residual of this step.
    """
    layers, size = averages["ema_count"].shape
    residual, codebooks = latents, list(quantizer.codebooks)
    counts, sums = [], []
    for layer in range(layers):
        codes = nearest(residual, codebooks[layer])
        left = residual - codebooks[layer][codes]
        count, total = _cluster(residual, codes, size)
        count = decay * averages["ema_count"][layer] + (1 - decay) * count
        total = decay * averages["ema_sum"][layer] + (1 - decay) * total
        fresh = residual[mx.array(rng.integers(0, residual.shape[0], size))]
        dead = (count < dead_below)[:, None]
        codebooks[layer] = mx.where(dead, fresh, total / mx.maximum(count, 1e-6)[:, None])
        counts.append(mx.where(dead[:, 0], 1.0, count))
        sums.append(mx.where(dead, fresh, total))
        residual = left
    quantizer.codebooks = mx.stack(codebooks)
    moved = {"ema_count": mx.stack(counts), "ema_sum": mx.stack(sums)}
    mx.eval(quantizer.codebooks, moved)
    return moved


def _cluster(points: mx.array, codes: mx.array, size: int) -> tuple[mx.array, mx.array]:
    """How many points [n, D] each code has, and their sum [size, D]."""
    # A product with one-hot rows: a scatter-add is serial on the CPU and unordered on Metal.
    chosen = (codes[:, None] == mx.arange(size)[None]).astype(points.dtype)
    return chosen.sum(0), chosen.T @ points
