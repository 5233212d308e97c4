"""How long a song will take, all stages together: from its own pace and that of earlier songs.

How the stages compare is counted from the model's sizes; how fast each is on this machine is
learnt from every song that is finished, and kept in the cache folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from khala_mlx.errors import KhalaError
from khala_mlx.files import appears_whole
from khala_mlx.machine import Machine, mac_with
from khala_mlx.places import cache_folder
from khala_mlx.planning import Job
from khala_mlx.stages import Stages
from khala_mlx.take import Take

FILE = "paces.json"
_STAGES = ("compose", "refine", "render")
# What is kept of each: of a stage the seconds until its first step begins, most of which go into
# loading its part, and those that the reference's best second takes here; of songs, how long they
# were as a share of what the prompt tells.
_LENGTHS = {"length": 1, **dict.fromkeys(_STAGES, 2)}
# Models, dtypes and machines of which the pace is kept.
_MOST_ENTRIES = 64
# Work is counted in the seconds that this machine takes at best; any serves, if always the same.
_REFERENCE = mac_with(1 << 44)
# The share of a stage after which its own pace counts, not that of earlier songs.
_TRUSTED = 0.125
# Clocks have steps.
_LEAST_TIME = 1e-6
# A song that is longer than expected is expected to get so much longer yet.
_BEYOND = 1.05


class Outlook:
    """Follows the stages of one song and tells how long what is left will take."""

    def __init__(
        self,
        khala: Stages,
        take: Take,
        layers: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Of a take that is about to be made, up to `layers` layers if that is given."""
        self._khala, self._take, self._clock = khala, take, clock
        self._layers = layers or take.num_codebooks
        self._begun = take.layers
        self._known = _read(_path()).get(self._key, {})
        # Where the stages before ended, and of each its reports so far.
        self._end = clock()
        self._reports: dict[str, _Reports] = {}
        # How much slower than expected the machine is, and was before the running stage.
        self._slower = self._slower_before = 1.0
        # Counting takes about as long as a token, and is asked for between two of them.
        self._counted = lru_cache(maxsize=1)(self._count)

    def __call__(self, stage: str, done: int, total: int) -> tuple[float, float]:
        """Seconds left of the stage, and of the song, when `done` of `total` of the stage is."""
        now = self._clock()
        if stage not in self._reports:
            self._reports[stage] = _Reports(self._end, (now, done), (now, done), total)
            self._slower_before = self._slower
        reports = self._reports[stage]
        reports.last, self._end = (now, done), now
        frames = self._frames(done if stage == "compose" else 0)
        work, known = self._counted(frames)
        steps = self._steps(stage, frames)
        # A machine that is slower than it was is so in the other stages, too.
        pace = self._pace(stage, steps, work[stage], known[stage][1] * self._slower_before)
        self._slower = pace / known[stage][1]
        left = max(0.0, 1 - done / steps) * work[stage] * pace
        ahead = (s for s in _STAGES[_STAGES.index(stage) + 1 :] if work[s])
        return left, left + sum(self._whole(known[s], work[s]) for s in ahead)

    def _whole(self, known: list[float], work: float) -> float:
        """Seconds of a stage that is still ahead."""
        start, pace = known
        return start + work * pace * self._slower

    def _steps(self, stage: str, frames: int) -> int:
        """Steps of a stage that has begun, that of compose for a song of so many frames."""
        if stage == "compose":
            return max(1, frames - self._take.kept.shape[1])
        return max(1, self._reports[stage].total)

    def _pace(self, stage: str, steps: int, work: float, known: float) -> float:
        """Of the running stage: what was measured so far, the surer the more of it is done."""
        reports = self._reports[stage]
        measured = reports.measured(steps, work)
        if measured is None:
            return known
        seen = (reports.last[1] - reports.first[1]) / steps
        trust = min(1.0, seen / _TRUSTED) if stage in self._known else 1.0
        return math.exp(trust * math.log(measured[1]) + (1 - trust) * math.log(known))

    def _count(self, frames: int) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Of a song of so many frames the work of each stage; and start and pace of each in earlier
        songs or, without any, of this machine's best."""
        work = self._work(frames, _REFERENCE)
        best = self._work(frames, self._khala.machine)
        paces = {s: self._known.get(s) or [0.0, best[s] / work[s]] for s in _STAGES if work[s]}
        return work, paces

    def keep(self) -> None:
        """Let songs to come know how fast this one was; a cache that cannot be written stays."""
        entries = _read(_path())
        known = entries.pop(self._key, {})
        frames = self._frames(0)
        work, _ = self._counted(frames)
        for stage, reports in self._reports.items():
            found = reports.measured(self._steps(stage, frames), work[stage])
            if found is not None:
                known[stage] = _mean(known.get(stage), found)
        if not self._begun and self._take.layers:
            share = self._take.codes.shape[1] / self._nominal
            known["length"] = _mean(known.get("length"), [share])
        entries[self._key] = known
        newest = dict(list(entries.items())[-_MOST_ENTRIES:])
        with suppress(KhalaError), appears_whole(_path(), overwrite=True) as temporary:
            temporary.write_text(json.dumps(newest))

    @property
    def _key(self) -> str:
        return f"{self._khala.fingerprint} {self._khala.dtype} {self._khala.machine.name}"

    @property
    def _nominal(self) -> int:
        """Frames of the minutes that the prompt tells, as far as they may be made."""
        most, least = self._take.budget
        told = round(self._take.request.minutes * 60 * self._khala.config.codec.frame_rate)
        return max(least, min(most, told))

    def _frames(self, composed: int) -> int:
        """Frames the song has or, while it is composed, can be expected to get."""
        if self._take.layers:
            return self._take.codes.shape[1]
        most, least = self._take.budget
        expected = round(self._nominal * self._known.get("length", [1.0])[0])
        # Longer than expected already: that it ends at once is not likely either.
        beyond = math.ceil(_BEYOND * (self._take.kept.shape[1] + composed))
        return min(most, max(least, expected, beyond))

    def _work(self, frames: int, machine: Machine) -> dict[str, float]:
        """Seconds that each stage takes a machine at best."""
        take = self._take
        prompts = len(take.prompts[0]), len(take.prompts[1])
        job = Job(*prompts, frames, kv_bits=take.request.kv_bits)
        work = {each.name: each.seconds for each in self._khala.envelope(job, machine).stages}
        first = self._khala.config.tokens.num_coarse
        work["compose"] *= 1 - take.kept.shape[1] / frames
        work["refine"] *= (self._layers - max(first, self._begun)) / (take.num_codebooks - first)
        return work


@dataclass
class _Reports:
    """Of a stage: when the one before ended, (time, steps done) of its first and its last report,
    and its steps."""

    since: float
    first: tuple[float, int]
    last: tuple[float, int]
    total: int

    def measured(self, steps: int, work: float) -> list[float] | None:
        """Seconds until the first of `steps` steps, and those for a second of `work`."""
        (began, before), (now, done) = self.first, self.last
        if work <= 0:
            return None
        if done > before:
            step = max((now - began) / (done - before), _LEAST_TIME)
            return [max(0.0, began - before * step - self.since), step * steps / work]
        if done >= self.total:
            # All in one step: what it took to start is not told apart.
            return [0.0, max(now - self.since, _LEAST_TIME) / work]
        return None


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
