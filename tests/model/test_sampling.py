from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khala_mlx.errors import KhalaError
from khala_mlx.model.sampling import (
    Sampling,
    exponential,
    sample,
    sample_by_race,
    stage_key,
    top_k_logits,
    uniform_draws,
)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 50), (0.9, 50), (1.3, 80), (0.6, 2)])
def test_probabilities_are_upstreams(oracle: Path, temperature: float, top_k: int) -> None:
    golden = mx.load(str(oracle / "goldens" / "backbone_greedy.safetensors"))
    logits = np.zeros(130304, np.float32)
    logits[np.array(golden["sampling.logit_ids"])] = np.array(golden["sampling.logit_values"])
    kept = top_k_logits(mx.array(logits), top_k, temperature)
    probabilities = np.array(mx.softmax(kept, precise=True))
    name = f"sampling_T{temperature}_k{top_k}"
    ids = np.array(golden[f"{name}.ids"])
    assert sorted(ids) == np.flatnonzero(np.isfinite(np.array(kept))).tolist()
    error = np.abs(probabilities[ids] - np.array(golden[f"{name}.probs"])).max()
    assert error <= 1e-6


def test_ties_at_the_last_place_are_all_kept() -> None:
    kept = np.array(top_k_logits(mx.array([3.0, 1.0, 2.0, 2.0, 0.0]), 2, 1.0))
    assert np.isfinite(kept).tolist() == [True, False, True, True, False]


@given(st.integers(1, 200), st.integers(2, 60))
def test_top_k_keeps_everything_when_there_is_no_more(top_k: int, size: int) -> None:
    kept = np.array(top_k_logits(mx.arange(size), top_k, 1.0))
    assert np.isfinite(kept).sum() == min(top_k, size)


def test_samples_follow_the_probabilities() -> None:
    logits = mx.broadcast_to(mx.log(mx.array([0.5, 0.3, 0.15, 0.05])), (20000, 4))
    draws = uniform_draws(mx.random.key(1), 20000)
    drawn = np.array(sample(logits, draws, top_k=3, temperature=1.0))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert shares == pytest.approx(np.array([0.5, 0.3, 0.15, 0]) / 0.95, abs=0.015)


@given(st.integers(0, 2**32), st.integers(2, 40), st.sampled_from([0.0, 1 - 2.0**-24, None]))
def test_only_what_can_be_drawn_is_drawn(seed: int, top_k: int, draw: float | None) -> None:
    """The ends of the unit interval, impossible rows at either end, any batch."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((3, 50)).astype(np.float32)
    logits[:, [0, -1]] = -np.inf
    draws = rng.random(3, dtype=np.float32) if draw is None else np.full(3, draw, np.float32)
    chosen = np.array(sample(mx.array(logits), mx.array(draws), top_k=top_k, temperature=0.7))
    for row, index in enumerate(chosen):
        assert (logits[row] >= logits[row, index]).sum() <= top_k
        one = sample(mx.array(logits[row]), mx.array(draws[row]), top_k=top_k, temperature=0.7)
        assert one.item() == index


def test_the_race_follows_the_softmax_of_the_best() -> None:
    logits = mx.broadcast_to(mx.log(mx.array([0.05, 0.3, 0.15, 0.5])), (20000, 4))
    draws = exponential(mx.random.key(2), (20000, 3))
    shares = np.bincount(np.array(sample_by_race(logits, draws, 3)), minlength=4) / 20000
    assert shares == pytest.approx(np.array([0, 0.3, 0.15, 0.5]) / 0.95, abs=0.015)


def test_top_k_one_is_argmax() -> None:
    logits = mx.array([[0.1, 2.0, 1.0]])
    assert sample(logits, mx.array([0.5]), top_k=1, temperature=5.0).item() == 1


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, "3"])
def test_bad_top_k(top_k: int) -> None:
    with pytest.raises(KhalaError, match="top_k"):
        Sampling(top_k=top_k)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "hot"])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(KhalaError, match="temperature"):
        Sampling(temperature=temperature)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, True, None])
def test_bad_seed(seed: int) -> None:
    with pytest.raises(KhalaError, match="seed"):
        stage_key(seed, 0)


def test_stages_have_keys_of_their_own() -> None:
    keys = {
        tuple(stage_key(seed, stage).tolist()) for seed in (0, 1, 2**64 - 1) for stage in (0, 1)
    }
    assert len(keys) == 6
