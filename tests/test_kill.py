"""kill -9 at random moments of `khala generate`; going on has to give the undisturbed song.

KHALA_KILLS says how many (the default is for CI), KHALA_KILLS_SEED which.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from khala_mlx.take import Take

KILLS = int(os.environ.get("KHALA_KILLS", "2"))
TAKE = "song.take.safetensors"
ASKED = ["--tags", "waltz, slow, happy", "--lyrics", "do re mi", "--seconds", "1", "--seed", "1"]
# conftest loads a fast BLAS into this process; a child has to do so itself, or the bits differ.
START = [
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest\n"
    "from khala_mlx.cli import main; main()",
    "generate",
]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*START, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, float]:
    """The song, and the seconds that making it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    began = time.perf_counter()
    result = run(folder, *ASKED)
    taken = time.perf_counter() - began
    assert result.returncode == 0, result.stderr
    return (folder / "song.wav").read_bytes(), taken


def moments(taken: float) -> list[float]:
    """Seconds after the start: one drawn from each of as many equal parts of the run."""
    draw = random.Random(int(os.environ.get("KHALA_KILLS_SEED", "0")))
    return [taken * (number + draw.random()) / KILLS for number in range(KILLS)]


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_song_is_finished(
    undisturbed: tuple[bytes, float], tmp_path: Path, number: int
) -> None:
    sound, taken = undisturbed
    process = subprocess.Popen([*START, *ASKED], cwd=tmp_path, stderr=subprocess.DEVNULL)
    time.sleep(moments(taken)[number])
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = sorted(path.name for path in tmp_path.iterdir())
    if TAKE in found:
        layers = str(Take.load(tmp_path / TAKE).layers)
        result = run(tmp_path, "--resume", TAKE)
    else:
        # So early that nothing was begun: the same command again.
        layers = "none"
        assert not [name for name in found if not name.startswith(".")]
        result = run(tmp_path, *ASKED)
    print(f"killed with {layers} layers, {found}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "song.wav").read_bytes() == sound
    assert sorted(p.name for p in tmp_path.iterdir()) == ["song.json", TAKE, "song.wav"]
