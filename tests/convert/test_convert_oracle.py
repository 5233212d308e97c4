"""Both published layouts of the reference set convert to its own tensors, bit for bit."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert
from khala_mlx.convert.formats.tensors import to_float32
from khala_mlx.convert.formats.torch_file import TorchZip

pytestmark = pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")

PARTS = ("backbone", "superres", "codec")
SOURCES = ("megatron", "vinpolar", "chunked", "plain_pickles")


@pytest.fixture(scope="module")
def sources(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The layouts, the backbone cut in two, and the pickles without Megatron's classes."""
    folder = tmp_path_factory.mktemp("sources")
    there = oracle / "checkpoints"
    for name in ("chunked", "plain_pickles"):
        (folder / name).mkdir()
        (folder / name / "dac_rvq_1.ckpt").symlink_to(next(there.glob("dac_rvq_*.ckpt")))
    (folder / "chunked/backbone").symlink_to(there / "backbone_tp2")
    (folder / "chunked/superresolution").symlink_to(there / "superresolution")
    for name in ("backbone", "superresolution"):
        copy = folder / "plain_pickles" / name
        shutil.copytree(there / name, copy)
        (iteration,) = copy.glob("iter_*")
        shutil.copy(there / f"alt/{name}.metadata", iteration / ".metadata")
        shutil.copy(there / f"alt/{name}.common.pt", iteration / "common.pt")
    return {
        "megatron": there,
        "vinpolar": oracle / "vinpolar",
        "chunked": folder / "chunked",
        "plain_pickles": folder / "plain_pickles",
    }


