"""The scripts of benchmarks/ run and measure what they say, at sizes that say nothing of speed."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / script), "--layers", "1", "--width", "128", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_growth(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    printed = run(
        "growth.py", "--turns", "1", "--seconds", "0.1", "0.2", "0.3", "--candidates", "1", "2",
        "--candidate-seconds", "0.1", "--out", str(tmp_path),
    )  # fmt: skip
    told = json.loads((tmp_path / "growth.json").read_text())
    assert set(told["stages"]) == {"compose", "refine", "render"}
    for stage, figures in told["stages"].items():
        assert f"| {stage} | " in printed
        assert len(figures["by_length"]) == 3
        assert min(figures["by_length"] + figures["by_candidates"]) > 0
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_laws_are_found() -> None:
    fitted = runpy.run_path(str(FOLDER / "growth.py"))["fitted"]
    x = [10.0, 30.0, 60.0, 120.0, 360.0]
    law = fitted(x, [2 * s + 0.01 * s * s for s in x], (0, 1, 2))
    assert law["worst"] < 1e-6
    assert law["factors"][1] == pytest.approx(2)
    assert law["factors"][2] == pytest.approx(0.01)
    # A falling line has no factors above zero; the rest is told.
    assert fitted([1, 2], [2.0, 1.0], (0, 1))["worst"] > 0.2


def test_against_torch() -> None:
    pytest.importorskip("torch")
    small = ["--cached", "8", "--tokens", "4", "--rows", "20", "--steps", "2", "--frames", "2"]
    told = json.loads(run("against_torch.py", *small, "--turns", "1", "--json"))
    for stage in ("compose", "refine", "render"):
        figures = told[stage]
        assert figures["times"] == figures["torch_seconds"] / figures["mlx_seconds"]
