"""Damaged, incomplete and untrue sources: one clear sentence and no destination."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_checkpoints import (
    META,
    Call,
    Made,
    Name,
    Sizes,
    Torch,
    carried,
    codec,
    lightning,
    megatron,
    pickled,
    transformer,
    vinpolar,
    works_or_says_why,
    write_dist,
    write_megatron,
    write_safetensors,
    write_tokenizer,
    write_vinpolar,
    zipped,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khala_mlx.convert import convert
from khala_mlx.convert.checksums import checked_sha256
from khala_mlx.convert.formats import dcp
from khala_mlx.convert.formats import torch_file as torchzip
from khala_mlx.convert.formats.dcp import DistCheckpoint
from khala_mlx.convert.formats.safetensors import read
from khala_mlx.convert.formats.tensors import Extent, mapped, stored
from khala_mlx.convert.formats.torch_file import TorchZip
from khala_mlx.convert.layouts.codec import codec_part
from khala_mlx.convert.source import locate
from khala_mlx.errors import ConvertError, KhalaError

pytestmark = [
    pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning"),
    # pickletools reads the escapes of Python 2's strings.
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
]

SIZES = Sizes(layers=1)
BACKBONE = "backbone/iter_0000007"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_megatron(folder / "megatron", SIZES, padding=0)
    write_vinpolar(folder / "vinpolar", SIZES)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def source(originals: Path, tmp_path: Path) -> Path:
    """A source in upstream's layout to damage."""
    shutil.copy(originals / "tokenizer.json", tmp_path)
    return shutil.copytree(originals / "megatron", tmp_path / "source")


@pytest.fixture
def port(originals: Path, tmp_path: Path) -> Path:
    """A source in the port's layout to damage."""
    shutil.copy(originals / "tokenizer.json", tmp_path)
    return shutil.copytree(originals / "vinpolar", tmp_path / "source")


def refused(source: Path, message: str, **options: Any) -> None:
    """The conversion fails with one line like `message` and leaves nothing behind."""
    there = sorted(source.parent.iterdir())
    with pytest.raises(KhalaError, match=message) as told:
        convert(source, source.parent / "new/model", **options)
    assert "\n" not in str(told.value)
    assert sorted(source.parent.iterdir()) == there


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(
    "file",
    [
        f"{BACKBONE}/__0_0.distcp",
        f"{BACKBONE}/.metadata",
        f"{BACKBONE}/common.pt",
        "dac_rvq_1.ckpt",
    ],
)
def test_truncated(source: Path, file: str, keep: float) -> None:
    cut(source / file, keep)
    refused(source, "truncated|damaged|no torch file")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("file", ["khala_superres.safetensors", "decoder_weights.pt"])
def test_truncated_port(port: Path, file: str, keep: float) -> None:
    cut(port / file, keep)
    refused(port, "truncated")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (f"{BACKBONE}/__0_0.distcp", "backbone: __0_0.distcp is missing from iter_0000007"),
        (f"{BACKBONE}/.metadata", "backbone: iter_0000007/.metadata is missing"),
        (f"{BACKBONE}/common.pt", "backbone: iter_0000007/common.pt is missing"),
        ("dac_rvq_1.ckpt", "codec: the source has no codec"),
        (BACKBONE, "names iter_0000007, which is missing"),
        ("superresolution", "superres: the source has no folder superresolution"),
    ],
)
def test_missing(source: Path, file: str, message: str) -> None:
    path = source / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(source, message)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("khala_superres.safetensors", "superres: khala_superres.safetensors is missing"),
        ("backbone_megatron_args.json", "backbone: backbone_megatron_args.json is missing"),
        ("decoder_weights.pt", "codec: decoder_weights.pt is missing"),
    ],
)
def test_missing_port(port: Path, file: str, message: str) -> None:
    (port / file).unlink()
    refused(port, message)


