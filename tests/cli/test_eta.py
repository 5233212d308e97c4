"""How long a song will take, on a clock that is simulated, and as a terminal shows it."""

import json
import os
import pty
import re
import select
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khala_mlx import Khala
from khala_mlx.cli import eta as outlook
from khala_mlx.cli.eta import FILE, Outlook
from khala_mlx.config import KhalaConfig
from khala_mlx.pipeline.plan import Job
from khala_mlx.prompt.request import Request
from khala_mlx.song.take import Take

# `khala generate` on a machine whose stages take the times below, by a clock that only they turn.
SIMULATED = """
import json, sys, types
now = 0.0

def takes(owner, name, seconds):
    work = getattr(owner, name)
    def slowly(*args, **kwargs):
        global now
        now += seconds(*args)
        return work(*args, **kwargs)
    setattr(owner, name, slowly)

from khala_mlx.cli import eta as outlook
from khala_mlx.pipeline import parts as stages
from khala_mlx.cli import terminal
terminal.time = types.SimpleNamespace(monotonic=lambda: now)
outlook.Outlook.__init__.__kwdefaults__["clock"] = lambda: now
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec
from khala_mlx.model.superres import SuperRes
slow = float(sys.argv.pop(1))
takes(stages, "load_part", lambda *_: 1.5)
# A token is slower the more there are, a step grows faster than the song.
known = [0]
def token(model, ids, cache=None):
    known[0] += ids.shape[1]
    return slow * 0.1 * (1 + known[0] / 1000)
takes(Backbone, "hidden", token)
takes(SuperRes, "_step", lambda model, prompt, audio, layer: slow * audio.shape[1] ** 1.2 / 40)
takes(Codec, "decode", lambda model, codes, **_: slow * 0.1 * codes.shape[1])
shown = []
draw = terminal.Progress._draw
def drawn(self, *args):
    shown.append(now)
    draw(self, *args)
terminal.Progress._draw = drawn
from khala_mlx.cli import main
try:
    main(["generate", *sys.argv[1:]])
finally:
    print(json.dumps({"shown": shown, "total": now}))
"""


def on_a_terminal(*arguments: Any) -> list[tuple[float, float, str]]:
    """(simulated time, simulated end, line) of all that the progress bar showed."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SIMULATED, *map(str, arguments)],
        stderr=follower, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(follower)
    seen = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            data = os.read(leader, 65536)
        except OSError:
            break
        if not data:
            break
        seen += data
    os.close(leader)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, seen.decode()
    told = json.loads(printed.splitlines()[-1])
    lines = [line for line in seen.decode().split("\r") if "%" in line]
    assert len(lines) == len(told["shown"])
    return [(at, told["total"], line) for at, line in zip(told["shown"], lines, strict=True)]


def left_of_the_song(line: str) -> float | None:
    found = re.search(r"(?:song|all) (\d+):(\d\d)", line) or re.search(r"(\d+):(\d\d) left", line)
    return found and int(found[1]) * 60 + int(found[2])


@pytest.mark.parametrize(
    "options",
    [[], ["--candidates", 3, "--best", 2, "--draft", 4]],
    ids=["a song", "candidates"],
)
def test_the_time_left_of_all_is_right_after_a_tenth(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[Any]
) -> None:
    """Within 25 % and the second that the display rounds away, from the second song on."""
    monkeypatch.setenv("KHALA_CACHE", str(tmp_path / "cache"))

    rate = KhalaConfig.tiny().codec.frame_rate

    def song(name: str, frames: int, slow: float) -> list[tuple[float, float, str]]:
        seconds = frames / rate
        asked = ["--tags", "pop", "--seconds", seconds, "--min-seconds", seconds, "--seed", 1]
        return on_a_terminal(slow, "-m", tiny_folder, *asked, *options, "-o", tmp_path / name)

    first = song("first.wav", 80, 1)
    assert ("all " if "--candidates" in options else "song ") in first[2][2]
    assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / FILE]
    checked = set()
    # Another length, on a machine that is busier than it was.
    for at, total, line in song("second.wav", 120, 1.5):
        left = left_of_the_song(line)
        if at >= total / 10 and left is not None:
            assert abs(left - (total - at)) <= 0.25 * (total - at) + 1, line
            checked.add(line.split()[0])
    assert {"compose", "refine"} <= checked


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def take(tiny: Khala, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Take:
    monkeypatch.setenv("KHALA_CACHE", str(tmp_path / "cache"))
    rate = tiny.config.codec.frame_rate
    return tiny.begin(Request(tags="pop", seconds=100 / rate, seed=1))


def follow(
    tiny: Khala, take: Take, frames: int, *, slow: float = 1.0, refine: float = 20
) -> list[float]:
    """A song of so many frames that takes 2 + 10 + 1 + 20 + 5 seconds; the totals it foretold."""
    clock, most = Clock(), take.budget[0]
    told: list[float] = []
    take = replace(take, codes=take.codes)
    ahead = Outlook(tiny, [take], clock=clock)

    def report(stage: str, seconds: float, done: int, total: int) -> None:
        clock.now += slow * seconds
        told.append(clock.now - 100 + ahead(stage, done, total)[1])

    clock.now += slow * 2
    for done in range(1, frames + 1):
        report("compose", 10 / frames, done, most)
    codes = np.zeros((tiny.config.tokens.num_coarse, frames), np.int32)
    take.set_codes(codes, tiny.config.codec.frame_rate)
    clock.now += slow
    steps = take.num_codebooks - len(codes)
    for done in range(1, steps + 1):
        report("refine", refine / steps, done, steps)
    report("render", 5, 1, 1)
    ahead.keep()
    return told


def follow_candidates(tiny: Khala, take: Take) -> list[float]:
    """Three songs of 60 frames, drafts of 4 layers, one of which is finished."""
    clock, most, layers = Clock(), take.budget[0], take.num_codebooks
    takes = [replace(take, codes=take.codes) for _ in range(3)]
    first = tiny.config.tokens.num_coarse
    told: list[float] = []
    ahead = Outlook(tiny, takes, 4, best=1, clock=clock)

    def report(stage: str, seconds: float, done: int, total: int) -> None:
        clock.now += seconds
        told.append(clock.now - 100 + ahead(stage, done, total)[1])

    clock.now += 2
    for done in range(1, 61):
        report("compose", 12 / 60, done, most)
    for each in takes:
        each.set_codes(np.zeros((first, 60), np.int32), tiny.config.codec.frame_rate)
    for songs, steps in ((3, 4 - first), (1, layers - 4)):
        clock.now += 1
        for done in range(1, songs * steps + 1):
            report("refine", 0.5, done, songs * steps)
        for done in range(1, songs + 1):
            report("render", 5, done, songs)
    ahead.keep()
    return told


def test_candidates_are_foretold(tiny: Khala, take: Take) -> None:
    follow_candidates(tiny, take)
    told = follow_candidates(tiny, take)
    assert told == pytest.approx([told[-1]] * len(told), rel=0.05)


def test_candidates_in_groups_are_foretold(
    tiny: Khala, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups, one after the other, each of which ends before it has to."""
    follow(tiny, take, 60)
    clock, most = Clock(), take.budget[0]
    one = tiny.envelope(Job(len(take.prompts[0]), len(take.prompts[1]), 60)).stages[0].peak
    monkeypatch.setattr(tiny, "machine", replace(tiny.machine, memory=one + 1))
    takes = [replace(take, codes=take.codes) for _ in range(2)]
    ahead, lefts = Outlook(tiny, takes, clock=clock), []
    for group in range(2):
        for done in range(1, 61):
            clock.now += 10 / 60
            lefts.append(ahead("compose", group * most + done, 2 * most)[0])
    assert lefts == pytest.approx([20 * (1 - n / 120) for n in range(1, 121)], abs=1.1)


