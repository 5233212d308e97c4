"""How right the time left is that `khala generate` shows, on a terminal and in real time.

    python benchmarks/time_left.py --songs 3 -- --tags waltz --lyrics "do re mi" --seconds 12

Makes songs of seeds 1, 2, ... one after the other, with a cache of their own, so that the first
knows of no other; prints by tenths of each run what was shown and what was true, and the largest
error of what was left after the first tenth, beyond the second that the display rounds away.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# (share of the run, stage, seconds shown as left, seconds truly left)
Row = tuple[float, str, float, float]
SHOWN = re.compile(r"(?:song|all) (\d+):(\d\d)")
OF_THE_LAST_STAGE = re.compile(r"(\d+):(\d\d) left")


def on_a_terminal(arguments: list[str], cache: Path) -> tuple[float, list[tuple[float, str]]]:
    """Seconds of a run of khala, and what its progress bar showed when."""
    leader, follower = pty.openpty()
    khala = "from khala_mlx.cli import main; main()"
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", khala, *arguments],
        stderr=follower,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "KHALA_CACHE": str(cache)},
    )
    os.close(follower)
    seen: list[tuple[float, str]] = []
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:
            break
        if not data:
            break
        now = time.monotonic() - began
        seen += [(now, line) for line in data.decode(errors="replace").split("\r") if "%" in line]
    os.close(leader)
    if process.wait():
        sys.exit("khala generate failed.")
    return time.monotonic() - began, seen


def rows(total: float, seen: list[tuple[float, str]]) -> list[Row]:
    """What was shown beside what was true."""
    told = []
    for at, line in seen:
        if found := SHOWN.search(line) or OF_THE_LAST_STAGE.search(line):
            # 0:07 stands for anything from 7 to 8 seconds.
            left = 60 * int(found[1]) + int(found[2]) + 0.5
            told.append((at / total, line.split()[0], left, total - at))
    return told


def worst(told: list[Row]) -> float:
    """The largest error of what is left after a tenth, as a share, beyond one second."""
    errors = [max(0.0, abs(shown - true) - 1) / true for at, _, shown, true in told if at >= 0.1]
    return max(errors, default=0.0)


def main() -> None:
    """Make songs, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--songs", type=int, default=3)
    parser.add_argument("generate", nargs="+", help="Options of khala generate, behind --.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, options.songs + 1):
            output = str(Path(folder, f"{seed}.wav"))
            arguments = ["generate", *options.generate, "--seed", str(seed), "-o", output]
            total, seen = on_a_terminal(arguments, Path(folder, "cache"))
            told = rows(total, seen)
            print(f"song {seed}: {total:.1f} s, worst error {worst(told):.0%}")
            tenth = 0
            for at, stage, shown, true in told:
                if at >= tenth / 10:
                    print(f"{at:6.0%} {stage:<8} shown {shown:6.1f} s, true {true:6.1f} s")
                    tenth = int(10 * at) + 1


if __name__ == "__main__":
    main()
