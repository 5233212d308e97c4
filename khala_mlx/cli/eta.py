"""How long songs will take, all stages together: from their own pace and that of earlier ones.

How the stages compare is counted from the model's sizes; how fast each is on this machine is
learnt from every song that is finished, and kept in the cache folder.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from khala_mlx.errors import KhalaError
from khala_mlx.performance.machine import Machine
from khala_mlx.pipeline.parts import Stages
from khala_mlx.pipeline.plan import Job
from khala_mlx.song.take import Take
from khala_mlx.storage.atomic import appears_whole
from khala_mlx.storage.paths import cache_folder

FILE = "paces.json"
_STAGES = ("compose", "refine", "render")
# Choosing by expectation takes longer than drawing.
_EXPECTED = "refine-expected"
# What is kept of each: of a stage the seconds until its first step begins, most of which go into
# loading its part, and those that a unit of work takes; of songs, how long they were as a share of
# what the prompt tells.
_LENGTHS = {"length": 1, **dict.fromkeys((*_STAGES, _EXPECTED), 2)}
# Models, dtypes and machines of which the pace is kept.
_MOST_ENTRIES = 64
# Work is counted in the seconds that a machine of these rates takes at best; any serve, if always
# the same.
_BANDWIDTH, _FLOPS = 1e11, 1e13
# The share of a stage after which its own pace counts, not that of earlier songs.
_TRUSTED = 0.125
# No machine reaches its best. Without an earlier song, what a stage takes beyond so many times its
# best is laid to that stage, not to the machine.
_MOST_SLOWER = 1.5
# By how much, as a logarithm, the first steps of a stage may be faster or slower than all.
_NOISE = 0.2
# Clocks have steps.
_LEAST_TIME = 1e-6
# A song that is longer than expected is expected to get so much longer yet.
_BEYOND = 1.05


@dataclass(eq=False)
class _Leg:
    """A stage that some songs pass, one after the other or together.

    Attributes:
        share: of refine, the share of all its steps.
        since: when the leg before ended.
        first, last: (time, steps done) of its first and its last report.
        total: its steps as reported, those of the longest songs.
    """

    stage: str
    songs: int
    share: float = 1.0
    since: float = 0.0
    first: tuple[float, int] | None = None
    last: tuple[float, int] = (0.0, 0)
    total: int = 0


class Outlook:
    """Follows songs of one request through their stages and tells how long what is left takes."""

    def __init__(
        self,
        khala: Stages,
        takes: Sequence[Take],
        layers: int | None = None,
        *,
        best: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Of takes that are about to be made, up to `layers` layers if that is given.

        After that the `best` of them are finished, as many as that says.
        """
        self._khala, self._takes, self._clock = khala, list(takes), clock
        self._fresh = not any(take.layers for take in takes)
        self._legs = self._all_legs(layers, best)
        self._at, self._end = -1, clock()
        self._known = {}
        with suppress(KhalaError):
            self._known = _read(_path()).get(self._key, {})
        # Start and pace of stages that were passed once.
        self._passed: dict[str, list[float]] = {}
        # How much slower than foretold the machine is, and was before the running leg.
        self._slower = self._slower_before = 1.0
        # Counting takes about as long as a token, and is asked for between two of them.
        self._work = lru_cache(maxsize=1)(self._count)

    def __call__(self, stage: str, done: int, total: int) -> tuple[float, float]:
        """Seconds left of the stage, and of all, when `done` of `total` of the stage is."""
        now = self._clock()
        if self._at < 0 or self._legs[self._at].stage != stage:
            self._pass_on(stage)
        leg = self._legs[self._at]
        if leg.first is None:
            leg.since, leg.first, leg.total = self._end, (now, done), total
        leg.last, self._end = (now, done), now
        return self._left()

    def keep(self) -> None:
        """Let songs to come know how fast these were; a cache that cannot be written stays."""
        with suppress(KhalaError):
            self._keep(_path())

    def _keep(self, path: Path) -> None:
        entries = _read(path)
        known = entries.pop(self._key, {})
        # A stage that was passed twice counts as it was the first time.
        found = {leg.stage: taken for leg in reversed(self._legs) if (taken := self._measured(leg))}
        for stage, taken in found.items():
            known[self._name(stage)] = _mean(known.get(self._name(stage)), taken)
        if self._fresh and (made := self._made):
            known["length"] = _mean(known.get("length"), [statistics.mean(made) / self._nominal])
        entries[self._key] = known
        newest = dict(list(entries.items())[-_MOST_ENTRIES:])
        with appears_whole(path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(newest))

    def _all_legs(self, layers: int | None, best: int) -> list[_Leg]:
        first, all_layers = self._khala.config.tokens.num_coarse, self._takes[0].num_codebooks
        expected = self._takes[0].request.refine_expected
        last = layers or all_layers

        def share(begun: int, last: int) -> float:
            # What layers leave over is not kept: chosen by expectation, they are made anew.
            begun = first if expected and begun < last else max(first, begun)
            return max(0, last - begun) / (all_layers - first)

        new, songs = sum(not take.layers for take in self._takes), len(self._takes)
        shares = [share(take.layers, last) for take in self._takes]
        legs = [_Leg("refine", songs, statistics.mean(shares)), _Leg("render", songs)]
        if new:
            legs.insert(0, _Leg("compose", new))
        if best:
            legs += [_Leg("refine", best, share(last, all_layers)), _Leg("render", best)]
        return legs

    def _pass_on(self, stage: str) -> None:
        """To the next leg of this stage."""
        if self._at >= 0:
            leg = self._legs[self._at]
            if measured := self._measured(leg):
                self._passed.setdefault(leg.stage, measured)
        following = range(self._at + 1, len(self._legs))
        self._at = next(at for at in following if self._legs[at].stage == stage)
        self._slower_before = self._slower

    def _left(self) -> tuple[float, float]:
        """Seconds left of the running leg, and of all."""
        leg = self._legs[self._at]
        work = self._work(self._frames(leg))
        done, steps = self._place(leg, leg.last[1])
        pace = self._pace(leg)
        if leg.stage not in self._passed:
            # A machine that is slower than it was is so in the other stages, too.
            slower = pace / self._recorded(leg.stage)[1]
            known = self._name(leg.stage) in self._known
            self._slower = _beyond_noise(slower, 1 - done / steps)
            if not known:
                self._slower = min(self._slower, _MOST_SLOWER)
        left = ahead = max(0.0, 1 - done / steps) * work[self._at][0] * pace
        for later in range(self._at + 1, len(self._legs)):
            if work[later][0]:
                start, pace = self._foretold(self._legs[later].stage, self._slower)
                ahead += start + work[later][0] * pace
        return left, ahead

    def _pace(self, leg: _Leg) -> float:
        """Of the running leg: what was measured so far, the surer the more of it is done."""
        known, measured = self._foretold(leg.stage, self._slower_before)[1], self._measured(leg)
        if leg.first is None or measured is None:
            return known
        (before, steps), (done, _) = self._place(leg, leg.first[1]), self._place(leg, leg.last[1])
        sure = leg.stage in self._passed or self._name(leg.stage) in self._known
        trust = min(1.0, (done - before) / steps / _TRUSTED) if sure else 1.0
        return math.exp(trust * math.log(measured[1]) + (1 - trust) * math.log(known))

    def _foretold(self, stage: str, slower: float) -> list[float]:
        """Start and pace of a stage that is ahead, on a machine that is so much slower."""
        if stage in self._passed:
            return self._passed[stage]
        start, pace = self._recorded(stage)
        return [start, pace * slower]

    def _recorded(self, stage: str) -> list[float]:
        """Start and pace of a stage in earlier songs or, without any, of this machine's best."""
        known = self._known.get(self._name(stage))
        if known is not None:
            return known
        all_work = zip(self._legs, self._work(self._frames(self._legs[self._at])), strict=True)
        work, best = max(work for leg, work in all_work if leg.stage == stage)
        return [0.0, best / work]

    def _measured(self, leg: _Leg) -> list[float] | None:
        """Seconds until the first step of a leg, and those for a unit of work; None if unknown."""
        work = self._work(self._frames(leg))[self._legs.index(leg)][0]
        if leg.first is None or work <= 0:
            return None
        began, now = leg.first[0], leg.last[0]
        (before, steps), (done, _) = self._place(leg, leg.first[1]), self._place(leg, leg.last[1])
        if done > before:
            step = max((now - began) / (done - before), _LEAST_TIME)
            return [max(0.0, began - before * step - leg.since), step * steps / work]
        if done >= steps:
            # All in one step: what it took to start is not told apart.
            return [0.0, max(now - leg.since, _LEAST_TIME) / work]
        return None

    def _place(self, leg: _Leg, done: int) -> tuple[int, int]:
        """Of the steps that are expected of a leg, how many are done, and all."""
        if leg.stage != "compose":
            return done, max(1, leg.total)
        steps = max(1, self._frames(leg) - self._begun)
        groups, group, of_it = self._group(leg, done)
        return group * steps + of_it, groups * steps

    def _group(self, leg: _Leg, done: int) -> tuple[int, int, int]:
        """Songs that the memory cannot hold together are composed in groups, one after the other:
        how many these are, how many of them are done, and how many steps of the next."""
        most = max(1, self._takes[0].budget[0] - self._begun)
        groups = max(1, round(leg.total / most))
        return (groups, *divmod(done, most)) if groups > 1 else (1, 0, done)

    @property
    def _key(self) -> str:
        return f"{self._khala.fingerprint} {self._khala.dtype} {self._khala.machine.name}"

    def _name(self, stage: str) -> str:
        """Under which a stage's pace is kept."""
        expected = self._takes[0].request.refine_expected
        return _EXPECTED if expected and stage == "refine" else stage

    @property
    def _begun(self) -> int:
        """Frames that were there before."""
        return self._takes[0].kept.shape[1]

    @property
    def _made(self) -> list[int]:
        """Frames of the songs that are composed."""
        return [take.codes.shape[1] for take in self._takes if take.layers]

    @property
    def _nominal(self) -> int:
        """Frames of the minutes that the prompt tells, as far as they may be made."""
        most, least = self._takes[0].budget
        minutes = self._takes[0].request.minutes
        told = round(minutes * 60 * self._khala.config.codec.frame_rate)
        return max(least, min(most, told))

    def _frames(self, leg: _Leg) -> int:
        """Frames the songs have or, while they are composed, can be expected to get."""
        if len(made := self._made) == len(self._takes) or (made and leg.stage != "compose"):
            return round(statistics.mean(made))
        most, least = self._takes[0].budget
        expected = round(self._nominal * self._known.get("length", [1.0])[0])
        _, _, composed = self._group(leg, leg.last[1])
        # Longer than expected already: that it ends at once is not likely either.
        return min(most, max(least, expected, math.ceil(_BEYOND * (self._begun + composed))))

    def _count(self, frames: int) -> list[tuple[float, float]]:
        """Of each leg its work, and the seconds that it takes this machine at best."""
        here = self._khala.machine
        reference = replace(here, bandwidth=_BANDWIDTH, flops=_FLOPS)
        return [
            (self._best(leg, frames, reference), self._best(leg, frames, here))
            for leg in self._legs
        ]

    def _best(self, leg: _Leg, frames: int, machine: Machine) -> float:
        """Seconds that a leg takes a machine at best."""
        backbone, superres = (max(len(t.prompts[part]) for t in self._takes) for part in range(2))
        kv_bits = self._takes[0].request.kv_bits
        job = Job(backbone, superres, frames, leg.songs, kv_bits=kv_bits)
        plan = self._khala.envelope(job, machine)
        seconds = next(each.seconds for each in plan.stages if each.name == leg.stage)
        return seconds * ((1 - self._begun / frames) if leg.stage == "compose" else leg.share)


def _beyond_noise(slower: float, left: float) -> float:
    """What to make of a pace while so much of its stage is left: first steps are not the mean."""
    noise = _NOISE * max(0.0, left)
    change = math.log(slower)
    return math.exp(math.copysign(max(0.0, abs(change) - noise), change))


def _mean(known: list[float] | None, new: list[float]) -> list[float]:
    """One slow song does not spoil what is known."""
    return new if known is None else [(a + b) / 2 for a, b in zip(known, new, strict=True)]


def _path() -> Path:
    return cache_folder() / FILE


def _read(path: Path) -> dict[str, dict[str, list[float]]]:
    """The paces by model, dtype and machine; whatever is damaged is left out."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {
        key: {name: found for name, found in entry.items() if _is_known(name, found)}
        for key, entry in entries.items()
        if isinstance(entry, dict)
    }


def _is_known(name: str, found: Any) -> bool:
    if not isinstance(found, list) or len(found) != _LENGTHS.get(name):
        return False
    numbers = all(type(each) in (int, float) and math.isfinite(each) for each in found)
    # No start takes time off, and no work takes none.
    return numbers and min(found) >= 0 and found[-1] > 0
