"""Super-resolution: a full-attention model that fills the fine layers, one layer a step.

Every step sees the whole song. Works on codes and token ids; knows nothing of sound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx import tokens
from khala_mlx.config import SuperResConfig, TokenLayout
from khala_mlx.errors import KhalaError
from khala_mlx.sampling import check_sampling, exponential, sample_by_race
from khala_mlx.transformer import Transformer, like_input, projector

Progress = Callable[[int, int], None]
Draws = Callable[[int], np.ndarray]


class SuperRes(Transformer):
    """Full-attention transformer over prompt rows and one row a frame."""

    def __init__(self, config: SuperResConfig, layout: TokenLayout) -> None:
        super().__init__(config)
        self.layout = layout

    def hidden(self, ids: Any) -> Any:
        """Token ids [B, S, C] -> hidden states [B, S, H] after the last norm.

        A row with only column 0 set is text; a row with more is audio, the sum of the embeddings
        of its columns; -1 is padding. NumPy in, float32 NumPy out; mx.array in, mx.array out.
        """
        columns = self.checked_ids(ids, 3, "[B, S, C]")
        # Column by column: a gather of all at once would hold C times the sum.
        summed = self.embed(columns[..., 0])
        for column in range(1, columns.shape[2]):
            summed = summed + self.embed(columns[..., column])
        return like_input(self.body(summed.astype(self.dtype), causal=False), ids)

    def refine(
        self,
        ids: np.ndarray,
        coarse: np.ndarray,
        *,
        top_k: int = 10,
        key: mx.array,
        draws: Draws | None = None,
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Fill layers num_coarse..K-1 of `coarse` [num_coarse, T] -> codes [K, T].

        One full-attention pass a layer over the real rows, P prompt tokens and T frames; upstream
        pads to 8192 rows and masks, with identical tokens. `draws(layer)` replaces the
        Exponential(1) draws [T, top_k] of a layer (parity tests inject upstream's).

        Raises:
            KhalaError: for codes or ids out of range, or more rows than the trained window.
        """
        check_sampling(top_k)
        coarse = tokens.check_codes(
            coarse, layers=self.layout.num_coarse, codebook_size=self.layout.codebook_size
        )
        frames, top_k = coarse.shape[1], min(top_k, self.layout.codebook_size)
        self._check_rows(len(ids), frames)
        prompt = self.embed(self.checked_ids(np.asarray(ids)[None], 2, "[1, P]"))
        keys = mx.random.split(key, self.layout.num_codebooks)
        codes = [mx.array(layer.astype(np.int32)) for layer in coarse]
        # Columns are only ever added, so the sum over them is kept instead of made again.
        audio = mx.zeros((1, frames, self.config.hidden_size))
        for layer, known in enumerate(codes):
            audio = audio + self._embed_codes(layer, known)
        first, last = self.layout.num_coarse, self.layout.num_codebooks
        for layer in range(first, last):
            logits = self._step(prompt, audio, layer)
            if top_k == 1:
                chosen = mx.argmax(logits, axis=-1)
            else:
                drawn = (
                    exponential(keys[layer], (frames, top_k))
                    if draws is None
                    else mx.array(draws(layer))
                )
                chosen = sample_by_race(logits, drawn, top_k)
            audio = audio + self._embed_codes(layer, chosen)
            codes.append(chosen.astype(mx.int32))
            mx.eval(audio, codes[-1])
            if on_progress is not None:
                on_progress(layer - first + 1, last - first)
        return np.stack([np.array(layer, dtype=np.int64) for layer in codes])

    def _step(self, prompt: mx.array, audio: mx.array, layer: int) -> mx.array:
        """prompt [1, P, H] and audio [1, T, H], float32 -> logits [T, codebook_size] of `layer`."""
        marker = self.embed(mx.array([[tokens.marker(self.layout, layer)]]))
        rows = mx.concatenate([prompt[:, :-1], marker, audio], axis=1).astype(self.dtype)
        hidden = self.body(rows, causal=False, start=prompt.shape[1])
        return projector(self.lm_head, slice(*tokens.window(self.layout, layer)))(hidden[0])

    def _embed_codes(self, layer: int, codes: mx.array) -> mx.array:
        """Codes [T] of one layer -> embeddings [1, T, H] in float32."""
        return self.embed(codes[None] + tokens.window(self.layout, layer)[0])

    def _check_rows(self, prompt_length: int, frames: int) -> None:
        if prompt_length < 1:
            raise KhalaError("The superres prompt has to hold at least one token.")
        room = self.config.context - prompt_length
        if frames > room:
            raise KhalaError(
                f"The trained window of {self.config.context} rows has room for {max(0, room)} "
                f"frames behind this prompt of {prompt_length} tokens, the song has {frames}."
            )
