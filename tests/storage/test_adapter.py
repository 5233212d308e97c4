"""Adapters as files, and what keeps one from a model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_songs import random_adapter

from khala_mlx.config import KhalaConfig, Quantization
from khala_mlx.convert import export_adapter
from khala_mlx.errors import KhalaError
from khala_mlx.storage.adapter import (
    Adapter,
    Pair,
    backbone_id,
    pairs_of,
    save_adapter,
)

CONFIG = KhalaConfig.tiny()


def changed(adapter: Adapter, **pairs: Pair) -> Adapter:
    return dataclasses.replace(adapter, pairs={**adapter.pairs, **pairs})


def from_sources(**source: Any) -> KhalaConfig:
    return dataclasses.replace(CONFIG, source=source)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_comes_back_as_it_was_saved(tmp_path: Path, dora: bool) -> None:
    adapter = random_adapter(CONFIG, dora=dora, base="abc")
    export_adapter(adapter, tmp_path / "some", "mlx")
    again = Adapter.load(tmp_path / "some")
    assert (again.name, again.scale, again.base) == ("some", 2.0, "abc")
    assert again.sha256 == adapter.sha256
    about = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    assert about["fine_tune_type"] == ("dora" if dora else "lora")
    assert about["num_layers"] == 2
    assert about["lora_parameters"]["rank"] == 3
    assert "self_attn.q_proj" in about["lora_parameters"]["keys"]


def test_half_precision_and_mlx_lms_prefix_are_read(tmp_path: Path) -> None:
    adapter = random_adapter(CONFIG)
    arrays = {
        f"model.{path}.{leaf}": mx.array(array).astype(mx.bfloat16)
        for path, leaf, array in adapter.leaves()
    }
    save_adapter(tmp_path, arrays, adapter.about())
    again = Adapter.load(tmp_path)
    again.check(CONFIG)
    assert all(pair.a.dtype == np.float32 for pair in again.pairs.values())


def test_what_an_adapter_changes_names_it() -> None:
    adapter = random_adapter(CONFIG)
    assert adapter.sha256 == random_adapter(CONFIG, "other").sha256
    assert adapter.sha256 != random_adapter(CONFIG, seed=1).sha256
    assert adapter.sha256 != dataclasses.replace(adapter, scale=1.0).sha256


def test_backbones_of_the_same_weights_have_one_name() -> None:
    files = {"backbone/a.distcp": "1", "superresolution/b.distcp": "2"}
    model = from_sources(files=files, layout="megatron")
    packed = dataclasses.replace(
        model,
        dtype="float16",
        quantization={"backbone.lm_head": Quantization(4, 64)},
        source={**model.source, "converted_from": {"dtype": "bfloat16"}},
    )
    assert backbone_id(model) == backbone_id(packed)
    assert backbone_id(model) == backbone_id(from_sources(files={"backbone/a.distcp": "1"}))
    others = [
        from_sources(files={"backbone/a.distcp": "3"}),
        from_sources(files=files, fused=[{"sha256": "x"}]),
        dataclasses.replace(model, fc1_bias="single"),
        dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, num_layers=3)),
        from_sources(files="nonsense"),
    ]
    assert len({backbone_id(config) for config in [model, *others]}) == 6


def test_every_layer_the_model_lacks_is_named() -> None:
    pair = Pair(np.zeros((32, 2), np.float32), np.zeros((2, 32), np.float32))
    adapter = changed(
        random_adapter(CONFIG), **{"layers.7.self_attn.q_proj": pair, "lm_head": pair}
    )
    with pytest.raises(KhalaError, match=r"not have: layers\.7\.self_attn\.q_proj, lm_head\."):
        adapter.check(CONFIG)
    with pytest.raises(KhalaError, match="is empty"):
        Adapter("none", 1.0, {}).check(CONFIG)


def test_every_misshapen_array_is_named() -> None:
    wide = Pair(np.zeros((33, 2), np.float32), np.zeros((3, 32), np.float32), np.zeros(5))
    flat = Pair(np.zeros(32, np.float32), np.zeros((2, 64), np.float32))
    adapter = changed(
        random_adapter(CONFIG), **{"layers.0.self_attn.q_proj": wide, "layers.1.mlp.up_proj": flat}
    )
    with pytest.raises(KhalaError) as error:
        adapter.check(CONFIG)
    for text in (
        "layers.0.self_attn.q_proj.lora_a has shape [33, 2] instead of [32, 2]",
        "layers.0.self_attn.q_proj.lora_b has shape [3, 32] instead of [2, 32]",
        "layers.0.self_attn.q_proj.m has shape [5] instead of [32]",
        "layers.1.mlp.up_proj.lora_a has shape [32] instead of [32, 32]",
    ):
        assert text in str(error.value)


def test_values_that_are_not_finite_are_named() -> None:
    bad = Pair(np.full((32, 2), np.nan, np.float32), np.zeros((2, 32), np.float32))
    adapter = changed(random_adapter(CONFIG), **{"layers.1.self_attn.q_proj": bad})
    with pytest.raises(
        KhalaError, match=r"NaN or infinity: layers\.1\.self_attn\.q_proj\.lora_a\."
    ):
        adapter.check(CONFIG)


def test_an_adapter_of_another_backbone_is_refused() -> None:
    random_adapter(CONFIG, base=backbone_id(CONFIG)).check(CONFIG)
    with pytest.raises(KhalaError, match="was trained on another backbone"):
        random_adapter(CONFIG, base=backbone_id(from_sources(files={"backbone": "1"}))).check(
            CONFIG
        )


def test_arrays_without_a_partner_are_named() -> None:
    array = np.zeros((2, 2), np.float32)
    with pytest.raises(
        KhalaError, match=r"not part of a LoRA pair: layers\.0\.x\.lora_a, y\.weight"
    ):
        pairs_of({"layers.0.x.lora_a": array, "y.weight": array})


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("adapter_config.json", None, "cannot be read"),
        ("adapter_config.json", "{", "not valid JSON"),
        ("adapter_config.json", "[]", "must be an object"),
        ("adapter_config.json", '{"fine_tune_type": "full"}', "not a LoRA or DoRA config"),
        ("adapter_config.json", '{"lora_parameters": {"rank": 8}}', "not a LoRA or DoRA config"),
        ("adapters.safetensors", None, "is missing"),
        ("adapters.safetensors", "damaged", "not a complete safetensors file"),
    ],
)
def test_a_damaged_folder_is_one_sentence(
    tmp_path: Path, file: str, content: str | None, sentence: str
) -> None:
    export_adapter(random_adapter(CONFIG), tmp_path / "some", "mlx")
    path = tmp_path / "some" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(KhalaError, match=sentence):
        Adapter.load(tmp_path / "some")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 10**400, True, "2"])
def test_a_scale_that_no_float_holds_is_refused(tmp_path: Path, scale: Any) -> None:
    adapter = random_adapter(CONFIG)
    arrays = {f"{path}.{leaf}": array for path, leaf, array in adapter.leaves()}
    about = adapter.about()
    about["lora_parameters"]["scale"] = scale
    save_adapter(tmp_path, arrays, about)
    with pytest.raises(KhalaError, match="not a LoRA or DoRA config"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("strength", [float("nan"), float("-inf"), 1e300])
def test_a_strength_beyond_float32_is_refused(strength: float) -> None:
    with pytest.raises(KhalaError, match="overflows at scale"):
        random_adapter(CONFIG).check(CONFIG, strength)


@pytest.mark.parametrize("name", ["", "layers.0.self_attn.q_proj."])
def test_arrays_that_are_no_matrices_or_of_no_layer_are_named(name: str) -> None:
    shape = (2, 2) if not name else (2,)
    with pytest.raises(KhalaError, match=f"{name}lora_a"):
        pairs_of({f"{name}lora_a": np.zeros(shape), f"{name}lora_b": np.zeros(shape)})
