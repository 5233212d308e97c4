"""The loop every training shares: schedule, clipping, guards, log, validation, checkpoints.

Whatever a step draws follows from the seed and the step's number alone, so that a resumed run
needs no generator's state and gives the same losses as one that was never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from khala_mlx.config import Strict, TokenLayout
from khala_mlx.errors import KhalaError
from khala_mlx.storage.atomic import appears_whole
from khala_mlx.train import checkpoint
from khala_mlx.train.plot import plot_losses
from khala_mlx.train.settings import Schedule

LOG = "log.jsonl"


class Task(Protocol):
    """What differs between the trainings."""

    model: nn.Module
    state: dict[str, mx.array]

    def batch(self, rng: np.random.Generator, step: int) -> Any:
        """The data of a step, a pure function of the generator and the step."""

    def loss(self, batch: Any) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss to descend; scalars to log beside it, and arrays that `after` needs."""

    def after(self, parts: dict[str, mx.array], rng: np.random.Generator, step: int) -> None:
        """Whatever is learnt without gradients, once the weights have moved."""

    def validate(self) -> dict[str, float]:
        """Figures on held-out data."""


@dataclass
class Run:
    """A training in a folder."""

    task: Task
    schedule: Schedule
    settings: dict[str, Any]
    folder: Path

    def train(
        self, *, resume: bool = False, on_progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Run all steps that are left; returns the last validation.

        Raises:
            KhalaError: if the folder holds a run already (and not `resume`), or a loss is not
                finite; the last checkpoint is kept then.
        """
        optimizer = make_optimizer(self.schedule)
        optimizer.init(self.task.model.trainable_parameters())
        first = self._start(optimizer, resume)
        value_and_grad = self.value_and_grad()
        figures: dict[str, float] = {}
        for step in range(first, self.schedule.steps):
            began = time.perf_counter()
            rng = np.random.default_rng([self.schedule.seed, step])
            batch = self.task.batch(rng, step)
            (loss, parts), gradients = value_and_grad(batch)
            gradients, norm = optim.clip_grad_norm(gradients, self.schedule.clip_norm)
            mx.eval(loss, parts, norm)
            self._check_finite(step, loss.item(), norm.item())
            optimizer.update(self.task.model, gradients)
            mx.eval(self.task.model.parameters(), optimizer.state)
            # Else they would be held while the next ones are taken.
            del gradients
            self.task.after(parts, rng, step)
            entry = {"step": step + 1, "loss": loss.item(), "gradient_norm": norm.item()}
            entry |= {name: value.item() for name, value in parts.items() if value.size == 1}
            done = step + 1
            last = done == self.schedule.steps
            if done % self.schedule.validate_every == 0 or last:
                figures = self.task.validate()
                entry |= {f"valid_{name}": value for name, value in figures.items()}
                last = self.enough(figures) or last
            entry["seconds"] = round(time.perf_counter() - began, 4)
            self._log(entry)
            if self.writes and self.schedule.keep_every and done % self.schedule.keep_every == 0:
                save_weights(self.folder / f"weights-{done:06d}.safetensors", self.task.model)
            if done % self.schedule.checkpoint_every == 0 or last:
                self._save(done, optimizer)
            if on_progress is not None:
                on_progress(done, self.schedule.steps)
            if last:
                break
        if self.writes:
            plot_losses(self.folder / LOG, self.folder / "loss.png")
        return figures

    @property
    def writes(self) -> bool:
        """Whether this process keeps the run's files; of several that train together one does."""
        return True

    def value_and_grad(self) -> Callable[[Any], Any]:
        """What turns a batch into ((loss, parts), gradients)."""
        return nn.value_and_grad(self.task.model, self.task.loss)

    def learnt(self) -> dict[str, Any]:
        """The parameters that a checkpoint holds."""
        return self.task.model.parameters()

    def enough(self, figures: dict[str, float]) -> bool:
        """Whether a validation says that more steps would be in vain."""
        return False

    def _start(self, optimizer: optim.Optimizer, resume: bool) -> int:
        log = self.folder / LOG
        if not resume:
            if self.writes and (log.exists() or (self.folder / checkpoint.FILE).exists()):
                raise KhalaError(f"{self.folder} holds a run already; continue with --resume.")
            self._save(0, optimizer)
            return 0
        step, self.task.state = checkpoint.load(
            self.folder, self.task.model, self.learnt(), optimizer, self.settings
        )
        if self.writes:
            # Lines behind the checkpoint belong to steps that will be made again.
            kept = [entry for entry in entries(log) if entry["step"] <= step]
            with appears_whole(log, overwrite=True) as temporary:
                text = "".join(f"{json.dumps(entry)}\n" for entry in kept)
                temporary.write_text(text, encoding="utf-8")
        return step

    def _save(self, step: int, optimizer: optim.Optimizer) -> None:
        if not self.writes:
            return
        checkpoint.save(self.folder, step, self.learnt(), optimizer, self.task.state, self.settings)

    def _log(self, entry: dict[str, float]) -> None:
        if not self.writes:
            return
        try:
            with (self.folder / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise KhalaError(
                f"{self.folder / LOG} cannot be written: {error.strerror}; continue with --resume."
            ) from error

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise KhalaError(
                f"Step {step + 1} gave a loss of {loss} with a gradient of {norm}; lower the "
                "learning rate and continue from the last checkpoint with --resume."
            )


def entries(log: Path) -> list[dict[str, float]]:
    """Return the entries of a log, without a last line that a kill cut short."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    try:
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [{**entry, "step": int(entry["step"])} for entry in found]
    except (ValueError, KeyError, TypeError) as error:
        raise KhalaError(f"{log} is damaged; remove it to continue without.") from error


def make_optimizer(schedule: Schedule) -> optim.Optimizer:
    """AdamW with linear warm-up and cosine decay."""
    decay = optim.cosine_decay(
        schedule.learning_rate,
        max(1, schedule.steps - schedule.warmup),
        schedule.learning_rate * schedule.final_fraction,
    )
    rate: Any = decay
    if schedule.warmup:
        warmup = optim.linear_schedule(0.0, schedule.learning_rate, schedule.warmup)
        rate = optim.join_schedules([warmup, decay], [schedule.warmup])
    return optim.AdamW(
        rate, betas=list(schedule.betas), weight_decay=schedule.weight_decay, bias_correction=True
    )


def save_weights(path: Path, model: nn.Module) -> None:
    """All parameters as a safetensors file that appears whole."""
    with appears_whole(path, overwrite=True) as temporary:
        mx.save_safetensors(str(temporary), dict(tree_flatten(model.parameters())))


def save_part(
    folder: Path, part: str, model: nn.Module, config: Strict, tokens: TokenLayout | None = None
) -> None:
    """Write the trained weights as `part`.safetensors, and their sizes as config.json.

    The token layout of a language model goes beside its sizes.
    """
    about = {part: config.to_dict()}
    if tokens is not None:
        about["tokens"] = tokens.to_dict()
    save_weights(folder / f"{part}.safetensors", model)
    with appears_whole(folder / "config.json", overwrite=True) as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n")
