"""Training of superres with hybrid attention, started from a trained backbone (paper section 4).

Every step mixes two objectives on the same songs: full-attention refinement, which predicts a
randomly drawn layer of each from the layers before it, and the backbone's own causal next-token
task, which keeps the alignment of words and sound that the backbone has learnt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from khala_mlx import token_ids as tokens
from khala_mlx.errors import KhalaError
from khala_mlx.model.superres import SuperRes
from khala_mlx.model.weights import fill_part, part_files, read_tensors
from khala_mlx.storage.atomic import appears_whole
from khala_mlx.train.backbone import audio_loss
from khala_mlx.train.codec import load_codec
from khala_mlx.train.data.sequences import Alike, Example, check_prompt, padded, read_examples
from khala_mlx.train.loop import Run, save_part
from khala_mlx.train.settings import SuperResTraining


def refine_loss(model: SuperRes, prompts: mx.array, codes: mx.array, layers: list[int]) -> mx.array:
    """Mean nats of codes [B, K, T] at one layer for each song, given the layers before it.

    The rows are those of generation: prompts [B, P] with the marker in the last row, then sums of
    the known layers.
    """
    layout, weight = model.layout, model.lm_head.weight
    markers = mx.array([[tokens.marker(layout, layer)] for layer in layers])
    text = model.embed(mx.concatenate([prompts[:, :-1], markers], axis=1))
    starts = mx.array([tokens.window(layout, layer)[0] for layer in range(layout.num_codebooks)])
    ids = codes + starts[:, None]
    # One gather for all songs and layers: the gradient of each is as large as the table.
    known = model.embed(mx.concatenate([ids[song, :n] for song, n in enumerate(layers)]))
    songs = mx.split(known, np.cumsum(layers)[:-1].tolist())
    audio = mx.stack([layers_of_one.sum(axis=0) for layers_of_one in songs])
    rows = mx.concatenate([text, audio], axis=1).astype(model.dtype)
    hidden = model.body(rows, causal=False, start=prompts.shape[1])
    chosen = starts[mx.array(layers)][:, None] + mx.arange(layout.codebook_size)
    logits = (hidden @ weight[chosen].swapaxes(1, 2)).astype(mx.float32)
    targets = mx.stack([codes[song, layer] for song, layer in enumerate(layers)])
    return nn.losses.cross_entropy(logits, targets, reduction="mean")


def _norms(codebooks: mx.array, rows: mx.array) -> mx.array:
    """Half the square of each codebook row, along a direction [H] that its projection leaves free.

    Of |r - e|^2 the logits of the nearest row need r e - |e|^2 / 2: a state with one unit along
    that direction adds the second term.
    """
    flat = np.array(rows.reshape(-1, rows.shape[-1]), dtype=np.float64)
    _, directions = np.linalg.eigh(flat.T @ flat)
    free = mx.array(directions[:, 0].astype(np.float32))
    return 0.5 * mx.square(codebooks).sum(-1, keepdims=True) * free


def start_from_backbone(model: SuperRes, folder: Path) -> None:
    """Copy body, and the rows of text and coarse codes, from backbone.safetensors in `folder`.

    The rows of the finer layers stay fresh, scaled to the spread of those that are copied.

    Raises:
        KhalaError: if the backbone's layers have other shapes than superres'.
    """
    tensors = read_tensors(part_files(folder, "backbone"))
    ours = dict(tree_flatten(model.parameters()))
    rows = model.layout.backbone_vocab
    copied = {}
    for name, array in ours.items():
        source = tensors.get(name)
        table = name in ("embed_tokens.weight", "lm_head.weight")
        wanted = (rows, *array.shape[1:]) if table else array.shape
        if source is None or source.shape != tuple(wanted):
            raise KhalaError(f"The backbone in {folder} has no {name} of shape {list(wanted)}.")
        if table:
            fresh = array[rows:] * (mx.std(source) / mx.std(array))
            source = mx.concatenate([source.astype(array.dtype), fresh])
        copied[name] = source
    model.load_weights(list(copied.items()), strict=True)
    mx.eval(model.parameters())


def start_from_codebooks(model: SuperRes, codebooks: mx.array, *, first: int) -> None:
    """Set the rows of layers `first`.. to random projections of the codec's codebooks [K, N, D].

    The sum over known layers is then a projection of the latents they stand for, and codes that
    sound alike start alike. One scale for all layers going in, as latents add up; unit scale for
    each coming out.

    Raises:
        KhalaError: if the codebooks are not those of the token layout.
    """
    layout = model.layout
    wanted = (layout.num_codebooks, layout.codebook_size)
    if codebooks.shape[:2] != wanted:
        raise KhalaError(
            f"The codec has {list(codebooks.shape[:2])} codebooks and rows, the token layout says "
            f"{list(wanted)}."
        )
    chosen = codebooks[first:].astype(mx.float32)
    for table, together in ((model.embed_tokens, True), (model.lm_head, False)):
        others = table.weight[: tokens.window(layout, first)[0]]
        rows = chosen @ mx.random.normal((chosen.shape[-1], others.shape[-1]))
        spread = mx.std(rows[:1] if together else rows, axis=(1, 2), keepdims=True)
        # A codec that was hardly trained may have layers that are all zero.
        spread = mx.maximum(spread, 1e-6)
        if not together:
            rows = rows - _norms(chosen, rows)
        rows = (rows * (mx.std(others) / spread)).reshape(-1, others.shape[-1])
        table.weight = mx.concatenate([others, rows.astype(others.dtype)])
    mx.eval(model.parameters())


class SuperResTask:
    """Songs of one shape, a drawn layer for each, and their coarse codes (see loop.Task)."""

    def __init__(
        self, settings: SuperResTraining, train: list[Example], valid: list[Example]
    ) -> None:
        self.settings, self.layout = settings, settings.tokens
        self.train, self.valid = Alike(train), Alike(valid)
        mx.random.seed(settings.schedule.seed)
        self.model = SuperRes(settings.superres, settings.tokens)
        mx.eval(self.model.parameters())
        self._start()
        self.state: dict[str, mx.array] = {}

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Any]:
        chosen = self.train.draw(rng, self.settings.schedule.batch_size)
        return {"layers": self._layers(rng, len(chosen)), **self._arrays(chosen)}

    def loss(self, batch: dict[str, Any]) -> tuple[mx.array, dict[str, mx.array]]:
        refine = refine_loss(self.model, batch["prompts"], batch["codes"], batch["layers"])
        parts = {"refine_loss": refine}
        if not self.settings.align_weight:
            return refine, parts
        coarse = batch["coarse"][: self.settings.align_songs or None]
        align = audio_loss(self.model, self.layout, coarse)
        return refine + self.settings.align_weight * align, {**parts, "align_loss": align}

    def after(self, parts: dict[str, mx.array], rng: np.random.Generator, step: int) -> None:
        """Nothing is learnt without gradients."""

    def validate(self) -> dict[str, float]:
        """Held-out nats of refinement, the mean over all layers, and of the causal task."""
        by_layer = self.by_layer()
        coarse = self._arrays(self.valid.draw(np.random.default_rng(0), 8))["coarse"]
        align = float(audio_loss(self.model, self.layout, coarse))
        return {"refine_loss": float(np.mean(list(by_layer.values()))), "align_loss": align}

    def by_layer(self, songs: int = 8) -> dict[int, float]:
        """Held-out nats of refinement for each layer, on the same songs."""
        batch = self._arrays(self.valid.draw(np.random.default_rng(0), songs))
        prompts, codes = batch["prompts"], batch["codes"]
        return {
            layer: float(refine_loss(self.model, prompts, codes, [layer] * len(codes)))
            for layer in range(self.layout.num_coarse, self.layout.num_codebooks)
        }

    def _start(self) -> None:
        settings = self.settings
        if settings.start:
            fill_part(self.model, Path(settings.start), "superres").train()
            return
        if settings.backbone:
            start_from_backbone(self.model, Path(settings.backbone))
        if settings.codec:
            codec = load_codec(Path(settings.codec))
            # The backbone knows the coarse layers by rows of its own.
            first = self.layout.num_coarse if settings.backbone else 0
            start_from_codebooks(self.model, codec.quantizer.codebooks, first=first)

    def _layers(self, rng: np.random.Generator, count: int) -> list[int]:
        fine = np.arange(self.layout.num_coarse, self.layout.num_codebooks)
        shares = fine ** -float(self.settings.layer_focus)
        return rng.choice(fine, count, p=shares / shares.sum()).tolist()

    def _arrays(self, examples: list[Example]) -> dict[str, mx.array]:
        return {
            "prompts": mx.array(np.stack([each.superres_prompt for each in examples])),
            "codes": mx.array(np.stack([each.codes for each in examples])),
            "coarse": mx.array(padded([each.coarse_sequence(self.layout) for each in examples])),
        }


def train_superres(
    settings: SuperResTraining,
    data: Path,
    folder: Path,
    *,
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Train on a prepared folder (data.read_coded) that also holds tokenizer.json.

    Writes superres.safetensors, config.json and by_layer.json (held-out nats of each layer) into
    `folder` when done, beside checkpoint, log.jsonl and loss.png. Returns the last validation.
    """

    def room(_: int, superres: int) -> int:
        check_prompt(superres, settings.superres.max_prompt)
        return settings.superres.context - superres

    train, valid = read_examples(data, settings.tokens, room)
    task: Any = SuperResTask(settings, train, valid)
    run = Run(task, settings.schedule, settings.to_dict(), folder)
    figures = run.train(resume=resume, on_progress=on_progress)
    save_part(folder, "superres", task.model, settings.superres, settings.tokens)
    with appears_whole(folder / "by_layer.json", overwrite=True) as temporary:
        temporary.write_text(json.dumps(task.by_layer(), indent=2) + "\n")
    return figures
