"""A newcomer's ten tasks: exactly the commands of docs/cookbook.md, on tiny models.

Environment variables select a tiny model instead of the bundled demo model, and make songs and
training short.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from fake_checkpoints import Sizes, write_megatron, write_tokenizer

from khala_mlx import Khala
from khala_mlx.audio import tags
from khala_mlx.cli import main
from khala_mlx.config import KhalaConfig
from khala_mlx.quality import goldens

COOKBOOK = (Path(__file__).parents[1] / "docs/cookbook.md").read_text()


def commands(title: str) -> list[str]:
    """Return the first block of commands below a title, at most two."""
    section = COOKBOOK.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    block = re.findall(r"```bash\n(.*?)```", section, flags=re.S)[0].splitlines()
    assert len(block) <= 2
    return block


def do(title: str) -> None:
    for line in commands(title):
        run(line)


def run(line: str) -> None:
    import shlex

    result = CliRunner().invoke(main, shlex.split(line)[1:])
    assert result.exit_code == 0, f"{line}\n{result.stderr}"


@pytest.fixture(scope="module")
def workshop(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with the files that the recipes need; the songs go there too."""
    folder = tmp_path_factory.mktemp("newcomer")
    # Wide enough to be quantized in groups of 64.
    sizes = Sizes(layers=1, heads=4, groups=2, head_dim=16, hidden=64, ffn=64)
    write_megatron(folder / "checkpoints", sizes)
    write_tokenizer(folder)
    shutil.copytree(tiny_folder, folder / "tiny")
    (folder / "words.txt").write_text("[Verse 1]\ndo re mi\n")
    (folder / "my-songs").mkdir()
    for number in range(3):
        wave = np.random.default_rng(number).normal(size=(20_000, 2)) * 0.1
        soundfile.write(folder / f"my-songs/{number}.wav", wave, 44100)
        (folder / f"my-songs/{number}.lyrics.txt").write_text("la la")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KHALA_CONFIG", str(folder / "none.toml"))
        patch.setenv("KHALA_MODEL", str(folder / "tiny"))
        for name, value in {"SECONDS": "0.5", "MIN_SECONDS": "0.5"}.items():
            patch.setenv(f"KHALA_GENERATE_{name}", value)
        for name, value in {"STEPS": "2", "RANK": "2", "LAYERS": "1", "BATCH_SIZE": "1"}.items():
            patch.setenv(f"KHALA_TRAIN_LORA_{name}", value)
        yield folder


pytestmark = pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")


def test_1_a_first_song(workshop: Path) -> None:
    do("A first song")
    assert soundfile.info("first.wav").duration > 0


def test_2_own_words(workshop: Path) -> None:
    do("Your own words")
    assert "do re mi" in Path("words.json").read_text()


def test_3_an_instrumental(workshop: Path) -> None:
    do("An instrumental")
    assert soundfile.info("instrumental.wav").duration > 0


def test_4_a_second_take(workshop: Path) -> None:
    do("A second take")
    assert Path("first.wav").read_bytes() != Path("second.wav").read_bytes()
    run("khala refine first.take.safetensors --seed 5 -o other-detail.wav")
    assert "khala refine first.take.safetensors --seed 5 -o other-detail.wav" in COOKBOOK


def test_5_a_longer_song(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without --seconds: the tiny model's window is the limit.
    monkeypatch.delenv("KHALA_GENERATE_SECONDS")
    monkeypatch.setenv("KHALA_GENERATE_SEED", "1")
    Path("long").mkdir()
    monkeypatch.chdir("long")
    do("A first song")
    do("A longer song")
    # --min-seconds prevented the end until the window was full.
    assert soundfile.info("longer.wav").duration >= soundfile.info("first.wav").duration
    assert '"min_seconds": 100.0' in Path("longer.json").read_text()


def test_6_an_mp3_with_tags(workshop: Path) -> None:
    do("An mp3 with tags")
    told = tags.read(Path("waltz.mp3"))
    assert (told["title"], told["artist"]) == ("First Waltz", "me")


def test_7_resume_after_a_kill(workshop: Path) -> None:
    whole = Path("words.wav").read_bytes()
    for name in ("words.wav", "words.json", "words.take.safetensors"):
        Path(name).unlink()
    seed = "3"
    environment = {**os.environ, "KHALA_GENERATE_SEED": seed}
    code = (
        "import os, signal\n"
        "from khala_mlx.model.superres import SuperRes\n"
        "SuperRes.refine = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from khala_mlx.cli import main\n"
        "main()\n"
    )
    words = commands("Your own words")[0].split('"')
    arguments = [words[0].split()[2], words[1], *words[2].split()]
    killed = subprocess.run(
        [sys.executable, "-c", code, "generate", *arguments],
        env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert not Path("words.wav").exists()
    do("After a crash, a power cut, Ctrl-C")
    assert len(Path("words.wav").read_bytes()) > len(whole) // 2


def test_8_convert(workshop: Path) -> None:
    do("Checkpoints to a model folder")
    assert KhalaConfig.load(Path("khala-model/config.json")).fc1_bias == "double"
    assert KhalaConfig.load(Path("khala-8bit/config.json")).quantization


def test_9_a_style_of_ones_own(workshop: Path) -> None:
    shutil.rmtree("khala-model", ignore_errors=True)
    shutil.copytree("tiny", "khala-model")
    do("A style of your own")
    run('khala generate -m khala-model --adapter my-style --tags "slow rock" -o mine.wav')
    assert soundfile.info("mine.wav").duration > 0


def test_10_verify(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the bundled demo model takes half a minute; here its name stands for the tiny one.
    khala = Khala.from_pretrained("tiny")
    goldens.record(khala)
    monkeypatch.setattr("khala_mlx.pipeline.khala.Khala.from_pretrained", lambda *_, **__: khala)
    do("Is it computing right here?")
