"""`khala train lora` from start to end: read the songs, forecast, load, train, keep the adapter."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from khala_mlx.config import KhalaConfig
from khala_mlx.distributed import Processes
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.weights import CPU_DEQUANTIZED_BYTES, find_model, load_part, working_dtype
from khala_mlx.performance.machine import usable_memory
from khala_mlx.storage.adapter import WEIGHTS, backbone_id
from khala_mlx.train.data.dataset import holds
from khala_mlx.train.data.prepared import read_prepared
from khala_mlx.train.data.sequences import Example, padded
from khala_mlx.train.finetune.lora import LoraRun, LoraTask, add_lora
from khala_mlx.train.finetune.memory import Forecast, Machine, forecast, weight_bytes
from khala_mlx.train.loop import LOG, entries
from khala_mlx.train.settings import LoraTraining

# Buffers of other shapes that MLX may keep: songs have many lengths.
_CACHE_BYTES = 2 * 2**30
_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the model is loaded."""

    source: Path
    config: KhalaConfig
    settings: LoraTraining
    train: list[Example]
    valid: list[Example]
    replay: list[Example]
    machine: Machine

    @property
    def forecast(self) -> Forecast:
        """What memory the training takes, with its largest batch."""
        return self.forecast_with(self.settings)

    def forecast_with(self, settings: LoraTraining) -> Forecast:
        """The same with other settings, on songs as long as these."""
        most, tokens = settings.schedule.batch_size, self.config.tokens
        shapes = []
        # A batch is all of the one or all of the other.
        for examples in (self.train, self.replay):
            lengths = Counter(
                padded([example.coarse_sequence(tokens)]).shape[1] - 1 for example in examples
            )
            shapes += [(min(most, count), length) for length, count in lengths.items()]
        each = [forecast(self.config, settings, shape, self.machine) for shape in shapes]
        return max(each, key=lambda one: one.total)


def plan(model: str | Path, data: Path, settings: LoraTraining, replay: Path | None = None) -> Plan:
    """Read the model's config and the prepared songs; cut these as generation's window wants it.

    The songs for training in `replay` are mixed in, as many as `settings` say.

    Raises:
        KhalaError: if one cannot be read, or they do not fit together.
    """
    source = find_model(model)
    config = KhalaConfig.load(source / "config.json")
    if settings.layers > config.backbone.num_layers:
        raise KhalaError(
            f"The backbone has {config.backbone.num_layers} layers, {settings.layers} were to get "
            "an adapter."
        )
    machine = _machine(config)
    # mlx-lm's DoRA layer takes 32 / bits for a whole number.
    odd = any(32 % how.bits for how in config.quantization.values())
    if settings.dora and odd and not machine.unpacked:
        raise KhalaError("DoRA needs a model that is quantized to 4 or 8 bits, or not at all.")
    train, valid = _songs(source, config, data, settings)
    old: list[Example] = []
    if replay is not None:
        seconds = settings.max_seconds
        old = read_prepared(source, config, replay, "train", max_seconds=seconds).examples
    return Plan(source, config, settings, train, valid, old, machine)


def check_memory(plan: Plan, limit: float | None = None) -> None:
    """Refuse what does not fit into `limit` bytes, by default what the device has.

    Raises:
        KhalaError: naming the options that would make it fit.
    """
    limit = usable_memory() if limit is None else limit
    needed = plan.forecast.total
    if needed <= limit:
        return
    raise KhalaError(
        f"This training takes about {needed / _GB:.3g} GB, {limit / _GB:.3g} GB are there: "
        f"{_remedy(plan, limit)}."
    )


