"""Codes by expectation instead of by drawing: another way to choose what superres predicts.

Where superres cannot tell the detail, a drawn code, and the likeliest one too, is a guess of the
right strength in the wrong place. The mean over its prediction is the guess with the least square
error of the latents. No code is that mean; but each layer is finer than the one before, so that
what one leaves over, the next ones can give. Upstream knows no such rule.
"""

from __future__ import annotations

import mlx.core as mx

from khala_mlx.model.quantizer import nearest


class Expected:
    """Chooses, for one song of T frames, codes whose sum follows the sum of the means.

    codebooks [K, N, D]: the codec's. `layer` is the layer to choose next: a song goes on where the
    same object left it, or begins behind the coarse layers.
    """

    def __init__(self, codebooks: mx.array, frames: int, layer: int) -> None:
        self.codebooks, self.layer = codebooks, layer
        # What the codes chosen so far leave over of the means, [T, D].
        self._owed = mx.zeros((frames, codebooks.shape[-1]))

    def choose(self, logits: mx.array, layer: int, first: int, known: int) -> mx.array:
        """Codes [R] of a layer for frames first.. from logits [R, N].

        The first `known` of them are not going to be used: nothing is owed on their account.
        """
        rows = self.codebooks[layer].astype(mx.float32)
        mean = mx.softmax(logits.astype(mx.float32), axis=-1, precise=True) @ rows
        last = first + logits.shape[0]
        wanted = mean + self._owed[first:last]
        chosen = nearest(wanted, rows)
        left = (wanted - rows[chosen])[known:]
        parts = [self._owed[: first + known], left, self._owed[last:]]
        self._owed = mx.concatenate(parts)
        return chosen
