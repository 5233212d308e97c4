"""examples/fine_tune, as it is documented, on a tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from khala_mlx.storage.adapter import Adapter

pytestmark = pytest.mark.extended

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "fine_tune"


def commands(text: str) -> list[str]:
    """The khala commands of a script or a document, each on one line."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in joined.splitlines() if line.strip().startswith("khala ")]


def test_the_documents_show_the_commands_of_the_script() -> None:
    script = commands((EXAMPLE / "fine_tune.sh").read_text())
    script = [line.replace('"$model"', "demo").replace('"$steps"', "120") for line in script]
    assert len(script) == 6
    shown = commands((EXAMPLE / "README.md").read_text())
    assert shown == script
    shown = commands((ROOT / "docs" / "fine-tuning.md").read_text())
    first = shown.index(script[0])
    assert shown[first : first + len(script)] == script


def test_it_runs_from_songs_to_a_fused_model(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    done = subprocess.run(
        ["bash", str(EXAMPLE / "fine_tune.sh"), str(tmp_path / "work")],
        env={
            **os.environ,
            # The commands of this very environment.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **{"MODEL": str(model), "STEPS": "2", "SONGS": "2", "OLD": "2"},
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    Adapter.load(work / "chiptune")
    log = [json.loads(line) for line in (work / "chiptune" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [0, 1, 2]
    assert re.search(r"^forget_change +[+-][\d.]+ %", done.stdout, re.M)
    assert (work / "pairs" / "index.html").exists()
    assert (work / "chiptune.wav").stat().st_size > 1000
    assert (work / "chiptune-model" / "config.json").exists()
