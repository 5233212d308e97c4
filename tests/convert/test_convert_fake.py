"""Checkpoints of other sizes, written backwards without torch, convert to what they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fake_checkpoints import (
    Call,
    Name,
    Persistent,
    Sizes,
    Torch,
    carried,
    codec,
    common,
    lightning,
    megatron,
    transformer,
    write_dist,
    write_megatron,
    write_safetensors,
    write_tokenizer,
    write_vinpolar,
)

from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert
from khala_mlx.convert.formats.tensors import Tensor
from khala_mlx.convert.layouts.codec import fold_weight_norm
from khala_mlx.errors import ConvertError, KhalaWarning

pytestmark = pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")

SIZES = Sizes()
PARTS = ("backbone", "superres", "codec")
HIDDEN = SIZES.hidden
ROWS = SIZES.vocab["backbone"] + 96
FILES = [f"__{rank}_0.distcp" for rank in range(3)]

# The embedding in six pieces along both axes over three files, others along either axis.
CUTS = {
    "backbone": {
        "embedding.word_embeddings.weight": [
            ((0, 0), (100000, 7), FILES[2]),
            ((0, 7), (100000, 13), FILES[0]),
            ((100000, 0), (ROWS - 100000, 12), FILES[1]),
            ((100000, 12), (20000, 8), FILES[0]),
            ((120000, 12), (8000, 8), FILES[2]),
            ((128000, 12), (ROWS - 128000, 8), FILES[1]),
        ],
        "decoder.layers.1.self_attention.linear_qkv.weight": [
            ((0, 0), (5, HIDDEN), FILES[1]),
            ((5, 0), (19, 3), FILES[0]),
            ((5, 3), (19, HIDDEN - 3), FILES[2]),
        ],
        "decoder.layers.2.mlp.linear_fc2.weight": [
            ((0, 0), (HIDDEN, 12), FILES[0]),
            ((0, 12), (HIDDEN, 12), FILES[1]),
            ((0, 24), (HIDDEN, 12), FILES[2]),
        ],
        "decoder.layers.0.mlp.linear_fc1.bias_w": [
            ((30,), (6,), FILES[1]),
            ((0,), (30,), FILES[2]),
        ],
    }
}


def assert_equal(folder: Path, expected: dict[str, dict[str, np.ndarray]], fc1: float = 2) -> None:
    for part in PARTS:
        found = mx.load(str(folder / f"{part}.safetensors"))
        assert isinstance(found, dict)
        assert found.keys() == expected[part].keys()
        for name, values in expected[part].items():
            factor = fc1 if name.endswith(("gate_proj.bias", "up_proj.bias")) else 1
            assert np.array_equal(np.array(found[name].astype(mx.float32)), values * factor), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_megatron_in_chunks(tmp_path: Path, dtype: str) -> None:
    expected = write_megatron(tmp_path / "source", SIZES, dtype=dtype, cuts=CUTS)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    report = convert(tmp_path / "source", tmp_path / "model", dtype="float32", tokenizer=tokenizer)
    assert_equal(tmp_path / "model", expected)
    assert report["parts"]["superres"]["dropped_rows"] == 96
    config = KhalaConfig.load(tmp_path / "model/config.json")
    for part in (config.backbone, config.superres):
        assert (part.num_layers, part.num_heads, part.num_kv_heads, part.head_dim) == (3, 6, 3, 2)
        assert (part.hidden_size, part.intermediate_size) == (20, 36)
        assert (part.norm_eps, part.rope_base) == (1e-5, 10000.0)
    assert config.codec.encoder_strides == (2, 12)
    assert config.codec.decoder_rates == (6, 2, 2)
    assert (config.codec.encoder_dim, config.codec.decoder_dim) == (3, 5)
    assert (config.codec.latent_dim, config.codec.num_codebooks) == (7, 5)
    assert config.tokens.num_codebooks == 5
    assert config.superres.vocab_size == 128256 + 5 * 16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_vinpolar_is_the_same_model(tmp_path: Path, dtype: str) -> None:
    expected = write_vinpolar(tmp_path / "source", SIZES, dtype=dtype)
    tokenizer = write_tokenizer(tmp_path / "source")
    for target in ("bfloat16", "float16"):
        report = convert(tmp_path / "source", tmp_path / target, dtype=target)
        assert_equal(tmp_path / target, expected)
        assert report["tokenizer"]["origin"] == "beside the source"
    written = mx.load(str(tmp_path / "bfloat16/superres.safetensors"))
    assert isinstance(written, dict)
    assert {values.dtype for values in written.values()} == {mx.bfloat16}
    assert (tmp_path / "bfloat16/tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_both_layouts_are_one_model(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", SIZES, cuts=CUTS)
    write_vinpolar(tmp_path / "b", SIZES)
    for name in "ab":
        convert(tmp_path / name, tmp_path / f"{name}-model", tokenizer=write_tokenizer(tmp_path))
    for part in PARTS:
        one, two = (tmp_path / f"{name}-model/{part}.safetensors" for name in "ab")
        assert one.read_bytes() == two.read_bytes()


def test_without_grouping_megatron_says_one_group(tmp_path: Path) -> None:
    sizes = Sizes(heads=4, groups=4, head_dim=4, hidden=16)
    expected = write_vinpolar(tmp_path / "source", sizes)
    arguments = sizes.arguments() | {"group_query_attention": False, "num_query_groups": 1}
    del arguments["kv_channels"], arguments["norm_epsilon"], arguments["rotary_base"]
    for part in ("backbone", "superres"):
        (tmp_path / f"source/{part}_megatron_args.json").write_text(json.dumps(arguments))
    tokenizer = write_tokenizer(tmp_path)
    with pytest.warns(KhalaWarning, match="norm_epsilon"):
        convert(tmp_path / "source", tmp_path / "model", tokenizer=tokenizer)
    assert_equal(tmp_path / "model", expected)
    config = KhalaConfig.load(tmp_path / "model/config.json")
    assert (config.backbone.num_kv_heads, config.backbone.norm_eps) == (4, 1e-6)
    assert config.backbone.rope_base == 500000.0


@pytest.mark.parametrize("kind", ["release", "only"])
def test_iteration_folders(tmp_path: Path, kind: str) -> None:
    expected = write_megatron(tmp_path / "source", SIZES)
    for folder in (tmp_path / "source").glob("*/"):
        latest = folder / "latest_checkpointed_iteration.txt"
        if kind == "only":
            latest.unlink()
        else:
            latest.write_text("release\n")
            (folder / "iter_0000007").rename(folder / "release")
    convert(
        tmp_path / "source",
        tmp_path / "model",
        dtype="float16",
        tokenizer=write_tokenizer(tmp_path),
    )
    assert_equal(tmp_path / "model", expected)


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_megatron(source, SIZES)
    tensors = megatron(SIZES, transformer(SIZES, "backbone", 0))
    tensors["decoder.layers.1.self_attention.q_layernorm.weight"] = np.ones(2, np.float32)
    tensors["decoder.layers.1.mlp._extra_state"] = np.ones(2, np.float32)
    write_dist(source / "backbone/iter_0000007", tensors, "float32")
    state, _ = codec(SIZES, 2)
    state["bottleneck.weight"] = np.ones(2, np.float32)
    (source / "dac_rvq_1.ckpt").write_bytes(lightning(state))
    report = convert(source, tmp_path / "model", tokenizer=write_tokenizer(tmp_path))
    told = [note for note in report["warnings"] if "unknown" in note]
    assert told == [
        "The backbone holds 1 unknown tensors, left out: "
        "decoder.layers.1.self_attention.q_layernorm.weight.",
        "The codec holds 1 unknown tensors, left out: generator.bottleneck.weight.",
    ]
    assert "decoder.layers.1.mlp._extra_state" in report["ignored"]["backbone"]


def test_a_table_far_too_long_is_told(tmp_path: Path) -> None:
    write_vinpolar(tmp_path / "source", SIZES)
    tensors = transformer(SIZES, "backbone", 0, padding=9000)
    named = {name.replace("embed_tokens", "embed"): values for name, values in tensors.items()}
    for ours, theirs in (
        ("input_layernorm", "input_norm"),
        ("self_attn", "attn"),
        ("post_attention_layernorm", "post_attn_norm"),
    ):
        named = {name.replace(ours, theirs): values for name, values in named.items()}
    write_safetensors(tmp_path / "source/khala_backbone.safetensors", named, "float32")
    with pytest.warns(KhalaWarning, match="backbone has 9000 rows too many"):
        convert(tmp_path / "source", tmp_path / "model", tokenizer=write_tokenizer(tmp_path))


def test_strided_and_offset_storages(tmp_path: Path) -> None:
    """Tensors may share a storage, begin inside it, or lie transposed in it."""
    write_vinpolar(tmp_path / "source", SIZES)
    state, expected = codec(SIZES, 2)
    torch = Torch()
    tensors = {name: torch.tensor(values) for name, values in state.items()}
    bias = state["encoder.block.0.bias"]
    padded = np.concatenate([np.full(5, np.nan, np.float32), bias, np.full(2, np.nan, np.float32)])
    tensors["encoder.block.0.bias"] = torch.view(padded, bias.shape, (1,), "float32", offset=5)
    v = state["decoder.model.1.block.1.weight_v"]
    a, b, _ = v.shape
    tensors["decoder.model.1.block.1.weight_v"] = torch.view(
        np.ascontiguousarray(v.transpose(2, 0, 1)), v.shape, (b, 1, a * b), "float32"
    )
    (tmp_path / "source/decoder_weights.pt").write_bytes(torch.saved(tensors))
    convert(tmp_path / "source", tmp_path / "model", tokenizer=write_tokenizer(tmp_path))
    found = mx.load(str(tmp_path / "model/codec.safetensors"))
    assert isinstance(found, dict)
    for name, values in expected.items():
        assert np.array_equal(np.array(found[name]), values), name


def test_half_precision_codec_and_untyped_storages(tmp_path: Path) -> None:
    write_vinpolar(tmp_path / "source", SIZES)
    state, expected = codec(SIZES, 2)
    torch = Torch()
    tensors = {name: torch.tensor(values) for name, values in state.items()}
    alpha = carried(np.array([[[0.5], [2.0], [-1.25]]], np.float32), "bfloat16")
    torch.entries["data/900"] = alpha.tobytes()
    identity = ("storage", Name("torch.storage", "UntypedStorage"), "900", "cpu", alpha.nbytes)
    tensors["encoder.block.1.block.0.block.0.alpha"] = Call(
        Name("torch._utils", "_rebuild_tensor_v3"),
        (Persistent(identity), 0, (1, 3, 1), (3, 1, 1), False, {}, Name("torch", "bfloat16"), None),
    )
    inner = torch.tensor(state["encoder.block.0.bias"].astype(np.float16), "float16")
    parameter = Call(Name("torch._utils", "_rebuild_parameter"), (inner, True, {}))
    tensors["encoder.block.0.bias"] = Call(
        Name("torch._tensor", "_rebuild_from_type_v2"),
        (Name("torch._utils", "_rebuild_parameter"), Name("my", "Tensor"), parameter.args, {}),
    )
    (tmp_path / "source/decoder_weights.pt").write_bytes(torch.saved(tensors))
    convert(tmp_path / "source", tmp_path / "model", tokenizer=write_tokenizer(tmp_path))
    found = mx.load(str(tmp_path / "model/codec.safetensors"))
    assert isinstance(found, dict)
    assert found["encoder.blocks.0.units.0.snake1.alpha"].tolist() == [0.5, 2.0, -1.25]
    half = expected["encoder.conv_in.bias"].astype(np.float16).astype(np.float32)
    assert np.array_equal(np.array(found["encoder.conv_in.bias"]), half)


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_norm_against_double_precision(transposed: bool) -> None:
    rng = np.random.default_rng(0)
    v, g = rng.standard_normal((6, 5, 4)), rng.standard_normal((6, 1, 1))
    v32, g32 = v.astype(np.float32), g.astype(np.float32)
    tensors = [
        Tensor(name, values.shape, "float32", lambda a, b, values=values: values[a:b])
        for name, values in (("g", g32), ("v", v32))
    ]
    folded = fold_weight_norm(*tensors, transposed=transposed)
    wanted = v32.astype(float) * g32 / np.sqrt((v32.astype(float) ** 2).sum((1, 2), keepdims=True))
    wanted = wanted.transpose(1, 2, 0) if transposed else wanted.transpose(0, 2, 1)
    assert folded.shape == wanted.shape
    np.testing.assert_allclose(folded.whole(), wanted, rtol=3e-7)


def test_arguments_of_another_architecture(tmp_path: Path) -> None:
    write_megatron(tmp_path / "source", SIZES)
    path = tmp_path / "source/superresolution/iter_0000007/common.pt"
    for key, value in (
        ("normalization", "LayerNorm"),
        ("swiglu", False),
        ("rotary_percent", 0.5),
        ("num_attention_heads", None),
        ("num_attention_heads", "6"),
        ("num_layers", 7),
        ("kv_channels", 3),
        ("num_query_groups", 2),
        ("norm_epsilon", -1.0),
        ("hidden_size", 10**30),
        ("rotary_base", float("nan")),
        ("num_attention_heads", 2**20),
        ("ffn_hidden_size", True),
    ):
        path.write_bytes(common(SIZES.arguments() | {key: value}))
        with pytest.raises(ConvertError, match=r"^superres: ") as told:
            convert(tmp_path / "source", tmp_path / "model", tokenizer=write_tokenizer(tmp_path))
        assert "\n" not in str(told.value)
    assert not (tmp_path / "model").exists()
