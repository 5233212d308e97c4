import os
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import CLOSE

from khala_mlx import Khala
from khala_mlx.model import attention
from khala_mlx.model.attention import attend
from khala_mlx.model.cache import make_cache
from khala_mlx.model.transformer import projector


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        rows, columns = scores.shape[-2:]
        scores[..., np.triu(np.ones((rows, columns), bool), columns - rows + 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from([1, 300, 10**9]),
    st.booleans(),
)
def test_attention_in_chunks_equals_plain(
    queries: int, before: int, causal: bool, budget: int, by_hand: bool
) -> None:
    rng = np.random.default_rng(queries)
    shapes = [(2, 4, queries, 8), (2, 2, queries + before, 8), (2, 2, queries + before, 8)]
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    kept, attention.SCORE_BYTES = attention.SCORE_BYTES, budget
    try:
        with patch.dict(os.environ, {attention.MANUAL_ATTENTION: "1"} if by_hand else {}):
            ours = attend(*map(mx.array, (q, k, v)), scale=8**-0.5, causal=causal)
    finally:
        attention.SCORE_BYTES = kept
    assert np.abs(np.array(ours) - plain_attention(q, k, v, causal)).max() < CLOSE


def test_attention_memory_is_bounded() -> None:
    q, k = mx.random.normal((1, 16, 2500, 16)), mx.random.normal((1, 4, 2500, 16))
    mx.eval(q, k)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(attend(q, k, k, scale=0.25, causal=False))
    # All scores at once would be 16 * 2500**2 * 4 bytes = 400 MB.
    assert mx.get_peak_memory() - before < 200 * 2**20


@pytest.mark.parametrize(("head_dim", "kernels"), [(64, 1), (48, 5), (96, 5)])
def test_a_gpu_gets_chunks_of_heads_it_has_no_kernel_for(
    head_dim: int, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = mx.random.normal((1, 4, 9, head_dim)), mx.random.normal((1, 2, 9, head_dim))
    whole = attend(q, k, k, scale=0.1, causal=True)
    kernel, calls = mx.fast.scaled_dot_product_attention, []
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda *a, **b: calls.append(1) or kernel(*a, **b)
    )
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    # Two rows of scores.
    monkeypatch.setattr(attention, "SCORE_BYTES", 2 * 4 * 4 * 9)
    chunked = attend(q, k, k, scale=0.1, causal=True)
    monkeypatch.undo()
    assert len(calls) == kernels
    assert mx.abs(chunked - whole).max() < CLOSE


def test_cached_steps_equal_one_pass(tiny: Khala) -> None:
    model = tiny.backbone
    ids = mx.array(np.arange(12)[None])
    cache = make_cache(2, 12)
    steps = [model.hidden(ids[:, :5], cache)] + [
        model.hidden(ids[:, n : n + 1], cache) for n in range(5, 12)
    ]
    whole = model.hidden(ids)
    assert mx.abs(mx.concatenate(steps, axis=1) - whole).max().item() < CLOSE
    # One allocation of the full capacity, never grown.
    assert cache[0].keys.shape[2] == 12


@pytest.mark.parametrize("kind", ["linear", "quantized", "adapter"])
def test_projector_reads_rows_of_any_head(kind: str) -> None:
    head: nn.Module = nn.Linear(64, 40, bias=False)
    x = mx.random.normal((2, 64))
    if kind == "quantized":
        head = nn.QuantizedLinear.from_linear(head, group_size=32, bits=8)
    if kind == "adapter":
        head = nn.Sequential(head)
    rows = mx.array([3, 17, 39])
    assert mx.abs(projector(head, rows)(x) - head(x)[:, rows]).max().item() < CLOSE
    assert mx.abs(projector(head, slice(4, 9))(x) - head(x)[:, 4:9]).max().item() < CLOSE


def test_numpy_in_numpy_out(tiny: Khala) -> None:
    ids = np.array([[1, 2, -1]])
    assert isinstance(tiny.backbone(ids), np.ndarray)
    assert isinstance(tiny.backbone(mx.array(ids)), mx.array)
    assert tiny.backbone(ids.tolist()).shape == (1, 3, 332)
