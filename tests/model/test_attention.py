"""Attention that gradients pass through, in chunks, against all at once."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import pytest
from tolerances import ON_CPU

from khala_mlx.model import attention as module
from khala_mlx.model.attention import attend, in_chunks

Attend = Callable[[mx.array, mx.array, mx.array], mx.array]


def heads(queries: int, keys: int) -> list[mx.array]:
    mx.random.seed(0)
    shapes = ((2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    return [mx.random.normal(shape) for shape in shapes]


def plain(causal: bool) -> Attend:
    mask = "causal" if causal else None
    return partial(mx.fast.scaled_dot_product_attention, scale=8**-0.5, mask=mask)


def gradients(attention: Attend, inputs: list[mx.array]) -> list[mx.array]:
    return mx.grad(lambda *qkv: mx.square(attention(*qkv)).sum(), argnums=(0, 1, 2))(*inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys", "rows"), [(9, 9, 4), (9, 9, 9), (5, 9, 2), (1, 1, 1)])
def test_values_and_gradients_are_those_of_all_at_once(
    causal: bool, queries: int, keys: int, rows: int
) -> None:
    inputs = heads(queries, keys)
    chunked = in_chunks(plain(causal), rows, causal=causal)
    assert mx.allclose(chunked(*inputs), plain(causal)(*inputs), atol=1e-5).item()
    for ours, theirs in zip(
        gradients(chunked, inputs), gradients(plain(causal), inputs), strict=True
    ):
        assert mx.abs(ours - theirs).max().item() < 1e-4


@pytest.mark.skipif(not ON_CPU, reason="fused on the GPU")
def test_training_never_holds_all_scores() -> None:
    mx.random.seed(0)
    inputs = [mx.random.normal((1, n, 2300, 16)) for n in (4, 2, 2)]
    mx.eval(inputs)
    scores = 4 * 4 * 2300**2
    peaks = []
    for training in (False, True):
        attention = partial(attend, scale=0.25, causal=True, training=training)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradients(attention, inputs))
        peaks.append(mx.get_peak_memory() - before)
    # Left to MLX, the gradients keep three arrays of scores.
    assert peaks[1] < 2.1 * scores < peaks[0]


def test_the_manual_switch_holds_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = heads(9, 9)
    attention = partial(attend, scale=8**-0.5, causal=True, training=True)
    expected = gradients(attention, inputs)
    mx.eval(expected)
    monkeypatch.setenv(module.MANUAL_ATTENTION, "1")
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", None)
    # Both are one row of scores.
    monkeypatch.setattr(module, "SCORE_BYTES", 4 * 2 * 4 * 9)
    monkeypatch.setattr(module, "TRAINING_SCORE_BYTES", 4 * 2 * 4 * 9)
    for ours, theirs in zip(gradients(attention, inputs), expected, strict=True):
        assert mx.abs(ours - theirs).max().item() < 1e-4
