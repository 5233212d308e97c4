"""The time left of songs, from the rate of the running stage and the plan's estimates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from khala_mlx.pipeline.khala import Khala
from khala_mlx.pipeline.plan import Job
from khala_mlx.song.take import Take

# A song that is longer than expected is expected to become this much longer still.
_BEYOND = 1.05


class Eta:
    """Follows songs of one request through their stages.

    The running stage is extrapolated from its own rate. The stages ahead take what the plan
    estimates, multiplied by how much longer than planned the stages so far have taken.
    """

    def __init__(
        self,
        khala: Khala,
        takes: Sequence[Take],
        codebooks: int | None = None,
        *,
        best: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Follow takes that are refined to `codebooks`; the `best` of them are finished then."""
        self._khala, self._takes, self._clock = khala, list(takes), clock
        self._stages = self._all_stages(codebooks, best)
        self._at = -1
        # When the song and the running stage began; the latter's first report.
        self._start = self._began = clock()
        self._first = 0
        # Planned seconds of the stages that are done.
        self._planned = 0.0

    def __call__(self, stage: str, done: int, total: int) -> tuple[float, float]:
        """Return the seconds left of the stage and of all, when `done` of `total` of it is."""
        now = self._clock()
        if self._at < 0 or self._stages[self._at][0] != stage:
            if self._at >= 0:
                self._planned += self._seconds(self._at)
            ahead = range(self._at + 1, len(self._stages))
            self._at = next(at for at in ahead if self._stages[at][0] == stage)
            self._began, self._first = now, done
        if stage == "compose":
            total = self._expected_steps(done, total)
        share = done / max(1, total)
        planned = self._seconds(self._at)
        slower = (now - self._start) / max(1e-9, self._planned + share * planned)
        left = max(0.0, 1 - share) * planned * slower
        if done > self._first:
            left = max(0, total - done) * (now - self._began) / (done - self._first)
        ahead = range(self._at + 1, len(self._stages))
        return left, left + slower * sum(self._seconds(at) for at in ahead)

    def _all_stages(self, codebooks: int | None, best: int) -> list[tuple[str, int, float]]:
        """Return (name, songs, share of all refine steps) of each stage ahead."""
        coarse, last = self._khala.config.tokens.num_coarse, self._takes[0].num_codebooks
        steps = last - coarse

        def share(begun: int, end: int) -> float:
            return max(0, end - max(coarse, begun)) / steps

        end = codebooks or last
        shares = statistics.mean(share(take.codebooks, end) for take in self._takes)
        songs, new = len(self._takes), sum(not take.codebooks for take in self._takes)
        stages = [("compose", new, 1.0)] if new else []
        stages += [("refine", songs, shares), ("render", songs, 1.0)]
        if best:
            stages += [("refine", best, share(end, last)), ("render", best, 1.0)]
        return stages

    def _seconds(self, at: int) -> float:
        """Return the least seconds that the plan gives a stage."""
        name, songs, share = self._stages[at]
        frames = self._frames()
        backbone, superres = (max(len(t.prompts[part]) for t in self._takes) for part in range(2))
        kv_bits, begun = self._takes[0].request.kv_bits, self._takes[0].prefix.shape[1]
        job = Job(backbone, superres, frames, songs, kv_bits=kv_bits, begun=min(begun, frames - 1))
        plan = self._khala.plan(job)
        return share * next(stage.seconds for stage in plan.stages if stage.name == name)

    def _frames(self) -> int:
        """Return the frames of the songs, or those that the prompt leads to expect."""
        if made := [take.codes.shape[1] for take in self._takes if take.codebooks]:
            return round(statistics.mean(made))
        (most, least), minutes = self._takes[0].budget, self._takes[0].request.minutes
        return max(least, min(most, round(minutes * 60 * self._khala.config.codec.frame_rate)))

    def _expected_steps(self, done: int, total: int) -> int:
        """Return the steps that composing is expected to take, of at most `total`."""
        begun = self._takes[0].prefix.shape[1]
        most = max(1, self._takes[0].budget[0] - begun)
        expected = total * (self._frames() - begun) / most
        return min(total, max(round(expected), round(done * _BEYOND)))
