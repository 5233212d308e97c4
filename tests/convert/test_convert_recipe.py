from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from khala_mlx import Khala
from khala_mlx.cli import main
from khala_mlx.config import KhalaConfig, Quantization
from khala_mlx.convert import convert
from khala_mlx.convert.recipe import recipe
from khala_mlx.errors import ConvertError

EIGHT, FOUR = Quantization(8, 64), Quantization(4, 64)


def test_parts_apart_from_the_rest() -> None:
    chosen = recipe("4", 64, {"head": "8", "superres": "none"})
    matrix = (128, 64)
    assert chosen.how("backbone", "lm_head.weight", matrix) == EIGHT
    assert chosen.how("backbone", "layers.0.mlp.up_proj.weight", matrix) == FOUR
    assert chosen.how("superres", "lm_head.weight", matrix) is None
    assert chosen.how("backbone", "norm.weight", (64,)) is None
    assert chosen.how("backbone", "lm_head.weight", (128, 65)) is None
    assert recipe(None, 64, {"embedding": 6}).how(
        "superres", "embed_tokens.weight", matrix
    ) == Quantization(6, 64)
    assert not recipe(None, 64, {"head": "none"})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("5", 64, None), "4, 6, 8, mxfp4, mxfp8, got 5"),
        (("4", 48, None), "group_size must be one of 32, 64, 128, got 48"),
        (("4", 64, {"codec": "4"}), "embedding, head, body, superres, got codec"),
        ((None, 64, {"head": "two"}), "got two"),
    ],
)
def test_wrong_recipes(arguments: Any, sentence: str) -> None:
    with pytest.raises(ConvertError, match=sentence):
        recipe(*arguments)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_block_floats_are_stored_as_mlx_makes_them(
    tiny_folder: Path, tmp_path: Path, mode: str
) -> None:
    report = convert(tiny_folder, tmp_path / "packed", dtype="bfloat16", quantize=mode)
    assert report["quantization"]["mode"] == mode
    plain = mx.load(str(tiny_folder / "backbone.safetensors"))
    packed = mx.load(str(tmp_path / "packed" / "backbone.safetensors"))
    assert isinstance(plain, dict)
    assert isinstance(packed, dict)
    bits = int(mode[-1])
    for name in ("lm_head", "layers.1.mlp.down_proj"):
        wanted = mx.quantize(
            plain[f"{name}.weight"].astype(mx.bfloat16), group_size=32, bits=bits, mode=mode
        )
        assert len(wanted) == 2
        assert mx.array_equal(packed[f"{name}.weight"], wanted[0])
        assert mx.array_equal(packed[f"{name}.scales"], wanted[1])
        assert f"{name}.biases" not in packed
    song = Khala.from_pretrained(tmp_path / "packed").compose(
        np.arange(9), max_frames=5, min_frames=5
    )
    assert song.shape == (2, 5)


def test_the_command_mixes(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(tiny_folder), str(tmp_path / "mixed"), "--dtype", "float32"]
    arguments += ["--quantize", "4", "--group-size", "32", "--quantize-part", "head=8"]
    result = CliRunner().invoke(main, [*arguments, "--quantize-part", "superres=none"])
    assert result.exit_code == 0, result.stderr
    found = KhalaConfig.load(tmp_path / "mixed" / "config.json").quantization
    assert found["backbone.lm_head"].bits == 8
    assert found["backbone.embed_tokens"].bits == 4
    assert not any(name.startswith("superres") for name in found)
    card = (tmp_path / "mixed" / "README.md").read_text()
    assert "4 bits in groups of 32" in card
    assert "8 bits in groups of 32" in card
    told = CliRunner().invoke(
        main, [*arguments[:2], str(tmp_path / "x"), "--quantize-part", "head"]
    )
    assert told.exit_code == 2
    assert "given as in head=8" in told.stderr
