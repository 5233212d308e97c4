"""Options, quantization, files and progress of a conversion, and what a failed one leaves."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fake_checkpoints import (
    Sizes,
    transformer,
    vinpolar,
    write_safetensors,
    write_tokenizer,
    write_vinpolar,
)
from tiny_model import write_tiny_model

from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert, outputs
from khala_mlx.convert import write as writing
from khala_mlx.convert.formats.safetensors import Entry, Output, read, write
from khala_mlx.convert.formats.tensors import narrow, to_float32
from khala_mlx.errors import ConvertError, KhalaError, KhalaWarning

pytestmark = pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")

# Rows of 32, 64 and 96 values: groups of 32 fit everywhere, groups of 64 only o_proj.
SIZES = Sizes(layers=1, heads=2, groups=1, head_dim=32, hidden=32, ffn=96)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 source with some matrices that divide into groups of 32 and 64."""
    root = tmp_path_factory.mktemp("source") / "port"
    write_vinpolar(root, SIZES, dtype="float32")
    rng = np.random.default_rng(5)
    for part in ("backbone", "superres"):
        tensors = transformer(SIZES, part, 1)
        for name, values in tensors.items():
            if ".layers." in f".{name}":
                tensors[name] = rng.standard_normal(values.shape).astype(np.float32)
        write_safetensors(root / f"khala_{part}.safetensors", vinpolar(tensors), "float32")
    write_tokenizer(root)
    return root


