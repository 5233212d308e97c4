"""kill -9 at random moments of `khala generate`; continuing must give the undisturbed song.

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

from khala_mlx.song.take import Take

pytestmark = pytest.mark.extended

KILLS = int(os.environ.get("KHALA_KILLS", "2"))
TAKE = "song.take.safetensors"
ASKED = ["--tags", "waltz, slow, happy", "--lyrics", "do re mi", "--seconds", "1", "--seed", "1"]
# conftest loads a fast BLAS into this process; a child must do so itself, or the bits differ.
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
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """The song, and how many lines of progress making it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run(folder, *ASKED)
    assert result.returncode == 0, result.stderr
    return (folder / "song.wav").read_bytes(), len(result.stderr.splitlines())


def moment(number: int, lines: int) -> tuple[int, float]:
    """After how many lines of progress, and how many seconds, to kill run `number`.

    By lines and not by the clock, so that all stages are met whatever else the machine does: one
    moment lies in each of as many equal parts of the run.
    """
    draw = random.Random(f"{os.environ.get('KHALA_KILLS_SEED', '0')} {number}")
    return int((lines + 1) * (number + draw.random()) / KILLS), draw.uniform(0, 0.3)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_song_is_finished(
    undisturbed: tuple[bytes, int], tmp_path: Path, number: int
) -> None:
    sound, total = undisturbed
    lines, seconds = moment(number, total)
    process = subprocess.Popen(
        [*START, *ASKED], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    last = "start"
    for _ in range(lines):
        last = process.stderr.readline().strip() or last
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = sorted(path.name for path in tmp_path.iterdir())
    if TAKE in found:
        layers = str(Take.load(tmp_path / TAKE).codebooks)
        result = run(tmp_path, "--resume", TAKE)
    else:
        # So early that nothing was started: the same command again.
        layers = "no"
        assert not [name for name in found if not name.startswith(".")]
        result = run(tmp_path, *ASKED)
    print(f"killed {seconds:.2f} s after {last!r} with {layers} layers, {found}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "song.wav").read_bytes() == sound
    assert sorted(p.name for p in tmp_path.iterdir()) == ["song.json", TAKE, "song.wav"]