def rewrite(source: Path, change: Callable[[dict[str, np.ndarray]], Any], **changes: Any) -> None:
    """Change the tensors of the backbone."""
    tensors = megatron(SIZES, transformer(SIZES, "backbone", 0))
    change(tensors)
    shutil.rmtree(source / BACKBONE / "__0_0.distcp", ignore_errors=True)
    write_dist(source / BACKBONE, tensors, "float32", **changes)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_are_named(source: Path, bad: float) -> None:
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    rewrite(source, lambda tensors: tensors[name].__setitem__((3, 4), bad))
    refused(source, f"^backbone: {name} holds NaN or infinite values")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bad_values_of_the_port(port: Path, dtype: str) -> None:
    tensors = transformer(SIZES, "superres", 1)
    tensors["norm.weight"][2] = np.inf
    named = {name: carried(values, dtype) for name, values in vinpolar(tensors).items()}
    write_safetensors(port / "khala_superres.safetensors", named, dtype)
    refused(port, r"^superres: norm.weight holds NaN or infinite values", dtype=dtype)


@pytest.mark.parametrize("name", ["weight_v", "weight_g", "bias"])
def test_bad_values_of_the_codec(source: Path, name: str) -> None:
    state, _ = codec(SIZES, 2)
    state[f"decoder.model.2.block.1.{name}"][0] = np.nan
    (source / "dac_rvq_1.ckpt").write_bytes(lightning(state))
    refused(source, rf"^codec: decoder.model.2.block.1.{name} holds NaN")


def test_weight_norm_of_nothing(source: Path) -> None:
    state, _ = codec(SIZES, 2)
    state["encoder.block.0.weight_v"][1] = 0
    (source / "dac_rvq_1.ckpt").write_bytes(lightning(state))
    refused(source, "codec: encoder.block.0.weight_v has a row of zeros")
    state["encoder.block.0.weight_v"][1, 0, 0] = 1e-38
    state["encoder.block.0.weight_g"][1] = 1e38
    (source / "dac_rvq_1.ckpt").write_bytes(lightning(state))
    refused(source, "codec: encoder.block.0.weight_v overflows")


def test_junk_in_dropped_rows_is_no_matter(source: Path) -> None:
    tensors = megatron(SIZES, transformer(SIZES, "backbone", 0, padding=8))
    tensors["output_layer.weight"][-8:] = np.nan
    write_dist(source / BACKBONE, tensors, "float32")
    convert(source, source.parent / "model")


