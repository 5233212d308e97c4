"""Adapters in foreign layouts: read, written, and refused in one sentence."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_checkpoints import Call, Name, Torch, pickled, works_or_says_why, zipped
from tiny_songs import random_adapter

from khala_mlx.cli import main
from khala_mlx.config import LINEARS, KhalaConfig
from khala_mlx.convert import export_adapter, read_adapter
from khala_mlx.convert.formats.safetensors import Entry, Output, write
from khala_mlx.errors import KhalaError
from khala_mlx.storage.adapter import Adapter, Pair

CONFIG = KhalaConfig.tiny()
PEFT = "base_model.model.model."


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    outputs = [
        Output((Entry(name, "float32", array.shape),), lambda array=array: iter([array]))
        for name, array in tensors.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, outputs, lambda _: None)
    return path


def peft_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    tensors = {}
    for path, pair in adapter.pairs.items():
        tensors[f"{PEFT}{path}.lora_A.weight"] = np.ascontiguousarray(pair.a.T)
        tensors[f"{PEFT}{path}.lora_B.weight"] = np.ascontiguousarray(pair.b.T)
        if pair.m is not None:
            tensors[f"{PEFT}{path}.lora_magnitude_vector"] = pair.m
    return tensors


def write_peft(folder: Path, adapter: Adapter, **changes: Any) -> Path:
    write_tensors(folder / "adapter_model.safetensors", peft_tensors(adapter))
    about = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", **changes}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def listed(adapter: Adapter, modules: tuple[str, ...] = LINEARS) -> dict[str, np.ndarray]:
    """What the public scripts save: pairs numbered as they walk the PyTorch port's modules."""
    tensors, number = {}, 0
    for layer in range(CONFIG.backbone.num_layers):
        for parent in ("self_attn", "mlp"):
            for name in modules:
                pair = adapter.pairs.get(f"layers.{layer}.{parent}.{name}")
                if pair is not None:
                    tensors[f"{number}.A"] = np.ascontiguousarray(pair.a.T)
                    tensors[f"{number}.B"] = np.ascontiguousarray(pair.b.T)
                    number += 1
    return tensors


def write_pt(path: Path, tensors: dict[str, np.ndarray], **beside: Any) -> Path:
    torch = Torch()
    state = {name: torch.tensor(array) for name, array in tensors.items()}
    path.write_bytes(torch.saved({"lora": state, **beside} if beside else state))
    return path


def same(ours: Adapter, theirs: Adapter) -> bool:
    return dataclasses.replace(ours, base=None).sha256 == theirs.sha256


@pytest.mark.parametrize("dora", [False, True])
def test_peft_there_and_back(tmp_path: Path, dora: bool) -> None:
    adapter = random_adapter(CONFIG, dora=dora, base="abc")
    export_adapter(adapter, tmp_path / "peft", "peft")
    again = read_adapter(tmp_path / "peft")
    assert same(again, adapter)
    assert again.name == "peft"
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["use_dora"]) == (3, 6, dora)
    assert set(about["target_modules"]) == set(adapter.pairs)
    assert same(read_adapter(write_peft(tmp_path / "by hand", adapter, use_dora=dora)), adapter)


def test_peft_computes_what_we_compute(tmp_path: Path) -> None:
    """result = W x + lora_B(lora_A(x)) * lora_alpha / r, in PEFT's own words."""
    adapter = random_adapter(CONFIG)
    export_adapter(adapter, tmp_path / "peft", "peft")
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    tensors, path = peft_tensors(adapter), "layers.1.mlp.down_proj"
    x = np.ones(64, np.float32)
    theirs = (
        tensors[f"{PEFT}{path}.lora_B.weight"]
        @ (tensors[f"{PEFT}{path}.lora_A.weight"] @ x)
        * (about["lora_alpha"] / about["r"])
    )
    pair = adapter.pairs[path]
    assert np.allclose(theirs, adapter.scale * (x @ pair.a @ pair.b), atol=1e-5)


