"""Whether songs would be refined faster in one batch than in turn: a step of superres, both ways.

    python benchmarks/refine_together.py --layers 1 --width 2048

Random weights; the two are timed in turns and their medians compared: above 1.0 a batch is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from khala_mlx import token_ids as tokens
from khala_mlx.model.superres import SuperRes
from khala_mlx.model.transformer import projector
from khala_mlx.performance.bench import RandomParts


def step(superres: SuperRes, rows: mx.array) -> mx.array:
    """Logits [B, S, codebook_size] of one layer from embedded rows [B, S, H]."""
    head = projector(superres.lm_head, slice(*tokens.window(superres.layout, 2)))
    return head(superres.body(rows, causal=False))


def seconds(work: Callable[[], Any]) -> float:
    """What one evaluation takes."""
    began = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - began


def compare(superres: SuperRes, rows: int, songs: int, turns: int) -> dict[str, Any]:
    """Median seconds of a step of all songs in turn and together, and their ratio."""
    width = superres.config.hidden_size
    embedded = mx.random.normal((songs, rows, width), key=mx.random.key(0))
    mx.eval(embedded)

    def in_turn() -> None:
        for song in range(songs):
            mx.eval(step(superres, embedded[song : song + 1]))

    def together() -> mx.array:
        return step(superres, embedded)

    in_turn()
    mx.eval(together())
    taken = [(seconds(in_turn), seconds(together)) for _ in range(turns)]
    turn, batch = (statistics.median(column) for column in zip(*taken, strict=True))
    return {"rows": rows, "in_turn": turn, "together": batch, "gain": turn / batch}


def main() -> None:
    """Print a row for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--songs", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256, 500])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    superres = RandomParts(options.layers, options.width).superres
    found = [compare(superres, rows, options.songs, options.turns) for rows in options.rows]
    if options.json:
        print(json.dumps(found))
        return
    for each in found:
        told = f"{each['rows']:>6} rows  in turn {each['in_turn']:.3f} s"
        print(f"{told}  together {each['together']:.3f} s  gain {each['gain']:.2f}")


if __name__ == "__main__":
    main()
