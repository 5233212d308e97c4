"""`khala bench`: how fast each stage is here, and how near to what the hardware allows."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import click

from khala_mlx.cli.options import FILE, json_option, model_option
from khala_mlx.cli.terminal import command, report


@click.command()
@model_option
@click.option(
    "--random",
    type=(int, int),
    metavar="LAYERS WIDTH",
    help="Random weights of the released shapes instead of a model; 24 2048 is its full size.",
)
@click.option("--cached", type=click.IntRange(1, 16000),
              help="Tokens written before those that are timed.  [default: 1000, or what fits]",
              )  # fmt: skip
@click.option("--songs", type=click.IntRange(1, 64), default=1, show_default=True,
              help="Songs composed together.")  # fmt: skip
@click.option("--rows", type=click.IntRange(8, 8192),
              help="Rows of a refine step.  [default: 500, or what fits]")  # fmt: skip
@click.option("--chunk-frames", type=click.IntRange(1, 1024), help="Frames rendered at once.")
@click.option("--turns", type=click.IntRange(1, 60), default=7, show_default=True,
              help="Measurements of each; their median counts.")  # fmt: skip
@click.option("--compare", type=FILE, metavar="OLD.json",
              help="Fail if a ratio to the floor grew by more than a quarter.")  # fmt: skip
@json_option
@command
def bench(**options: Any) -> None:
    """Time compose, refine and render against their floor.

    The floor is the bare kernels of the same shapes, dtype and packing, run in the same process in
    turns with ours. A ratio of 1.0 is perfect; it holds on a busy machine, the times do not.
    """
    from khala_mlx.errors import KhalaWarning
    from khala_mlx.performance.bench import compared, measured, unlike

    old = _read(options["compare"]) if options["compare"] else None
    sizes = {name: options[name] for name in ("cached", "songs", "rows", "turns")}
    told = measured(_khala(options), sizes, options["chunk_frames"])
    if old is not None:
        told["compared"] = compared(told, old)
        if other := unlike(told, old):
            warnings.warn(f"Not alike: {'; '.join(other)}.", KhalaWarning, stacklevel=2)
    report(told if options["as_json"] else _lines(told), options["as_json"])
    if old is not None:
        _fail_if_worse(told["compared"])


def _khala(options: dict[str, Any]) -> Any:
    if options["random"] is None:
        from khala_mlx.pipeline.khala import Khala

        return Khala.from_pretrained(options["model"], keep_loaded=False)
    from khala_mlx.performance.bench import RandomModel

    return RandomModel(*options["random"])


def _read(path: Path) -> Any:
    from khala_mlx.errors import KhalaError

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KhalaError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise KhalaError(f"{path} is no report of `khala bench --json`.") from error


def _lines(told: dict[str, Any]) -> dict[str, Any]:
    """The report as lines; the rest is for --json."""
    machine = told["machine"]
    lines = {"machine": machine["name"], "model": told["model"]}
    for stage in ("compose", "refine", "render"):
        figures = told[stage]
        speed = next(name for name in figures if name.endswith("s_per_second"))
        lines[stage] = (
            f"{figures['floor_ratio']:.2f} x floor, {figures[speed]:.3g} "
            f"{speed.removesuffix('_per_second')}/s, {figures['realtime_factor']:.2f} x real time, "
            f"peak {figures['peak_bytes'] / 1e9:.2f} GB "
            f"(forecast {figures['forecast_bytes'] / 1e9:.2f})"
        )
    compose, refine = told["compose"], told["refine"]
    reading = f"{compose['gigabytes_per_second']:.3g} GB/s"
    if machine["published_bandwidth"]:
        reading += f" of the chip's {machine['published_bandwidth'] / 1e9:.0f}"
    megabytes = f"{compose['bytes_per_token'] / 1e6:.1f} MB"
    lines["bytes per token"] = f"{megabytes}, {compose['bytes_ratio']:.3f} x least, {reading}"
    lines["work per step"] = (
        f"{refine['flops_per_step'] / 1e9:.1f} GFLOP, {refine['flops_ratio']:.3f} x least, "
        f"{refine['gigaflops_per_second']:.3g} GFLOP/s"
    )
    for name, change in told.get("compared", {}).items():
        lines[name] = f"{change['old']:.2f} -> {change['new']:.2f} ({change['change']:+.0%})"
    return lines


def _fail_if_worse(changes: dict[str, dict[str, float]]) -> None:
    from khala_mlx.errors import KhalaError
    from khala_mlx.performance.bench import WORSE

    worse = [name for name, change in changes.items() if change["change"] > WORSE]
    if worse:
        raise KhalaError(f"More than {WORSE:.0%} further from the floor: {', '.join(worse)}.")