def test_too_large_for_half_precision(source: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["decoder.layers.0.mlp.linear_fc1.bias_v"][5] = 40000
        tensors["decoder.final_layernorm.weight"][:] = 60000

    rewrite(source, change)
    refused(source, "backbone: decoder.layers.0.mlp.linear_fc1.bias_v holds 80000", dtype="float16")
    convert(source, source.parent / "single", dtype="float16", fc1_bias="single")
    rewrite(source, lambda t: t["decoder.final_layernorm.weight"].__setitem__(0, 3.4e38))
    refused(
        source, "backbone: decoder.final_layernorm.weight holds 3.4e.38, too large for bfloat16"
    )
    rewrite(source, lambda t: t["decoder.layers.0.mlp.linear_fc1.bias_v"].__setitem__(0, 3e38))
    refused(source, "bias_v is too large to be doubled", dtype="float32")


def test_missing_tensors_are_all_named(source: Path) -> None:
    gone = ["decoder.layers.0.mlp.linear_fc2.bias", "output_layer.weight"]
    rewrite(source, lambda tensors: [tensors.pop(name) for name in gone])
    refused(source, f"^backbone: 2 tensors are missing: {', '.join(gone)}")


def test_misshapen_tensors_are_all_named(source: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["decoder.layers.0.mlp.linear_fc2.bias"] = np.zeros(7, np.float32)
        tensors["decoder.final_layernorm.weight"] = np.zeros((20, 1), np.float32)

    rewrite(source, change)
    refused(
        source,
        r"^backbone: 2 tensors are misshapen: .*linear_fc2.bias \[7\] instead of \[20\]"
        r".*decoder.final_layernorm.weight \[20, 1\] instead of \[20\]",
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("output_layer.weight", (128256, 20), r"output_layer.weight \[128256, 20\] instead of"),
        ("embedding.word_embeddings.weight", (9,), "is not a matrix"),
        ("decoder.layers.0.mlp.linear_fc1.weight_w", (40, 20), "ffn_hidden_size"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (28, 20), "num_query_groups"),
        ("decoder.layers.0.self_attention.linear_proj.weight", (20, 14), "num_attention_heads"),
        ("decoder.layers.2.mlp.linear_fc2.bias", (20,), "decoder.layers.1 is missing"),
        ("decoder.layers.1.mlp.linear_fc2.bias", (20,), "11 tensors are missing"),
    ],
)
def test_shapes_that_contradict(
    source: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    rewrite(source, lambda tensors: tensors.__setitem__(name, np.zeros(shape, np.float32)))
    refused(source, message)


def test_no_layers(source: Path) -> None:
    rewrite(source, lambda t: [t.pop(name) for name in [*t] if ".layers." in name])
    refused(source, "12 tensors are missing: decoder.layers.0")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("encoder.block.1.block.4.weight_v", (6, 3, 5), "misshapen|even numbers|one hop"),
        ("encoder.block.1.block.4.weight_v", (6, 3), "is not a convolution"),
        ("quantizer.vq_layer_3._codebook.embed", (15, 7), "misshapen: quantizer.vq_layer_3"),
        ("quantizer.vq_layer_0._codebook.embed", (), "codebook_size"),
        ("decoder.model.4.alpha", (1, 6, 1), r"decoder.model.4.alpha \[1, 6, 1\]"),
        ("decoder.model.6.bias", (2,), "misshapen|missing"),
        ("quantizer.vq_layer_7._codebook.embed", (16, 7), "vq_layer_5 is missing"),
    ],
)
def test_codec_shapes(source: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    state, _ = codec(SIZES, 2)
    state[name] = np.ones(shape, np.float32)
    (source / "dac_rvq_1.ckpt").write_bytes(lightning(state))
    refused(source, "^codec: .*(" + message + ")")


def test_codec_without_tensors(source: Path) -> None:
    path = source / "dac_rvq_1.ckpt"
    for root, message in (
        ([1], "holds no state dict"),
        ({"state_dict": {1: 2}}, "holds no state dict"),
        ({"state_dict": {}}, "tensors are missing"),
        ({"generator.x": 5}, "tensors are missing"),
    ):
        path.write_bytes(Torch().saved(root))
        refused(source, f"^codec: .*{message}")


def test_other_dtypes_are_refused(source: Path) -> None:
    state, _ = codec(SIZES, 2)
    torch = Torch()
    tensors: dict[str, Any] = {name: torch.tensor(values) for name, values in state.items()}
    tensors["encoder.block.0.bias"] = torch.tensor(np.zeros(3, np.int64), "LongStorage")
    (source / "dac_rvq_1.ckpt").write_bytes(torch.saved(tensors))
    with pytest.raises(ConvertError, match="encoder.block.0.bias in .* is torch.LongStorage"):
        codec_part(source / "dac_rvq_1.ckpt")
    path = source.parent / "x.safetensors"
    header = {
        "a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "b": {"dtype": "U32", "shape": [1], "data_offsets": [8, 12]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)
    tensors = read(path)
    assert tensors["a"].dtype == "I64"
    with pytest.raises(ConvertError, match="not a float"):
        tensors["a"].whole()


def test_the_port_with_integers(port: Path) -> None:
    path = port / "khala_superres.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"BF16"', b'"I16" ', 1))
    refused(port, "superres: embed.weight is I16, no float to convert|is I16")


# --- torch_dist ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../a_0.distcp", "/tmp/a.distcp", "a\\_0.distcp", "..", "", "a/b"]
)
def test_paths_may_not_escape(source: Path, name: str) -> None:
    tensors = {"x": np.zeros(3, np.float32)}
    folder = source / "odd"
    write_dist(folder, tensors, "float32", {"x": [((0,), (3,), "__0_0.distcp")]})
    data = (folder / ".metadata").read_bytes()
    old = pickled("__0_0.distcp")[2:-1]
    (folder / ".metadata").write_bytes(data.replace(old, pickled(name)[2:-1]))
    with pytest.raises(ConvertError, match="points outside its folder"):
        DistCheckpoint(folder)


CHUNKS = {
    "a hole": ([((0,), (2,)), ((3,), (2,))], "leave holes"),
    "an overlap": ([((0,), (3,)), ((2,), (3,))], "overlap"),
    "twice": ([((0,), (3,)), ((0,), (3,))], "twice"),
    "outside": ([((0,), (3,)), ((3,), (3,))], "reaches outside"),
    "axes": ([((0, 0), (3, 1))], "reaches outside"),
    "none": ([], "leave holes"),
}


@pytest.mark.parametrize("name", list(CHUNKS))
def test_chunks_that_do_not_fit(tmp_path: Path, name: str) -> None:
    boxes, message = CHUNKS[name]
    values = np.arange(6, dtype=np.float32)
    pieces = [(offsets, sizes, "__0_0.distcp") for offsets, sizes in boxes]
    if name == "axes":
        write_dist(tmp_path, {"x": values.reshape(6, 1)}, "float32", {"x": pieces})
        path = tmp_path / ".metadata"
        size = pickled(Call(Name("torch", "Size"), ((6, 1),)))[2:-1]
        other = pickled(Call(Name("torch", "Size"), ((6,),)))[2:-1]
        path.write_bytes(path.read_bytes().replace(size, other))
    else:
        write_dist(tmp_path, {"x": values}, "float32", {"x": pieces})
        path = tmp_path / ".metadata"
        size = pickled(Call(Name("torch", "Size"), ((6,),)))[2:-1]
        other = pickled(Call(Name("torch", "Size"), ((5,),)))[2:-1]
        path.write_bytes(path.read_bytes().replace(size, other))
    with pytest.raises(ConvertError, match=message):
        DistCheckpoint(tmp_path).tensor("x")


def test_a_thousand_chunks_and_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(300, dtype=np.float32)
    pieces = [((i,), (1,), "__0_0.distcp") for i in range(300)]
    write_dist(tmp_path, {"x": values}, "float32", {"x": pieces})
    assert np.array_equal(DistCheckpoint(tmp_path).tensor("x").whole(), values)
    monkeypatch.setattr(dcp, "MOST_CHUNKS", 299)
    with pytest.raises(ConvertError, match="too many"):
        DistCheckpoint(tmp_path).tensor("x")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "describes no checkpoint"),
        ({"state_dict_metadata": {}}, "describes no checkpoint"),
        ({"state_dict_metadata": [], "storage_data": {}}, "describes no checkpoint"),
    ],
)
def test_metadata_without_content(tmp_path: Path, state: Any, message: str) -> None:
    (tmp_path / ".metadata").write_bytes(pickled(Made(Name(META, "Metadata"), state)))
    with pytest.raises(ConvertError, match=message):
        DistCheckpoint(tmp_path)


