"""Pickles are read without running them, whatever is in them."""

from __future__ import annotations

import functools
import os
import pickle
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_checkpoints import (
    Call,
    Made,
    Name,
    Persistent,
    Raw,
    Sizes,
    Torch,
    codec,
    common,
    lightning,
    pickled,
    works_or_says_why,
    write_dist,
    write_megatron,
    write_tokenizer,
    write_vinpolar,
    zipped,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from khala_mlx.convert import convert
from khala_mlx.convert.formats import pickle_objects as inert
from khala_mlx.convert.formats import pickles
from khala_mlx.convert.formats.pickles import loads
from khala_mlx.errors import ConvertError, KhalaError

# pickletools reads the escapes of Python 2's strings.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")

SIZES = Sizes(layers=1)


def villains(marker: Path) -> dict[str, Any]:
    """Things that leave a file behind when a stock unpickler meets them."""
    touch = f"open({str(marker)!r}, 'w').close()"
    command = f"touch {marker}"
    build = Made(Name("builtins", "object"), {})
    return {
        "os.system": Call(Name("os", "system"), (command,)),
        "posix.system": Call(Name("posix", "system"), (command,)),
        "eval": Call(Name("builtins", "eval"), (f"__import__('os').system({command!r})",)),
        "exec": Call(Name("builtins", "exec"), (touch,)),
        "popen": Call(Name("subprocess", "Popen"), (["touch", str(marker)],)),
        "getattr": Call(
            Call(Name("builtins", "getattr"), (Name("os", "path"), "os")), ("system", command)
        ),
        "torch name": Call(Name("torch._utils", "_rebuild_tensor_v2.__globals__"), (command,)),
        "import": Name("khala_villain", "anything"),
        "obj": Raw(b"(cos\nsystem\nX" + struct.pack("<I", len(command)) + command.encode() + b"o"),
        "inst": Raw(b"(X" + struct.pack("<I", len(command)) + command.encode() + b"ios\nsystem\n"),
        "newobj_ex": Raw(
            b"\x8c\x02os\x8c\x06system\x93(\x8c"
            + bytes([len(command)])
            + command.encode()
            + b"t}\x92"
        ),
        "build": build,
        "from_type": Call(
            Name("torch._tensor", "_rebuild_from_type_v2"),
            (Name("os", "system"), Name("a", "B"), (command,), None),
        ),
        "parameter": Call(
            Name("torch._utils", "_rebuild_parameter"), (Call(Name("os", "system"), (command,)),)
        ),
        "size": Call(Name("torch", "Size"), (Call(Name("os", "system"), (command,)),)),
    }


class Reduced:
    """The classic."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that must not appear, and a module whose import would make it."""
    marker = tmp_path / "ran"
    (tmp_path / "khala_villain.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nanything = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "khala_villain", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "khala_villain")
    return marker


@pytest.mark.parametrize("name", list(villains(Path("x"))))
def test_nothing_runs(marker: Path, name: str) -> None:
    data = pickled({"payload": villains(marker)[name], "plain": 1})
    assert loads(data, "it")["plain"] == 1
    assert not marker.exists()
    assert "khala_villain" not in sys.modules


@pytest.mark.parametrize("name", ["os.system", "exec", "inst", "obj", "import"])
def test_the_villains_are_real(marker: Path, name: str) -> None:
    pickle.loads(pickled(villains(marker)[name]))
    assert marker.exists()


@pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")
@pytest.mark.parametrize("place", ["root", "inside"])
@pytest.mark.parametrize("file", [".metadata", "common.pt", "ckpt", "distcp"])
def test_a_hostile_megatron_source(marker: Path, tmp_path: Path, file: str, place: str) -> None:
    source = tmp_path / "source"
    write_megatron(source, SIZES)
    tokenizer = write_tokenizer(tmp_path)
    folder = source / "backbone/iter_0000007"
    state, _ = codec(SIZES, 2)
    evil = villains(marker)
    whole = {"root": evil["os.system"], "inside": None}[place]
    if file == ".metadata":
        data = (folder / ".metadata").read_bytes()
        old = pickled("planner_data")[2:-1] + b"N"
        new = pickled("planner_data")[2:-1] + pickled([*evil.values()])[2:-1]
        assert data.count(old) == 1
        data = pickled(whole) if whole else data.replace(old, new)
        (folder / ".metadata").write_bytes(data)
    elif file == "common.pt":
        arguments = {**SIZES.arguments(), **evil}
        data = Torch().saved(whole) if whole else common(arguments, extra=evil["exec"])
        (folder / "common.pt").write_bytes(data)
    elif file == "ckpt":
        data = Torch().saved(whole) if whole else lightning(state, hyper_parameters=evil)
        (source / "dac_rvq_1.ckpt").write_bytes(data)
    else:
        tensor = np.zeros((4, 4), np.float32)
        write_dist(folder, {"embedding.word_embeddings.weight": tensor}, "float32")
        data = Torch().saved(whole or [*evil.values()])
        (folder / "__0_0.distcp").write_bytes(b"\0" * 3 + data)
    if place == "inside" and file != "distcp":
        convert(source, tmp_path / "model", tokenizer=tokenizer)
        assert (tmp_path / "model/config.json").is_file()
    else:
        with pytest.raises(KhalaError):
            convert(source, tmp_path / "model", tokenizer=tokenizer)
        assert not (tmp_path / "model").exists()
    assert not marker.exists()
    assert "khala_villain" not in sys.modules


@pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")
@pytest.mark.parametrize("place", ["root", "value", "tensor"])
def test_a_hostile_decoder_weights(marker: Path, tmp_path: Path, place: str) -> None:
    source = tmp_path / "source"
    write_vinpolar(source, SIZES)
    write_tokenizer(source)
    state, _ = codec(SIZES, 2)
    torch = Torch()
    tensors: dict[str, Any] = {name: torch.tensor(values) for name, values in state.items()}
    evil = villains(marker)
    if place == "value":
        tensors |= evil
    elif place == "tensor":
        tensors["encoder.block.0.bias"] = evil["eval"]
    root = Raw(pickle.dumps(Reduced(f"touch {marker}"), 2)[2:-1]) if place == "root" else tensors
    (source / "decoder_weights.pt").write_bytes(torch.saved(root))
    if place == "value":
        convert(source, tmp_path / "model")
    else:
        with pytest.raises(ConvertError, match="codec: "):
            convert(source, tmp_path / "model")
        assert not (tmp_path / "model").exists()
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_of_every_protocol(protocol: int) -> None:
    shared = [1, -2, 2**40, -(2**80), 2.5, True, False, None]
    value: dict[str, Any] = {
        "shared": shared,
        "again": shared,
        "text": "ä" * 300,
        "bytes": b"\0" * 300,
        "empty": (),
        "tuples": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "nested": {1: [{}], (2, "x"): []},
    }
    if protocol < 3:
        del value["bytes"]
    read = loads(pickle.dumps(value, protocol), "it")
    assert read == value
    assert read["shared"] is read["again"]
    made = loads(pickle.dumps([{1, 2}, frozenset({3}), bytearray(b"x"), 1j], protocol), "it")
    assert len(made) == 4


def test_what_names_become() -> None:
    data = pickle.dumps(OrderedDict(a=1), 2)
    assert loads(data, "it") == {"a": 1}
    made = loads(pickled(Made(Name("argparse", "Namespace"), {"x": 3})), "it")
    assert isinstance(made, inert.Object)
    assert (made.name, made.get("x"), made.get("y", 7)) == ("argparse.Namespace", 3, 7)
    assert inert.Object("bare").get("x") is None
    assert loads(pickled(Call(Name("torch", "Size"), ([2, 3],))), "it") == (2, 3)
    for odd in (
        Call(Name("torch", "Size"), ((-1,),)),
        Call(Name("collections", "OrderedDict"), ([["a", 1]],)),
        Call(Name("torch._utils", "_rebuild_tensor_v2"), (1, 2, (3,), (1,), False, None)),
        Call(Name("torch._utils", "_rebuild_tensor_v3"), (1, 2, (3,), (1,), False, None, "f4")),
        Persistent(("storage", "no type", "0", "cpu", 1)),
        Persistent("module"),
        Call(5),
    ):
        assert isinstance(loads(pickled(odd), "it"), inert.Object)
    storage = Persistent(("storage", Name("torch", "FloatStorage"), "0", "cpu", 6))
    for shape, strides in (((2, 3), (3,)), ((2, "x"), (3, 1)), ([2, 3], (3, 1)), ((2**70,), (1,))):
        call = Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides, False))
        assert isinstance(loads(pickled(call), "it"), inert.Object)
    call = Call(Name("torch._utils", "_rebuild_tensor"), (storage, 0, (2, 3), (3, 1)))
    assert loads(pickled(call), "it").shape == (2, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"N",
        b"R.",
        b"(",
        b"t.",
        b"\x85.",
        b"s.",
        b"u.",
        b"b.",
        b"a.",
        b"(NN",
        b"h\x07.",
        b"\x94.",
        b"}(K\x01u.",
        b"](K\x01e",
        b"NNs.",
        b"]Q",
        b"cos\n",
        b"cos\nsyst\xffem\n.",
        b"\x8cX\x02.",
        b"X\xff\xff\xff\xffabc.",
        b"I12x\n.",
        b"F1..2\n.",
        b"\x8d" + b"\xff" * 8 + b".",
        b"\x8e" + b"\xff" * 7 + b"\x0f.",
        b"\x96" + b"\xff" * 8 + b".",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x82\x01.",
        b"\x83\x01\x00.",
        b"\x84\x01\x00\x00\x00.",
        b"\x97.",
        b"\x98.",
        b"0.",
        b"1.",
        b"2.",
        b"\x80\xff.",
    ],
)
def test_malformed_pickles_are_one_error(data: bytes) -> None:
    with pytest.raises(ConvertError, match="it holds") as told:
        loads(data, "it")
    assert "\n" not in str(told.value)