def test_layers_with_ranks_and_alphas_of_their_own(tmp_path: Path) -> None:
    adapter = random_adapter(CONFIG)
    path = "layers.1.mlp.up_proj"
    wider = Pair(np.ones((32, 5), np.float32), np.ones((5, 64), np.float32))
    uneven = dataclasses.replace(adapter, pairs={**adapter.pairs, path: wider})
    export_adapter(uneven, tmp_path / "peft", "peft")
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert about["r"] == 5
    assert len(about["rank_pattern"]) == 13
    again = read_adapter(tmp_path / "peft")
    for each, pair in uneven.pairs.items():
        change = again.scale * again.pairs[each].a @ again.pairs[each].b
        assert np.allclose(change, uneven.scale * pair.a @ pair.b, atol=1e-5)

    pattern = {path: 24, "up_proj": 12}
    changed = read_adapter(write_peft(tmp_path / "pattern", adapter, alpha_pattern=pattern))
    assert np.allclose(changed.pairs[path].b, 4 * adapter.pairs[path].b)
    other = "layers.0.mlp.up_proj"
    assert np.allclose(changed.pairs[other].b, 2 * adapter.pairs[other].b)
    rslora = read_adapter(write_peft(tmp_path / "rslora", adapter, use_rslora=True))
    assert rslora.scale == pytest.approx(6 / 3**0.5)


