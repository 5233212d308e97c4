"""The backbone's loss in chunks of positions, over a body whose layers can be computed twice.

Only rows of the head that a target needs are projected, only for a chunk of targets at a time, so
that logits of all positions never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from khala_mlx import token_ids as tokens
from khala_mlx.config import TokenLayout
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.transformer import Block, projector

# The logits of a chunk take at most this many bytes.
LOGIT_BYTES = 32 * 2**20
# Counts of targets are padded to multiples of this, so that shapes repeat.
_MULTIPLE = 128


@dataclass(frozen=True)
class Targets:
    """What is predicted from one set of candidates, padded with rows of weight 0.

    Attributes:
        count: how many there are.
        candidates: ids [C], rows of the head; None is the whole vocabulary.
        positions: rows [n] of the hidden states [B * S] that predict.
        labels: where among the candidates each target stands, [n].
        weights: 1 for targets, 0 for padding, [n].
    """

    count: int
    candidates: mx.array | None
    positions: mx.array
    labels: mx.array
    weights: mx.array


def targets_of(rows: np.ndarray, layout: TokenLayout, *, whole_vocabulary: bool) -> list[Targets]:
    """The targets of token rows [B, S + 1]: audio and the end of the song, prompt masked.

    Each is predicted from what generation chooses from at its turn: the window of its layer and
    the end of the song, or else from the whole vocabulary.
    """
    ids = rows[:, 1:].reshape(-1)
    counted = (ids >= layout.audio_start) | (ids == layout.end_of_song)
    if whole_vocabulary:
        return [_targets(None, np.flatnonzero(counted), ids[counted])]
    # The end comes where the first layer would.
    ends = ids == layout.end_of_song
    turns = np.where(ends, 0, (ids - layout.audio_start) // layout.codebook_size)
    found = []
    for layer in range(layout.num_coarse):
        start, stop = tokens.window(layout, layer)
        candidates = mx.array([layout.end_of_song, *range(start, stop)])
        positions = np.flatnonzero(counted & (turns == layer))
        labels = np.where(ends, 0, ids - start + 1)[positions]
        found.append(_targets(candidates, positions, labels))
    return found


def _targets(candidates: mx.array | None, positions: np.ndarray, labels: np.ndarray) -> Targets:
    count = len(positions)
    spare = -count % _MULTIPLE
    weights = np.pad(np.ones(count, np.float32), (0, spare))
    positions, labels = (np.pad(array, (0, spare)) for array in (positions, labels))
    return Targets(count, candidates, mx.array(positions), mx.array(labels), mx.array(weights))


def summed_nats(model: Backbone, hidden: mx.array, targets: list[Targets]) -> mx.array:
    """Sum of the nats of all targets, from hidden states [B, S, H] after the last norm."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    total = mx.zeros(())
    for each in targets:
        rows = slice(None) if each.candidates is None else each.candidates
        nats = _nats_of(projector(model.lm_head, rows), each)
        size = model.config.vocab_size if each.candidates is None else each.candidates.size
        total = total + _in_chunks(nats, max(1, LOGIT_BYTES // (4 * size)))(flat[each.positions])
    return total


class Nats(Protocol):
    """Summed nats of hidden states [n, H], the targets `taken`."""

    def __call__(self, hidden: mx.array, *, taken: slice) -> mx.array: ...


def _nats_of(project: Callable[[mx.array], mx.array], targets: Targets) -> Nats:
    def nats(hidden: mx.array, *, taken: slice) -> mx.array:
        losses = nn.losses.cross_entropy(project(hidden), targets.labels[taken])
        return (losses * targets.weights[taken]).sum()

    return nats


def _in_chunks(nats: Nats, rows: int) -> Callable[[mx.array], mx.array]:
    """The sum of `nats` over chunks of hidden states [n, H], each after the one before."""

    @mx.custom_function
    def total(hidden: mx.array) -> mx.array:
        done = mx.zeros(())
        for start in range(0, hidden.shape[0], rows):
            taken = slice(start, start + rows)
            (part,) = mx.depends([hidden[taken]], [done])
            done = done + nats(part, taken=taken)
        return done

    @total.vjp
    def backward(hidden: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        parts: list[mx.array] = []
        for start in range(0, hidden.shape[0], rows):
            taken = slice(start, start + rows)
            part = hidden[taken]
            if parts:
                (part,) = mx.depends([part], parts[-1:])
            gradients: Any = mx.vjp(partial(nats, taken=taken), [part], [cotangent])[1]
            parts += gradients
        return mx.concatenate(parts)

    return cast(Callable[[mx.array], mx.array], total)


def hidden_states(model: Backbone, inputs: mx.array, *, checkpointed: bool, seed: int) -> mx.array:
    """Hidden states [B, S, H] after the last norm of token ids [B, S].

    With `checkpointed` the inside of every layer that is trained is made again for its gradients.
    `seed` draws what dropout leaves out, the same both times.
    """
    x = model.embed(inputs).astype(model.dtype)
    for number, layer in enumerate(model.layers):
        trained = tree_flatten(layer.trainable_parameters())
        call = _call(layer, [name for name, _ in trained], seed + number)
        if checkpointed and trained:
            call = _made_twice(call)
        x = call(x, *(array for _, array in trained))
    return model.norm(x)


Call = Callable[..., mx.array]


def _call(layer: Block, names: list[str], seed: int) -> Call:
    def call(x: mx.array, *parameters: mx.array) -> mx.array:
        mx.random.seed(seed)
        layer.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        return layer(x, None, True)

    return call


def _made_twice(call: Call) -> Call:
    """Return `call` with only its inputs kept for the gradients.

    mx.checkpoint lets the second pass of every layer begin as soon as the first has ended; here it
    waits for the gradients that come in, so that one layer at a time is held.
    """

    @mx.custom_function
    def once(*primals: mx.array) -> mx.array:
        return call(*primals)

    @once.vjp
    def again(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> Any:
        gradients: Any = mx.vjp(call, mx.depends(list(primals), [cotangent]), [cotangent])[1]
        (going_on,) = mx.depends(gradients[:1], gradients[1:])
        return going_on, *gradients[1:]

    return cast(Call, once)
