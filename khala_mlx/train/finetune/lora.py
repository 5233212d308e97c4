"""Training of an adapter: mlx-lm's LoRA or DoRA layers on the backbone, the backbone frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from khala_mlx.distributed import Processes
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.cache import file_limit_kept
from khala_mlx.storage.adapter import module_key, save_adapter
from khala_mlx.train.backbone import by_length, drawn
from khala_mlx.train.data.sequences import Example, padded
from khala_mlx.train.finetune.loss import Targets, hidden_states, summed_nats, targets_of
from khala_mlx.train.loop import LOG, Run, entries
from khala_mlx.train.settings import LoraTraining

_BEST = "best."


def add_lora(model: Backbone, settings: LoraTraining) -> None:
    """Freeze `model` and put fresh adapters on it, which change nothing yet."""
    with file_limit_kept():
        from mlx_lm.tuner.utils import linear_to_lora_layers
    model.freeze()
    mx.random.seed(settings.schedule.seed)
    linear_to_lora_layers(
        model,
        settings.layers or len(model.layers),
        lora_parameters(settings),
        use_dora=settings.dora,
    )
    model.train()
    mx.eval(model.parameters())


def lora_parameters(settings: LoraTraining) -> dict[str, Any]:
    """The settings of mlx-lm's layers, under its names."""
    return {
        "rank": settings.rank,
        "scale": settings.scale,
        "dropout": settings.dropout,
        "keys": [module_key(module) for module in settings.modules],
    }


@dataclass(frozen=True)
class Batch:
    """Token rows, without the last token [B, S], and what they are to predict.

    `share` is one over the targets of the whole step, `seed` draws what dropout leaves out.
    """

    inputs: mx.array
    targets: list[Targets]
    share: float
    seed: int