def tensor_entry(**fields: Any) -> Made:
    plain: dict[str, Any] = {
        "size": (2,),
        "chunks": [Made(Name(META, "C"), {"offsets": (0,), "sizes": (2,)})],
    }
    return Made(Name(META, "TensorStorageMetadata"), plain | fields)


class Items(dict[Any, Any]):
    """One pair whose key need not hash."""

    def __init__(self, key: Any, value: Any) -> None:
        super().__init__()
        self._pair = (key, value)

    def items(self) -> Any:
        return [self._pair]


def stored_at(**fields: Any) -> Items:
    index = Made(Name(META, "MetadataIndex"), {"fqn": "x", "offset": (0,)})
    plain = {"relative_path": "__0_0.distcp", "offset": 0, "length": 10}
    return Items(index, Made(Name(META, "_StorageInfo"), plain | fields))


@pytest.mark.parametrize(
    ("entry", "place", "message"),
    [
        (tensor_entry(size=None), stored_at(), "gives x no shape"),
        (tensor_entry(size=(2**40,)), stored_at(), "length too large"),
        (tensor_entry(chunks=5), stored_at(), "describes the chunks of x wrongly"),
        (tensor_entry(chunks=[7]), stored_at(), "describes the chunks of x wrongly"),
        (tensor_entry(), stored_at(offset=-1), "does not say where x is stored"),
        (tensor_entry(), stored_at(length="9"), "does not say where x is stored"),
        (tensor_entry(), stored_at(relative_path=5), "does not say where x is stored"),
        (tensor_entry(), stored_at(transform_descriptors=["zstd"]), "stored compressed"),
        (tensor_entry(), {}, r"stores no chunk of x at \[0\]"),
        (tensor_entry(), {5: 6}, r"stores no chunk of x at \[0\]"),
        (tensor_entry(), stored_at(), "__0_0.distcp is missing"),
    ],
)
def test_metadata_that_says_nonsense(tmp_path: Path, entry: Any, place: Any, message: str) -> None:
    state = {"state_dict_metadata": {"x": entry, 5: 6}, "storage_data": place}
    (tmp_path / ".metadata").write_bytes(pickled(Made(Name(META, "Metadata"), state)))
    with pytest.raises(ConvertError, match=message):
        DistCheckpoint(tmp_path).tensor("x")


