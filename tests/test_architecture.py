"""Folders import one way, they stay small, and raw released ids live nowhere but in the config."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "khala_mlx"
# A folder (or a module beside them) imports only from itself and from lines above its own.
FLOORS = [
    {"errors", "text"},
    {"config", "distributed"},
    {"token_ids", "storage"},
    {"model", "prompt", "audio"},
    {"song", "performance", "convert"},
    {"pipeline", "train", "library"},
    {"quality"},
    {"cli"},
]
SOURCES = {
    path: (*prefix, *path.relative_to(folder).with_suffix("").parts)
    for folder, prefix in ((PACKAGE, ()), (ROOT / "convert", ("convert",)))
    for path in sorted(folder.rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """What a module imports from this package, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("khala_mlx"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".", 1)[1] for name in names if name.startswith("khala_mlx.")}


@pytest.mark.parametrize("path", list(SOURCES), ids=lambda p: str(p.relative_to(ROOT)))
def test_folders_import_one_way(path: Path) -> None:
    folder = SOURCES[path][0]
    if folder == "__init__":
        return
    floor = next(n for n, names in enumerate(FLOORS) if folder in names)
    allowed = {folder}.union(*FLOORS[:floor])
    assert {name.split(".")[0] for name in imported(path)} <= allowed


def test_folders_stay_small() -> None:
    folders = {path.parent for path in SOURCES}
    sizes = {folder: len([*folder.glob("*.py")]) - 1 for folder in folders}
    assert sizes.pop(PACKAGE) <= 6
    assert max(sizes.values()) <= 14, sizes


@pytest.mark.parametrize("path", list(SOURCES), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_knows_click(path: Path) -> None:
    assert SOURCES[path][0] == "cli" or "click" not in path.read_text().split()


@pytest.mark.parametrize("path", list(SOURCES), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_config_knows_released_ids(path: Path) -> None:
    # The converter knows what the published checkpoints hold.
    if path.stem == "config" or SOURCES[path][0] == "convert":
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
        ("khala_mlx.cli.main", "mlx"),
        ("khala_mlx.convert", "mlx"),
        ("khala_mlx.pipeline.khala", "mlx_lm"),
        ("khala_mlx.pipeline.khala", "transformers"),
        ("khala_mlx.pipeline.khala", "sounddevice"),
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
