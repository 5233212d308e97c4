"""Compare the stages with their kernel baselines, and the ratios with the committed figures.

    python benchmarks/floor.py              compare with floor.json; exit code 1 if a ratio is worse
    python benchmarks/floor.py --write 11   measure so often, write the medians

Runs `khala bench` in processes of their own, at the sizes that floor.json names. A ratio counts as
worse only if it is so in every attempt: what shares the machine passes, a regression stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from khala_mlx.performance.bench import RATIOS, WORSE, compared

FIGURES = Path(__file__).with_name("floor.json")
ATTEMPTS = 3


def bench(arguments: list[str]) -> dict[str, Any]:
    """The report of `khala bench --json` with these arguments."""
    khala = "from khala_mlx.cli import main; main()"
    command = [sys.executable, "-c", khala, "bench", "--json", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(result.returncode)
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """The ratio to the kernel baseline of each stage, by name."""
    return {name: change["new"] for name, change in compared(report, report).items()}


def device() -> str:
    """What ratios depend on most."""
    return f"{sys.platform}, {mx.default_device()}"


def write(path: Path, times: int) -> None:
    """Replace the figures by the medians of so many reports."""
    figures = json.loads(path.read_text(encoding="utf-8"))
    reports = [bench(figures["arguments"]) for _ in range(times)]
    runs = {name: sorted(ratios(report)[name] for report in reports) for name in RATIOS}
    for name, values in runs.items():
        print(f"{name:<20}", *(f"{value:.2f}" for value in values))
        figures[name.split(".")[0]] = {"floor_ratio": round(statistics.median(values), 3)}
    figures["device"] = device()
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def worse(path: Path, attempts: int = ATTEMPTS) -> list[str]:
    """The ratios that are too far above the figures in every attempt."""
    figures, least = json.loads(path.read_text(encoding="utf-8")), dict[str, float]()
    if device() != figures["device"]:
        print(f"{path.name} is of {figures['device']}, this is {device()}: not compared.")
        return []
    failing: list[str] = []
    for attempt in range(1, attempts + 1):
        report = bench(figures["arguments"])
        for name, ratio in ratios(report).items():
            least[name] = min(ratio, least.get(name, ratio))
            stage, key = name.split(".")
            report[stage][key] = least[name]
        print(f"{' '.join(figures['arguments'])}, attempt {attempt}")
        changes = compared(report, figures)
        for name, change in changes.items():
            old, new = change["old"], change["new"]
            print(f"{name:<20} {old:.2f} -> {new:.2f} ({change['change']:+.0%})")
        failing = [name for name, change in changes.items() if change["change"] > WORSE]
        if not failing:
            break
    return failing


def main() -> None:
    """Compare or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--attempts", type=int, default=ATTEMPTS)
    parser.add_argument("--write", type=int, metavar="TIMES")
    options = parser.parse_args()
    if options.write:
        write(options.figures, options.write)
    elif failing := worse(options.figures, options.attempts):
        sys.exit(f"More than {WORSE:.0%} further from the kernel baseline: {', '.join(failing)}.")


if __name__ == "__main__":
    main()
