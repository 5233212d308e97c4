"""What `khala doctor` finds: versions, device, memory, sound, disk, and what will fit."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from khala_mlx.storage.paths import models_folder

if TYPE_CHECKING:
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

    device = str(mx.default_device())
    if sys.platform == "darwin" and not mx.metal.is_available():
        fixes.append(
            "MLX has no Metal here: use an arm64 Python 3.11 or newer on macOS 14 or newer "
            "(`python3 -c 'import platform; print(platform.machine())'` has to say arm64)"
        )
    machine = this_machine()
    plans = _plans(machine)
    fitting = [name for name, plan in plans.items() if plan.problem is None]
    if not fitting:
        fixes.append("the released weights do not fit: the model in the box (--model demo) does")
    return {
        "chip": machine.name,
        "device": device,
        "memory_for_mlx": f"{machine.memory / 1e9:.1f} GB",
        "released_weights_fit_in": ", ".join(fitting) or "none",
        "released_weights_need": ", ".join(
            f"{plan.peak / 1e9:.1f} GB in {name}" for name, plan in plans.items()
        ),
    }


def _plans(machine: Machine) -> dict[str, Plan]:
    """How a song of the released model would be made here, by packing."""
    from khala_mlx.config import KhalaConfig, Quantization
    from khala_mlx.performance import cost as counts
    from khala_mlx.performance.memory import Setting
    from khala_mlx.pipeline.plan import Job, make_plan

    released = KhalaConfig()
    packings = {"16 bit": released}
    for bits in _PACKINGS:
        packings[f"{bits} bit"] = counts.packed(released, Quantization(bits, 64))
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
