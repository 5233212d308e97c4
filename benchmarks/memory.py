"""Memory of every quantization: files and measured peaks of a model, and the forecast beside them.

    python benchmarks/memory.py khala-model-float32 --out memory

The model is a folder that is not quantized. Each quantization of it is converted, loaded and run,
a stage at a time, for a few steps: the peak does not depend on how many. Two tables are printed,
the measured one and the one computed for the released model, and memory.json is written. On the
CPU backend quantized parts of this size would be dequantized when loaded; here they are not, as on
the GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx import Khala
from khala_mlx.config import KhalaConfig, Quantization
from khala_mlx.convert import convert
from khala_mlx.model import weights
from khala_mlx.performance import cost as counts
from khala_mlx.performance import memory as envelope
from khala_mlx.performance.machine import mac_with
from khala_mlx.performance.memory import Setting
from khala_mlx.pipeline.plan import Job, make_plan
from khala_mlx.quality.sensitivity import mixed

PACKINGS = {
    "8": Quantization(8, 64),
    "6": Quantization(6, 64),
    "4": Quantization(4, 64),
    "mxfp8": Quantization(8, 32, "mxfp8"),
    "mxfp4": Quantization(4, 32, "mxfp4"),
}
PARTS = {"compose": "backbone", "refine": "superres", "render": "codec"}
PROMPT = np.arange(8)


def packed(full: Path, name: str, folder: Path, dtype: str) -> Path:
    """The model, quantized."""
    made, how = folder / name, {"dtype": dtype, "tokenizer": str(full)}
    if name == "mixed":
        layers = mixed(Khala.from_pretrained(full, keep_loaded=False), 4, dtype=dtype)
        convert(full, made, quantize_layers=layers, **how)
    else:
        convert(full, made, quantize=None if name == "plain" else name, **how)
    return made


def peak_of(khala: Khala, part: str, work: Callable[[], Any]) -> int:
    """Bytes from before a part is loaded to the most while it works."""
    mx.clear_cache()
    before = mx.get_active_memory()
    getattr(khala, part)
    mx.reset_peak_memory()
    work()
    peak = mx.get_peak_memory() - before
    khala.parts.release(part)
    return peak


def measured(folder: Path, frames: int) -> dict[str, Any]:
    """Of one model folder: bytes of files, and by stage the peak and its forecast."""
    khala, told = Khala.from_pretrained(folder, keep_loaded=False), {}
    config, layout = khala.config, khala.config.tokens
    setting = Setting(khala.parts.dtype, on_cpu=mx.default_device() == mx.cpu)
    codes = np.zeros((layout.num_codebooks, frames), dtype=np.int64)
    coarse, most = layout.num_coarse, frames * layout.num_coarse
    prompt = np.resize(PROMPT, most)
    working = {
        "compose": envelope.compose_bytes(config, setting, most, 8),
        "refine": envelope.refine_bytes(config, setting, len(PROMPT), frames),
        "render": envelope.render_bytes(config.codec, frames, on_cpu=setting.on_cpu),
    }
    work = {
        "compose": lambda: khala.compose(prompt, max_frames=8 // coarse, min_frames=8 // coarse),
        "refine": lambda: khala.refine(PROMPT, codes[:coarse], codebooks=coarse + 2),
        "render": lambda: khala.render(codes, chunk_frames=frames),
    }
    for stage, part in PARTS.items():
        told[stage] = {
            "file_bytes": sum(file.stat().st_size for file in folder.glob(f"{part}*.safetensors")),
            "peak_bytes": peak_of(khala, part, work[stage]),
            "forecast_bytes": envelope.weight_bytes(config, part, setting) + working[stage],
        }
    return told


def released() -> dict[str, Any]:
    """The same of the released model on a Mac, computed: two minutes of song."""
    config = KhalaConfig()
    setting, mac = Setting(config.dtype, on_cpu=False), mac_with(64 * 2**30)
    job = Job(200, 150, round(120 * config.codec.frame_rate))
    told: dict[str, Any] = {}
    for name, how in {"plain": None, **PACKINGS}.items():
        kind = counts.quantized(config, how) if how else config
        plan = make_plan(kind, setting, mac, job, keep_loaded=False)
        told[name] = {
            stage.name: {"weights_bytes": stage.weights, "peak_bytes": stage.peak}
            for stage in plan.stages
        }
    return told


def table(told: dict[str, Any], columns: tuple[str, ...], unit: float) -> str:
    """One row a quantization; in each stage's column these figures, in units of so many bytes."""
    lines = [f"| | {' | '.join(PARTS)} |", "|---" * (len(PARTS) + 1) + "|"]
    for name, stages in told.items():
        cells = [" / ".join(f"{stages[s][c] / unit:.2f}" for c in columns) for s in PARTS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a model folder that is not quantized")
    parser.add_argument("--packings", nargs="+", default=["plain", *PACKINGS, "mixed"])
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("memory"))
    options = parser.parse_args()
    # A quantized part is to stay quantized; both modules read it.
    weights.CPU_DEQUANTIZED_BYTES = envelope.CPU_DEQUANTIZED_BYTES = 0
    told = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.packings:
            made = packed(options.model, name, Path(folder), options.dtype)
            told[name] = measured(made, options.frames)
    result = {"measured": told, "released": released()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"Measured, {options.frames} frames, MB: file / peak / forecast\n")
    print(table(told, ("file_bytes", "peak_bytes", "forecast_bytes"), 1e6))
    print("\nComputed for the released model, two minutes, GB: weights / peak\n")
    print(table(result["released"], ("weights_bytes", "peak_bytes"), 1e9))


if __name__ == "__main__":
    main()
