"""The scripts of benchmarks/ run and measure what they say, at sizes that say nothing of speed."""

import importlib.util
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from khala_mlx.config import KhalaConfig

pytestmark = pytest.mark.extended

FOLDER = Path(__file__).parents[2] / "benchmarks"


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
    # A falling line has no factors above zero; the rest is reported.
    assert fitted([1, 2], [2.0, 1.0], (0, 1))["worst"] > 0.2


@pytest.fixture
def packable(tmp_path: Path) -> Path:
    """A tiny model whose matrices are wide enough to be quantized."""
    config, body = KhalaConfig.tiny(), {"hidden_size": 64, "intermediate_size": 128}
    parts = {name: replace(getattr(config, name), **body) for name in ("backbone", "superres")}
    return write_tiny_model(tmp_path / "full", replace(config, **parts))


def test_memory(packable: Path, tmp_path: Path) -> None:
    arguments = [str(packable), "--packings", "plain", "4", "--frames", "8", "--out", str(tmp_path)]
    command = [sys.executable, str(FOLDER / "memory.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| mxfp4 | 0." in result.stdout
    told = json.loads((tmp_path / "memory.json").read_text())
    plain, four = told["measured"]["plain"], told["measured"]["4"]
    for stage in ("compose", "refine"):
        assert four[stage]["file_bytes"] < 0.5 * plain[stage]["file_bytes"]
        # Quantized weights stay quantized, or both would be alike.
        assert four[stage]["peak_bytes"] < plain[stage]["peak_bytes"]
        assert four[stage]["forecast_bytes"] < plain[stage]["forecast_bytes"]
    assert four["render"]["file_bytes"] == plain["render"]["file_bytes"]
    released = told["released"]
    assert released["4"]["refine"]["weights_bytes"] == pytest.approx(1.1e9, rel=0.05)


def test_healthy(packable: Path) -> None:
    command = [sys.executable, str(FOLDER / "healthy.py"), str(packable), "--json"]
    result = subprocess.run(
        [*command, "--packings", "4"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert set(told) == {"float16", "bfloat16", "4"}
    for part in ("backbone", "superres"):
        healthy, packing = (told["4"][kind][f"{part}_nats"] for kind in ("healthy", "packing"))
        # What 4 bits lose is more than what 16 bits round, or one was compared with itself.
        assert packing > healthy


def test_time_left(tiny_folder: Path) -> None:
    script = str(FOLDER / "time_left.py")
    command = [sys.executable, script, "--songs", "1", "--", "-m", str(tiny_folder)]
    command += ["--tags", "pop", "--seconds", "0.5"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "song 1: " in result.stdout
    tell = runpy.run_path(script)
    told = tell["rows"](
        40.0,
        [(2.0, "compose 9 %  0:01 left, song 1:40"), (20.0, "render 9 %  0:12 left")],
    )
    assert told == [(0.05, "compose", 100.5, 38.0), (0.5, "render", 12.5, 20.0)]
    # Too early, the first counts for nothing; the second is 7.5 s off, one of them for rounding.
    assert tell["worst"](told) == 6.5 / 20


def test_refining_together() -> None:
    rows = ["--rows", "4", "9", "--turns", "1", "--songs", "2", "--json"]
    told = json.loads(run("refine_together.py", *rows))
    assert [each["rows"] for each in told] == [4, 9]
    assert all(each["gain"] == each["in_turn"] / each["together"] for each in told)


def test_against_torch() -> None:
    pytest.importorskip("torch")
    small = ["--cached", "8", "--tokens", "4", "--rows", "20", "--steps", "2", "--frames", "2"]
    told = json.loads(run("against_torch.py", *small, "--turns", "1", "--json"))
    for stage in ("compose", "refine", "render"):
        figures = told[stage]
        assert figures["times"] == figures["torch_seconds"] / figures["mlx_seconds"]


@pytest.fixture
def floor() -> Any:
    spec = importlib.util.spec_from_file_location("floor_gate", FOLDER / "floor.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report_of(*ratios: float) -> dict[str, Any]:
    stages = zip(("compose", "refine", "render"), ratios, strict=True)
    return {stage: {"floor_ratio": ratio} for stage, ratio in stages}


@pytest.mark.parametrize(
    ("reports", "failing", "attempts"),
    [
        ([(1.24, 0.9, 1.2)], [], 1),
        # Each attempt has an outlier of its own.
        ([(3, 1, 1), (1, 3, 1), (3, 3, 1)], [], 2),
        # A regression stays, whatever the others do.
        ([(1.3, 3, 1), (1.27, 1, 3), (1.9, 1, 1)], ["compose.floor_ratio"], 3),
    ],
)
def test_the_gate(
    floor: Any, tmp_path: Path, reports: list[Any], failing: list[str], attempts: int
) -> None:
    path, made = tmp_path / "figures.json", iter([(1.0, 1.0, 1.0), *reports])
    path.write_text(json.dumps({"arguments": ["--turns", "1"]}))
    asked = []

    def bench(arguments: list[str]) -> dict[str, Any]:
        asked.append(arguments)
        return report_of(*next(made))

    floor.bench = bench
    floor.write(path, 1)
    assert floor.worse(path) == failing
    assert asked == [["--turns", "1"]] * (1 + attempts)
    # Ratios of another device say nothing here, and nothing is measured.
    floor.device = lambda: "another"
    assert floor.worse(path) == []


def test_the_gate_runs(tmp_path: Path) -> None:
    """Figures that cannot be met, but for refine's."""
    path = tmp_path / "figures.json"
    sizes = "--random 1 128 --cached 8 --rows 16 --chunk-frames 1 --turns 1"
    committed = json.loads((FOLDER / "floor.json").read_text())
    figures = report_of(0.01, 1000, 0.01) | {"device": committed["device"]}
    path.write_text(json.dumps(figures | {"arguments": sizes.split()}))
    command = [sys.executable, str(FOLDER / "floor.py"), "--figures", str(path), "--attempts", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "not compared" in result.stdout:
        pytest.skip("the committed figures are of another device")
    assert result.returncode == 1
    assert "attempt 1" in result.stdout
    assert result.stderr.endswith("baseline: compose.floor_ratio, render.floor_ratio.\n")


def test_compiled() -> None:
    printed = run("compiled.py", "--cached", "4", "--tokens", "2", "--rows", "8", "--turns", "1")
    for stage in ("compose", "refine"):
        assert any(line.startswith(stage) for line in printed.splitlines())
    # A piece for each side of attention, traced once.
    assert printed.count("2 traces a layer") == 2
