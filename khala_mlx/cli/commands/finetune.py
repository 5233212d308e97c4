"""The `khala train` commands that make and change adapters; heavy imports wait inside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from khala_mlx.cli.options import group
from khala_mlx.cli.terminal import Progress, command, report
from khala_mlx.config import LINEARS

if TYPE_CHECKING:
    from khala_mlx.train.settings import LoraTraining

FOLDER = click.Path(path_type=Path)

model_option = click.option(
    "--model", "-m", default="demo", show_default="the bundled demo model", help="Model to adapt."
)
data_option = click.option(
    "--data", type=FOLDER, required=True, help="Folder made by `khala train prepare`."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
scale_option = click.option(
    "--adapter-scale", "scales", type=float, multiple=True, help="Strength of each adapter."
)
vocabulary_option = click.option(
    "--reachable-only/--whole-vocabulary",
    default=True,
    show_default=True,
    help="Predict from the tokens that can follow, or from all.",
)
cut_option = click.option(
    "--max-seconds",
    type=click.FloatRange(0),
    default=0.0,
    help="Cut longer songs.  [default: no limit]",
)
POSITIVE = click.IntRange(1)


@dataclass(frozen=True)
class LoraArgs:
    """The settings of a LoRA training, as options."""

    rank: int
    scale: float
    layers: int | None
    modules: str
    dora: bool
    dropout: float
    steps: int
    batch_size: int
    grad_accumulation: int
    learning_rate: float
    warmup: int | None
    max_seconds: float
    reachable_only: bool
    grad_checkpoint: bool
    validate_every: int
    checkpoint_every: int
    patience: int
    replay_share: float
    seed: int

    def training(self, *, replay: bool) -> LoraTraining:
        """Return the settings of the training."""
        from khala_mlx.train.settings import LoraTraining, Schedule

        schedule = Schedule(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup=min(50, self.steps // 10) if self.warmup is None else self.warmup,
            seed=self.seed,
            validate_every=self.validate_every,
            checkpoint_every=self.checkpoint_every,
        )
        return LoraTraining(
            schedule,
            rank=self.rank,
            scale=self.scale,
            dropout=self.dropout,
            dora=self.dora,
            grad_checkpoint=self.grad_checkpoint,
            max_seconds=self.max_seconds,
            patience=self.patience,
            layers=self.layers or 0,
            modules=tuple(name.strip() for name in self.modules.split(",")),
            accumulate=self.grad_accumulation,
            whole_vocabulary=not self.reachable_only,
            replay_share=self.replay_share if replay else 0.0,
        )


lora_options = group(
    "settings",
    LoraArgs,
    click.option("--rank", type=POSITIVE, default=16, show_default=True),
    click.option(
        "--scale", type=float, default=2.0, show_default=True, help="Strength, alpha / rank."
    ),
    click.option(
        "--layers", type=POSITIVE, help="How many of the last layers to adapt.  [default: all]"
    ),
    click.option(
        "--modules",
        default=",".join(LINEARS),
        show_default=True,
        help="Linear layers to adapt in each.",
    ),
    click.option("--dora", is_flag=True, help="DoRA instead of LoRA."),
    click.option("--dropout", type=float, default=0.0, show_default=True),
    click.option("--steps", type=POSITIVE, default=600, show_default=True),
    click.option(
        "--batch-size", type=POSITIVE, default=1, show_default=True, help="Songs per batch."
    ),
    click.option(
        "--grad-accumulation", type=POSITIVE, default=8, show_default=True, help="Batches per step."
    ),
    click.option("--learning-rate", type=float, default=1e-4, show_default=True),
    click.option("--warmup", type=click.IntRange(0), help="Steps.  [default: a tenth, 50 at most]"),
    cut_option,
    vocabulary_option,
    click.option("--grad-checkpoint", is_flag=True, help="Use less memory and a third more time."),
    click.option("--validate-every", type=POSITIVE, default=50, show_default=True, help="Steps."),
    click.option("--checkpoint-every", type=POSITIVE, default=50, show_default=True, help="Steps."),
    click.option(
        "--patience",
        type=click.IntRange(0),
        default=0,
        help="Stop after this many validations without a better loss, and keep the best adapter.",
    ),
    click.option(
        "--replay-share",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=0.25,
        show_default=True,
        help="Share of the batches with such songs.",
    ),
    click.option("--seed", type=int, default=0, show_default=True),
)


@click.command()
@model_option
@data_option
@click.option("--out", type=FOLDER, required=True, help="Folder of the run and of the adapter.")
@lora_options
@click.option(
    "--replay",
    type=FOLDER,
    help="Another prepared folder, of songs that the model should not forget.",
)
@click.option("--resume", is_flag=True, help="Resume from the last checkpoint in OUT.")
@click.option(
    "--memory-limit",
    type=float,
    help="Memory to use, in GB.  [default: what the device has]",
)
@click.option("--dry-run", is_flag=True, help="Show the memory forecast and stop.")
@json_option
@command
def lora(
    model: str,
    data: Path,
    out: Path,
    settings: LoraArgs,
    replay: Path | None,
    resume: bool,
    memory_limit: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a LoRA adapter of the backbone on prepared songs, into OUT.

    Use it with `khala generate --adapter OUT`. Only the adapter is trained, so the model may be
    quantized (`khala convert --quantize`).
    """
    from khala_mlx.distributed import Processes
    from khala_mlx.train.finetune.run import check_memory, plan, train_lora

    planned = plan(model, data, settings.training(replay=replay is not None), replay)
    told = planned.forecast.to_dict()
    if dry_run:
        click.echo(f"Memory: {_memory(told)}", err=True)
        report({f"{name}_bytes": value for name, value in told.items()}, as_json)
        return
    processes = Processes.launched()
    if processes.leads:
        click.echo(f"Memory: {_memory(told)}", err=True)
    check_memory(planned, memory_limit * 1e9 if memory_limit is not None else None)
    progress = Progress()
    figures = train_lora(
        planned,
        out,
        resume=resume,
        processes=processes,
        on_progress=lambda done, total: progress("train", done, total) if processes.leads else None,
    )
    if processes.leads:
        rounded = {name: round(value, 4) for name, value in figures.items()}
        report({"folder": str(out), **rounded, "forecast_bytes": told["total"]}, as_json)