def test_chunks_that_are_not_what_metadata_says(tmp_path: Path) -> None:
    values = np.zeros((4, 2), np.float32)
    halves = [((0, 0), (2, 2), "__0_0.distcp"), ((2, 0), (2, 2), "__1_0.distcp")]
    write_dist(tmp_path, {"x": values}, "float32", {"x": halves})
    write_dist(tmp_path / "half", {"x": values.astype(np.float16)}, "float16", {"x": halves})
    write_dist(
        tmp_path / "turned",
        {"x": values.reshape(2, 4)},
        "float32",
        {"x": [((0, 0), (1, 4), "__0_0.distcp"), ((1, 0), (1, 4), "__1_0.distcp")]},
    )
    shutil.copy(tmp_path / "turned/__1_0.distcp", tmp_path)
    with pytest.raises(ConvertError, match=r"has the shape \[1, 4\], .metadata says \[2, 2\]"):
        DistCheckpoint(tmp_path).tensor("x")
    shutil.copy(tmp_path / "half/__1_0.distcp", tmp_path)
    data = (tmp_path / "half/.metadata").read_bytes()
    with pytest.raises(ConvertError, match="several dtypes: float16, float32|truncated|no torch"):
        DistCheckpoint(tmp_path).tensor("x")
    (tmp_path / "half/.metadata").write_bytes(data.replace(b"float16", b"float32"))
    with pytest.raises(ConvertError, match="x is float16, .metadata says torch.float32"):
        DistCheckpoint(tmp_path / "half").tensor("x")


def test_metadata_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dist(tmp_path, {"x": np.zeros(3, np.float32)}, "float32")
    monkeypatch.setattr(dcp, "MAX_BYTES", 10)
    with pytest.raises(ConvertError, match="too large"):
        DistCheckpoint(tmp_path)


# --- zips ----------------------------------------------------------------------------------


