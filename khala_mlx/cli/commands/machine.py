"""`khala bench` and `khala doctor`: how fast this machine is, what it has and what will fit."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from khala_mlx.cli.options import FILE, json_option, model_option
from khala_mlx.cli.terminal import command, report
from khala_mlx.storage.paths import models_folder

if TYPE_CHECKING:
    from khala_mlx.performance.bench import Measurable
    from khala_mlx.performance.machine import Machine
    from khala_mlx.pipeline.plan import Plan

_PACKAGES = ("khala-mlx", "mlx", "mlx-lm", "numpy", "soundfile", "soxr", "huggingface-hub")
# What is missing without them, and what brings them.
_EXTRAS = {
    "mutagen": ("tags every player reads", "pip install 'khala-mlx[tags]'"),
    "matplotlib": ("pictures of songs and losses", "pip install 'khala-mlx[plot]'"),
    "pyloudnorm": ("blind pairs of `khala train evaluate`", "pip install 'khala-mlx[listen]'"),
}
# What is asked of the released model: a song of three minutes behind lyrics of some length.
_MINUTES, _PROMPT = 3, 400
_PACKINGS = (8, 6, 4)
_LITTLE_DISK = 30e9


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
              help="Fail if a ratio to the kernel baseline grew by over a quarter.")  # fmt: skip
@json_option
@command
def bench(
    model: str,
    random: tuple[int, int] | None,
    cached: int | None,
    songs: int,
    rows: int | None,
    chunk_frames: int | None,
    turns: int,
    compare: Path | None,
    as_json: bool,
) -> None:
    """Time compose, refine and render against their kernel baseline.

    The kernel baseline is the bare kernels of the same shapes, dtype and quantization, run
    alternately in the same process. A ratio of 1.0 is perfect. Ratios hold on a busy machine, times
    do not.
    """
    from khala_mlx.errors import KhalaWarning
    from khala_mlx.performance.bench import compared, measured, unlike

    old = _read(compare) if compare else None
    sizes = {"cached": cached, "songs": songs, "rows": rows, "turns": turns}
    parts, source = _parts(model, random)
    told = measured(parts, source, sizes, chunk_frames)
    if old is not None:
        told["compared"] = compared(told, old)
        if other := unlike(told, old):
            warnings.warn(f"Not alike: {'; '.join(other)}.", KhalaWarning, stacklevel=2)
    report(told if as_json else _lines(told), as_json)
    if old is not None:
        _fail_if_worse(told["compared"])


def _parts(model: str, random: tuple[int, int] | None) -> tuple[Measurable, str]:
    if random is None:
        from khala_mlx.pipeline.parts import Parts

        return Parts.open(model, keep_loaded=False), model
    from khala_mlx.performance.bench import RandomParts

    parts = RandomParts(*random)
    return parts, parts.source


def _read(path: Path) -> Any:
    from khala_mlx.errors import KhalaError

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KhalaError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise KhalaError(f"{path} is not a report of `khala bench --json`.") from error


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
        raise KhalaError(
            f"More than {WORSE:.0%} further from the kernel baseline: {', '.join(worse)}."
        )


@click.command()
@json_option
@command
def doctor(as_json: bool) -> None:
    """Show what this machine has, what will fit, and how to fix what is wrong."""
    found = examine()
    if as_json:
        report(found, as_json)
        return
    fixes = found.pop("fixes")
    report(found, as_json)
    click.echo("\n".join(["", *(f"Fix: {fix}" for fix in fixes)]) if fixes else "\nNo problems.")


def examine() -> dict[str, Any]:
    """The findings by name, and under "fixes" what is wrong, each with a command that mends it."""
    fixes: list[str] = []
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name, fixes) for name in _PACKAGES},
        **_device(fixes),
        "sound": _sound(fixes),
        **_disk(fixes),
        "m4a": _m4a(),
    }
    for name, (what, fix) in _EXTRAS.items():
        if find_spec(name) is None:
            found[name] = f"missing: no {what} ({fix})"
    return {**found, "fixes": fixes}


def _version(name: str, fixes: list[str]) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        fixes.append(f"{name} is missing: pip install --upgrade khala-mlx")
        return "missing"


def _device(fixes: list[str]) -> dict[str, Any]:
    import mlx.core as mx

    from khala_mlx.performance.machine import this_machine

    device, blas = str(mx.default_device()), _blas(fixes)
    if sys.platform == "darwin" and not mx.metal.is_available():
        fixes.append(
            "MLX has no Metal here: use an arm64 Python 3.11 or newer on macOS 14 or newer "
            "(`python3 -c 'import platform; print(platform.machine())'` must say arm64)"
        )
    machine = this_machine()
    plans = _plans(machine)
    fitting = [name for name, plan in plans.items() if plan.problem is None]
    if not fitting:
        fixes.append("the released weights do not fit: the bundled demo model (--model demo) does")
    return {
        "chip": machine.name,
        "device": device,
        **blas,
        "memory_for_mlx": f"{machine.memory / 1e9:.1f} GB",
        "released_weights_fit_in": ", ".join(fitting) or "none",
        "released_weights_need": ", ".join(
            f"{plan.peak / 1e9:.1f} GB in {name}" for name, plan in plans.items()
        ),
    }


def _blas(fixes: list[str]) -> dict[str, str]:
    """Return the BLAS that multiplies on a Linux CPU."""
    from khala_mlx.performance.blas import INSTALL, SWITCH, load

    if sys.platform != "linux":
        return {}
    if name := load():
        return {"blas": name}
    if os.environ.get(SWITCH, "").lower() != "off":
        fixes.append(f"MLX multiplies with its slow reference BLAS; a fast one: {INSTALL}")
    return {"blas": "MLX's own, slow"}


def _plans(machine: Machine) -> dict[str, Plan]:
    """How a song of the released model would be made here, by quantization."""
    from khala_mlx.config import KhalaConfig, Quantization
    from khala_mlx.performance import cost as counts
    from khala_mlx.performance.memory import Setting
    from khala_mlx.pipeline.plan import Job, make_plan

    released = KhalaConfig()
    packings = {"16 bit": released}
    for bits in _PACKINGS:
        packings[f"{bits} bit"] = counts.quantized(released, Quantization(bits, 64))
    setting = Setting("float32" if machine.on_cpu else released.dtype, machine.on_cpu)
    job = Job(_PROMPT, _PROMPT, round(_MINUTES * 60 * released.codec.frame_rate))
    return {
        name: make_plan(config, setting, machine, job, keep_loaded=False)
        for name, config in packings.items()
    }


def _sound(fixes: list[str]) -> str:
    try:
        import sounddevice
    except OSError:
        fixes.append("no sound can be played: apt install libportaudio2")
        return "PortAudio is missing"
    try:
        outputs = [d["name"] for d in sounddevice.query_devices() if d["max_output_channels"] > 0]
    except sounddevice.PortAudioError as error:
        return f"no devices: {error}"
    return ", ".join(outputs) or "no output device; songs are written, not played"


def _disk(fixes: list[str]) -> dict[str, str]:
    folder = models_folder()
    parent = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(parent).free
    if free < _LITTLE_DISK:
        fixes.append(
            f"{free / 1e9:.0f} GB free: fetching the released weights takes about 30 GB for a "
            "while; keep them elsewhere with: export KHALA_MODELS=/Volumes/Disk/khala"
        )
    if "Documents" in folder.parts or "Desktop" in folder.parts:
        fixes.append("iCloud may take models away from there: export KHALA_MODELS=~/khala-models")
    fixes += _here()
    return {"models": str(folder), "free_disk": f"{free / 1e9:.1f} GB"}


def _here() -> list[str]:
    """What is wrong with the folder the command runs in."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return ["the folder this runs in is gone: cd ~"]
    if os.access(here, os.W_OK):
        return []
    return [f"nothing can be written here: cd ~ (this folder is {here})"]


def _m4a() -> str:
    return next((tool for tool in ("ffmpeg", "afconvert") if shutil.which(tool)), "not readable")
