"""How time grows with the length of a song and with the number of candidates.

    python benchmarks/growth.py --out growth --layers 2 --width 256

Runs a small model of random weights through compose, refine and render, prints a table of measured
seconds and the law fitted to each row, and writes growth.json and growth.png (needs matplotlib).
Where the processor computes they are its own seconds, which other work on the machine stretches
less than those of the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx.performance.bench import RandomParts

PROMPT = np.arange(32)
# (model, frames, songs, turns) -> seconds
Stage = Callable[[RandomParts, int, int, int], float]


def timed(work: Callable[[], Any], turns: int) -> float:
    """Seconds, the median of some turns."""
    clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
    taken = []
    for _ in range(turns):
        began = clock()
        work()
        mx.synchronize()
        taken.append(clock() - began)
        mx.clear_cache()
    return statistics.median(taken)


def compose(model: RandomParts, frames: int, songs: int, turns: int) -> float:
    """Seconds to compose so many songs together."""
    backbone = model.backbone
    keys = [mx.random.key(seed) for seed in range(songs)]
    tokens = frames * model.config.tokens.num_coarse
    return timed(
        lambda: backbone.generate_many(PROMPT, keys=keys, max_tokens=tokens, min_tokens=tokens),
        turns,
    )


def refine(model: RandomParts, frames: int, songs: int, turns: int) -> float:
    """Seconds to refine so many songs in turn, all layers."""
    superres, layout = model.superres, model.config.tokens
    coarse = np.zeros((layout.num_coarse, frames), dtype=np.int64)
    return timed(
        lambda: [superres.refine(PROMPT, coarse, key=mx.random.key(s)) for s in range(songs)], turns
    )


def render(model: RandomParts, frames: int, songs: int, turns: int) -> float:
    """Seconds to render so many songs in turn."""
    codec = model.codec
    codes = np.zeros((model.config.codec.num_codebooks, frames), dtype=np.int64)
    return timed(lambda: [codec.decode(codes) for _ in range(songs)], turns)


def fitted(x: list[float], y: list[float], powers: tuple[int, ...]) -> dict[str, Any]:
    """y as a sum of powers of x with factors >= 0, of least relative error.

    Returns:
        "factors" by power and "worst", the largest relative error of a measured value.
    """
    xs, ys = np.array(x), np.array(y)
    best: tuple[float, dict[int, float]] | None = None
    # With three powers at most, all sets of them can be tried; fewer than the values, or the law
    # would say nothing.
    for count in range(1, min(len(powers), max(1, len(x) - 1)) + 1):
        for chosen in itertools.combinations(powers, count):
            columns = np.stack([xs**p / ys for p in chosen], axis=1)
            factors = np.linalg.lstsq(columns, np.ones(len(ys)), rcond=None)[0]
            error = float(np.square(columns @ factors - 1).sum())
            if (factors >= 0).all() and (best is None or error < best[0]):
                best = error, dict(zip(chosen, factors.tolist(), strict=True))
    assert best is not None
    law = sum(factor * xs**power for power, factor in best[1].items())
    return {"factors": best[1], "worst": float(np.abs(law / ys - 1).max())}


def shown(law: dict[str, Any], name: str) -> str:
    """ "0.012 n + 3.4e-05 n^2 (within 3 %)" """
    units = {0: "", 1: f" {name}"}
    terms = [f"{f:.3g}{units.get(p, f' {name}^{p}')}" for p, f in law["factors"].items()]
    return f"{' + '.join(terms)} (within {100 * law['worst']:.0f} %)"


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stage by length and by candidates, and the laws."""
    model = RandomParts(options.layers, options.width)
    rate, longest = model.config.codec.frame_rate, max(options.seconds)
    # The trained windows end before the longest song does; how time grows is another question.
    rows = len(PROMPT) + round(longest * rate) * model.config.tokens.num_coarse
    windows = {
        name: replace(part, context=max(part.context, rows))
        for name, part in (("backbone", model.config.backbone), ("superres", model.config.superres))
    }
    model.config = replace(model.config, **windows)
    told: dict[str, Any] = {
        "model": model.source,
        "device": str(mx.default_device()),
        "turns": options.turns,
        "seconds_of_song": options.seconds,
        "candidates": options.candidates,
        "candidate_seconds": options.candidate_seconds,
        "stages": {},
    }
    for stage, part in ((compose, "backbone"), (refine, "superres"), (render, "codec")):
        name = stage.__name__
        # The first call imports, quantizes and allocates.
        stage(model, 2, 1, 1)

        def run(seconds: float, songs: int, stage: Stage = stage) -> float:
            taken = stage(model, round(seconds * rate), songs, options.turns)
            print(f"{stage.__name__}, {seconds:g} s, {songs}: {taken:.3g} s", file=sys.stderr)
            return taken

        lengths = [run(seconds, 1) for seconds in options.seconds]
        songs = [run(options.candidate_seconds, count) for count in options.candidates]
        told["stages"][name] = {
            "by_length": lengths,
            "length_law": fitted(options.seconds, lengths, (0, 1, 2)),
            "by_candidates": songs,
            "candidates_law": fitted(options.candidates, songs, (0, 1)),
        }
        model.release(part)
    return told


def table(told: dict[str, Any]) -> str:
    """Two tables in Markdown: by seconds of song s, by candidates n."""
    lines = []
    for what, heads, law, name in (
        ("by_length", [f"{s:g} s" for s in told["seconds_of_song"]], "length_law", "s"),
        ("by_candidates", [f"{n}" for n in told["candidates"]], "candidates_law", "n"),
    ):
        lines += [f"| {what.replace('_', ' ')} | {' | '.join(heads)} | law, seconds |"]
        lines += ["|---" * (len(heads) + 2) + "|"]
        for stage, figures in told["stages"].items():
            cells = " | ".join(f"{seconds:.3g}" for seconds in figures[what])
            lines.append(f"| {stage} | {cells} | {shown(figures[law], name)} |")
        lines.append("")
    return "\n".join(lines)


def draw(told: dict[str, Any], path: Path) -> None:
    """Measured points and fitted laws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    pairs = (
        ("by_length", "length_law", told["seconds_of_song"], "seconds of song"),
        ("by_candidates", "candidates_law", told["candidates"], "candidates"),
    )
    for axes, (what, law, x, label) in zip(figure.subplots(1, 2), pairs, strict=True):
        for stage, figures in told["stages"].items():
            (points,) = axes.loglog(x, figures[what], "o", label=stage)
            fine = np.geomspace(min(x), max(x), 100)
            factors = figures[law]["factors"].items()
            axes.loglog(fine, sum(f * fine**p for p, f in factors), color=points.get_color())
        axes.set(xlabel=label, ylabel="seconds")
        axes.set_xticks(x, [f"{each:g}" for each in x])
        axes.set_xticks([], minor=True)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("growth"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    lengths = [10.0, 30.0, 60.0, 120.0, 240.0, 360.0]
    parser.add_argument("--seconds", type=float, nargs="+", default=lengths)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--candidate-seconds", type=float, default=30.0)
    options = parser.parse_args()
    told = measured(options)
    print(table(told))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "growth.json").write_text(json.dumps(told, indent=1) + "\n")
    draw(told, options.out / "growth.png")


if __name__ == "__main__":
    main()
