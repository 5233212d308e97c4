"""Adapters at work on a model, from Python and from the command line."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result
from mlx.utils import tree_flatten
from tiny_model import write_tiny_model
from tiny_songs import random_adapter
from tolerances import CLOSE

from khala_mlx import Khala, KhalaError
from khala_mlx.cli import main
from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert, export_adapter
from khala_mlx.model import weights
from khala_mlx.model.transformer import matrix
from khala_mlx.storage.adapter import Adapter, Pair, backbone_id

CONFIG = KhalaConfig.tiny()
IDS = np.arange(40)[None] % 300


@pytest.fixture
def khala(tiny_folder: Path) -> Khala:
    return Khala.from_pretrained(tiny_folder)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(adapter: Adapter) -> Path:
        export_adapter(adapter, tmp_path / adapter.name, "mlx")
        return tmp_path / adapter.name

    return save


def dense(khala: Khala, adapters: list[tuple[Adapter, float]]) -> np.ndarray:
    """Logits of a model whose matrices have been changed by hand."""
    plain = Khala.from_pretrained(khala.parts.folder)
    layers = dict(plain.backbone.named_modules())
    for path in adapters[0][0].pairs:
        before = matrix(layers[path])
        total = before
        for adapter, strength in adapters:
            pair = adapter.pairs[path]
            after = before + adapter.scale * (mx.array(pair.a) @ mx.array(pair.b)).T
            if pair.m is not None:
                after = after * (mx.array(pair.m) / mx.linalg.norm(after, axis=1))[:, None]
            total = total + strength * (after - before)
        layers[path].weight = total
    return plain.backbone(IDS)


@pytest.mark.parametrize("kinds", [[False], [True], [False, True], [True, False, True]], ids=str)
def test_several_at_once_add_up(khala: Khala, kinds: list[bool]) -> None:
    adapters = [
        random_adapter(CONFIG, seed=seed, rank=2 + seed, dora=dora)
        for seed, dora in enumerate(kinds)
    ]
    strengths = [1.0, 0.5, -0.25][: len(kinds)]
    before = khala.backbone(IDS)
    khala.load_adapters(adapters, strengths)
    expected = dense(khala, list(zip(adapters, strengths, strict=True)))
    assert np.abs(expected - before).max() > 0.1
    assert np.abs(khala.backbone(IDS) - expected).max() < 20 * CLOSE


@pytest.mark.parametrize("dora", [False, True])
def test_scale_0_and_none_are_the_base_bit_by_bit(khala: Khala, dora: bool) -> None:
    base, loaded = khala.backbone(IDS), khala.backbone
    adapter = random_adapter(CONFIG, dora=dora)
    for scales in (None, [0.3], [0.0], [1.0], []):
        khala.load_adapters([adapter] if scales != [] else [], scales)
        assert khala.backbone is loaded
        same = np.array_equal(khala.backbone(IDS), base)
        assert same == (scales in ([0.0], []))
    assert all("lora" not in name for name, _ in tree_flatten(khala.backbone.parameters()))


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(khala: Khala, dora: bool) -> None:
    base = khala.backbone(IDS)
    layers, pairs = dict(khala.backbone.named_modules()), {}
    for path, pair in random_adapter(CONFIG).pairs.items():
        lengths = np.array(mx.linalg.norm(matrix(layers[path]), axis=1)) if dora else None
        pairs[path] = Pair(pair.a, np.zeros_like(pair.b), lengths)
    khala.load_adapters([Adapter("fresh", 2.0, pairs)])
    assert np.abs(khala.backbone(IDS) - base).max() == 0


def test_songs_differ_and_come_back(khala: Khala, saved: Callable[..., Path]) -> None:
    def sung() -> np.ndarray:
        return khala.generate(tags="pop", seconds=0.2, min_seconds=0.2, seed=1).codes

    base = sung()
    khala.load_adapters([saved(random_adapter(CONFIG))], scales=[0.8])
    assert not np.array_equal(sung(), base)
    khala.load_adapters([])
    assert np.array_equal(sung(), base)


def test_stages_that_are_freed_keep_their_adapters(tiny_folder: Path) -> None:
    adapter, codes = random_adapter(CONFIG), []
    for keep in (True, False):
        khala = Khala.from_pretrained(tiny_folder, keep_loaded=keep)
        khala.load_adapters([adapter])
        for _ in range(2):
            song = khala.generate(tags="pop", seconds=0.2, min_seconds=0.2, seed=1)
            codes.append(song.codes)
    assert all(np.array_equal(each, codes[0]) for each in codes)
    assert song.metadata["model"]["adapters"] == [
        {"name": "some", "sha256": adapter.sha256, "scale": 1.0}
    ]
    khala.load_adapters([])
    assert not np.array_equal(
        khala.generate(tags="pop", seconds=0.2, min_seconds=0.2, seed=1).codes, codes[0]
    )


def test_what_does_not_fit_is_refused_and_the_rest_stays(
    khala: Khala, saved: Callable[..., Path], tmp_path: Path
) -> None:
    good = random_adapter(CONFIG)
    khala.load_adapters([good])
    before = khala.backbone(IDS)
    small = KhalaConfig.tiny()
    deeper = dataclasses.replace(
        small, backbone=dataclasses.replace(small.backbone, num_layers=3, intermediate_size=65)
    )
    other = dataclasses.replace(good, base="0" * 64)
    for adapters, scales, sentence in (
        ([good, random_adapter(deeper)], None, r"not have: layers\.2\.mlp\.down_proj, "),
        ([tmp_path / "absent"], None, "cannot be read"),
        ([other], None, "another backbone"),
        ([good], [1.0, 2.0], "1 adapters, but 2 scales"),
        ([good], [float("nan")], "must be a finite number"),
        ([good], ["1"], "must be a finite number"),
    ):
        with pytest.raises(KhalaError, match=sentence):
            khala.load_adapters(adapters, scales)
        assert np.array_equal(khala.backbone(IDS), before)
    khala.load_adapters([str(saved(dataclasses.replace(good, base=backbone_id(CONFIG))))])
    assert np.array_equal(khala.backbone(IDS), before)


def test_mlx_lm_reads_the_folder_too(khala: Khala, saved: Callable[..., Path]) -> None:
    from khala_mlx.model.cache import file_limit_kept

    with file_limit_kept():
        from mlx_lm.tuner.utils import load_adapters
    for dora in (False, True):
        folder = saved(random_adapter(CONFIG, f"dora-{dora}", dora=dora))
        khala.load_adapters([folder])
        theirs = load_adapters(Khala.from_pretrained(khala.parts.folder).backbone, str(folder))
        theirs.eval()
        assert np.abs(khala.backbone(IDS) - theirs(IDS)).max() < 20 * CLOSE


@pytest.mark.parametrize("dora", [False, True])
def test_on_packed_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dora: bool) -> None:
    write_tiny_model(tmp_path / "plain")
    packed = tmp_path / "packed"
    convert(tmp_path / "plain", packed, dtype="float32", quantize=8, group_size=32)
    monkeypatch.setattr(weights, "CPU_DEQUANTIZED_BYTES", 0)
    khala, adapter = Khala.from_pretrained(packed), random_adapter(CONFIG, dora=dora)
    base = khala.backbone(IDS)
    assert "scales" in khala.backbone.layers[0].mlp.up_proj
    khala.load_adapters([adapter])
    adapted = khala.backbone(IDS)
    monkeypatch.undo()
    unpacked = Khala.from_pretrained(packed)
    unpacked.load_adapters([adapter])
    assert np.abs(adapted - base).max() > 0.1
    assert np.abs(adapted - unpacked.backbone(IDS)).max() < 20 * CLOSE


def generate(*arguments: Any) -> Result:
    length = ["--seconds", "0.2", "--min-seconds", "0.2", "--tags", "pop", "--seed", 1]
    return CliRunner().invoke(main, [str(each) for each in ("generate", *length, *arguments)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        export_adapter(random_adapter(CONFIG, name, seed=seed), name, "mlx")
    export_adapter(random_adapter(CONFIG, "one"), "peft", "peft")
    return tiny_folder


def codes(name: str) -> np.ndarray:
    return np.array(mx.load(f"{name}.take.safetensors")["codes"])


def test_generate_with_adapters(here: Path) -> None:
    both = ["--adapter", "one", "--adapter", "two", "--adapter-scale", 0.8, "--adapter-scale", 0.4]
    for name, options in (
        ("base", []),
        ("one", ["--adapter", "one"]),
        ("peft", ["--adapter", "peft"]),
        ("off", ["--adapter", "one", "--adapter-scale", 0]),
        ("both", both),
    ):
        result = generate("-m", here, *options, "-o", f"{name}.wav")
        assert result.exit_code == 0, result.stderr
    assert np.array_equal(codes("off"), codes("base"))
    assert np.array_equal(codes("peft"), codes("one"))
    assert not np.array_equal(codes("one"), codes("base"))
    assert not np.array_equal(codes("both"), codes("one"))
    told = json.loads(Path("both.json").read_text())["model"]["adapters"]
    assert [(each["name"], each["scale"]) for each in told] == [("one", 0.8), ("two", 0.4)]
    assert json.loads(Path("base.json").read_text())["model"]["adapters"] == []


def test_what_finishes_a_draft_names_its_adapters(here: Path) -> None:
    asked = ["-m", here, "--adapter", "one", "--adapter-scale", 0.5]
    generate(*asked, "-o", "a.wav")
    told = json.loads(generate(*asked, "--draft", 4, "--json", "-o", "b.wav").stdout)
    assert told["finish"].endswith("b.take.safetensors --adapter one --adapter-scale 0.5")
    done = CliRunner().invoke(main, told["finish"].split()[1:])
    assert done.exit_code == 0, done.stderr
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()


def test_like_tells_of_other_adapters(here: Path) -> None:
    generate("-m", here, "--adapter", "one", "--adapter-scale", 0.5, "-o", "a.wav")
    again = ["-m", here, "--like", "a.json"]
    result = generate(*again, "-o", "b.wav")
    assert "a.json was made with other adapters (one at 0.5): the song will differ" in result.stderr
    result = generate(*again, "--adapter", "one", "--adapter-scale", 0.5, "-o", "c.wav")
    assert "adapters" not in result.stderr
    assert Path("a.wav").read_bytes() == Path("c.wav").read_bytes()
    generate("-m", here, "-o", "d.wav")
    result = generate("-m", here, "--like", "d.json", "--adapter", "one", "-o", "e.wav")
    assert "d.json was made with other adapters (none)" in result.stderr


def test_wrong_adapters_stop_before_anything_is_loaded(here: Path) -> None:
    shutil.copytree(here, "model", ignore=shutil.ignore_patterns("*.safetensors"))
    for options, sentence in (
        (["--adapter", "absent"], "There is no adapter absent."),
        (["--adapter", "model"], "model is not an adapter"),
        (["--adapter-scale", 1], "0 adapters, but 1 scales"),
        (["--adapter", "one", "--adapter-scale", 1, "--adapter-scale", 2], "1 adapters, but 2"),
    ):
        result = generate("-m", "model", *options)
        assert result.exit_code == 1
        assert sentence in result.stderr


def test_without_adapters_mlx_lm_is_not_imported_for_them() -> None:
    modules = "khala_mlx.model.lora, khala_mlx.storage.adapter"
    code = f"import sys, {modules}; sys.exit('mlx_lm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
