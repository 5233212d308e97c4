import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from khala_mlx import Khala, goldens
from khala_mlx.cli import main
from khala_mlx.errors import KhalaError


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def test_a_model_agrees_with_itself(folder: Path) -> None:
    khala = Khala.from_pretrained(folder)
    before = khala.fingerprint
    goldens.record(khala)
    assert khala.fingerprint == before
    told = goldens.check(Khala.from_pretrained(folder))
    assert told == {"tokens": 1.0, "superres": 1.0, "codec_snr_db": 200.0, "holds": True}
    with pytest.raises(KhalaError, match="exists already"):
        goldens.record(khala)


@pytest.mark.parametrize(
    ("part", "figure"),
    [("backbone", "tokens"), ("superres", "superres"), ("codec", "codec_snr_db")],
)
def test_a_part_that_computes_something_else_is_found(folder: Path, part: str, figure: str) -> None:
    goldens.record(Khala.from_pretrained(folder))
    khala = Khala.from_pretrained(folder)
    model = getattr(khala, part)
    # As a wrong kernel would: noise where there were weights.
    key = mx.random.key(3)
    model.apply(lambda x: mx.random.normal(x.shape, key=key) if x.ndim > 1 else x)
    told = goldens.check(khala)
    assert not told["holds"]
    least = {"tokens": 0.8, "superres": 0.7, "codec_snr_db": 30}
    assert told[figure] < least[figure]
    assert all(told[other] >= wanted for other, wanted in least.items() if other != figure)


def test_the_command(folder: Path) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, ["models", "verify", str(folder), *arguments])
        return result.exit_code, result.stdout, result.stderr

    code, _, errors = run()
    assert code == 1
    assert "has no goldens" in errors
    assert run("--record")[0] == 0
    code, told, _ = run("--json")
    assert code == 0
    assert json.loads(told)["holds"]
    (folder / goldens.FILE).write_bytes(b"\xff" * 99)
    code, _, errors = run()
    assert code == 1
    assert "damaged" in errors
    assert "Traceback" not in errors


def test_goldens_of_other_weights(folder: Path, tmp_path: Path) -> None:
    from tiny_model import write_tiny_model

    goldens.record(Khala.from_pretrained(folder))
    other = write_tiny_model(tmp_path / "other", seed=5)
    shutil.copy(folder / goldens.FILE, other / goldens.FILE)
    with pytest.raises(KhalaError, match="of other weights"):
        goldens.check(Khala.from_pretrained(other))