@click.command()
@click.argument("destination", type=FOLDER, metavar="DEST")
@model_option
@click.option(
    "--adapter",
    "adapters",
    type=FOLDER,
    multiple=True,
    required=True,
    help="LoRA adapter folder. Repeatable.",
)
@scale_option
@json_option
@command
def fuse(
    destination: Path,
    model: str,
    adapters: tuple[Path, ...],
    scales: tuple[float, ...],
    as_json: bool,
) -> None:
    """Write the model folder DEST: the model with adapters merged into its backbone."""
    from khala_mlx.convert import fuse as run
    from khala_mlx.convert import read_adapter
    from khala_mlx.errors import KhalaError
    from khala_mlx.model.weights import find_model

    if scales and len(scales) != len(adapters):
        raise KhalaError(f"There are {len(adapters)} adapters, but {len(scales)} scales.")
    chosen = [read_adapter(path) for path in adapters]
    pairs = list(zip(chosen, scales or (1.0,) * len(chosen), strict=True))
    told = run(find_model(model), pairs, destination, on_progress=Progress())
    lines = {"folder": told["destination"], "size": f"{told['bytes'] / 1e6:.1f} MB"}
    lines["layers"] = f"{told['layers']} changed, {told['unpacked']} of them no longer quantized"
    report(told if as_json else lines, as_json)


@click.command()
@click.argument("destination", type=FOLDER, metavar="DEST")
@click.option(
    "--adapter", type=FOLDER, required=True, help="Adapter in any format that `generate` reads."
)
@click.option(
    "--format", "layout", type=click.Choice(["peft", "mlx"]), default="peft", show_default=True
)
@json_option
@command
def export(destination: Path, adapter: Path, layout: str, as_json: bool) -> None:
    """Write an adapter into the folder DEST, for PEFT or in mlx-lm's layout."""
    from khala_mlx.convert import export_adapter, read_adapter

    found = read_adapter(adapter)
    export_adapter(found, destination, layout)
    report({"folder": str(destination), "layers": len(found.pairs), "format": layout}, as_json)


def _memory(told: dict[str, int]) -> str:
    names = {"weights": "weights", "adapter": "adapter", "kept": "kept", "at_work": "at work"}
    parts = ", ".join(f"{told[key] / 1e9:.3g} {name}" for key, name in names.items())
    return f"about {told['total'] / 1e9:.3g} GB ({parts})"
