"""The backbone: a causal language model that writes the coarse layers of the whole song.

Works on token ids; knows the token layout, nothing of prompts' text, superres or sound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx import tokens
from khala_mlx.config import BackboneConfig, TokenLayout
from khala_mlx.errors import KhalaError
from khala_mlx.sampling import check_sampling, sample
from khala_mlx.transformer import Transformer, like_input, make_cache, projector

Progress = Callable[[int, int], None]

# mlx-lm's interval for returning freed buffers while decoding.
_CLEAR_EVERY = 256


class Backbone(Transformer):
    """Causal transformer over text and the coarse codes, q0 and q1 interleaved."""

    def __init__(self, config: BackboneConfig, layout: TokenLayout) -> None:
        super().__init__(config)
        self.layout = layout

    def __call__(self, ids: Any) -> Any:
        """Token ids [B, S] -> logits [B, S, V] over the whole vocabulary.

        -1 is padding. NumPy in, float32 NumPy out; mx.array in, mx.array out.
        """
        return like_input(self.lm_head(self.hidden(self.checked_ids(ids, 2, "[B, S]"))), ids)

    def hidden(self, ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Checked ids [B, S] -> hidden states [B, S, H] after the last norm."""
        return self.body(self.embed(ids).astype(self.dtype), causal=True, cache=cache)

    def room(self, prompt_length: int) -> int:
        """Whole frames that fit the trained window behind a prompt."""
        return max(0, self.config.context - prompt_length) // self.layout.num_coarse

    def generate(
        self,
        ids: np.ndarray,
        *,
        max_tokens: int,
        min_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int = 50,
        key: mx.array,
        reachable_only: bool = True,
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Sample up to `max_tokens` audio tokens behind the prompt `ids` [P].

        The end of the song stops it and is not returned; it cannot be drawn before `min_tokens`.
        `reachable_only` projects and samples only what can follow: the window of the layer whose
        turn it is, and the end of the song. Without it the whole vocabulary is sampled, as
        upstream does, and any id can come back.

        Returns:
            Token ids [n], n <= max_tokens.
        """
        check_sampling(top_k, temperature)
        prompt = self.checked_ids(np.asarray(ids)[None], 2, "[1, P]")
        choices = self._choices(reachable_only)
        keys = mx.random.split(key, self.config.context)
        cache = make_cache(len(self.layers), prompt.shape[1] + max_tokens)

        def step(ids: mx.array, index: int) -> mx.array:
            embedded = self.embed(ids).astype(self.dtype)
            start = ids.shape[1] - 1
            hidden = self.body(embedded, causal=True, cache=cache, start=start)
            project, candidates = choices[index % len(choices)]
            logits = project(hidden[:, -1])
            if index < min_tokens:
                logits = mx.where(candidates == self.layout.end_of_song, -mx.inf, logits)
            chosen = sample(logits, keys[index], top_k=top_k, temperature=temperature)
            return candidates[chosen]

        written: list[int] = []
        upcoming = step(prompt, 0)
        for index in range(max_tokens):
            token = upcoming
            mx.async_eval(token)
            if index + 1 < max_tokens:
                # Issued before this token is read, so that the device never waits for Python.
                upcoming = step(token[:, None], index + 1)
                mx.async_eval(upcoming)
            value = int(np.array(token)[0])
            if value == self.layout.end_of_song:
                break
            written.append(value)
            if index % _CLEAR_EVERY == _CLEAR_EVERY - 1:
                mx.clear_cache()
            if on_progress is not None:
                on_progress(index + 1, max_tokens)
        return np.array(written, dtype=np.int64)

    def compose(
        self,
        ids: np.ndarray,
        *,
        max_frames: int,
        min_frames: int = 0,
        temperature: float = 1.0,
        top_k: int = 50,
        key: mx.array,
        reachable_only: bool = True,
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Coarse codes [num_coarse, T] of a song of at most `max_frames` frames.

        Raises:
            KhalaError: before any work, if frames or prompt do not fit the trained window; after
                it, if the model ended the song before the first frame, or (only with
                `reachable_only=False`) wrote a token outside its window.
        """
        self._check_frames(len(ids), max_frames, min_frames)
        layers = self.layout.num_coarse

        def report(done: int, total: int) -> None:
            if on_progress is not None and (done % layers == 0 or done == total):
                on_progress(done // layers, total // layers)

        written = self.generate(
            ids,
            max_tokens=max_frames * layers,
            min_tokens=min_frames * layers,
            temperature=temperature,
            top_k=top_k,
            key=key,
            reachable_only=reachable_only,
            on_progress=report,
        )
        if len(written) < layers:
            raise KhalaError(
                "The model ended the song before its first frame: try another seed, or ask for a "
                "least length."
            )
        return tokens.deinterleave(self.layout, written)

    def _check_frames(self, prompt_length: int, max_frames: int, min_frames: int) -> None:
        for name, value in (("max_frames", max_frames), ("min_frames", min_frames)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise KhalaError(f"{name} has to be a whole number, got {value!r}.")
        if max_frames < 1 or not 0 <= min_frames <= max_frames:
            raise KhalaError(
                f"A song needs at least one frame and 0 <= min_frames <= max_frames, got "
                f"max_frames={max_frames}, min_frames={min_frames}."
            )
        room = self.room(prompt_length)
        if max_frames > room:
            raise KhalaError(
                f"The trained window of {self.config.context} tokens has room for {room} frames "
                f"behind this prompt of {prompt_length} tokens, {max_frames} were asked for."
            )

    def _choices(
        self, reachable_only: bool
    ) -> list[tuple[Callable[[mx.array], mx.array], mx.array]]:
        """For each turn: the projection onto its candidates, and their ids [C]."""
        if not reachable_only:
            everything = mx.arange(self.config.vocab_size)
            return [(projector(self.lm_head, slice(None)), everything)]
        choices = []
        for layer in range(self.layout.num_coarse):
            window = range(*tokens.window(self.layout, layer))
            # Rising ids, so that equal logits resolve as they do over the whole vocabulary.
            candidates = mx.array([self.layout.end_of_song, *window])
            choices.append((projector(self.lm_head, candidates), candidates))
        return choices