def test_names_of_the_pytorch_port_and_torch_files(tmp_path: Path) -> None:
    adapter, torch = random_adapter(CONFIG), Torch()
    state = {
        name.replace("model.model.", "model.").replace("self_attn", "attn"): torch.tensor(array)
        for name, array in peft_tensors(adapter).items()
    }
    write_peft(tmp_path / "port", adapter)
    (tmp_path / "port" / "adapter_model.safetensors").unlink()
    (tmp_path / "port" / "adapter_model.bin").write_bytes(torch.saved(state))
    for path in (tmp_path / "port", tmp_path / "port" / "adapter_model.bin"):
        assert same(read_adapter(path), adapter)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "LOHA"}, "sets peft_type"),
        ({"bias": "all", "modules_to_save": ["lm_head"]}, "sets bias, modules_to_save"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out"),
        ({"r": 0}, "no sensible r"),
        ({"lora_alpha": None}, "no sensible r"),
        ({"use_dora": True}, r"partner is missing: layers\.0\.mlp\.down_proj, layers"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "not a name of a layer"),
        ({"alpha_pattern": {"up_proj": "x"}}, "not a name of a layer"),
    ],
)
def test_peft_that_means_something_else(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(KhalaError, match=sentence):
        read_adapter(write_peft(tmp_path / "peft", random_adapter(CONFIG), **changes))


def test_every_foreign_tensor_is_named(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "peft", random_adapter(CONFIG))
    extra = {f"{PEFT}lm_head.lora_A.weight": np.ones((3, 3)), "x.lora_embedding_A": np.ones(3)}
    tensors = {name: array.astype(np.float32) for name, array in extra.items()}
    (folder / "adapter_model.safetensors").unlink()
    write_tensors(folder / "adapter_model.safetensors", tensors)
    with pytest.raises(KhalaError, match=rf"{PEFT}lm_head\.lora_A\.weight, x\.lora_embedding_A\."):
        read_adapter(folder)


def test_the_list_of_fine_tuners(tmp_path: Path) -> None:
    adapter = random_adapter(CONFIG)
    run = {"lora_r": 3, "lora_alpha": 6.0, "run_name": "r1", "smoke": False}
    tensors = listed(adapter)
    saved = write_pt(tmp_path / "lora_ep2.pt", tensors, config=run, epoch=2, targets=LINEARS)
    assert same(read_adapter(saved), adapter)
    assert read_adapter(saved).name == "lora_ep2"
    # Without settings the scale is that of the published ones, 32 / 16.
    for path in (
        write_pt(tmp_path / "bare.pt", tensors),
        write_tensors(tmp_path / "bare.safetensors", tensors),
    ):
        assert same(read_adapter(path), adapter)
    halved = write_pt(tmp_path / "half.pt", tensors, config={"lora_r": 6, "lora_alpha": 6})
    assert read_adapter(halved).scale == 1


def test_a_list_of_some_modules(tmp_path: Path) -> None:
    adapter = random_adapter(CONFIG)
    some = ("down_proj", "v_proj", "q_proj")
    tensors = listed(adapter, some)
    path = write_pt(tmp_path / "some.pt", tensors, targets=some, config={})
    found = read_adapter(path)
    assert len(found.pairs) == 6
    for key, pair in found.pairs.items():
        assert np.array_equal(pair.a, adapter.pairs[key].a)


@pytest.mark.parametrize(
    ("drop", "beside", "sentence"),
    [
        (("3.A",), {"epoch": 1}, "needs 7 pairs, but it has 3.A"),
        (("13.A", "13.B"), {"epoch": 1}, "it has 13 pairs"),
        (("3.A", "3.B"), {"epoch": 1}, "it has 13.A, 13.B, 3.A, 3.B"),
        ((), {"targets": ["lm_head"]}, "layers that the backbone does not have: lm_head"),
        ((), {"config": {"lora_r": 0}}, "no sensible rank"),
        ((), {"config": {"lora_alpha": "x"}}, "no sensible rank"),
    ],
)
def test_lists_that_are_not_whole(
    tmp_path: Path, drop: tuple[str, ...], beside: dict[str, Any], sentence: str
) -> None:
    tensors = {k: v for k, v in listed(random_adapter(CONFIG)).items() if k not in drop}
    with pytest.raises(KhalaError, match=sentence):
        read_adapter(write_pt(tmp_path / "lora.pt", tensors, **beside))


def test_nothing_in_a_torch_file_runs(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    evil = Call(Name("os", "system"), (f"touch {tmp_path}/khala-was-here",))
    path.write_bytes(zipped({"archive/data.pkl": pickled({"0.A": evil, "0.B": evil})}))
    with pytest.raises(KhalaError, match="not a plain tensor"):
        read_adapter(path)
    assert not (tmp_path / "khala-was-here").exists()
    for root in ({}, [], {"lora": 5}, {"lora": {}}):
        path.write_bytes(zipped({"archive/data.pkl": pickled(root)}))
        works_or_says_why(lambda: read_adapter(path))


def test_matrices_that_are_none(tmp_path: Path) -> None:
    tensors = {name: array.reshape(-1) for name, array in listed(random_adapter(CONFIG)).items()}
    with pytest.raises(KhalaError, match=r"0\.A is not a matrix"):
        read_adapter(write_pt(tmp_path / "flat.pt", tensors))


def test_mlx_folders_and_what_is_no_adapter(tmp_path: Path) -> None:
    adapter = random_adapter(CONFIG)
    export_adapter(adapter, tmp_path / "mlx", "mlx")
    for path in (tmp_path / "mlx", tmp_path / "mlx" / "adapters.safetensors"):
        assert same(read_adapter(path), adapter)
    with pytest.raises(KhalaError, match="not an adapter: it holds neither"):
        read_adapter(tmp_path)
    with pytest.raises(KhalaError, match="There is no adapter"):
        read_adapter(tmp_path / "absent")
    with pytest.raises(KhalaError, match="format must be one of peft, mlx, got gguf"):
        export_adapter(adapter, tmp_path / "new", "gguf")
    with pytest.raises(KhalaError, match="exists already"):
        export_adapter(adapter, tmp_path / "mlx", "peft")


def test_export_from_the_command_line(tmp_path: Path) -> None:
    adapter = random_adapter(CONFIG)
    source = write_pt(tmp_path / "lora_ep1.pt", listed(adapter))
    for layout in ("peft", "mlx"):
        arguments = ["export", tmp_path / layout, "--adapter", source, "--format", layout, "--json"]
        result = CliRunner().invoke(main, ["train", *map(str, arguments)])
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["layers"] == 14
        assert same(read_adapter(tmp_path / layout), adapter)
