"""The backbone: a causal language model that writes the coarse codes of the whole song.

It works on token ids, not on text or sound.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx import token_ids as tokens
from khala_mlx.config import BackboneConfig, TokenLayout, check_whole
from khala_mlx.errors import KhalaError, KhalaWarning, NoSongError
from khala_mlx.model import Progress
from khala_mlx.model.cache import check_kv_bits, keep_rows, make_cache, spread
from khala_mlx.model.sampling import DEFAULT_SAMPLING, Sampling, sample, uniform_draws, usable
from khala_mlx.model.transformer import Transformer, like_input, projector

# Tokens between two reads of what was written: each read waits for the device.
_READ_EVERY = 16
# mlx-lm's interval for returning freed buffers while decoding; a multiple of the above.
_CLEAR_EVERY = 256
# Positions whose logits are held at once by nats_per_token.
_PROJECTED = 1024


class Backbone(Transformer):
    """Causal transformer over text and the coarse codes, q0 and q1 interleaved."""

    def __init__(self, config: BackboneConfig, layout: TokenLayout) -> None:
        super().__init__(config)
        self.layout = layout

    def __call__(self, ids: Any) -> Any:
        """Return logits [B, S, V] over the whole vocabulary for token ids [B, S].

        -1 is padding. NumPy gives float32 NumPy, mx.array gives mx.array.
        """
        return like_input(self.lm_head(self.hidden(self.checked_ids(ids, "[B, S]"))), ids)

    def hidden(self, ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Return hidden states [B, S, H] after the last norm for checked ids [B, S]."""
        return self.body(self.embed(ids).astype(self.dtype), causal=True, cache=cache)

    def room(self, prompt_length: int) -> int:
        """Return how many frames fit the trained window behind a prompt."""
        return max(0, self.config.context - prompt_length) // self.layout.num_coarse

    def generate_many(
        self,
        ids: np.ndarray,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        keys: Sequence[mx.array],
        max_tokens: int,
        min_tokens: int = 0,
        on_progress: Progress | None = None,
    ) -> list[np.ndarray]:
        """Sample up to `max_tokens` audio tokens behind the prompt `ids` [P], once for each key.

        All rows share one pass over the prompt and every read of the weights; the result of a key
        does not depend on the other keys. The end of the song stops a row and is not returned; it
        cannot be drawn before `min_tokens`. With `reachable_only` only the tokens that can follow
        are projected and sampled: the window of the codebook whose turn it is, and the end of the
        song. Without it any id of the vocabulary can come back.

        Returns:
            Token ids [n] for each key, n <= max_tokens.
        """
        check_kv_bits(sampling.kv_bits, self.config.head_dim)
        top_k, temperature = sampling.top_k, sampling.temperature
        prompt = self.checked_ids(np.asarray(ids)[None], "[1, P]")
        choices = self.choices(sampling.reachable_only)
        draws = mx.stack([uniform_draws(key, self.config.context) for key in keys], axis=1)
        rows = _Rows(len(keys), self.layout.end_of_song)

        def pick(hidden: mx.array, index: int) -> mx.array:
            project, candidates = choices[index % len(choices)]
            logits = project(hidden[:, -1])
            fine = usable(logits)
            if index < min_tokens:
                logits = mx.where(candidates == self.layout.end_of_song, -mx.inf, logits)
            chosen = sample(logits, draws[index, rows.alive], top_k=top_k, temperature=temperature)
            return mx.where(fine, candidates[chosen], -1)

        hidden, cache = self._prefill(prompt, len(keys), max_tokens, sampling.kv_bits)
        token = pick(hidden, 0)
        for index in range(max_tokens):
            mx.async_eval(token)
            rows.add(token)
            last = index + 1 == max_tokens
            if not last:
                # Issued before any token is read, so that the device never waits for Python.
                token = pick(self.hidden(token[:, None], cache), index + 1)
                mx.async_eval(token)
            if not last and (index + 1) % _READ_EVERY:
                continue
            alive = rows.read()
            if on_progress is not None:
                on_progress(index + 1, max_tokens)
            if alive is None:
                break
            if len(alive) < token.shape[0]:
                token = token[alive]
                keep_rows(cache, alive)
            if (index + 1) % _CLEAR_EVERY == 0:
                mx.clear_cache()
        return rows.written()

    def _prefill(
        self, prompt: mx.array, rows: int, max_tokens: int, kv_bits: int | None
    ) -> tuple[mx.array, list[Any]]:
        """Return the hidden state [rows, 1, H] behind the prompt [1, P], and the filled caches."""
        layers, length = len(self.layers), prompt.shape[1]
        filled = make_cache(layers, length)
        embedded = self.embed(prompt).astype(self.dtype)
        hidden = self.body(embedded, causal=True, cache=filled, start=length - 1)
        mx.eval(hidden)
        cache = make_cache(
            layers, length + max_tokens, kv_bits=kv_bits, head_dim=self.config.head_dim
        )
        spread(filled, cache, rows)
        return mx.repeat(hidden, rows, axis=0), cache

    def compose_many(
        self,
        ids: np.ndarray,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        keys: Sequence[mx.array],
        max_frames: int,
        min_frames: int = 0,
        on_progress: Progress | None = None,
    ) -> list[np.ndarray]:
        """Return coarse codes [num_coarse, T] for each key, at most `max_frames` frames each.

        See `generate_many`. If only some songs fail, theirs are [num_coarse, 0], with a
        KhalaWarning.

        Raises:
            KhalaError: before any work if frames or prompt do not fit the trained window. After it
                if every song failed: the model ended it before the first frame, or (only without
                `reachable_only`) wrote a token outside its window.
        """
        self._check_frames(len(ids), max_frames, min_frames)
        per_frame = self.layout.num_coarse

        def report(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(done // per_frame, total // per_frame)

        written = self.generate_many(
            ids,
            sampling,
            keys=keys,
            max_tokens=max_frames * per_frame,
            min_tokens=min_frames * per_frame,
            on_progress=report,
        )
        songs, failures = [], {}
        for number, song in enumerate(written, start=1):
            try:
                songs.append(self._frames_of(song))
            except KhalaError as error:
                failures[number] = error
                songs.append(np.empty((per_frame, 0), dtype=np.int64))
        if len(failures) == len(songs):
            first = next(iter(failures.values()))
            raise NoSongError(str(first)) from first
        for number, why in failures.items():
            warnings.warn(f"Song {number}: {why}", KhalaWarning, stacklevel=2)
        return songs

    def nats_per_token(self, ids: np.ndarray, coarse: np.ndarray) -> np.ndarray:
        """Return the nats [num_coarse * T] of coarse codes [num_coarse, T] behind a prompt [P].

        They are those of the tokens that can follow, at temperature 1 and without top_k. One pass
        over the whole song.
        """
        written = tokens.interleave(self.layout, coarse)
        rows = np.concatenate([np.asarray(ids), written])[None, :-1]
        hidden = self.hidden(self.checked_ids(rows, "[1, P]"))[0, len(ids) - 1 :]
        turns, nats = self.layout.num_coarse, np.empty(len(written), dtype=np.float32)
        for turn, (project, _) in enumerate(self.choices(True)):
            # The end of the song comes first among the candidates.
            labels = mx.array(coarse[turn].astype(np.int32) + 1)[:, None]
            for first in range(0, coarse.shape[1], _PROJECTED):
                part = hidden[turn::turns][first : first + _PROJECTED]
                logits = project(part).astype(mx.float32)
                chosen = mx.take_along_axis(logits, labels[first : first + _PROJECTED], axis=-1)
                lost = mx.logsumexp(logits, axis=-1) - chosen[:, 0]
                nats[turn::turns][first : first + len(part)] = np.array(lost)
        return nats

    def _frames_of(self, written: np.ndarray) -> np.ndarray:
        if len(written) < self.layout.num_coarse:
            raise KhalaError(
                "The model ended the song before its first frame. Try another seed, or set a "
                "minimum length."
            )
        return tokens.deinterleave(self.layout, written)

    def _check_frames(self, prompt_length: int, max_frames: int, min_frames: int) -> None:
        check_whole("max_frames", max_frames, 1)
        check_whole("min_frames", min_frames, 0, max_frames)
        room = self.room(prompt_length)
        if max_frames > room:
            raise KhalaError(
                f"The trained window of {self.config.context} tokens has room for {room} frames "
                f"behind this prompt of {prompt_length} tokens, got max_frames={max_frames}."
            )

    def choices(
        self, reachable_only: bool
    ) -> list[tuple[Callable[[mx.array], mx.array], mx.array]]:
        """Return for each turn the projection onto its candidates, and their ids [C]."""
        if not reachable_only:
            everything = mx.arange(self.config.vocab_size)
            return [(projector(self.lm_head, slice(None)), everything)]
        choices = []
        for codebook in range(self.layout.num_coarse):
            window = range(*tokens.window(self.layout, codebook))
            # In rising order, so that ties resolve as they do over the whole vocabulary.
            candidates = mx.array([self.layout.end_of_song, *window])
            choices.append((projector(self.lm_head, candidates), candidates))
        return choices


class _Rows:
    """The songs of a batch: the tokens of each, and which of them continue."""

    def __init__(self, count: int, end_of_song: int) -> None:
        self._songs: list[list[int]] = [[] for _ in range(count)]
        self._end = end_of_song
        self._running = list(range(count))
        self._unread: list[mx.array] = []
        self.alive = mx.arange(count)

    def add(self, token: mx.array) -> None:
        """Add a token [B] for each row that continues, without reading it."""
        self._unread.append(token)

    def read(self) -> mx.array | None:
        """Read the added tokens; return the rows that continue, or None if all songs have ended."""
        block = np.stack([np.array(token) for token in self._unread], axis=1)
        self._unread.clear()
        if block.min() < 0:
            raise KhalaError(
                "The backbone made no usable numbers. The device may be out of memory, the weights "
                "may need another dtype, or an adapter may be too strong."
            )
        kept = []
        for row, (song, written) in enumerate(zip(self._running, block.tolist(), strict=True)):
            end = written.index(self._end) if self._end in written else len(written)
            self._songs[song] += written[:end]
            if end == len(written):
                kept.append(row)
        self._running = [self._running[row] for row in kept]
        self.alive = mx.array(self._running)
        return mx.array(kept) if kept else None

    def written(self) -> list[np.ndarray]:
        """Return the token ids [n] of each song."""
        return [np.array(song, dtype=np.int64) for song in self._songs]
