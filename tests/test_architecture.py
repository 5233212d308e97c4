"""Imports point one way, and raw released ids live nowhere but in the config."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up; a module may import (at its top or inside functions) only from lower ranks.
RANKS = [
    {"errors", "names"},
    {"options", "keys", "places", "awake", "ahead", "tally", "examples_of"},
    {"settings_file", "config", "files", "hub", "tags", "loudness", "player", "mel", "processes"},
    {"halo", "adapter", "attention"},
    {"tokens", "sampling", "ops", "audio", "cleaning", "cache", "clock", "candidates", "words"},
    {"transformer", "quantizer", "tokenizer"},
    {"expected"},
    {"backbone", "superres", "codec", "prompt", "weights", "finish", "picture", "lora"},
    {"request", "machine", "counts"},
    {"take", "lengths", "envelope"},
    {"planning", "preview", "floor", "batch"},
    {"bench"},
    {"song", "stages", "beginning"},
    {"intake", "info", "outlook", "verify", "sensitivity"},
    {"pipeline"},
    {"terminal", "models", "doctor", "goldens"},
    {"song_files"},
    {"candidate_files"},
    {
        "generate_command",
        "take_commands",
        "play_command",
        "models_commands",
        "batch_command",
        "doctor_command",
        "bench_command",
    },
    {"cli"},
]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("khala_mlx"):
            if node.module == "khala_mlx":
                names |= {f"khala_mlx.{alias.name}" for alias in node.names}
            else:
                names.add(str(node.module))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".", 1)[1] for name in names if name.startswith("khala_mlx.")}


def modules() -> dict[str, Path]:
    return {p.stem: p for p in (ROOT / "khala_mlx").glob("*.py") if p.stem != "__init__"}


def test_every_module_has_a_rank() -> None:
    assert set(modules()) == set().union(*RANKS)


@pytest.mark.parametrize(("name", "path"), list(modules().items()))
def test_imports_point_down(name: str, path: Path) -> None:
    rank = next(i for i, names in enumerate(RANKS) if name in names)
    lower = set().union(*RANKS[:rank])
    packages = {
        "cli": {"convert", "train.commands"},
        "song_files": {"convert"},
        "models": {"convert", "convert.partial", "convert.source"},
    }.get(name, set())
    found = imported(path) - packages
    assert found <= lower, f"{name} imports {found - lower}"


@pytest.mark.parametrize("path", [*(ROOT / "khala_mlx/train").glob("*.py")], ids=lambda p: p.stem)
def test_training_stands_on_the_stages(path: Path) -> None:
    found = {name.split(".")[0] for name in imported(path)} - {"train"}
    above = {"cli"}
    if not path.stem.endswith("commands"):
        above |= {"pipeline", "info", "terminal", "convert"}
    assert not found & above


@pytest.mark.parametrize("path", [*(ROOT / "convert").glob("*.py")], ids=lambda p: p.stem)
def test_convert_knows_no_runtime_model(path: Path) -> None:
    allowed = {"adapter", "config", "errors", "files", "hub", "names", "tokens", "tokenizer"}
    found = {name.split(".")[0] for name in imported(path)} - {"convert"}
    assert found <= allowed


@pytest.mark.parametrize("path", [*(ROOT / "khala_mlx").glob("*.py")], ids=lambda p: p.stem)
def test_only_the_config_knows_released_ids(path: Path) -> None:
    if path.stem == "config":
        return
    numbers = {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, int)
    }
    assert not {n for n in numbers if 128000 <= n <= 193792}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("khala_mlx.cli", "mlx"),
        ("khala_mlx.convert", "mlx"),
        ("khala_mlx.pipeline", "mlx_lm"),
        ("khala_mlx.pipeline", "transformers"),
        ("khala_mlx.pipeline", "sounddevice"),
    ],
)
def test_heavy_imports_wait(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names() -> None:
    import khala_mlx

    for name in khala_mlx.__all__:
        assert getattr(khala_mlx, name).__name__ == name
    with pytest.raises(AttributeError, match="Kahla"):
        khala_mlx.Kahla  # noqa: B018
