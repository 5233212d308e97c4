"""Training of the backbone: next-token prediction on prompt and coarse codes, loss on the codes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from khala_mlx.config import TokenLayout
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.transformer import Transformer, projector
from khala_mlx.model.weights import fill_part
from khala_mlx.train.data.sequences import Example, check_prompt, padded, read_examples
from khala_mlx.train.loop import Run, save_part
from khala_mlx.train.settings import BackboneTraining


def audio_loss(model: Transformer, layout: TokenLayout, rows: mx.array) -> mx.array:
    """Mean nats per audio token of rows [B, S], the end of the song included.

    Prompt and padding (-1) are not targets. Attention is causal, so what stands behind a row's end
    changes nothing before it. The vocabulary is the backbone's, also for superres.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    hidden = model.body(model.embed(inputs).astype(model.dtype), causal=True)
    logits = projector(model.lm_head, slice(0, layout.backbone_vocab))(hidden)
    counted = (targets >= layout.audio_start) | (targets == layout.end_of_song)
    losses = nn.losses.cross_entropy(logits, mx.maximum(targets, 0))
    return (losses * counted).sum() / mx.maximum(counted.sum(), 1)


class BackboneTask:
    """Batches of whole songs (see loop.Task)."""

    def __init__(
        self, settings: BackboneTraining, train: list[Example], valid: list[Example]
    ) -> None:
        self.settings, self.layout = settings, settings.tokens
        self.train, self.valid = train, valid
        mx.random.seed(settings.schedule.seed)
        self.model = Backbone(settings.backbone, settings.tokens)
        mx.eval(self.model.parameters())
        if settings.start:
            fill_part(self.model, Path(settings.start), "backbone").train()
        self.by_length = by_length(train, settings.tokens)
        self.state: dict[str, mx.array] = {}

    def batch(self, rng: np.random.Generator, step: int) -> mx.array:
        return self._rows(drawn(self.by_length, rng, self.settings.schedule.batch_size))

    def loss(self, batch: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        return audio_loss(self.model, self.layout, batch), {}

    def after(self, parts: dict[str, mx.array], rng: np.random.Generator, step: int) -> None:
        """Nothing is learnt without gradients."""

    def validate(self) -> dict[str, float]:
        """Nats per audio token on the held-out songs, each batch as long as it must be."""
        size, total = self.settings.schedule.batch_size, 0.0
        for start in range(0, len(self.valid), size):
            rows = self._rows(self.valid[start : start + size])
            total += float(audio_loss(self.model, self.layout, rows)) * rows.shape[0]
        return {"loss": total / len(self.valid)}

    def _rows(self, examples: list[Example]) -> mx.array:
        return mx.array(padded([each.coarse_sequence(self.layout) for each in examples]))


def by_length(examples: Sequence[Example], layout: TokenLayout) -> list[list[Example]]:
    """Songs whose sequences are padded alike."""
    groups: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[padded([example.coarse_sequence(layout)]).shape[1]].append(example)
    return [groups[length] for length in sorted(groups)]


def drawn(
    groups: Sequence[Sequence[Example]], rng: np.random.Generator, count: int
) -> list[Example]:
    """At most `count` different songs of one group: hardly any padding, every song as likely."""
    sizes = np.array([len(group) for group in groups], dtype=np.float64)
    group = groups[rng.choice(len(sizes), p=sizes / sizes.sum())]
    chosen = rng.choice(len(group), min(count, len(group)), replace=False)
    return [group[index] for index in chosen]


def train_backbone(
    settings: BackboneTraining,
    data: Path,
    folder: Path,
    *,
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Train on a prepared folder (data.read_coded) that also holds tokenizer.json.

    Writes backbone.safetensors and config.json into `folder` when done, beside checkpoint,
    log.jsonl and loss.png. Returns the last validation.
    """

    def room(backbone: int, _: int) -> int:
        check_prompt(backbone, settings.backbone.max_prompt)
        # One token is kept for the end of the song.
        return (settings.backbone.context - backbone - 1) // settings.tokens.num_coarse

    train, valid = read_examples(data, settings.tokens, room)
    task: Any = BackboneTask(settings, train, valid)
    run = Run(task, settings.schedule, settings.to_dict(), folder)
    figures = run.train(resume=resume, on_progress=on_progress)
    save_part(folder, "backbone", task.model, settings.backbone, settings.tokens)
    return figures
