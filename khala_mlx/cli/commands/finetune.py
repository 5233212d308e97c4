"""The `khala train` commands that make and change adapters; heavy imports wait inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from khala_mlx.cli.terminal import Progress, command, report
from khala_mlx.config import LINEARS

FOLDER = click.Path(path_type=Path)

model_option = click.option(
    "--model", "-m", default="demo", show_default="the bundled demo model", help="What is adapted."
)
data_option = click.option(
    "--data", type=FOLDER, required=True, help="Folder made by `khala train prepare`."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
scale_option = click.option(
    "--adapter-scale", "scales", type=float, multiple=True, help="One for each adapter."
)
vocabulary_option = click.option(
    "--reachable-only/--whole-vocabulary",
    default=True,
    show_default=True,
    help="Predict from the tokens that can follow, or from all.",
)
cut_option = click.option(
    "--max-seconds", type=click.FloatRange(0), default=0.0, help="Cut longer songs."
)
POSITIVE = click.IntRange(1)


@click.command()
@model_option
@data_option
@click.option("--out", type=FOLDER, required=True, help="Folder of the run and of the adapter.")
@click.option("--rank", type=POSITIVE, default=16, show_default=True)
@click.option(
    "--scale", type=float, default=2.0, show_default=True, help="Others call it alpha / rank."
)
@click.option("--layers", type=POSITIVE, help="How many get one, the last ones.  [default: all]")
@click.option(
    "--modules", default=",".join(LINEARS), show_default=True, help="The linear layers in each."
)
@click.option("--dora", is_flag=True, help="DoRA instead of LoRA.")
@click.option("--dropout", type=float, default=0.0, show_default=True)
@click.option("--steps", type=POSITIVE, default=600, show_default=True)
@click.option("--batch-size", type=POSITIVE, default=1, show_default=True, help="Songs.")
@click.option(
    "--grad-accumulation", type=POSITIVE, default=8, show_default=True, help="Batches to a step."
)
@click.option("--learning-rate", type=float, default=1e-4, show_default=True)
@click.option("--warmup", type=click.IntRange(0), help="Steps.  [default: a tenth, 50 at most]")
@cut_option
@vocabulary_option
@click.option(
    "--grad-checkpoint", is_flag=True, help="Less memory, a third more time: make layers twice."
)
@click.option("--validate-every", type=POSITIVE, default=50, show_default=True, help="Steps.")
@click.option("--checkpoint-every", type=POSITIVE, default=50, show_default=True, help="Steps.")
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=0,
    help="Stop after so many validations without a better loss, and keep the best adapter.",
)
@click.option(
    "--replay", type=FOLDER, help="Another prepared folder: songs to mix in, not to be forgotten."
)
@click.option(
    "--replay-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.25,
    show_default=True,
    help="Of the batches.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in OUT.")
@click.option(
    "--memory-limit",
    type=float,
    help="GB that the training may take.  [default: what the device has]",
)
@click.option("--dry-run", is_flag=True, help="Show the memory forecast and stop.")
@json_option
@command
def lora(model: str, data: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Teach the backbone from prepared songs; the adapter goes into OUT.

    Use it with `khala generate --adapter OUT`. What is learnt is the adapter alone, so the model
    may be quantized (`khala convert --quantize`).
    """
    from khala_mlx.distributed import Processes
    from khala_mlx.train.finetune.run import check_memory, plan, train_lora

    planned = plan(model, data, _settings(options), options["replay"])
    told = planned.forecast.to_dict()
    if options["dry_run"]:
        click.echo(f"Memory: {_memory(told)}", err=True)
        report({f"{name}_bytes": value for name, value in told.items()}, as_json)
        return
    processes, limit = Processes.launched(), options["memory_limit"]
    if processes.leads:
        click.echo(f"Memory: {_memory(told)}", err=True)
    check_memory(planned, limit * 1e9 if limit is not None else None)
    progress = Progress()
    figures = train_lora(
        planned,
        out,
        resume=options["resume"],
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
    "--adapter", "adapters", type=FOLDER, multiple=True, required=True, help="Can be repeated."
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
    """Write the model folder DEST: the model with adapters worked into its backbone."""
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
@click.option("--adapter", type=FOLDER, required=True, help="In any layout that generate takes.")
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


def _settings(options: dict[str, Any]) -> Any:
    from khala_mlx.train.settings import LoraTraining, Schedule

    names = ("steps", "batch_size", "learning_rate", "seed", "validate_every", "checkpoint_every")
    warmup = options["warmup"]
    schedule = Schedule(
        **{name: options[name] for name in names},
        warmup=min(50, options["steps"] // 10) if warmup is None else warmup,
    )
    same = ("rank", "scale", "dropout", "dora", "grad_checkpoint", "max_seconds", "patience")
    return LoraTraining(
        schedule,
        **{name: options[name] for name in same},
        layers=options["layers"] or 0,
        modules=tuple(name.strip() for name in options["modules"].split(",")),
        accumulate=options["grad_accumulation"],
        whole_vocabulary=not options["reachable_only"],
        replay_share=options["replay_share"] if options["replay"] else 0.0,
    )


def _memory(told: dict[str, int]) -> str:
    names = {"weights": "weights", "adapter": "adapter", "kept": "kept", "at_work": "at work"}
    parts = ", ".join(f"{told[key] / 1e9:.3g} {name}" for key, name in names.items())
    return f"about {told['total'] / 1e9:.3g} GB ({parts})"
