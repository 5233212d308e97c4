"""Times the stages of a song and names the stage in progress reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]


@contextmanager
def timed(
    seconds: dict[str, float], stage: str, on_progress: Progress | None, part: int = 0, of: int = 1
) -> Iterator[Callable[[int, int], None]]:
    """Time a stage, or one part of several alike, and name it in progress reports.

    The time is added to what `seconds` holds, that of an earlier run perhaps.
    """

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(stage, part * total + done, of * total)

    began = time.perf_counter()
    yield report
    taken = time.perf_counter() - began
    seconds[stage] = round(seconds.get(stage, 0.0) + taken, 3)
