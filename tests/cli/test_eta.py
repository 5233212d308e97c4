"""The time left of songs, on a simulated clock."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from khala_mlx import Khala, Request, Take
from khala_mlx.cli.eta import Eta
from khala_mlx.pipeline.plan import Job

FRAMES = 100


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def take(tiny: Khala) -> Take:
    seconds = FRAMES / tiny.config.codec.frame_rate
    return tiny.begin(Request(tags="pop", seconds=seconds, min_seconds=seconds, seed=1))


def best(khala: Khala, take: Take, songs: int = 1) -> dict[str, float]:
    """The least seconds that the plan gives each stage."""
    job = Job(len(take.prompts[0]), len(take.prompts[1]), FRAMES, songs)
    return {stage.name: stage.seconds for stage in khala.plan(job).stages}


def follow(
    khala: Khala, takes: list[Take], slower: float, legs: list[tuple[str, float, int]], **how: Any
) -> list[tuple[float, float, float]]:
    """(seconds so far, seconds left as estimated, seconds left in truth) at each report.

    Each leg is a stage, the share of its planned time that it takes, and its steps.
    """
    clock = Clock()
    eta, planned = Eta(khala, takes, clock=clock, **how), best(khala, takes[0], len(takes))
    seen = []
    for stage, share, steps in legs:
        for done in range(1, steps + 1):
            clock.now += slower * share * planned[stage] / steps
            seen.append((clock.now - 100, eta(stage, done, steps)[1]))
        if stage == "compose":
            for take in takes:
                take.set_codes(np.zeros((2, FRAMES), np.int32), khala.config.codec.frame_rate)
    return [(at, left, clock.now - 100 - at) for at, left in seen]


@pytest.mark.parametrize("slower", [1.0, 40.0])
def test_a_song_is_right_after_a_tenth(tiny: Khala, take: Take, slower: float) -> None:
    """Where the plan's ratios hold, whatever the machine's speed."""
    legs = [("compose", 1.0, FRAMES), ("refine", 1.0, 6), ("render", 1.0, 4)]
    reports = follow(tiny, [take], slower, legs)
    total = reports[-1][0]
    late = [each for each in reports if each[0] >= total / 10]
    assert len(late) > 10
    for _, estimated, left in late:
        assert abs(estimated - left) <= 0.25 * left + 0.01 * total


def test_candidates_with_drafts_and_one_finished(tiny: Khala, take: Take) -> None:
    takes = [replace(take, codes=take.codes, metadata=dict(take.metadata)) for _ in range(3)]
    steps = tiny.config.tokens.num_codebooks - 2
    draft, rest = 2 / steps, (steps - 2) / steps
    legs = [("compose", 1.0, FRAMES), ("refine", draft, 6), ("render", 1.0, 3)]
    legs += [("refine", rest / 3, 4), ("render", 1 / 3, 1)]
    reports = follow(tiny, takes, 5.0, legs, codebooks=4, best=1)
    total = reports[-1][0]
    for at, estimated, left in reports:
        if at >= total / 10:
            assert abs(estimated - left) <= 0.25 * left + 0.02 * total


def test_the_rate_of_the_running_stage_counts(tiny: Khala, take: Take) -> None:
    clock = Clock()
    eta = Eta(tiny, [take], clock=clock)
    eta("compose", 1, FRAMES)
    for done in range(2, 52):
        clock.now += 2
        stage, whole = eta("compose", done, FRAMES)
    assert stage == pytest.approx(2 * (FRAMES - 51))
    assert whole > stage


def test_a_song_longer_than_expected_grows(tiny: Khala) -> None:
    """The prompt says one minute, the song may become longer."""
    take = tiny.begin(Request(tags="pop", seed=1))
    clock, most = Clock(), take.budget[0]
    eta = Eta(tiny, [take], clock=clock)
    lefts = []
    for done in range(1, most + 1):
        clock.now += 1
        lefts.append(eta("compose", done, most)[0])
    assert lefts[-1] == 0
    assert min(lefts[:-1]) > 0


def test_a_finished_take_has_only_to_be_rendered(tiny: Khala, take: Take) -> None:
    codes = np.zeros((take.num_codebooks, FRAMES), np.int32)
    take.set_codes(codes, tiny.config.codec.frame_rate)
    clock = Clock()
    eta = Eta(tiny, [take], clock=clock)
    clock.now += 1
    assert eta("render", FRAMES, FRAMES) == (0.0, 0.0)