@pytest.fixture(scope="module")
def model(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source as a float32 model folder with single biases."""
    folder = tmp_path_factory.mktemp("model") / "single"
    convert(source, folder, dtype="float32", fc1_bias="single")
    return folder


def tensors(folder: Path, part: str = "backbone") -> dict[str, mx.array]:
    loaded = mx.load(str(folder / f"{part}.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


# --- dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrowing_is_mlxs(source: Path, model: Path, tmp_path: Path, dtype: str) -> None:
    convert(source, tmp_path / "direct", dtype=dtype, fc1_bias="single")
    convert(model, tmp_path / "again", dtype=dtype)
    for part in ("backbone", "superres"):
        direct = (tmp_path / f"direct/{part}.safetensors").read_bytes()
        assert direct == (tmp_path / f"again/{part}.safetensors").read_bytes()
        wide, narrowed = tensors(model, part), tensors(tmp_path / "direct", part)
        for name, values in wide.items():
            assert mx.array_equal(values.astype(getattr(mx, dtype)), narrowed[name]), name
    assert tensors(tmp_path / "direct", "codec")["encoder.conv_in.weight"].dtype == mx.float32


def test_rounding_to_nearest_even() -> None:
    values = np.array(
        [
            0x3F808000,
            0x3F818000,
            0x3F808001,
            0x3F807FFF,
            0xBF818000,
            0x00008000,
            0x80018000,
            0x7F7F7FFF,
            0,
            0x80000000,
            1,
        ],
        np.uint32,
    ).view(np.float32)
    wanted = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF82, 0, 0x8002, 0x7F7F, 0, 0x8000, 0]
    assert narrow(values, "bfloat16", "x").tolist() == wanted
    # MLX flushes subnormals on some devices, so they are left out of the comparison with it.
    rng = np.random.default_rng(0)
    many = rng.integers(0x00800000, 0x7F000000, 100_000, dtype=np.uint32).view(np.float32)
    for dtype, limit in ((mx.bfloat16, np.inf), (mx.float16, 60000)):
        kept = many[(many < limit) & (many > 1e-4)]
        name = str(dtype).removeprefix("mlx.core.")
        ours = narrow(kept, name, "x").view(np.uint16)
        assert np.array_equal(ours, np.array(mx.array(kept).astype(dtype).view(mx.uint16)))


def test_every_half_survives_widening(tmp_path: Path) -> None:
    bits = np.arange(0x7C00, dtype=np.uint16)
    for dtype, kept in (("float16", bits), ("bfloat16", np.arange(0x7F80, dtype=np.uint16))):
        carrier = kept.view(np.float16) if dtype == "float16" else kept
        write_safetensors(tmp_path / "x.safetensors", {"x": carrier}, dtype)
        tensor = read(tmp_path / "x.safetensors")["x"]
        wide = to_float32(tensor.whole(), tensor)
        assert np.array_equal(narrow(wide, dtype, "x").view(np.uint16), kept)


def test_widening_a_model_is_told(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "half", dtype="float16")
    with pytest.warns(KhalaWarning, match="The source is float16; float32 only makes it larger"):
        convert(tmp_path / "half", tmp_path / "wide", dtype="float32")
    half, wide = tensors(tmp_path / "half"), tensors(tmp_path / "wide")
    assert all(mx.array_equal(half[name].astype(mx.float32), wide[name]) for name in half)


# --- quantisation --------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (6, 32), (8, 64)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_quantised(model: Path, tmp_path: Path, bits: int, group: int, dtype: str) -> None:
    folder = tmp_path / "packed"
    report = convert(model, folder, dtype=dtype, quantize=bits, group_size=group)
    config = KhalaConfig.load(folder / "config.json")
    for part in ("backbone", "superres"):
        plain, packed = tensors(model, part), tensors(folder, part)
        for name, values in plain.items():
            stem = name.removesuffix(".weight")
            narrowed = values.astype(getattr(mx, dtype))
            if values.ndim == 1 or values.shape[1] % group:
                assert mx.array_equal(packed.pop(name), narrowed)
                assert f"{part}.{stem}" not in config.quantization
                continue
            how = config.quantization[f"{part}.{stem}"]
            assert (how.bits, how.group_size, how.mode) == (bits, group, "affine")
            wanted = mx.quantize(narrowed, group_size=group, bits=bits)
            for kind, array in zip(("weight", "scales", "biases"), wanted, strict=True):
                assert mx.array_equal(packed.pop(f"{stem}.{kind}"), array), (name, kind)
        assert not packed
    assert report["quantization"] == {
        "bits": bits,
        "group_size": group,
        "mode": "affine",
        "layers": len(config.quantization),
    }
    codec = "codec.safetensors"
    assert (folder / codec).read_bytes() == (model / codec).read_bytes()
    with pytest.raises(ConvertError, match="The source is quantised"):
        convert(folder, tmp_path / "again")


def test_nothing_to_quantise(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no row divides into groups of 128"):
        convert(source, tmp_path / "x", quantize=4, group_size=128)
    assert not (tmp_path / "x").exists()


def test_the_runtime_loads_it(model: Path, tmp_path: Path) -> None:
    from khala_mlx.model.backbone import Backbone
    from khala_mlx.model.codec import Codec
    from khala_mlx.model.superres import SuperRes
    from khala_mlx.model.weights import load_part

    for name, options in (("packed", {"quantize": 4}), ("plain", {})):
        folder = tmp_path / name
        convert(model, folder, **options)  # type: ignore[arg-type]
        config = KhalaConfig.load(folder / "config.json")
        load_part(Backbone(config.backbone, config.tokens), folder, "backbone", config)
        load_part(SuperRes(config.superres, config.tokens), folder, "superres", config)
        load_part(Codec(config.codec), folder, "codec", config)


# --- a model folder as a source ------------------------------------------------------------


def test_fc1_bias_of_a_model_folder(source: Path, model: Path, tmp_path: Path) -> None:
    """It keeps what it has, or is rescaled exactly on demand."""
    convert(source, tmp_path / "double", dtype="float32")
    convert(model, tmp_path / "kept", dtype="float32")
    convert(model, tmp_path / "doubled", dtype="float32", fc1_bias="double")
    convert(tmp_path / "doubled", tmp_path / "halved", dtype="float32", fc1_bias="single")
    convert(tmp_path / "double", tmp_path / "still", dtype="float32", fc1_bias="double")
    names = ("double", "kept", "doubled", "halved", "still")
    told = {name: KhalaConfig.load(tmp_path / name / "config.json").fc1_bias for name in names}
    assert list(told.values()) == ["double", "single", "double", "single", "double"]
    for part in ("backbone", "superres"):
        data = {name: (tmp_path / name / f"{part}.safetensors").read_bytes() for name in names}
        assert data["double"] == data["doubled"] == data["still"]
        assert data["kept"] == data["halved"] == (model / f"{part}.safetensors").read_bytes()


def test_provenance_is_kept(model: Path, tmp_path: Path) -> None:
    first = KhalaConfig.load(model / "config.json").source
    convert(model, tmp_path / "a", dtype="float16")
    convert(tmp_path / "a", tmp_path / "b", dtype="bfloat16")
    second = KhalaConfig.load(tmp_path / "b/config.json").source
    assert second["files"] == first["files"]
    assert second["layout"] == first["layout"] == "vinpolar"
    assert second["converted_from"]["dtype"] == "float16"
    assert "backbone.safetensors" in second["converted_from"]["files"]


def test_a_tiny_model_of_the_runtime(tmp_path: Path) -> None:
    """Other token layouts than the released one, with their own tokenizer."""
    write_tiny_model(tmp_path / "tiny")
    convert(tmp_path / "tiny", tmp_path / "copy", dtype="float32")
    for part in ("backbone", "superres", "codec"):
        plain, copied = tensors(tmp_path / "tiny", part), tensors(tmp_path / "copy", part)
        assert plain.keys() == copied.keys()
        assert all(mx.array_equal(plain[name], copied[name]) for name in plain)
    before, after = (KhalaConfig.load(tmp_path / name / "config.json") for name in ("tiny", "copy"))
    assert before.tokens == after.tokens
    assert before.backbone == after.backbone


def test_damaged_model_folders(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    values = {name: np.array(array) for name, array in tensors(model).items()}
    values["norm.weight"] = np.zeros(5, np.float32)
    write_safetensors(broken / "backbone.safetensors", values, "float32")
    with pytest.raises(ConvertError, match=r"backbone: 1 tensors are misshapen: norm.weight \[5\]"):
        convert(broken, tmp_path / "x")
    del values["norm.weight"]
    values["extra"] = np.zeros(3, np.float32)
    write_safetensors(broken / "backbone.safetensors", values, "float32")
    with pytest.raises(ConvertError, match=r"backbone: 1 tensors are missing: norm.weight"):
        convert(broken, tmp_path / "x")
    (broken / "config.json").write_text("{")
    with pytest.raises(KhalaError, match="not valid JSON"):
        convert(broken, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- files ---------------------------------------------------------------------------------


def test_large_parts_are_cut(
    source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "LARGEST_FILE", 17_000_000)
    folder = tmp_path / "cut"
    report = convert(source, folder, dtype="float32", fc1_bias="single")
    files = report["parts"]["backbone"]["files"]
    assert files == [f"backbone-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    assert report["parts"]["codec"]["files"] == ["codec.safetensors"]
    index = json.loads((folder / "backbone.safetensors.index.json").read_text())
    whole = tensors(model)
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in whole.values())
    for name, file in index["weight_map"].items():
        assert mx.array_equal(mx.load(str(folder / file))[name], whole[name])  # type: ignore[index]
    monkeypatch.undo()
    convert(folder, tmp_path / "joined", dtype="float32")
    joined = (tmp_path / "joined/backbone.safetensors").read_bytes()
    assert joined == (model / "backbone.safetensors").read_bytes()
    name = "backbone.safetensors.index.json"
    for text, message in (
        ('{"weight_map":{"a":"../x"}}', "malformed"),
        ("{}", "malformed"),
        ("[]", "no JSON object"),
        ('{"weight_map":{"a":5}}', "malformed"),
        (json.dumps({"weight_map": {"a": files[0]}}), "tensors are missing"),
    ):
        (folder / name).write_text(text)
        with pytest.raises(ConvertError, match=f"backbone: .*{message}"):
            convert(folder, tmp_path / "x")
    shutil.copy(folder / files[0], folder / "twin")
    (folder / name).write_text(json.dumps({"weight_map": {"a": files[0], "b": "twin"}}))
    with pytest.raises(ConvertError, match="embed_tokens.weight is in two files"):
        convert(folder, tmp_path / "x")


def test_a_writer_that_lies_is_found(tmp_path: Path) -> None:
    output = Output((Entry("x", "float32", (3,)),), lambda: iter([np.zeros(2, np.float32)]))
    with pytest.raises(RuntimeError, match="x: 8 bytes, not 12"):
        write(tmp_path / "x.safetensors", [output], lambda _: None)


def test_headers_are_aligned(model: Path) -> None:
    data = (model / "codec.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0


# --- options and destinations --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got int8"),
        ({"codec_dtype": "bfloat16"}, "codec_dtype must be one of float32, float16"),
        ({"quantize": 5}, "quantize must be one of 4, 6, 8, mxfp4, mxfp8, got 5"),
        ({"group_size": 16}, "group_size must be one of 32, 64, 128, got 16"),
        ({"fc1_bias": "triple"}, "fc1_bias must be one of double, single, got triple"),
    ],
)
def test_options(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        convert(source, tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())


def test_destinations(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("there", "exists already"),
        ("file", "exists already"),
        ("link", "exists already"),
        ("file/x", "cannot be written"),
        ("x" * 300, "cannot be written"),
    ):
        with pytest.raises(KhalaError, match=message) as told:
            convert(source, tmp_path / name)
        assert "\n" not in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "there"]


def test_parents_go_with_a_failure(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError):
        convert(tmp_path / "none", tmp_path / "a/b/model")
    assert not list(tmp_path.iterdir())
    convert(source, str(tmp_path / "a/b/model"))
    assert (tmp_path / "a/b/model/config.json").is_file()


def test_unreadable_source(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from khala_mlx.convert import run

    def refuse(_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(run, "locate", refuse)
    with pytest.raises(ConvertError, match="The source cannot be read: Permission denied"):
        convert(source, tmp_path / "x")


def test_a_full_disk_by_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "write", full)
    with pytest.raises(
        ConvertError, match=r"backbone: the disk is full, this part takes 0.01.* GB"
    ):
        convert(source, tmp_path / "x")
    monkeypatch.setattr(
        writing, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error"))
    )
    with pytest.raises(KhalaError, match="x cannot be written: I/O error"):
        convert(source, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "khala-test", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(source: Path, small_disk: Path) -> None:
    with pytest.raises(ConvertError, match="the disk is full") as told:
        convert(source, small_disk / "new/model", dtype="float32")
    assert "\n" not in str(told.value)
    assert not list(small_disk.iterdir())


# --- interruptions -------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys
from khala_mlx.convert import convert

def progress(part, done, total):
    if part == "superres" and done > total * 0.6:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))

convert(sys.argv[1], sys.argv[2], on_progress=progress)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_interrupted(source: Path, tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(source), str(tmp_path / "a/model"), name]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert ended.returncode == -getattr(signal, name)
    left = [path.name for path in tmp_path.rglob("*") if path.parent.name in ("a", tmp_path.name)]
    if name == "SIGINT":
        assert not left
    else:
        hidden = [part for part in left if part != "a"]
        assert len(hidden) == 1
        assert hidden[0].startswith(".model.")
        convert(source, tmp_path / "a/model")


def test_progress_may_stop_it(source: Path, tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "a/model", on_progress=stop)
    assert not list(tmp_path.iterdir())


def test_import_is_light() -> None:
    heavy = ["mlx", "mlx.core", "huggingface_hub", "tokenizers", "torch", "yaml"]
    code = f"import sys, khala_mlx.convert; print([m for m in sys.modules if m in {heavy}])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- memory --------------------------------------------------------------------------------

MEASURED = """
import pathlib, resource, sys
import numpy
from khala_mlx.convert import convert

def peak():
    # Linux's ru_maxrss begins with what the parent had before exec; VmHWM is this program's.
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

if len(sys.argv) > 3:
    import mlx.core
before = peak()
report = convert(sys.argv[1], sys.argv[2], **({"quantize": 4} if len(sys.argv) > 3 else {}))
print(peak() - before, sum(part["bytes"] for part in report["parts"].values()))
"""


def write_hollow(root: Path, sizes: Sizes) -> int:
    """A float32 source whose matrices are holes in files; returns its largest tensor's bytes."""
    write_vinpolar(root, Sizes(layers=sizes.layers, codebooks=64, codebook_size=1024))
    write_tokenizer(root)
    wide = Sizes(**{**vars(sizes), "codebooks": 64, "codebook_size": 1024})
    queries, keys = wide.heads * wide.head_dim, wide.groups * wide.head_dim
    for part in ("backbone", "superres"):
        names = vinpolar(transformer(Sizes(**{**vars(wide), "hidden": 2, "ffn": 2}), part, 0))
        header, end = {}, 0
        for name in names:
            kind = name.split(".")[-2] if "layers" in name else name
            rows = {
                "embed.weight": wide.vocab[part],
                "lm_head.weight": wide.vocab[part],
                "q_proj": queries,
                "k_proj": keys,
                "v_proj": keys,
                "gate_proj": wide.ffn,
                "up_proj": wide.ffn,
            }.get(kind, wide.hidden)
            into = {"o_proj": queries, "down_proj": wide.ffn}.get(kind, wide.hidden)
            plain = name.endswith("bias") or "norm" in kind
            shape = [rows] if plain else [rows, into]
            size = 4 * int(np.prod(shape))
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with (root / f"khala_{part}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        (root / f"{part}_megatron_args.json").write_text(json.dumps(wide.arguments()))
    return 4 * wide.vocab["superres"] * wide.hidden


@pytest.mark.parametrize("kind", ["plain", "quantised"])
@pytest.mark.extended
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, kind: str) -> None:
    """500 MB of source: not even its largest tensor (150 MB) is held at once."""
    sizes = Sizes(layers=1, heads=4, groups=2, head_dim=64, hidden=192, ffn=512)
    largest = write_hollow(tmp_path / "source", sizes)
    assert largest > 140e6
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "source"), str(tmp_path / "model")]
    command += ["q"] if kind == "quantised" else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    growth, written = map(int, done.stdout.split())
    assert written > (70e6 if kind == "quantised" else 240e6)
    # A GPU keeps some freed buffers of the quantised blocks.
    assert growth < largest + (100e6 if kind == "quantised" else 0)
    shutil.rmtree(tmp_path / "model")
