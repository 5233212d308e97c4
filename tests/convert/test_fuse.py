"""`khala train fuse`: a model folder that sings what the model sang with its adapters."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_model import write_tiny_model
from tiny_songs import random_adapter, write_songs
from tolerances import CLOSE

from khala_mlx import Khala, KhalaError
from khala_mlx.cli import main
from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert, export_adapter, fuse
from khala_mlx.storage.adapter import backbone_id

CONFIG = KhalaConfig.tiny()
IDS = np.arange(40)[None] % 300
ADAPTERS = [
    (random_adapter(CONFIG, "one"), 0.8),
    (random_adapter(CONFIG, "two", seed=1, dora=True), 0.5),
]


def with_adapters(folder: Path) -> Any:
    khala = Khala.from_pretrained(folder)
    khala.load_adapters([each for each, _ in ADAPTERS], [scale for _, scale in ADAPTERS])
    return khala


def sung(khala: Khala) -> np.ndarray:
    return khala.generate(tags="pop", seconds=0.2, min_seconds=0.2, seed=1).codes


def test_the_fused_model_is_the_adapted_one(tiny_folder: Path, tmp_path: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    told = fuse(
        tiny_folder, ADAPTERS, tmp_path / "fused", on_progress=lambda *all: progress.append(all)
    )
    assert told["layers"] == 14
    assert progress[-1][1] == progress[-1][2]
    fused, adapted = Khala.from_pretrained(tmp_path / "fused"), with_adapters(tiny_folder)
    assert np.abs(fused.backbone(IDS) - adapted.backbone(IDS)).max() < 20 * CLOSE
    assert np.array_equal(sung(fused), sung(adapted))
    names = {path.name for path in (tmp_path / "fused").iterdir()}
    assert {"README.md", "config.json", "tokenizer.json", "codec.safetensors"} <= names
    # It is a model of its own: adapters of the one it was made from do not fit.
    record = fused.config.source["fused"]
    assert [(each["name"], each["scale"]) for each in record] == [("one", 0.8), ("two", 0.5)]
    assert backbone_id(fused.config) != backbone_id(CONFIG)
    # Nor does what is fused again forget what it was.
    fuse(tmp_path / "fused", ADAPTERS[:1], tmp_path / "twice")
    again = KhalaConfig.load(tmp_path / "twice" / "config.json")
    assert [each["name"] for each in again.source["fused"]] == ["one", "two", "one"]


def test_half_precision_stays(tiny_folder: Path, tmp_path: Path) -> None:
    convert(tiny_folder, tmp_path / "half", dtype="bfloat16")
    fuse(tmp_path / "half", ADAPTERS, tmp_path / "fused")
    stored = mx.load(str(tmp_path / "fused" / "backbone.safetensors"))
    assert {array.dtype for array in stored.values()} == {mx.bfloat16}
    fused, adapted = Khala.from_pretrained(tmp_path / "fused"), with_adapters(tmp_path / "half")
    difference = np.abs(fused.backbone(IDS) - adapted.backbone(IDS))
    assert difference.max() < 0.2 < np.abs(fused.backbone(IDS)).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_layers_become_plain_and_nothing_is_rounded_away(
    tiny_folder: Path, tmp_path: Path, dtype: str
) -> None:
    convert(tiny_folder, tmp_path / "packed", dtype=dtype, quantize=4, group_size=32)
    small = random_adapter(CONFIG, "small", size=0.02)
    attention = {path: pair for path, pair in small.pairs.items() if "self_attn" in path}
    small = dataclasses.replace(small, pairs=attention)
    told = fuse(tmp_path / "packed", [(small, 1.0)], tmp_path / "fused")
    assert told["unpacked"] == 8
    config = KhalaConfig.load(tmp_path / "fused" / "config.json")
    assert "backbone.layers.0.self_attn.q_proj" not in config.quantization
    assert "backbone.layers.0.mlp.up_proj" in config.quantization
    fused, adapted = (Khala.from_pretrained(tmp_path / name) for name in ("fused", "packed"))
    base = adapted.backbone(IDS)
    adapted.load_adapters([small])
    expected = adapted.backbone(IDS)
    away = np.abs(fused.backbone(IDS) - expected).max()
    assert away < (20 * CLOSE if dtype == "float32" else 0.02) < np.abs(expected - base).max()


def test_scale_0_fuses_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    fuse(tiny_folder, [(ADAPTERS[0][0], 0.0)], tmp_path / "same")
    stored = (tmp_path / "same", tiny_folder)
    ours, theirs = (mx.load(str(folder / "backbone.safetensors")) for folder in stored)
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


def test_what_does_not_fit_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    deeper = dataclasses.replace(
        CONFIG, backbone=dataclasses.replace(CONFIG.backbone, num_layers=3)
    )
    with pytest.raises(KhalaError, match=r"not have: layers\.2"):
        fuse(tiny_folder, [(random_adapter(deeper), 1.0)], tmp_path / "fused")
    with pytest.raises(KhalaError, match="exists already"):
        fuse(tiny_folder, ADAPTERS, tiny_folder)
    broken = write_tiny_model(tmp_path / "broken")
    (broken / "backbone.safetensors").write_bytes(b"damaged")
    with pytest.raises(KhalaError, match="backbone.safetensors"):
        fuse(broken, ADAPTERS, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["train", "fuse", *map(str, arguments)])


def test_fuse_from_the_command_line(tiny_folder: Path, tmp_path: Path) -> None:
    for adapter, _ in ADAPTERS:
        export_adapter(adapter, tmp_path / adapter.name, "peft")
    options = ["-m", tiny_folder, "--adapter", tmp_path / "one", "--adapter", tmp_path / "two"]
    result = run(tmp_path / "fused", *options, "--adapter-scale", 0.8, "--adapter-scale", 0.5)
    assert result.exit_code == 0, result.stderr
    assert "14 changed, 0 of them no longer quantized" in result.stdout
    fused, adapted = Khala.from_pretrained(tmp_path / "fused"), with_adapters(tiny_folder)
    assert np.abs(fused.backbone(IDS) - adapted.backbone(IDS)).max() < 20 * CLOSE
    result = run(tmp_path / "more", *options, "--adapter-scale", 0.8)
    assert "2 adapters, but 1 scales" in result.stderr
    result = run(tmp_path / "more", *options, "--json")
    assert json.loads(result.stdout)["adapters"] == ["one", "two"]
    assert run(tmp_path / "none", "-m", tiny_folder).exit_code == 2


def test_no_model_of_numbers_that_are_not_finite_is_written(
    tiny_folder: Path, tmp_path: Path
) -> None:
    adapter = random_adapter(CONFIG, size=3.0)
    for strength in (float("nan"), float("inf"), 1e37):
        with pytest.raises(KhalaError, match="overflows|not finite"):
            fuse(tiny_folder, [(adapter, strength)], tmp_path / "fused")
        assert not list(tmp_path.iterdir())
    export_adapter(adapter, tmp_path / "some", "mlx")
    data = write_songs(tmp_path / "songs", [5], held_out=1)
    options = ["--model", tiny_folder, "--data", data, "--adapter", tmp_path / "some"]
    arguments = ["train", "evaluate", *map(str, options), "--adapter-scale", "1e37"]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stderr.count("an adapter is too strong")) == (1, 1)
