import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from upstream_rules import write_tokens

from khala_mlx import Khala, KhalaError
from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert
from khala_mlx.errors import KhalaWarning
from khala_mlx.model import weights
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.weights import fingerprint, load_part


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
    with pytest.raises(KhalaError, match=f"does not have {part}.safetensors"):
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
        ("{", "not a safetensors index"),
        ("{}", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ('{"weight_map": {}}', "outside"),
        ('{"weight_map": {"a": "../b"}}', "outside"),
        ('{"weight_map": {"a": "b.safetensors"}}', "does not have b.safetensors"),
        ('{"weight_map": {"a": 3}}', "not a safetensors index"),
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


@pytest.fixture(scope="module")
def packed_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with every matrix of the language models in 8 bits, scales in bfloat16."""
    destination = tmp_path_factory.mktemp("packed") / "model"
    with pytest.warns(KhalaWarning):
        convert(tiny_folder, destination, quantize=8, group_size=32)
    return destination


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def layer_types(model: nn.Module) -> set[type]:
    kinds = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)
    return {type(layer) for _, layer in model.named_modules() if isinstance(layer, kinds)}


def stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CPU_DEQUANTIZED_BYTES", 100)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_small_packed_parts_are_unpacked_on_the_cpu(
    packed_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    plain = Khala.from_pretrained(packed_folder, dtype=dtype)
    for part in (plain.backbone, plain.superres):
        assert layer_types(part) == {nn.Linear, nn.Embedding}
        found = {array.dtype for _, array in tree_flatten(part.parameters())}
        assert found == {mx.float16 if dtype == "float16" else mx.float32}
    stay_packed(monkeypatch)
    packed = Khala.from_pretrained(packed_folder, dtype=dtype)
    for part in (packed.backbone, packed.superres):
        assert layer_types(part) == {nn.QuantizedLinear, nn.QuantizedEmbedding}
    ids, tolerance = np.array([[1, 2, 300, 331]]), 2e-2 if dtype == "float16" else 1e-5
    assert np.abs(plain.backbone(ids) - packed.backbone(ids)).max() < tolerance
    rows = np.array([[[1, -1], [300, 320]]])
    assert np.abs(plain.superres.hidden(rows) - packed.superres.hidden(rows)).max() < tolerance


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("reachable_only", [True, False])
def test_unpacked_and_packed_models_sing_the_same(
    packed_folder: Path, monkeypatch: pytest.MonkeyPatch, reachable_only: bool
) -> None:
    def sung() -> list[np.ndarray]:
        khala = Khala.from_pretrained(packed_folder)
        ids = write_tokens(khala.backbone,
            np.arange(9), max_tokens=12, top_k=1, key=mx.random.key(0),
            reachable_only=reachable_only,
        )  # fmt: skip
        return [ids, khala.refine(np.arange(5), np.zeros((2, 3), int), top_k=1)]

    plain = sung()
    stay_packed(monkeypatch)
    assert all(map(np.array_equal, plain, sung()))


@pytest.mark.usefixtures("on_the_cpu")
def test_the_limit_counts_a_part_as_if_unpacked(
    packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = KhalaConfig.load(packed_folder / "config.json")
    model = Backbone(config.backbone, config.tokens)
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    for limit, kind in ((size, nn.Linear), (size - 1, nn.QuantizedLinear)):
        monkeypatch.setattr(weights, "CPU_DEQUANTIZED_BYTES", limit)
        assert type(Khala.from_pretrained(packed_folder).backbone.lm_head) is kind


def test_packed_layers_stay_packed_on_a_gpu(
    packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = KhalaConfig.load(packed_folder / "config.json")
    model = Backbone(config.backbone, config.tokens)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    load_part(model, packed_folder, "backbone", config, mx.float32)
    assert layer_types(model) == {nn.QuantizedLinear, nn.QuantizedEmbedding}


@pytest.mark.parametrize(
    ("bits", "group_size", "reason"), [(7, 32, "quantization"), (8, 64, "divisible .* size 64")]
)
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_quantization_that_mlx_lacks_or_the_width_forbids_is_one_sentence(
    folder: Path, layer: str, bits: int, group_size: int, reason: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    how = {"bits": bits, "group_size": group_size, "mode": "affine"}
    config["quantization"] = {f"backbone.{layer}": how}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(KhalaError, match=reason):
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
    assert tiny.parts.dtype == "float32"
    half = Khala.from_pretrained(tiny_folder, dtype="bfloat16")
    ids = np.array([[1, 2, 3]])
    assert half.backbone.norm.weight.dtype == mx.bfloat16
    assert half.codec.decoder.conv_in.weight.dtype == mx.float32
    assert 0 < np.abs(half.backbone(ids) - tiny.backbone(ids)).max() < 0.1
    assert half.refine(np.arange(5), np.zeros((2, 3), int), seed=1).shape == (8, 3)
    assert half.compose(np.arange(5), max_frames=3, min_frames=3).shape == (2, 3)
    with pytest.raises(KhalaError, match="dtype must be one of"):
        Khala.from_pretrained(tiny_folder, dtype="float64")


def test_a_fingerprint_tells_models_apart(tiny_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    assert fingerprint(copy) == fingerprint(tiny_folder)
    for name in ("config.json", "superres.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert fingerprint(copy) != fingerprint(tiny_folder)
        (copy / name).write_bytes(content)
    (copy / "codec.safetensors").unlink()
    with pytest.raises(KhalaError, match="does not have codec"):
        fingerprint(copy)
