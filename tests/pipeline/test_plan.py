import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from takes import begin_all
from tiny_songs import random_adapter

from khala_mlx import Khala, KhalaError
from khala_mlx.config import KhalaConfig
from khala_mlx.performance.machine import CHIPS, Machine, mac_with
from khala_mlx.performance.memory import Setting
from khala_mlx.pipeline import plan as planning
from khala_mlx.pipeline.parts import Parts
from khala_mlx.pipeline.plan import Job, Plan, limits, make_plan
from khala_mlx.prompt.request import Request
from khala_mlx.storage.adapter import Extent

CONFIG = KhalaConfig()
METAL = Setting("bfloat16", on_cpu=False)
TWO_MINUTES = Job(200, 150, 2584)
GIB = 2**30


def plan(gigabytes: float, job: Job = TWO_MINUTES, keep_loaded: bool = True) -> Plan:
    mac = mac_with(int(gigabytes * GIB))
    return make_plan(CONFIG, METAL, mac, job, keep_loaded=keep_loaded)


def test_a_beginning_is_read_not_written() -> None:
    whole, behind = plan(16), plan(16, replace(TWO_MINUTES, begun=2000))
    compose, after = whole.stages[0], behind.stages[0]
    # Its keys and values are there all the same; reading 4200 tokens needs more than 200.
    assert after.peak > compose.peak
    assert after.seconds < 0.5 * compose.seconds
    assert behind.stages[1:] == whole.stages[1:]


def test_judging_takes_memory_and_time() -> None:
    plain, judged = plan(16), plan(16, replace(TWO_MINUTES, judged=True))
    assert judged.stages[0].working > plain.stages[0].working
    assert judged.stages[0].seconds > plain.stages[0].seconds


def test_drafts_take_the_time_of_their_layers() -> None:
    one = plan(16)
    _, refine, render = plan(16, replace(TWO_MINUTES, songs=4, draft=8, finished=1)).stages
    assert refine.seconds == pytest.approx(one.stages[1].seconds * (4 * 6 + 56) / 62)
    assert render.seconds == pytest.approx(one.stages[2].seconds * 5)
    _, refine, render = plan(16, replace(TWO_MINUTES, draft=2)).stages
    assert refine.seconds == 0
    assert render.seconds == one.stages[2].seconds


def test_adapters_are_read_with_the_weights() -> None:
    rank_16 = Extent(parameters=13_959_168, widest=5632)
    mac = mac_with(16 * GIB)
    setting = replace(METAL, adapters=rank_16)
    adapted = make_plan(CONFIG, setting, mac, TWO_MINUTES, keep_loaded=False).stages
    plain = plan(16, keep_loaded=False).stages
    assert adapted[0].weights - plain[0].weights == 4 * rank_16.parameters
    more = TWO_MINUTES.frames * 2 * 4 * rank_16.parameters / mac.bandwidth
    assert adapted[0].seconds - plain[0].seconds == pytest.approx(more, rel=0.01)
    assert adapted[1:] == plain[1:]


def test_large_macs_keep_everything_loaded() -> None:
    large = plan(64)
    assert not large.staged
    assert large.problem is None
    assert large.peak == pytest.approx(9.2e9, rel=0.1)
    assert plan(64, keep_loaded=False).staged


def test_smaller_ones_load_and_free() -> None:
    small = plan(8)
    assert small.staged
    assert small.problem is None
    assert 4e9 < small.peak < 8 * GIB * 2 / 3


def test_weights_are_read_ahead_where_both_fit() -> None:
    assert [plan(16).ahead_of(p) for p in ("backbone", "superres", "codec")] == [
        "superres", "codec", None,
    ]  # fmt: skip
    assert [plan(8).ahead_of(p) for p in ("backbone", "superres")] == [None, "codec"]


def test_fewer_songs_at_once_and_smaller_chunks_before_giving_up() -> None:
    many = replace(TWO_MINUTES, songs=16)
    assert plan(64, many).songs_at_once == 16
    assert 1 < plan(8, many).songs_at_once < 16
    assert plan(8, many).peak <= 8 * GIB * 2 / 3


def test_chunks_shrink_to_what_fits() -> None:
    fine = plan(64)
    render = fine.stages[2]
    machine = Machine("", render.peak - 1, False, 1e11, 1e12, True)
    tight = make_plan(CONFIG, Setting("bfloat16", False), machine, TWO_MINUTES, keep_loaded=False)
    assert tight.chunk_frames < fine.chunk_frames
    assert tight.stages[2].peak <= machine.memory


def test_what_does_not_fit_is_told_with_the_numbers() -> None:
    tiny = plan(3)
    assert tiny.problem is not None
    assert "To compose this song needs 3." in tiny.problem
    assert "2.1 GB can be used" in tiny.problem
    with pytest.raises(KhalaError, match="khala convert --quantize"):
        tiny.check()