def test_zips_that_torch_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    root = pickled({"x": 1})
    for entries, message in (
        ({"a/version": b"3"}, "does not have data.pkl"),
        ({"a/data.pkl": root, "b/data.pkl": root}, "holds data.pkl twice"),
        ({"a/data.pkl": root, "a/byteorder": b"big"}, "little-endian"),
        ({"a/data.pkl": b"garbage"}, "no readable pickle"),
    ):
        path.write_bytes(zipped(entries))
        with pytest.raises(ConvertError, match=message):
            TorchZip(path)
    whole = zipped({"a/data.pkl": root})
    at = whole.index(b"PK\x01\x02")
    for change, message in (
        ({at + 10: b"\x08"}, "in a way torch does not write"),
        ({at + 8: b"\x01"}, "in a way torch does not write|no torch file"),
        ({at + 20: b"\x01"}, "in a way torch does not write"),
        ({at + 42: b"\xff\xff"}, "damaged zip directory|no torch file"),
        ({0: b"XX"}, "in a way torch does not write"),
        ({26: b"\xff\xff"}, "truncated"),
    ):
        data = bytearray(whole)
        for position, new in change.items():
            data[position : position + len(new)] = new
        path.write_bytes(data)
        with pytest.raises(ConvertError, match=message):
            TorchZip(path)
    with pytest.raises(ConvertError, match="cannot be read"):
        TorchZip(tmp_path / "none.pt")
    with pytest.raises(ConvertError, match="not a torch file"):
        TorchZip(tmp_path)


def test_limits_on_zips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zipped({"a/data.pkl": pickled(1)}))
    monkeypatch.setattr(torchzip, "MAX_BYTES", 3)
    with pytest.raises(ConvertError, match="too large"):
        TorchZip(path)
    monkeypatch.setattr(torchzip, "MAX_DIRECTORY", 10)
    with pytest.raises(ConvertError, match="too large"):
        TorchZip(path)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2, 3), (4, 1), 0),
        ((6, 6), (0, 1), 0),
        ((3,), (3,), 0),
        ((2**31, 2**31), (1, 1), 0),
        ((1,), (1,), 2**61),
    ],
)
def test_views_outside_their_storage(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    torch = Torch()
    view = torch.view(np.arange(6, dtype=np.float32), shape, strides, "float32", offset)
    (tmp_path / "x.pt").write_bytes(torch.saved({"x": view}))
    archive = TorchZip(tmp_path / "x.pt")
    with pytest.raises(ConvertError, match="x in x.pt reaches outside its storage"):
        archive.tensor(archive.root["x"], "x")


def test_checksums_of_pickles(source: Path) -> None:
    path = source / BACKBONE / "common.pt"
    old, new = (pickled(value)[2:-1] for value in (1e-5, 2e-5))
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    refused(source, "backbone: common.pt is damaged: its pickle does not match")


def test_a_shard_that_lacks_only_what_is_not_needed(source: Path) -> None:
    folder = source / BACKBONE
    tensors = megatron(SIZES, transformer(SIZES, "backbone", 0))
    tensors["optimizer.state"] = np.zeros(3, np.float32)
    write_dist(folder, tensors, "float32")
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-1])
    refused(source, rf"backbone: __0_0.distcp is truncated: it has {len(data) - 1} of {len(data)}")


def test_checksums_find_flipped_bits(source: Path) -> None:
    path = source / "dac_rvq_1.ckpt"
    archive = TorchZip(path)
    state = archive.root["state_dict"]
    tensor = archive.tensor(state["generator.encoder.block.0.bias"], "x")
    (extent,) = tensor.extents
    data = bytearray(path.read_bytes())
    data[extent.start + 1] ^= 4
    path.write_bytes(data)
    refused(source, "codec: dac_rvq_1.ckpt is damaged: its bytes")


def test_checksums_over_piece_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    import zlib

    from khala_mlx.convert import checksums

    data = bytes(range(256)) * 4
    path = tmp_path / "x"
    path.write_bytes(data)
    spans = [(0, 1), (1, 400), (100, 101), (7, 1024), (1023, 1024), (300, 300)]
    extents = [Extent(path, a, b, zlib.crc32(data[a:b])) for a, b in spans]
    for piece in (1, 7, 100, 1024, 5000):
        monkeypatch.setattr(checksums, "PIECE", piece)
        assert checked_sha256(path, extents) == hashlib.sha256(data).hexdigest()
        for span in spans[:-1]:
            with pytest.raises(ConvertError, match=f"its bytes {span[0]} to {span[1]} do not"):
                checked_sha256(path, [Extent(path, *span, 1)])
    with pytest.raises(ConvertError, match="cannot be read"):
        checked_sha256(tmp_path / "none")