@pytest.fixture(scope="module")
def models(
    oracle: Path, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Each source converted to float32."""
    folder = tmp_path_factory.mktemp("models")
    for name, source in sources.items():
        convert(source, folder / name, dtype="float32", tokenizer=oracle / "tokenizer_small")
    return {name: folder / name for name in sources}


@pytest.mark.parametrize("other", SOURCES[1:])
@pytest.mark.parametrize("part", PARTS)
def test_layouts_agree_bit_for_bit(models: dict[str, Path], other: str, part: str) -> None:
    name = f"{part}.safetensors"
    assert (models["megatron"] / name).read_bytes() == (models[other] / name).read_bytes()


@pytest.mark.parametrize("part", ["backbone", "superres"])
def test_transformers_are_the_oracles(oracle: Path, models: dict[str, Path], part: str) -> None:
    theirs = mx.load(str(oracle / f"vinpolar/khala_{part}.safetensors"))
    ours = mx.load(str(models["megatron"] / f"{part}.safetensors"))
    assert isinstance(theirs, dict)
    assert isinstance(ours, dict)
    rows = ours["embed_tokens.weight"].shape[0]
    for name, values in theirs.items():
        ours_name = (
            name.replace("embed.", "embed_tokens.")
            .replace("input_norm", "input_layernorm")
            .replace("post_attn_norm", "post_attention_layernorm")
            .replace(".attn.", ".self_attn.")
        )
        wanted = values[:rows].astype(mx.float32)
        if ours_name.endswith(("gate_proj.bias", "up_proj.bias")):
            wanted = wanted + wanted
        assert mx.array_equal(ours.pop(ours_name), wanted), name
    assert not ours


def state_dict(path: Path) -> dict[str, np.ndarray]:
    """A torch.save file of float32 tensors, read by the standard library's own unpickler."""
    archive = zipfile.ZipFile(path)
    (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))

    def rebuild(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> np.ndarray:
        strides = [4 * stride for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides)

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return {"OrderedDict": OrderedDict, "_rebuild_tensor_v2": rebuild}.get(name, name)

        def persistent_load(self, pid: Any) -> Any:
            key = f"{pickled.removesuffix('data.pkl')}data/{pid[2]}"
            return np.frombuffer(archive.read(key), np.float32)

    with archive.open(pickled) as file:
        return dict(Reader(file).load())


def test_codec_is_the_oracles(oracle: Path, models: dict[str, Path]) -> None:
    theirs = state_dict(oracle / "vinpolar/decoder_weights.pt")
    ours = mx.load(str(models["megatron"] / "codec.safetensors"))
    assert isinstance(ours, dict)
    config = KhalaConfig.load(models["megatron"] / "config.json").codec

    def conv(here: str, there: str, axes: tuple[int, ...] = (0, 2, 1)) -> None:
        v, g = (theirs[f"{there}.weight_{each}"].astype(np.float64) for each in "vg")
        wanted = (v * g / np.sqrt((v * v).sum((1, 2), keepdims=True))).transpose(axes)
        np.testing.assert_allclose(ours.pop(f"{here}.weight"), wanted, rtol=3e-7)
        assert np.array_equal(ours.pop(f"{here}.bias"), theirs[f"{there}.bias"])

    def snake(here: str, there: str) -> None:
        assert np.array_equal(ours.pop(f"{here}.alpha"), theirs[f"{there}.alpha"].reshape(-1))

    def unit(here: str, there: str) -> None:
        snake(f"{here}.snake1", f"{there}.block.0")
        conv(f"{here}.conv1", f"{there}.block.1")
        snake(f"{here}.snake2", f"{there}.block.2")
        conv(f"{here}.conv2", f"{there}.block.3")

    down, up = len(config.encoder_strides), len(config.decoder_rates)
    conv("encoder.conv_in", "encoder.block.0")
    conv("encoder.conv_out", f"encoder.block.{down + 2}")
    snake("encoder.snake", f"encoder.block.{down + 1}")
    conv("decoder.conv_in", "decoder.model.0")
    conv("decoder.conv_out", f"decoder.model.{up + 2}")
    snake("decoder.snake", f"decoder.model.{up + 1}")
    for i in range(down):
        for j in range(3):
            unit(f"encoder.blocks.{i}.units.{j}", f"encoder.block.{i + 1}.block.{j}")
        snake(f"encoder.blocks.{i}.snake", f"encoder.block.{i + 1}.block.3")
        conv(f"encoder.blocks.{i}.down", f"encoder.block.{i + 1}.block.4")
    for i in range(up):
        snake(f"decoder.blocks.{i}.snake", f"decoder.model.{i + 1}.block.0")
        conv(f"decoder.blocks.{i}.up", f"decoder.model.{i + 1}.block.1", (1, 2, 0))
        for j in range(3):
            unit(f"decoder.blocks.{i}.units.{j}", f"decoder.model.{i + 1}.block.{j + 2}")
    books = [theirs[f"quantizer.vq_layer_{q}._codebook.embed"] for q in range(config.num_codebooks)]
    assert np.array_equal(ours.pop("quantizer.codebooks"), np.stack(books))
    assert not ours


def test_pickled_omegaconf_is_read_without_it(oracle: Path) -> None:
    whole = TorchZip(next((oracle / "checkpoints").glob("dac_rvq_*.ckpt")))
    partial = TorchZip(oracle / "checkpoints/dac_omegaconf_hparams_partial.ckpt")
    hparams = partial.root["hyper_parameters"]
    assert "DictConfig" in str([getattr(value, "name", "") for value in hparams.values()])
    compared = 0
    for name, ref in partial.root["state_dict"].items():
        if name in whole.root["state_dict"] and name.startswith("generator."):
            ours = partial.tensor(ref, name)
            theirs = whole.tensor(whole.root["state_dict"][name], name)
            assert np.array_equal(
                to_float32(ours.whole(), ours), to_float32(theirs.whole(), theirs)
            )
            compared += 1
    assert compared >= 5


@pytest.mark.parametrize("source", SOURCES)
def test_config_and_card(oracle: Path, models: dict[str, Path], source: str) -> None:
    config = KhalaConfig.load(models[source] / "config.json")
    told = json.loads((oracle / "vinpolar/superres_megatron_args.json").read_text())
    for part in (config.backbone, config.superres):
        assert part.num_layers == told["num_layers"]
        assert part.hidden_size == told["hidden_size"]
        assert part.num_heads == told["num_attention_heads"]
        assert part.num_kv_heads == told["num_query_groups"]
        assert part.head_dim == told["kv_channels"]
        assert part.intermediate_size == told["ffn_hidden_size"]
        assert (part.norm_eps, part.rope_base) == (1e-6, 500000.0)
    assert (config.backbone.vocab_size, config.superres.vocab_size) == (130304, 193792)
    assert (config.backbone.context, config.superres.context) == (16384, 8192)
    assert (config.codec.num_codebooks, config.codec.codebook_size) == (64, 1024)
    assert (config.dtype, config.fc1_bias, dict(config.quantization)) == ("float32", "double", {})
    assert all(len(digest) == 64 for digest in config.source["files"].values())
    text = (models[source] / "README.md").read_text()
    assert text.startswith("---\nlicense: cc-by-nc-4.0\nlibrary_name: mlx\n")
    assert "CC BY-NC 4.0" in text
    assert "Llama 3.1" in text
    assert str(oracle) not in text + json.dumps(config.to_dict())


def test_report(oracle: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = convert(
        oracle / "checkpoints",
        tmp_path / "model",
        tokenizer=oracle / "tokenizer_small",
        fc1_bias="single",
        on_progress=lambda *step: seen.append(step),
    )
    assert report == json.loads(json.dumps(report))
    assert report["layout"] == "megatron"
    assert report["unused"] == {part: [] for part in PARTS}
    assert report["fc1_bias"] == "single"
    for part in ("backbone", "superres"):
        told = json.loads((oracle / f"vinpolar/{part}_megatron_args.json").read_text())
        dropped = told["padded_vocab_size"] - told["vocab_size"]
        assert report["parts"][part]["dropped_rows"] == dropped
    assert any("discriminator" in name for name in report["ignored"]["codec"])
    names = {path.rsplit("/", 1)[-1] for path in report["source_files"]}
    assert {".metadata", "common.pt", "__0_0.distcp"} < names
    assert report["bytes"] == sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    assert [note for note in report["warnings"] if "Llama 3.1" not in note] == []
    for part in PARTS:
        steps = [(done, total) for name, done, total in seen if name == part]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_single_bias_is_the_files_own(
    oracle: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    single = tmp_path / "single"
    convert(
        oracle / "vinpolar",
        single,
        dtype="float32",
        fc1_bias="single",
        tokenizer=oracle / "tokenizer_small",
    )
    doubled = mx.load(str(models["vinpolar"] / "backbone.safetensors"))
    plain = mx.load(str(single / "backbone.safetensors"))
    assert isinstance(doubled, dict)
    assert isinstance(plain, dict)
    for name, values in plain.items():
        factor = 2 if name.endswith(("gate_proj.bias", "up_proj.bias")) else 1
        assert mx.array_equal(values * factor, doubled[name]), name
