import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from khala_mlx import Khala, KhalaError


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def rewrite(folder: Path, part: str, change: Any) -> None:
    path = folder / f"{part}.safetensors"
    tensors = {name: mx.array(np.array(tensor)) for name, tensor in mx.load(str(path)).items()}
    change(tensors)
    path.unlink()
    mx.save_safetensors(str(path), tensors)


def test_every_wrong_tensor_is_named(folder: Path) -> None:
    def change(tensors: dict[str, mx.array]) -> None:
        del tensors["norm.weight"], tensors["layers.0.mlp.up_proj.bias"]
        tensors["layers.9.mlp.up_proj.bias"] = mx.zeros(4)
        tensors["lm_head.weight"] = mx.zeros((3, 4))

    rewrite(folder, "backbone", change)
    with pytest.raises(KhalaError) as caught:
        Khala.from_pretrained(folder).backbone(np.array([[1]]))
    for text in (
        "missing layers.0.mlp.up_proj.bias, norm.weight",
        "unknown layers.9.mlp.up_proj.bias",
        "lm_head.weight has shape [3, 4] instead of [332, 32]",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize("part", ["backbone", "superres", "codec"])
def test_missing_and_damaged_files_are_named(folder: Path, part: str) -> None:
    path = folder / f"{part}.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(KhalaError, match=part):
            getattr(Khala.from_pretrained(folder), part)
    path.unlink()
    with pytest.raises(KhalaError, match=f"lacks {part}.safetensors"):
        getattr(Khala.from_pretrained(folder), part)


def shard(folder: Path) -> Path:
    tensors = mx.load(str(folder / "backbone.safetensors"))
    names = sorted(tensors)
    halves = {
        "backbone-00001-of-00002.safetensors": names[:9],
        "backbone-00002-of-00002.safetensors": names[9:],
    }
    for file, group in halves.items():
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in group})
    index = folder / "backbone.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f for f, g in halves.items() for n in g}}))
    (folder / "backbone.safetensors").unlink()
    return index


def test_shards_load_like_one_file(folder: Path, tiny: Khala) -> None:
    shard(folder)
    ids = np.array([[1, 2, 3]])
    assert np.array_equal(Khala.from_pretrained(folder).backbone(ids), tiny.backbone(ids))


def test_wrong_shards_are_refused(folder: Path) -> None:
    index = shard(folder)
    good = index.read_text()
    second = folder / "backbone-00002-of-00002.safetensors"
    for text, sentence in [
        ("{", "no safetensors index"),
        ("{}", "no safetensors index"),
        ("[]", "no safetensors index"),
        ('{"weight_map": {}}', "outside"),
        ('{"weight_map": {"a": "../b"}}', "outside"),
        ('{"weight_map": {"a": "b.safetensors"}}', "lacks b.safetensors"),
        ('{"weight_map": {"a": 3}}', "no safetensors index"),
    ]:
        index.write_text(text)
        with pytest.raises(KhalaError, match=sentence):
            Khala.from_pretrained(folder).backbone(np.array([[1]]))
    index.write_text(good)
    second.write_bytes((folder / "backbone-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(KhalaError, match="repeats tensors"):
        Khala.from_pretrained(folder).backbone(np.array([[1]]))


def test_quantised_layers_load_as_config_says(folder: Path, tiny: Khala) -> None:
    how = {"bits": 8, "group_size": 32, "mode": "affine"}

    def change(tensors: dict[str, mx.array]) -> None:
        packed = mx.quantize(tensors["lm_head.weight"], 32, 8)
        for name, tensor in zip(("weight", "scales", "biases"), packed, strict=True):
            tensors[f"lm_head.{name}"] = tensor

    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"backbone.lm_head": how}
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, "backbone", change)
    khala = Khala.from_pretrained(folder)
    ids = np.array([[1, 2, 3]])
    error = np.abs(khala.backbone(ids) - tiny.backbone(ids)).max()
    assert 0 < error < 0.1
    coarse = khala.compose(np.arange(9), max_frames=8, min_frames=8, seed=1)
    assert coarse.shape == (2, 8)


def test_a_quantisation_that_mlx_lacks_is_one_sentence(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"backbone.lm_head": {"bits": 7, "group_size": 32, "mode": "affine"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(KhalaError, match="quantisation"):
        Khala.from_pretrained(folder).backbone(np.array([[1]]))


def test_the_folder_has_to_be_one(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(KhalaError, match=r"no config\.json.*khala convert"):
        Khala.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(KhalaError, match="is a file"):
        Khala.from_pretrained(tmp_path / "file")
    with pytest.raises(KhalaError, match="no model folder"):
        Khala.from_pretrained(tmp_path / "absent")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(KhalaError, match="tokenizer.json"):
        Khala.from_pretrained(folder)


def test_the_dtype_can_be_chosen(tiny_folder: Path, tiny: Khala) -> None:
    assert tiny.dtype == "float32"
    half = Khala.from_pretrained(tiny_folder, dtype="bfloat16")
    ids = np.array([[1, 2, 3]])
    assert half.backbone.norm.weight.dtype == mx.bfloat16
    assert half.codec.decoder.conv_in.weight.dtype == mx.float32
    assert 0 < np.abs(half.backbone(ids) - tiny.backbone(ids)).max() < 0.1
    assert half.refine(np.arange(5), np.zeros((2, 3), int), seed=1).shape == (8, 3)
    assert half.compose(np.arange(5), max_frames=3, min_frames=3).shape == (2, 3)
    with pytest.raises(KhalaError, match="dtype has to be one of"):
        Khala.from_pretrained(tiny_folder, dtype="float64")