def test_files_that_shrink(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\0" * 8)
    tensor = stored("x", (4,), "float32", path, 0)
    with pytest.raises(ConvertError, match="x cannot be read or is truncated"):
        tensor.whole()
    path.unlink()
    with pytest.raises(ConvertError, match="x cannot be read or is truncated"):
        tensor.whole()
    assert mapped(path, 5, 0).size == 0


# --- safetensors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[]", "malformed safetensors header"),
        ("{{", "malformed safetensors header"),
        ("[" * 100_000, "malformed safetensors header"),
        ('{"a":5}', "describes a in a malformed way"),
        ('{"a":{"dtype":"F32","shape":[1]}}', "describes a in a malformed way"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "malformed way"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', "malformed way"),
        ('{"a":{"dtype":5,"shape":[1],"data_offsets":[0,4]}}', "malformed way"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "do not fit its shape"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "truncated: 4 of 8"),
        ('{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "4 bytes that belong to no"),
        ('{"a":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}', "overlap or leave gaps"),
        ('{"a":{},"a":{}}', "x.safetensors holds a twice"),
        ('{"a\\u001b[31m":{}}', r"describes 'a\\x1b\[31m' in a malformed way"),
    ],
)
def test_untrue_headers(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 4)
    with pytest.raises(ConvertError, match=message):
        read(path)


def test_headers_of_absurd_length(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data in (b"", b"\0" * 8, b"\xff" * 30, struct.pack("<Q", 23) + b"{}"):
        path.write_bytes(data)
        with pytest.raises(ConvertError, match="not a safetensors file or is truncated"):
            read(path)
    with pytest.raises(ConvertError, match="cannot be read"):
        read(tmp_path / "none.safetensors")


# --- the folder ----------------------------------------------------------------------------


def test_what_is_no_source(tmp_path: Path, originals: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("empty", "holds no Khala weights"),
        ("file", "is a file"),
        ("no such", "does not exist"),
    ):
        with pytest.raises(ConvertError, match=message):
            convert(tmp_path / name, tmp_path / "model")
    both = shutil.copytree(originals / "megatron", tmp_path / "both")
    (both / "khala_backbone.safetensors").write_text("")
    refused(both, "several layouts at once: megatron, vinpolar")


def test_two_codecs_and_two_iterations(source: Path) -> None:
    shutil.copy(source / "dac_rvq_1.ckpt", source / "dac_rvq_2.ckpt")
    refused(source, "codec: the source has several codecs, keep one: dac_rvq_1.ckpt, dac_rvq_2")
    (source / "dac_rvq_2.ckpt").rename(source / "other.ckpt")
    latest = source / "backbone/latest_checkpointed_iteration.txt"
    for text, message in (
        ("8", "names iter_0000008, which is missing"),
        ("../x", "names no iteration but ../x"),
        ("", "names no iteration but"),
        ("\x1b[1m" * 99, "names no iteration but"),
    ):
        latest.write_text(text)
        refused(source, message)
    latest.unlink()
    shutil.copytree(source / BACKBONE, source / "backbone/iter_0000008")
    refused(source, "not just one iteration: iter_0000007, iter_0000008")
    shutil.rmtree(source / "backbone/iter_0000008")
    (source / "dac_rvq_1.ckpt").unlink()
    (source / "other.ckpt").rename(source / "codec.ckpt")
    write = shutil.copytree(source, source.parent / "again")
    (write / "codec.ckpt").write_bytes((source / "codec.ckpt").read_bytes())
    convert(write, source.parent / "model")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff"])
def test_arguments_that_are_no_json(port: Path, text: str) -> None:
    (port / "superres_megatron_args.json").write_bytes(text.encode("latin-1"))
    refused(port, "superres: superres_megatron_args.json (is not valid JSON|holds no JSON object)")


def test_common_without_arguments(source: Path) -> None:
    path = source / BACKBONE / "common.pt"
    for root in ([], {}, {"args": 5}, {"args": Name("a", "b")}):
        path.write_bytes(Torch().saved(root))
        refused(source, "backbone: iter_0000007/common.pt holds no Megatron arguments")


# --- fuzzing -------------------------------------------------------------------------------


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checksums of pickles, so that damage gets further."""
    monkeypatch.setattr(torchzip, "_matches", lambda data, crc: True)


FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6)


def damaged(data: bytes, flips: list[tuple[float, int]], keep: float) -> bytes:
    changed = bytearray(data[: max(0, int(len(data) * keep))])
    for where, bits in flips:
        if changed:
            changed[int(where * len(changed))] ^= bits
    return bytes(changed)


def try_everything(path: Path) -> None:
    for part in locate(path).open().parts:
        for tensor in part.tensors.values():
            if tensor.size < 10_000:
                tensor.whole()


@pytest.mark.parametrize(
    ("file", "window"),
    [
        (f"{BACKBONE}/.metadata", None),
        (f"{BACKBONE}/common.pt", None),
        ("dac_rvq_1.ckpt", 60_000),
        ("dac_rvq_1.ckpt", -30_000),
    ],
    ids=["metadata", "common", "ckpt-head", "ckpt-tail"],
)
@pytest.mark.usefixtures("blind")
@pytest.mark.extended
def test_fuzzed_megatron(
    originals: Path, tmp_path_factory: pytest.TempPathFactory, file: str, window: int | None
) -> None:
    root = tmp_path_factory.mktemp("fuzz") / "source"
    shutil.copytree(originals / "megatron", root)
    whole = (originals / "megatron" / file).read_bytes()
    if window is None:
        before, middle, after = b"", whole, b""
    elif window > 0:
        before, middle, after = b"", whole[:window], whole[window:]
    else:
        before, middle, after = whole[:window], whole[window:], b""

    @FUZZ
    @given(FLIPS, st.one_of(st.just(1.0), st.floats(0, 1)))
    def check(flips: list[tuple[float, int]], keep: float) -> None:
        (root / file).write_bytes(before + damaged(middle, flips, keep) + after)
        works_or_says_why(lambda: try_everything(root))

    check()


@pytest.mark.usefixtures("blind")
def test_fuzzed_distcp(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    values = rng.standard_normal((8, 6)).astype(np.float32)
    cuts = {"x": [((0, 0), (8, 2), "a"), ((0, 2), (4, 4), "a"), ((4, 2), (4, 4), "b")]}
    write_dist(folder, {"x": values}, "float32", cuts)
    originals = {name: (folder / name).read_bytes() for name in ("a", "b")}

    @FUZZ
    @given(st.sampled_from(["a", "b"]), FLIPS, st.one_of(st.just(1.0), st.floats(0, 1)))
    def check(name: str, flips: list[tuple[float, int]], keep: float) -> None:
        for each, data in originals.items():
            (folder / each).write_bytes(damaged(data, flips, keep) if each == name else data)
        works_or_says_why(lambda: DistCheckpoint(folder).tensor("x").whole())

    check()


def test_fuzzed_safetensors(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    values = {f"layers.{i}.weight": np.zeros((3, i), np.float16) for i in range(1, 5)}
    write_safetensors(path, values, "float16")
    whole = path.read_bytes()

    @FUZZ
    @given(FLIPS, st.one_of(st.just(1.0), st.floats(0, 1)))
    def check(flips: list[tuple[float, int]], keep: float) -> None:
        path.write_bytes(damaged(whole, flips, keep))
        works_or_says_why(lambda: [t.whole() for t in read(path).values() if len(t.dtype) > 4])

    check()