def test_a_name_twice_is_told() -> None:
    key = b"X\x01\x00\x00\x00a"
    with pytest.raises(ConvertError, match="it holds a twice"):
        loads(b"}(" + key + b"N" + key + b"Nu.", "it")
    with pytest.raises(ConvertError, match="it holds a twice"):
        loads(b"(" + key + b"N" + key + b"Nd.", "it")
    assert loads(b"(" + key + b"Nd.", "it") == {"a": None}


def test_bombs_are_duds(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = loads(b"N" + b"\x85" * 200_000 + b".", "it")
    assert isinstance(deep, tuple)
    del deep
    nested = b"N" + b"\x85" * 100_000
    assert len(loads(b"}" + nested + b"Ns.", "it")) == 1
    long = b"X" + struct.pack("<I", 5000) + b"m" * 5000
    assert loads(long + long + b"\x93.", "it").name == "?"
    assert loads(b"r\xff\xff\xff\x7f".join([b"N", b"."]), "it") is None
    wide = pickled(Call(Name("torch", "Size"), (tuple([1] * 100),)))
    assert isinstance(loads(wide, "it"), inert.Object)
    again = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    with pytest.raises(ConvertError, match="no readable pickle"):
        loads(again + (b"(" + again + b"N") * 5000 + b"N" + b"Nt" * 5000 + b"R.", "it")
    monkeypatch.setattr(pickles, "MAX_OPCODES", 100)
    with pytest.raises(ConvertError, match="too long"):
        loads(b"N0" * 100 + b"N.", "it")
    monkeypatch.setattr(pickles, "MAX_BYTES", 100)
    with pytest.raises(ConvertError, match="too large"):
        loads(b"N" * 200, "it")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes(data: bytes) -> None:
    for text in (data, b"\x80\x04" + data, data + b"."):
        works_or_says_why(functools.partial(loads, text, "it"))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_opcodes(draw: st.DataObject) -> None:
    """Sequences of opcodes get further than random bytes."""
    words = [
        b"N",
        b"K\x01",
        b"X\x01\x00\x00\x00a",
        b"(",
        b")",
        b"]",
        b"}",
        b"t",
        b"l",
        b"d",
        b"\x85",
        b"\x86",
        b"\x87",
        b"a",
        b"e",
        b"s",
        b"u",
        b"R",
        b"\x81",
        b"\x92",
        b"b",
        b"Q",
        b"0",
        b"1",
        b"2",
        b"\x94",
        b"h\x00",
        b"h\x01",
        b"\x93",
        b"cos\nsystem\n",
        b"ctorch\nSize\n",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"o",
        b"ctorch._tensor\n_rebuild_from_type_v2\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nFloatStorage\n",
        b"X\x07\x00\x00\x00storage",
    ]
    data = b"".join(draw.draw(st.lists(st.sampled_from(words), max_size=40)))
    works_or_says_why(lambda: loads(data + b".", "it"))


def test_zip_helper_makes_readable_zips(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "x.zip"
    path.write_bytes(zipped({"a/b": b"hello", "a/c": b""}))
    assert zipfile.ZipFile(path).testzip() is None
