"""khala_mlx against the same work written plainly in PyTorch, on the same machine.

    python benchmarks/against_torch.py --layers 2 --width 2048 --released-vocabulary

Same weights, float32, as many threads, in one process and in turns; medians, of the clock's seconds
and of the processor's, which other work on the machine stretches less. torch is needed here alone,
and is loaded first, so that on Linux MLX uses the fast BLAS that comes with it. First both must
make the same tokens, codes and samples.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

if sys.platform == "linux":
    # Symbols loaded globally first win, so this must precede the first import of mlx.
    ctypes.CDLL(
        str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL
    )

import mlx.core as mx
import plain_torch
from mlx.utils import tree_flatten

from khala_mlx.config import DILATIONS, KhalaConfig
from khala_mlx.model.sampling import Detail, Sampling
from khala_mlx.performance.bench import RandomParts

Works = tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]


def weights(part: Any) -> dict[str, torch.Tensor]:
    """The parameters of a part for torch."""
    return plain_torch.tensors({name: np.array(a) for name, a in tree_flatten(part.parameters())})


def compose_works(model: RandomParts, options: argparse.Namespace) -> Works:
    """Ours, as a user gets it, and torch's: `tokens` tokens behind `cached`."""
    ours, layout = model.backbone, model.config.tokens
    theirs = plain_torch.Transformer(weights(ours), model.config.backbone)
    prompt, count = np.arange(options.cached) % layout.audio_start, options.tokens

    def run(reachable_only: bool = True) -> np.ndarray:
        return ours.generate_many(
            prompt,
            Sampling(top_k=1, reachable_only=reachable_only),
            keys=[mx.random.key(0)],
            max_tokens=count,
            min_tokens=count,
        )[0]

    def plainly() -> np.ndarray:
        return plain_torch.compose(theirs, prompt, count, layout.end_of_song)

    # Over the whole vocabulary both must write the same.
    check("compose", run(False), plainly())
    return run, plainly


def refine_works(model: RandomParts, options: argparse.Namespace) -> Works:
    """`steps` steps over `rows` rows."""
    ours, layout = model.superres, model.config.tokens
    theirs = plain_torch.Transformer(weights(ours), model.config.superres)
    prompt = np.arange(min(32, options.rows // 2))
    coarse = np.random.default_rng(0).integers(
        0, layout.codebook_size, (layout.num_coarse, options.rows - len(prompt))
    )
    layers = layout.num_coarse + options.steps

    def run() -> np.ndarray:
        return ours.refine(prompt, coarse, Detail(top_k=1), codebooks=layers, key=mx.random.key(0))

    def plainly() -> np.ndarray:
        return plain_torch.refine(theirs, prompt, coarse, layers, layout)

    check("refine", run(), plainly())
    return run, plainly


def render_works(model: RandomParts, options: argparse.Namespace) -> Works:
    """`frames` frames of sound."""
    ours, config = model.codec, model.config.codec
    theirs = plain_torch.Decoder(weights(ours), config, DILATIONS)
    codes = np.random.default_rng(0).integers(
        0, config.codebook_size, (config.num_codebooks, options.frames)
    )

    def run() -> np.ndarray:
        return ours.decode(codes)

    def plainly() -> np.ndarray:
        return theirs.decode(codes)

    check("render", run(), plainly())
    return run, plainly


def check(stage: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Stop unless both made the same; of tokens and codes a few near ties may differ."""
    if ours.shape != theirs.shape:
        sys.exit(f"{stage}: shapes {ours.shape} and {theirs.shape} differ.")
    if ours.dtype.kind == "f":
        same = bool(np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max())
    else:
        same = float((ours == theirs).mean()) >= 0.95
    if not same:
        sys.exit(f"{stage}: MLX and torch do not make the same; nothing was timed.")


def in_turns(works: Works, turns: int) -> dict[str, float]:
    """Median seconds of each, measured one after the other in each turn."""
    clocks = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
    taken: dict[str, list[float]] = {}
    for _ in range(turns):
        for who, work in zip(("mlx", "torch"), works, strict=True):
            began = {name: clock() for name, clock in clocks.items()}
            work()
            for name, clock in clocks.items():
                taken.setdefault(f"{who}_{name}", []).append(clock() - began[name])
    told = {name: statistics.median(times) for name, times in taken.items()}
    told["times"] = told["torch_seconds"] / told["mlx_seconds"]
    told["processor_times"] = told["torch_processor_seconds"] / told["mlx_processor_seconds"]
    return told


def random_model(options: argparse.Namespace) -> RandomParts:
    """The released shapes, with fewer layers."""
    model = RandomParts(options.layers, options.width)
    if options.released_vocabulary:
        released, config = KhalaConfig(), model.config
        model.config = replace(
            config,
            tokens=released.tokens,
            backbone=replace(config.backbone, vocab_size=released.backbone.vocab_size),
            superres=replace(config.superres, vocab_size=released.superres.vocab_size),
        )
    return model


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument(
        "--released-vocabulary", action="store_true", help="Heads of the released sizes."
    )
    parser.add_argument("--cached", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    torch.set_num_threads(threads)
    model = random_model(options)
    told: dict[str, Any] = {"model": model.source, "threads": threads, "turns": options.turns}
    stages = (("compose", compose_works), ("refine", refine_works), ("render", render_works))
    for (name, works), part in zip(stages, ("backbone", "superres", "codec"), strict=True):
        told[name] = in_turns(works(model, options), options.turns)
        print(name, told[name], file=sys.stderr)
        model.release(part)
    if options.json:
        print(json.dumps(told))
        return
    print(f"{told['model']}, {threads} threads, medians of {options.turns} turns")
    for name, _ in stages:
        figures = told[name]
        print(
            f"{name:<8} MLX {figures['mlx_seconds']:.3f} s, torch {figures['torch_seconds']:.3f} s:"
            f" {figures['times']:.2f} x ({figures['processor_times']:.2f} x in processor seconds)"
        )


if __name__ == "__main__":
    # Both on the processor, on Macs too.
    mx.set_default_device(mx.cpu)
    main()
