"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from khala_mlx.storage.atomic import appears_whole


def plot_losses(log: Path, picture: Path) -> bool:
    """Draw training and validation losses of a JSONL log; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    names = [n for n in dict.fromkeys(n for e in entries for n in e) if "loss" in n]
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    for name in names:
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        marker = "o" if name.startswith("valid") else ""
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if names:
        axes.legend()
    with appears_whole(picture, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=120)
    return True