class LoraTask:
    """Batches of songs of about one length, several to a step (see loop.Task).

    Without songs in `valid` nothing is validated; those in `replay` are mixed in, so that they are
    not forgotten. Of several processes each takes its part of the batches.
    """

    def __init__(
        self,
        model: Backbone,
        settings: LoraTraining,
        train: list[Example],
        valid: list[Example],
        replay: Sequence[Example] = (),
        processes: Processes | None = None,
    ) -> None:
        self.model, self.settings, self.valid = model, settings, valid
        self.groups = by_length(train, model.layout)
        self.replayed = by_length(replay, model.layout)
        self.processes = processes or Processes()
        self.state: dict[str, mx.array] = {}

    def batch(self, rng: np.random.Generator, step: int) -> list[Batch]:
        songs = [self._drawn(rng) for _ in range(self.settings.accumulate)]
        rows = [self._rows(each) for each in songs]
        targets = [self._targets(each) for each in rows]
        share = 1 / sum(_count(each) for each in targets)
        batches = [
            Batch(mx.array(tokens[:, :-1]), wanted, share, int(rng.integers(2**31)))
            for tokens, wanted in zip(rows, targets, strict=True)
        ]
        return batches[self.processes.part]

    def _drawn(self, rng: np.random.Generator) -> list[Example]:
        mixed_in = self.replayed and rng.random() < self.settings.replay_share
        groups = self.replayed if mixed_in else self.groups
        return drawn(groups, rng, self.settings.schedule.batch_size)

    def loss(self, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        """The batch's part in the mean nats per audio token of its step."""
        hidden = hidden_states(
            self.model,
            batch.inputs,
            checkpointed=self.settings.grad_checkpoint,
            seed=batch.seed,
        )
        return summed_nats(self.model, hidden, batch.targets) * batch.share, {}

    def after(self, parts: dict[str, mx.array], rng: np.random.Generator, step: int) -> None:
        """Nothing is learnt without gradients."""

    def validate(self) -> dict[str, float]:
        """Nats per audio token on the held-out songs."""
        size, total, count = self.settings.schedule.batch_size, 0.0, 0
        self.model.eval()
        for start in range(0, len(self.valid), size)[self.processes.part]:
            rows = self._rows(self.valid[start : start + size])
            targets = self._targets(rows)
            hidden = self.model.hidden(mx.array(rows[:, :-1]))
            total += float(summed_nats(self.model, hidden, targets))
            count += _count(targets)
        self.model.train()
        # Held-out songs have lengths of their own, whose buffers training would not take up.
        mx.clear_cache()
        if not self.valid:
            return {}
        sums = self.processes.summed({"nats": mx.array(total), "tokens": mx.array(float(count))})
        return {"loss": sums["nats"].item() / sums["tokens"].item()}

    def _rows(self, examples: Sequence[Example]) -> np.ndarray:
        return padded([each.coarse_sequence(self.model.layout) for each in examples])

    def _targets(self, rows: np.ndarray) -> list[Targets]:
        whole = self.settings.whole_vocabulary
        return targets_of(rows, self.model.layout, whole_vocabulary=whole)


@dataclass
class LoraRun(Run):
    """A run that keeps the adapter alone, and with patience the best one.

    Attributes:
        base: what adapter_config.json says of the model the adapter is for.
    """

    base: dict[str, Any]

    @property
    def how(self) -> LoraTraining:
        """The settings as they are read."""
        settings: LoraTraining = self.task.settings  # type: ignore[attr-defined]
        return settings

    @property
    def processes(self) -> Processes:
        """Those that train together."""
        processes: Processes = self.task.processes  # type: ignore[attr-defined]
        return processes

    @property
    def writes(self) -> bool:
        """Whether this process leads."""
        return self.processes.leads

    def value_and_grad(self) -> Callable[[Any], Any]:
        """The gradients of a step's batches, added up one after the other."""
        model = self.task.model
        take = nn.value_and_grad(model, self.task.loss)

        def descend(batches: list[Batch]) -> Any:
            weights = model.trainable_parameters()
            total, gradients = mx.zeros(()), None
            for batch in batches:
                (loss, _), more = take(batch)
                gradients = more if gradients is None else tree_map(mx.add, gradients, more)
                total = total + loss
                mx.eval(total, gradients)
                # What was traced stays in the model otherwise, with all it was made from.
                model.update(weights)
            total, gradients = self.processes.summed((total, gradients))
            return (total, {}), gradients

        return descend

    def learnt(self) -> dict[str, Any]:
        """The adapter; the base is not learnt."""
        weights: dict[str, Any] = self.task.model.trainable_parameters()
        return weights

    def enough(self, figures: dict[str, float]) -> bool:
        """Whether the loss has not become better for `patience` validations."""
        if not self.how.patience or "loss" not in figures:
            return False
        state = self.task.state
        if figures["loss"] < float(state.get("best_loss", math.inf)):
            best = {_BEST + name: array for name, array in tree_flatten(self.learnt())}
            self.task.state = {"best_loss": mx.array(figures["loss"]), "stale": mx.array(0), **best}
        else:
            state["stale"] = state["stale"] + 1
        return self._gave_up()

    def adapter(self) -> dict[str, mx.array]:
        """What the run must show: the best adapter so far, or without patience the last."""
        best = {
            name.removeprefix(_BEST): array
            for name, array in self.task.state.items()
            if name.startswith(_BEST)
        }
        return best or dict(tree_flatten(self.learnt()))

    def _start(self, optimizer: optim.Optimizer, resume: bool) -> int:
        step = super()._start(optimizer, resume)
        self.processes.agree(f"{step}", "checkpoint: OUT must be one folder that all see")
        self.task.model.update(self.processes.from_leader(self.learnt()))
        if step == 0:
            figures = self.task.validate()
            self.enough(figures)
            if figures and not entries(self.folder / LOG):
                told = {f"valid_{name}": value for name, value in figures.items()}
                self._log({"step": 0, **told})
        return self.schedule.steps if self._gave_up() else step

    def _gave_up(self) -> bool:
        patience = self.how.patience
        return patience > 0 and int(self.task.state.get("stale", 0)) >= patience

    def _save(self, step: int, optimizer: optim.Optimizer) -> None:
        if not self.writes:
            return
        super()._save(step, optimizer)
        about = {
            "fine_tune_type": "dora" if self.how.dora else "lora",
            "num_layers": self.how.layers or len(self.task.model.layers),
            "lora_parameters": lora_parameters(self.how),
            "base": self.base,
            "generator": f"khala-mlx {version('khala-mlx')}",
            "steps": step,
            "training": self.how.to_dict(),
        }
        save_adapter(self.folder, self.adapter(), about, overwrite=True)


def _count(targets: list[Targets]) -> int:
    return sum(each.count for each in targets)