def train_lora(
    plan: Plan,
    folder: Path,
    *,
    resume: bool = False,
    processes: Processes | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Train as planned; adapters.safetensors and adapter_config.json go into `folder`.

    Beside them lie the checkpoint, log.jsonl and loss.png. Of several `processes`, which share the
    batches of a step, the one that leads writes all of it, and returns all figures.

    Returns:
        Held-out nats per audio token before (`loss_before`) and after (`loss`), where there are
        held-out songs; `steps` made, and `peak_bytes` of memory.
    """
    processes = processes or Processes()
    settings, config = plan.settings, plan.config
    if processes.leads and not resume and (folder / WEIGHTS).exists():
        raise KhalaError(f"{folder} holds an adapter already; choose another folder, or --resume.")
    if settings.accumulate < processes.size:
        raise KhalaError(
            f"{processes.size} processes share the batches of a step, which are "
            f"{settings.accumulate}: take --grad-accumulation {processes.size} or more."
        )
    base = _base(plan)
    told = {**settings.to_dict(), "base": base["backbone"], "songs": _songs_id(plan)}
    processes.agree(json.dumps(told, sort_keys=True), "model, songs and settings")
    dtype = getattr(mx, working_dtype(config))
    model = load_part(
        Backbone(config.backbone, config.tokens), plan.source, "backbone", config, dtype
    )
    add_lora(model, settings)
    task: Any = LoraTask(model, settings, plan.train, plan.valid, plan.replay, processes)
    run = LoraRun(task, settings.schedule, told, folder, base)
    with _small_cache():
        mx.reset_peak_memory()
        run.train(resume=resume, on_progress=on_progress)
        # What is kept need not be what the last step left.
        model.update(tree_unflatten(list(run.adapter().items())))
        figures = task.validate()
        peak = mx.get_peak_memory()
    if not processes.leads:
        return figures
    log = entries(folder / LOG)
    # A run that continues without its log has no first loss to report, nor steps if none were left.
    first = log[0] if log else {"step": 1}
    before = {"loss_before": first["valid_loss"]} if first["step"] == 0 else {}
    steps = {"steps": log[-1]["step"]} if log else {}
    return {**before, **figures, **steps, "peak_bytes": peak}


def _songs(
    source: Path, config: KhalaConfig, data: Path, settings: LoraTraining
) -> tuple[list[Example], list[Example]]:
    train = read_prepared(source, config, data, "train", max_seconds=settings.max_seconds)
    if holds(data, "valid"):
        held_out = read_prepared(source, config, data, "valid", max_seconds=settings.max_seconds)
        return train.examples, held_out.examples
    # A single song leaves none to hold out.
    if settings.patience:
        raise KhalaError(f"{data} has no held-out songs to stop by. Leave patience at 0.")
    warnings.warn(
        f"{data} has no held-out songs, so nothing shows whether the songs are memorised.",
        KhalaWarning,
        stacklevel=2,
    )
    return train.examples, []


def _machine(config: KhalaConfig) -> Machine:
    on_cpu = mx.default_device() == mx.cpu
    machine = Machine(4 if working_dtype(config) == "float32" else 2, on_cpu)
    unpacked = dataclasses.replace(machine, unpacked=True)
    return (
        unpacked if on_cpu and weight_bytes(config, unpacked) <= CPU_DEQUANTIZED_BYTES else machine
    )


def _songs_id(plan: Plan) -> str:
    digest = hashlib.sha256()
    for examples in (plan.train, plan.valid, plan.replay):
        digest.update(f"{len(examples)}".encode())
        for example in examples:
            sequence = example.coarse_sequence(plan.config.tokens)
            digest.update(np.array([len(sequence), *sequence], np.int64).tobytes())
    return digest.hexdigest()


def _base(plan: Plan) -> dict[str, Any]:
    config = plan.source / "config.json"
    return {
        "name": plan.source.resolve().name,
        "backbone": backbone_id(plan.config),
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest(),
    }


def _remedy(plan: Plan, limit: float) -> str:
    """The first of the options, one on top of the other, with which it fits."""
    given: list[str] = []
    settings = plan.settings
    single = dataclasses.replace(settings.schedule, batch_size=1)
    songs = settings.schedule.batch_size * settings.accumulate
    changes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("--grad-checkpoint", {"grad_checkpoint": True}),
        (
            f"--batch-size 1 --grad-accumulation {songs}",
            {"schedule": single, "accumulate": songs},
        ),
    )
    for option, change in changes:
        changed = dataclasses.replace(settings, **change)
        if changed != settings:
            settings = changed
            given.append(option)
            if plan.forecast_with(settings).total <= limit:
                return f"add {' '.join(given)}"
    if seconds := _seconds(plan, settings, limit):
        return f"add {' '.join([*given, f'--max-seconds {seconds}'])}"
    return "it does not fit with any options, take a smaller model, or this one with --quantize 4"


def _seconds(plan: Plan, settings: LoraTraining, limit: float) -> int:
    """The most whole seconds of sound that fit behind the longest prompt; 0 if none do."""
    layout, rate = plan.config.tokens, plan.config.codec.frame_rate
    songs = (*plan.train, *plan.replay)
    prompt = max(len(example.backbone_prompt) for example in songs)
    longest = max(example.codes.shape[1] for example in songs)
    for seconds in range(int(longest / rate), 0, -1):
        # 32 is what rows are padded to.
        tokens = prompt + layout.num_coarse * int(seconds * rate) + 32
        if forecast(plan.config, settings, (1, tokens), plan.machine).total <= limit:
            return seconds
    return 0


@contextmanager
def _small_cache() -> Iterator[None]:
    before = mx.set_cache_limit(_CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
