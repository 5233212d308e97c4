import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_model import write_tiny_model

from khala_mlx import Khala, KhalaError
from khala_mlx.cli import main
from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert
from khala_mlx.quality.divergence import against


@pytest.fixture(scope="module")
def packed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    made = {}
    for how in ("8", "4"):
        made[how] = folder / how
        convert(tiny_folder, made[how], dtype="float32", quantize=how, group_size=32)
    return made


def test_fewer_bits_are_further_away(tiny_folder: Path, packed: dict[str, Path]) -> None:
    def told(folder: Path) -> dict[str, float]:
        return against(Khala.from_pretrained(folder), Khala.from_pretrained(tiny_folder), frames=24)

    same, eight, four = told(tiny_folder), told(packed["8"]), told(packed["4"])
    assert same["kl_nats"] == same["codes_changed"] == 0
    assert same["top1_agreement"] == 1
    assert 0 < eight["kl_nats"] < four["kl_nats"]
    assert eight["codes_changed"] < four["codes_changed"]
    assert eight["top1_agreement"] > four["top1_agreement"]


def test_the_command(tiny_folder: Path, packed: dict[str, Path]) -> None:
    arguments = ["models", "verify", str(packed["4"]), "--against", str(tiny_folder)]
    result = CliRunner().invoke(main, [*arguments, "--frames", "8", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["kl_nats"] > 0
    result = CliRunner().invoke(main, [*arguments, "--frames", "8"])
    assert "top1_agreement" in result.stdout
    assert "%" in result.stdout


def test_other_shapes_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    config = KhalaConfig.tiny()
    config = replace(config, backbone=replace(config.backbone, num_layers=1))
    other = write_tiny_model(tmp_path / "other", config)
    with pytest.raises(KhalaError, match="their backbone have other sizes"):
        against(Khala.from_pretrained(other), Khala.from_pretrained(tiny_folder))
