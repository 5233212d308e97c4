"""What mx.compile would gain: the layers of compose and refine, as they are and compiled.

    python benchmarks/compiled.py --layers 2 --width 2048

All of a layer but its attention is compiled, in two pieces: the cache grows and attention's shapes
change with each token, and a function is traced again for every shape. Same weights and inputs, in
turns, medians; where the processor computes, of its own seconds. Prints how often a piece was
traced, and by how much the results differ.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from khala_mlx.model.attention import attend
from khala_mlx.model.cache import make_cache
from khala_mlx.model.transformer import EVALUATED_ROWS, Block
from khala_mlx.performance.bench import RandomParts

Piece = Callable[..., Any]
Pieces = list[tuple[Piece, Piece]]


class Traces:
    """Counts how often Python runs a function; a compiled one runs only to be traced."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, function: Piece) -> Piece:
        """`function`, counted."""

        def counted(*arguments: Any) -> Any:
            self.count += 1
            return function(*arguments)

        return counted


def before(block: Block) -> Piece:
    """x [B, S, H], first position [] -> queries, keys, values [B, heads, S, D]."""
    attention = block.self_attn

    def piece(x: mx.array, first: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        y = block.input_layernorm(x)
        q = attention._rotate(attention._heads(attention.q_proj(y), attention.num_heads), first)
        k = attention._rotate(attention._heads(attention.k_proj(y), attention.num_kv_heads), first)
        return q, k, attention._heads(attention.v_proj(y), attention.num_kv_heads)

    return piece


def after(block: Block) -> Piece:
    """x [B, S, H], attended [B, N, S, D] -> x [B, S, H]."""

    def piece(x: mx.array, attended: mx.array) -> mx.array:
        x = x + block.self_attn.o_proj(attended.swapaxes(1, 2).flatten(2))
        made: mx.array = x + block.mlp(block.post_attention_layernorm(x))
        return made

    return piece


def compose_work(model: RandomParts, pieces: Pieces, cached: int, tokens: int) -> mx.array:
    """The last hidden state of `tokens` tokens behind `cached` ones; none is waited for."""
    config = model.config.backbone
    caches = make_cache(config.num_layers, cached + tokens)
    for cache in caches:
        known = mx.ones((1, config.num_kv_heads, cached, config.head_dim))
        mx.eval(cache.update_and_fetch(known, known))
    x = mx.ones((1, 1, config.hidden_size))
    for _ in range(tokens):
        for (first, second), cache in zip(pieces, caches, strict=True):
            q, k, v = first(x, mx.array(cache.offset))
            x = second(x, attend(q, *cache.update_and_fetch(k, v), scale=0.125, causal=True))
        x = x / mx.linalg.norm(x)
        mx.async_eval(x)
    mx.eval(x)
    return x


def refine_work(model: RandomParts, pieces: Pieces, rows: int, steps: int) -> mx.array:
    """Hidden states of `rows` rows, `steps` times, layer by layer as SuperRes does."""
    start = mx.random.normal((1, rows, model.config.superres.hidden_size), key=mx.random.key(0))
    for _ in range(steps):
        x = start
        for first, second in pieces:
            q, k, v = first(x, mx.array(0))
            x = second(x, attend(q, k, v, scale=0.125, causal=False))
            if rows >= EVALUATED_ROWS:
                mx.eval(x)
        mx.eval(x)
    return x


def compared(name: str, blocks: list[Any], work: Callable[[Pieces], mx.array], turns: int) -> None:
    """Time both in turns; print."""
    traces = Traces()
    plain = [(before(block), after(block)) for block in blocks]
    compiled = [
        (mx.compile(traces.of(first)), mx.compile(traces.of(second))) for first, second in plain
    ]
    # The first calls trace and, on the processor, run the C++ compiler.
    far = mx.abs(work(plain) - work(compiled)).max().item()
    taken: dict[str, list[float]] = {"plain": [], "compiled": []}
    clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
    for _ in range(turns):
        for kind, pieces in (("plain", plain), ("compiled", compiled)):
            began = clock()
            work(pieces)
            taken[kind].append(clock() - began)
    pairs = zip(taken["compiled"], taken["plain"], strict=True)
    gain = statistics.median(compiled / plain for compiled, plain in pairs)
    print(
        f"{name:<8} plain {statistics.median(taken['plain']):.4f} s, compiled {gain:.3f} times that"
        f", {traces.count / len(blocks):g} traces a layer, largest difference {far:.1e}"
    )


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--cached", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    model = RandomParts(options.layers, options.width)
    print(f"{model.source}, {mx.default_device()}, medians of {options.turns} turns")
    compared(
        "compose",
        model.backbone.layers,
        lambda pieces: compose_work(model, pieces, options.cached, options.tokens),
        options.turns,
    )
    model.release("backbone")
    compared(
        "refine",
        model.superres.layers,
        lambda pieces: refine_work(model, pieces, options.rows, options.steps),
        options.turns,
    )


if __name__ == "__main__":
    main()
