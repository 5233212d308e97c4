"""Run the short scripts of examples/, and check the commands of docs/cookbook.md."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import soundfile

from khala_mlx.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("finished_file", ["finished.mp3"]),
        ("stages", ["stages.wav"]),
        ("other_detail", ["detail-1.wav", "detail-2.wav"]),
        ("several_seeds", ["seed-1.wav", "seed-2.wav", "seed-3.wav"]),
    ],
)
def test_scripts(
    name: str, files: list[str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, str(tiny_folder), "0.5"])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    for file in files:
        assert 0 < soundfile.info(file).duration <= 0.55


def test_reencoding(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import numpy as np

    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", np.random.default_rng(0).normal(size=(5000, 2)) * 0.1, 44100)
    monkeypatch.setattr(sys, "argv", ["reencode", "a.wav", str(tiny_folder)])
    runpy.run_path(str(ROOT / "examples/reencode.py"))
    assert "SNR" in capsys.readouterr().out
    assert soundfile.info("reencoded.wav").frames == 5000


def documented() -> list[str]:
    text = (ROOT / "docs/cookbook.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.mark.parametrize("line", documented())
def test_the_cookbooks_commands_exist(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that each command accepts its options and arguments; test_newcomer runs some."""
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("la")
    words = shlex.split(line)
    if words[0] == "mlx.launch":
        words = words[words.index("--") + 1 :]
    assert words[0] == "khala"
    group, rest = main, words[1:]
    while hasattr(command := group.commands[rest[0]], "commands"):
        group, rest = command, rest[1:]
    command.make_context(rest[0], rest[1:])