def test_a_stage_that_was_never_timed_is_not_slow_for_another(tiny: Khala, take: Take) -> None:
    """A small model composes far below the machine's rates, but need not refine so."""
    clock = Clock()
    ahead = Outlook(tiny, [take], clock=clock)
    _, whole = ahead("compose", 1, 50)
    best = whole - ahead("compose", 1, 50)[0]
    for done in range(2, 20):
        clock.now += 1000
        left, whole = ahead("compose", done, 50)
    assert whole - left == pytest.approx(1.5 * best)


def test_a_song_like_the_last_is_foretold(tiny: Khala, take: Take) -> None:
    frames = 60
    follow(tiny, take, frames)
    # Half the length that it may have was learnt too.
    told = follow(tiny, take, frames)
    assert take.budget[0] > frames + 20
    assert told == pytest.approx([38] * len(told), rel=0.06)


def test_choosing_by_expectation_has_a_pace_of_its_own(tiny: Khala, take: Take) -> None:
    follow(tiny, take, 60)
    expected = take.with_request(replace(take.request, refine_expected=True))
    follow(tiny, expected, 60, refine=50)
    assert follow(tiny, take, 60)[0] == pytest.approx(38, rel=0.05)
    assert follow(tiny, expected, 60, refine=50)[0] == pytest.approx(68, rel=0.05)


def test_a_slower_machine_is_noticed(tiny: Khala, take: Take) -> None:
    follow(tiny, take, 60)
    told = follow(tiny, take, 60, slow=3)
    assert told[20] == pytest.approx(3 * 38, rel=0.1)


def test_a_longer_song_than_ever(tiny: Khala, take: Take) -> None:
    follow(tiny, take, 40)
    told = follow(tiny, take, 80)
    # While it grows beyond what the last one was, refining it is foretold to take longer, too.
    assert all(later > earlier for earlier, later in pairwise(told[40:80]))
    assert told[-1] == pytest.approx(38)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"a": 1}', '{"KEY": {"refine": [1], "length": ["x"], "render": [1, 0]}}'],
)
def test_a_damaged_file_is_no_file(tiny: Khala, take: Take, tmp_path: Path, text: str) -> None:
    path = tmp_path / "cache" / FILE
    path.parent.mkdir()
    fresh = Outlook(tiny, [take], clock=Clock())
    path.write_text(text.replace("KEY", fresh._key))
    assert Outlook(tiny, [take], clock=Clock())("compose", 1, 50) == fresh("compose", 1, 50)
    follow(tiny, take, 40)
    assert set(json.loads(path.read_text())[fresh._key]) == {
        "compose",
        "refine",
        "render",
        "length",
    }


def test_only_the_newest_are_kept(
    tiny: Khala, take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlook, "_MOST_ENTRIES", 2)
    path = tmp_path / "cache" / FILE
    path.parent.mkdir()
    path.write_text(json.dumps({"old": {}, "older": {}, "newer": {}}))
    follow(tiny, take, 30)
    kept = list(json.loads(path.read_text()))
    assert len(kept) == 2
    assert kept[0] == "newer"


def test_a_cache_that_cannot_be_written_stops_nothing(
    tiny: Khala, take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KHALA_CACHE", str(tmp_path / "file"))
    assert follow(tiny, take, 30)
