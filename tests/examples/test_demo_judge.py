"""The judge of the demo's songs: its loss, its reading and its counting."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

_DEMO = Path(__file__).parents[2] / "examples" / "train_demo"


@pytest.fixture(scope="module")
def judge() -> Iterator[Any]:
    sys.path.insert(0, str(_DEMO))
    import judge

    yield judge
    sys.path.remove(str(_DEMO))


@pytest.mark.parametrize("labels", [[1, 2], [1, 1], [2, 0], [0, 0]])
def test_the_loss_sums_over_all_alignments(judge: Any, labels: list[int]) -> None:
    """Against the sum over every path of five frames that reads as the labels."""
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet(np.ones(3), size=5))
    total = 0.0
    for path in itertools.product(range(3), repeat=5):
        merged = [c for before, c in zip((0, *path), path, strict=False) if c and c != before]
        if merged == [label for label in labels if label]:
            total += np.exp(sum(log_probs[n, c] for n, c in enumerate(path)))
    found = judge.ctc_loss(mx.array(log_probs[None].astype(np.float32)), np.array([labels]))
    assert found.item() == pytest.approx(-np.log(total), abs=1e-4)


def test_reading_merges_repeats_and_drops_blanks(judge: Any) -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0]
    assert judge.read(np.eye(8)[path]) == ["do", "do", "re"]


@pytest.mark.parametrize(
    ("said", "wanted", "distance"),
    [("", "do", 1), ("do re", "do re", 0), ("re do", "do re", 2), ("do mi re", "do re", 1)],
)
def test_edits(judge: Any, said: str, wanted: str, distance: int) -> None:
    assert judge.edits(said.split(), wanted.split()) == distance


def test_errors_are_shares_of_the_syllables_wanted(judge: Any) -> None:
    wanted = [["do", "re"], ["mi", "fa"], ["sol", "la"]]
    assert judge.syllable_error(wanted, wanted) == 0
    assert judge.syllable_error([["do"], ["mi", "fa"], []], wanted) == 0.5
    assert 0.5 < judge.shuffled_error(wanted, wanted) < 1


def test_it_hears_songs_of_any_length(judge: Any) -> None:
    mx.random.seed(0)
    waves = [np.zeros((frames * 2048, 2), np.float32) for frames in (10, 17)]
    verdicts = judge.judge_songs(judge.Judge(), waves)
    assert len(verdicts) == 2
    assert verdicts[0].style in judge.TRAITS["style"]