@pytest.mark.parametrize("chip", CHIPS)
def test_the_times_of_the_docs_are_those_of_the_plan(chip: str) -> None:
    """docs/performance.md shows the best case for one minute of song on each chip."""
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {chip} |"))
    bandwidth, tflops = CHIPS[chip]
    mac = replace(mac_with(64 * GIB), bandwidth=bandwidth * 1e9, flops=tflops * 1e12)
    stages = make_plan(CONFIG, METAL, mac, Job(150, 150, 1292), keep_loaded=False).stages
    seconds = [max(1, round(stage.seconds)) for stage in stages]
    assert re.findall(r"(\d+) s", row) == [str(each) for each in seconds]


def test_a_song_too_large_is_refused_before_anything_loads(tiny_folder: Path) -> None:
    khala = Khala.from_pretrained(tiny_folder)
    khala.machine = replace(khala.machine, memory=10_000)
    with pytest.raises(KhalaError, match="can be used"):
        khala.generate(seconds=0.1)
    assert khala.parts._loaded == {}
    assert khala.preview(Request())["memory"]["fits"] is False


def test_little_memory_makes_the_same_songs(tiny_folder: Path) -> None:
    request = Request(tags="pop", seconds=0.2, min_seconds=0.2)
    roomy, tight = Khala.from_pretrained(tiny_folder), Khala.from_pretrained(tiny_folder)
    seeds = [1, 2, 3]
    expected = list(roomy.finish_many(begin_all(roomy, request, seeds)))
    assert set(roomy.parts._loaded) == {"backbone", "superres", "codec"}
    ids = roomy.prompt_ids(tags="pop")
    job = Job(len(ids[0]), len(ids[1]), 69, songs=3)
    needs = roomy.plan(job)
    # Room for any one part, with the sound in the smallest pieces.
    setting = Setting(roomy.parts.dtype, roomy.machine.on_cpu)
    nothing = replace(roomy.machine, memory=1)
    least = make_plan(roomy.config, setting, nothing, job, keep_loaded=False)
    assert least.songs_at_once == least.chunk_frames == 1
    tight.machine = replace(roomy.machine, memory=least.peak)
    plan = tight.plan(job)
    assert plan.staged
    assert plan.problem is None
    assert plan.chunk_frames < needs.chunk_frames
    songs = list(tight.finish_many(begin_all(tight, request, seeds)))
    assert tight.parts._loaded == {}
    for song, wanted in zip(songs, expected, strict=True):
        assert np.array_equal(song.codes, wanted.codes)
        assert np.abs(song.waveform - wanted.waveform).max() < 1e-5


def test_what_an_earlier_song_left_loaded_is_freed(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    khala, request = Khala.from_pretrained(tiny_folder), Request(tags="pop", seconds=0.1)
    khala.finish(khala.begin(request))
    assert len(khala.parts._loaded) == 3
    stages = khala.preview(request)["memory"]["stages"].values()
    # Room for the largest part, not for all.
    khala.machine = replace(khala.machine, memory=max(each["peak_bytes"] for each in stages))
    together: set[tuple[str, ...]] = set()
    get = Parts._part

    def watched(self: Parts, name: str, build: Callable[..., Any]) -> Any:
        part = get(self, name, build)
        together.add(tuple(self._loaded))
        return part

    monkeypatch.setattr(Parts, "_part", watched)
    khala.finish(khala.begin(request))
    assert together == {("backbone",), ("superres",), ("codec",)}


def test_what_is_done_is_what_was_planned(tiny_folder: Path) -> None:
    """A beginning and adapters are in the plan of the dry run and in that of the work."""
    khala = Khala.from_pretrained(tiny_folder)
    request = Request(tags="pop", seconds=0.2)
    plain = khala.preview(request)["memory"]["stages"]["compose"]
    adapter = random_adapter(khala.config)
    khala.load_adapters([adapter], [0.5])
    kept = np.zeros((2, 40), dtype=np.int64)
    told = khala.preview(request, prefix_frames=40)["memory"]
    assert told["stages"]["compose"]["weights_bytes"] - plain["weights_bytes"] == (
        4 * adapter.extent.parameters
    )
    assert khala._plan_of(begin_all(khala, request, [1], kept)).summary() == told
    judged = khala.preview(request, 3, judged=True)["memory"]
    assert khala._plan_of(begin_all(khala, request, [1, 2, 3]), judged=True).summary() == judged
    assert khala.parts._loaded == {}


def test_limits_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    wired: list[int] = []
    waited: list[bool] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: wired.append(size) or 77)
    monkeypatch.setattr(mx, "synchronize", lambda: waited.append(True))
    cache = mx.set_cache_limit(123456)
    try:
        with pytest.raises(ZeroDivisionError), limits(plan(8)):
            inside = mx.set_cache_limit(0)
            mx.set_cache_limit(inside)
            assert planning._LEAST_CACHE <= inside <= planning._MOST_CACHE
            raise ZeroDivisionError
        assert mx.set_cache_limit(cache) == 123456
    finally:
        mx.set_cache_limit(cache)
    assert wired == [plan(8).peak, 77]
    assert waited == [True]


def test_a_refused_limit_leaves_the_other_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> int:
        raise ValueError("larger than the working set")

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    cache = mx.set_cache_limit(123456)
    try:
        with pytest.raises(ValueError, match="working set"), limits(plan(8)):
            pass
        assert mx.set_cache_limit(cache) == 123456
    finally:
        mx.set_cache_limit(cache)
