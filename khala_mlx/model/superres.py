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

# A window shares one part in so many with the one before.
_OVERLAP = 4
# Frames without which a window and its overlap make no sense.
_LEAST_ROOM = 2 * _OVERLAP


class Expected:
    """Chooses the codes of one song of T frames by expectation instead of by drawing.

    Where superres cannot predict the detail, a drawn code has the right energy in the wrong place.
    The mean over the prediction has the least square error in the latents. No code equals that
    mean, but each codebook is finer than the one before: later ones fill what one leaves over.
    Upstream has no such rule.

    codebooks [K, N, D] are the codec's; `layer` is the next codebook to choose.
    """

    def __init__(self, codebooks: mx.array, frames: int, layer: int) -> None:
        self.codebooks, self.layer = codebooks, layer
        # What the codes chosen so far leave over of the means, [T, D].
        self._left_over = mx.zeros((frames, codebooks.shape[-1]))

    def choose(self, logits: mx.array, layer: int, first: int, known: int) -> mx.array:
        """Return codes [R] of a codebook for frames first.. from logits [R, N].

        The first `known` of them are not used, so nothing is left over on their account.
        """
        rows = self.codebooks[layer].astype(mx.float32)
        mean = mx.softmax(logits.astype(mx.float32), axis=-1, precise=True) @ rows
        last = first + logits.shape[0]
        wanted = mean + self._left_over[first:last]
        chosen = nearest(wanted, rows)
        left = (wanted - rows[chosen])[known:]
        parts = [self._left_over[: first + known], left, self._left_over[last:]]
        self._left_over = mx.concatenate(parts)
        return chosen


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
        columns = self.checked_ids(ids, "[B, S, C]")
        # Column by column: a gather of all at once would hold C times the sum.
        summed = self.embed(columns[..., 0])
        for column in range(1, columns.shape[2]):
            summed = summed + self.embed(columns[..., column])
        return like_input(self.body(summed.astype(self.dtype), causal=False), ids)

    def logits(self, ids: np.ndarray, codes: np.ndarray, layers: Container[int]) -> list[mx.array]:
        """Logits [T, codebook_size] of some layers of codes [K, T], behind a prompt [P].

        Each sees the codes of the layers before it. There are no windows.
        """
        prompt = self.embed(self.checked_ids(np.asarray(ids)[None], "[1, P]"))
        audio, found = mx.zeros((1, codes.shape[1], self.config.hidden_size)), []
        for layer, row in enumerate(codes):
            if layer in layers:
                found.append(self._step(prompt, audio, layer))
            audio = audio + self._embed_codes(layer, mx.array(row.astype(np.int32)))
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
        """Fill codebooks num_coarse..K-1 of `coarse` [num_coarse, T] -> codes [K, T].

        One full-attention pass per codebook over the real rows, P prompt tokens and T frames.
        Upstream pads to 8192 rows and masks, with identical tokens.

        A song of more rows than the trained window is refined in overlapping windows, each with
        the codes of the one before held fixed. The model was not trained for that, and a
        KhalaWarning says so.

        Args:
            refined: codes [n, T] of the codebooks behind the coarse ones that are made already.
                The result is the same as that of an undisturbed run.
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
        if expected is not None and expected.layer != len(begun):
            raise KhalaError(
                f"The expected codes continue at codebook {expected.layer}, not at {len(begun)}."
            )
        if len(windows) > 1 and len(begun) == self.layout.num_coarse:
            _warn_windows(frames, windows)
        prompt = self.embed(self.checked_ids(np.asarray(ids)[None], "[1, P]"))
        keys = mx.random.split(key, self.layout.num_codebooks)

        def pick(logits: mx.array, layer: int, known: int, first: int) -> mx.array:
            if expected is not None:
                return expected.choose(logits, layer, first, known)
            if top_k == 1:
                return mx.argmax(logits, axis=-1)
            draws = exponential(keys[layer], (frames, top_k))[first : first + logits.shape[0]]
            return sample_by_race(logits, draws, top_k)

        codes = np.zeros((codebooks, frames), dtype=np.int64)
        codes[: len(kept), : kept.shape[1]] = kept[:codebooks]
        codes[: len(begun)] = begun
        steps = codebooks - len(begun)

        def report(done: int, before: int) -> None:
            if on_progress is not None:
                on_progress(before + done, len(windows) * steps)

        for number, (first, fixed, last) in enumerate(windows):
            # How many frames of each layer are known beforehand.
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
            expected.layer = codebooks
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
        """Codes [k, T] whose first `begun` layers are known, all of them -> the same, all known.

        prompt [1, P, H]; of layer i the first fixed[i] frames are known too; `pick` gives codes
        [T] from logits [T, codebook_size], the layer, and how many frames of it are known.
        """
        known = [mx.array(layer.astype(np.int32)) for layer in codes]
        # Columns are only ever added, so the sum over them is kept instead of made again.
        audio = mx.zeros((1, codes.shape[1], self.config.hidden_size))
        for layer in range(begun):
            audio = audio + self._embed_codes(layer, known[layer])
        for layer in range(begun, len(codes)):
            logits = self._step(prompt, audio, layer)
            fine = usable(logits).all()
            stay = int(fixed[layer])
            chosen = pick(logits, layer, stay).astype(mx.int32)
            known[layer] = mx.concatenate([known[layer][:stay], chosen[stay:]])
            audio = audio + self._embed_codes(layer, known[layer])
            mx.eval(audio, known[layer], fine)
            if not fine.item():
                raise KhalaError(
                    "Superres made no usable numbers: the device is out of memory, or the weights "
                    "need another dtype than this."
                )
            report(layer - begun + 1)
        return np.stack([np.array(layer, dtype=np.int64) for layer in known])

    def _step(self, prompt: mx.array, audio: mx.array, layer: int) -> mx.array:
        """prompt [1, P, H] and audio [1, T, H], float32 -> logits [T, codebook_size] of `layer`."""
        marker = self.embed(mx.array([[tokens.marker(self.layout, layer)]]))
        rows = mx.concatenate([prompt[:, :-1], marker, audio], axis=1).astype(self.dtype)
        hidden = self.body(rows, causal=False, start=prompt.shape[1])
        return projector(self.lm_head, slice(*tokens.window(self.layout, layer)))(hidden[0])

    def _embed_codes(self, layer: int, codes: mx.array) -> mx.array:
        """Codes [T] of one layer -> embeddings [1, T, H] in float32."""
        return self.embed(codes[None] + tokens.window(self.layout, layer)[0])

    def _check_kept(self, kept: np.ndarray | None, codes: np.ndarray) -> np.ndarray:
        """Codes [k, T0] that stay; [0, 0] for none."""
        kept = np.empty((0, 0)) if kept is None else tokens.plain_array(kept, "Codes")
        if kept.size == 0:
            return np.empty((0, 0), dtype=np.int32)
        most, size = self.layout.num_codebooks, self.layout.codebook_size
        kept = tokens.check_codes(kept, codebooks=most, size=size, fewer=True)
        both = min(len(kept), len(codes))
        if kept.shape[1] > codes.shape[1] or (kept[:both] != codes[:both, : kept.shape[1]]).any():
            raise KhalaError("The codes that are to stay are not those the song begins with.")
        return kept

    def _windows(self, prompt_length: int, frames: int) -> list[tuple[int, int, int]]:
        """(first, fixed, last) of each window: frames first..last, the first `fixed` known."""
        if prompt_length < 1:
            raise KhalaError("The superres prompt must hold at least one token.")
        room = self.config.context - prompt_length
        if frames <= room:
            return [(0, 0, frames)]
        if room < _LEAST_ROOM:
            raise KhalaError(
                f"The trained window of {self.config.context} rows has room for {max(0, room)} "
                f"frames behind this prompt of {prompt_length} tokens: shorten it."
            )
        windows = [(0, 0, room)]
        while windows[-1][2] < frames:
            done = windows[-1][2]
            # All of one size: the last begins earlier instead of being shorter.
            first = min(done - room // _OVERLAP, frames - room)
            windows.append((first, done - first, first + room))
        return windows


def _warn_windows(frames: int, windows: list[tuple[int, int, int]]) -> None:
    warnings.warn(
        f"The song has {frames} frames, and the window superres was trained on has room for "
        f"{windows[0][2]} behind this prompt: it is refined in {len(windows)} overlapping windows, "
        "which is beyond its training.",
        KhalaWarning,
        stacklevel=3,
    )
