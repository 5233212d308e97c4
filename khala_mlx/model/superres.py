"""Super-resolution: a full-attention model that fills the fine codebooks, one per step.

Every step sees the whole song. The model works on codes and token ids, not on sound.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx import token_ids as tokens
from khala_mlx.config import SuperResConfig, TokenLayout, check_whole
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.model import Progress
from khala_mlx.model.quantizer import nearest
from khala_mlx.model.sampling import DEFAULT_DETAIL, Detail, exponential, sample_by_race, usable
from khala_mlx.model.transformer import Transformer, like_input, projector

# A window shares one part in this many with the one before.
_OVERLAP = 4
# The least frames for a window and its overlap to make sense.
_LEAST_ROOM = 2 * _OVERLAP


class Expected:
    """Chooses the codes of one song of T frames by expectation instead of by drawing.

    Where superres cannot predict the detail, a drawn code has the right energy in the wrong place.
    The mean over the prediction has the least square error in the latents. No code equals that
    mean, but each codebook is finer than the one before: later ones fill what one leaves over.
    Upstream has no such rule.

    codebooks [K, N, D] are the codec's; `next` is the codebook to choose next.
    """

    def __init__(self, codebooks: mx.array, frames: int, first: int) -> None:
        self.codebooks, self.next = codebooks, first
        # What the codes chosen so far leave over of the means, [T, D].
        self._left_over = mx.zeros((frames, codebooks.shape[-1]))

    def choose(self, logits: mx.array, codebook: int, first: int, known: int) -> mx.array:
        """Return codes [R] of a codebook for frames first.. from logits [R, N].

        The first `known` of them are not used, so nothing is left over on their account.
        """
        rows = self.codebooks[codebook].astype(mx.float32)
        mean = mx.softmax(logits.astype(mx.float32), axis=-1, precise=True) @ rows
        last = first + logits.shape[0]
        wanted = mean + self._left_over[first:last]
        chosen = nearest(wanted, rows)
        left = (wanted - rows[chosen])[known:]
        parts = [self._left_over[: first + known], left, self._left_over[last:]]
        self._left_over = mx.concatenate(parts)
        return chosen


class SuperRes(Transformer):
    """Full-attention transformer over the prompt and one row per frame."""

    def __init__(self, config: SuperResConfig, layout: TokenLayout) -> None:
        super().__init__(config)
        self.layout = layout

    def hidden(self, ids: Any) -> Any:
        """Return hidden states [B, S, H] after the last norm for token ids [B, S, C].

        A row with only column 0 set is text; a row with more is audio, the sum of the embeddings
        of its columns; -1 is padding. NumPy gives float32 NumPy, mx.array gives mx.array.
        """
        columns = self.checked_ids(ids, "[B, S, C]")
        # Column by column: a gather of all at once would hold C times the sum.
        summed = self.embed(columns[..., 0])
        for column in range(1, columns.shape[2]):
            summed = summed + self.embed(columns[..., column])
        return like_input(self.body(summed.astype(self.dtype), causal=False), ids)

    def logits(
        self, ids: np.ndarray, codes: np.ndarray, codebooks: Container[int]
    ) -> list[mx.array]:
        """Return logits [T, codebook_size] of some codebooks of codes [K, T] behind a prompt.

        Each sees the codes of the codebooks before it. The song is not cut into windows.
        """
        prompt = self.embed(self.checked_ids(np.asarray(ids)[None], "[1, P]"))
        audio, found = mx.zeros((1, codes.shape[1], self.config.hidden_size)), []
        for codebook, row in enumerate(codes):
            if codebook in codebooks:
                found.append(self._step(prompt, audio, codebook))
            audio = audio + self._embed_codes(codebook, mx.array(row.astype(np.int32)))
        return found

    def refine(
        self,
        ids: np.ndarray,
        coarse: np.ndarray,
        detail: Detail = DEFAULT_DETAIL,
        *,
        key: mx.array,
        refined: np.ndarray | None = None,
        codebooks: int | None = None,
        kept: np.ndarray | None = None,
        expected: Expected | None = None,
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Return codes [K, T]: coarse codes [num_coarse, T] with all other codebooks filled.

        One full-attention pass per codebook over the real rows, P prompt tokens and T frames.
        Upstream pads to 8192 rows and masks, with identical tokens.

        A song of more rows than the trained window is refined in overlapping windows, each with
        the codes of the one before held fixed. The model was not trained for that, and a
        KhalaWarning says so.

        Args:
            refined: codes [n, T] of the codebooks behind the coarse ones that exist already. The
                result equals that of one whole run.
            codebooks: how many codebooks the result has; K by default.
            kept: codes [k, T0] that the first T0 frames keep; the other frames see them.
                Codebooks beyond k are filled as elsewhere.
            expected: chooses the codes instead, where `detail.expected`; neither `detail.top_k`
                nor `key` matters then.

        Raises:
            KhalaError: for codes or ids out of range, a prompt that leaves no room, or an
                `expected` that is at another codebook.
        """
        begun = tokens.join_codes(self.layout, coarse, refined)
        most = self.layout.num_codebooks
        codebooks = most if codebooks is None else codebooks
        codebooks = check_whole("codebooks", codebooks, len(begun), most)
        kept = self._check_kept(kept, begun)
        frames, top_k = begun.shape[1], min(detail.top_k, self.layout.codebook_size)
        windows = self._windows(len(ids), frames)
        if expected is not None and expected.next != len(begun):
            raise KhalaError(
                f"The expected codes continue at codebook {expected.next}, not at {len(begun)}."
            )
        if len(windows) > 1 and len(begun) == self.layout.num_coarse:
            _warn_windows(frames, windows)
        prompt = self.embed(self.checked_ids(np.asarray(ids)[None], "[1, P]"))
        keys = mx.random.split(key, self.layout.num_codebooks)

        def pick(logits: mx.array, codebook: int, known: int, first: int) -> mx.array:
            if expected is not None:
                return expected.choose(logits, codebook, first, known)
            if top_k == 1:
                return mx.argmax(logits, axis=-1)
            draws = exponential(keys[codebook], (frames, top_k))[first : first + logits.shape[0]]
            return sample_by_race(logits, draws, top_k)

        codes = np.zeros((codebooks, frames), dtype=np.int64)
        codes[: len(kept), : kept.shape[1]] = kept[:codebooks]
        codes[: len(begun)] = begun
        steps = codebooks - len(begun)

        def report(done: int, before: int) -> None:
            if on_progress is not None:
                on_progress(before + done, len(windows) * steps)

        for number, (first, fixed, last) in enumerate(windows):
            # How many frames of each codebook are known before this window.
            known = np.full(codebooks, fixed)
            known[: len(kept)] = np.clip(kept.shape[1] - first, fixed, last - first)
            codes[:, first:last] = self._refine_window(
                prompt,
                codes[:, first:last],
                len(begun),
                known,
                partial(pick, first=first),
                partial(report, before=number * steps),
            )
        if expected is not None:
            expected.next = codebooks
        return codes

    def _refine_window(
        self,
        prompt: mx.array,
        codes: np.ndarray,
        begun: int,
        fixed: np.ndarray,
        pick: Callable[[mx.array, int, int], mx.array],
        report: Callable[[int], None],
    ) -> np.ndarray:
        """Return codes [k, T] of one window, whose first `begun` codebooks are known.

        Args:
            prompt: embeddings [1, P, H].
            fixed: [k], how many of the first frames of each codebook are known.
            pick: returns codes [T] from logits [T, codebook_size], the codebook, and how many of
                its frames are known.
        """
        known = [mx.array(row.astype(np.int32)) for row in codes]
        # Each step adds one column, so the sum over the columns is kept.
        audio = mx.zeros((1, codes.shape[1], self.config.hidden_size))
        for codebook in range(begun):
            audio = audio + self._embed_codes(codebook, known[codebook])
        for codebook in range(begun, len(codes)):
            logits = self._step(prompt, audio, codebook)
            fine = usable(logits).all()
            stay = int(fixed[codebook])
            chosen = pick(logits, codebook, stay).astype(mx.int32)
            known[codebook] = mx.concatenate([known[codebook][:stay], chosen[stay:]])
            audio = audio + self._embed_codes(codebook, known[codebook])
            mx.eval(audio, known[codebook], fine)
            if not fine.item():
                raise KhalaError(
                    "Superres made no usable numbers. The device may be out of memory, or the "
                    "weights may need another dtype."
                )
            report(codebook - begun + 1)
        return np.stack([np.array(row, dtype=np.int64) for row in known])

    def _step(self, prompt: mx.array, audio: mx.array, codebook: int) -> mx.array:
        """Return logits [T, codebook_size] from float32 prompt [1, P, H] and audio [1, T, H]."""
        marker = self.embed(mx.array([[tokens.marker(self.layout, codebook)]]))
        rows = mx.concatenate([prompt[:, :-1], marker, audio], axis=1).astype(self.dtype)
        hidden = self.body(rows, causal=False, start=prompt.shape[1])
        return projector(self.lm_head, slice(*tokens.window(self.layout, codebook)))(hidden[0])

    def _embed_codes(self, codebook: int, codes: mx.array) -> mx.array:
        """Return float32 embeddings [1, T, H] of codes [T] of one codebook."""
        return self.embed(codes[None] + tokens.window(self.layout, codebook)[0])

    def _check_kept(self, kept: np.ndarray | None, codes: np.ndarray) -> np.ndarray:
        """Return the codes [k, T0] to keep; [0, 0] for none."""
        kept = np.empty((0, 0)) if kept is None else tokens.plain_array(kept, "Codes")
        if kept.size == 0:
            return np.empty((0, 0), dtype=np.int32)
        most, size = self.layout.num_codebooks, self.layout.codebook_size
        kept = tokens.check_codes(kept, codebooks=most, size=size, fewer=True)
        both = min(len(kept), len(codes))
        if kept.shape[1] > codes.shape[1] or (kept[:both] != codes[:both, : kept.shape[1]]).any():
            raise KhalaError("The codes to keep differ from those that the song starts with.")
        return kept

    def _windows(self, prompt_length: int, frames: int) -> list[tuple[int, int, int]]:
        """Return (first, fixed, last) of each window: frames first..last, `fixed` of them known."""
        if prompt_length < 1:
            raise KhalaError("The superres prompt must hold at least one token.")
        room = self.config.context - prompt_length
        if frames <= room:
            return [(0, 0, frames)]
        if room < _LEAST_ROOM:
            raise KhalaError(
                f"The trained window of {self.config.context} rows has room for {max(0, room)} "
                f"frames behind this prompt of {prompt_length} tokens. Shorten the prompt."
            )
        windows = [(0, 0, room)]
        while windows[-1][2] < frames:
            done = windows[-1][2]
            # All have one size: the last window starts earlier instead of being shorter.
            first = min(done - room // _OVERLAP, frames - room)
            windows.append((first, done - first, first + room))
        return windows


def _warn_windows(frames: int, windows: list[tuple[int, int, int]]) -> None:
    warnings.warn(
        f"The song has {frames} frames, but the trained window of superres has room for "
        f"{windows[0][2]} behind this prompt. It is refined in {len(windows)} overlapping windows, "
        "for which the model was not trained.",
        KhalaWarning,
        stacklevel=3,
    )
