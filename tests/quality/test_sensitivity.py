import itertools
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from khala_mlx import Khala, KhalaError
from khala_mlx.cli import main
from khala_mlx.config import KhalaConfig, Quantization
from khala_mlx.convert import convert
from khala_mlx.errors import ConvertError
from khala_mlx.performance import cost as counts
from khala_mlx.quality import sensitivity
from khala_mlx.quality.sensitivity import BITS, allot, mixed

# The tiny tokenizer is not the released one.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not Llama 3.1")

LAYERS = {"backbone.lm_head": Quantization(8, 32), "superres.lm_head": Quantization(3, 32)}


def test_bits_go_where_they_help_most() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = {name: int(rng.integers(1, 5)) for name in "abcd"}
        # Each bit more makes the error a quarter of itself, as quantization does.
        worst = {name: float(rng.exponential()) for name in sizes}
        distances = {name: {b: worst[name] * 4.0**-b for b in BITS} for name in sizes}
        found = allot(distances, sizes, 4.5)

        def cost(chosen: dict[str, int], sizes: dict[str, int] = sizes) -> int:
            return sum(sizes[name] * bits for name, bits in chosen.items())

        def loss(chosen: dict[str, int], table: dict[str, dict[int, float]] = distances) -> float:
            return sum(table[name][bits] for name, bits in chosen.items())

        budget = 4.5 * sum(sizes.values())
        every = [dict(zip(sizes, b, strict=True)) for b in itertools.product(BITS, repeat=4)]
        least = min(loss(chosen) for chosen in every if cost(chosen) <= budget)
        assert cost(found) <= budget
        assert loss(found) <= 1.5 * least
        uniform = loss(dict.fromkeys(sizes, 4))
        assert loss(found) <= uniform


def test_all_alike_get_the_same() -> None:
    distances = {name: {b: 4.0**-b for b in BITS} for name in "abc"}
    assert set(allot(distances, dict.fromkeys("abc", 7), 4).values()) == {4}
    assert set(allot(distances, dict.fromkeys("abc", 7), 8).values()) == {8}


def test_a_matrix_that_matters_more_gets_more(tiny_folder: Path) -> None:
    khala = Khala.from_pretrained(tiny_folder)
    name = "layers.1.mlp.down_proj"
    strong = dict(khala.backbone.named_modules())[name]
    strong.weight = strong.weight * 20
    before = dict(tree_flatten(khala.backbone.parameters()))
    told: list[tuple[int, int]] = []
    backbone, superres = khala.backbone, khala.superres
    khala.parts.release = lambda part: None  # type: ignore[method-assign]
    chosen = mixed(
        khala, 4.5, group_size=32, dtype="float32", frames=12, on_progress=lambda *a: told.append(a)
    )
    assert set(chosen) == set(counts.quantizable(khala.config))
    ours = {n: how.bits for n, how in chosen.items() if n.startswith("backbone.layers")}
    assert ours[f"backbone.{name}"] == max(ours.values()) > min(ours.values())
    sizes = {n: into * out for n, (into, out) in counts.quantizable(khala.config).items()}
    for part in ("backbone.", "superres."):
        own = [n for n in sizes if n.startswith(part)]
        spent = sum(chosen[n].bits * sizes[n] for n in own) / sum(sizes[n] for n in own)
        assert 4 < spent <= 4.5
    assert told == [(n, len(sizes) * len(BITS)) for n in range(1, len(told) + 1)]
    # The model is what it was.
    assert khala.backbone is backbone
    assert khala.superres is superres
    after = dict(tree_flatten(backbone.parameters()))
    assert all(mx.array_equal(before[n], after[n]) for n in before)


def test_the_command_packs_what_was_measured(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def chosen(_: Khala, bits: float, **how: object) -> dict[str, Quantization]:
        asked.append((bits, how["group_size"], how["dtype"]))
        return LAYERS

    monkeypatch.setattr(sensitivity, "mixed", chosen)
    arguments = ["convert", str(tiny_folder), str(tmp_path / "out"), "--dtype", "float32", "--json"]
    arguments += ["--quantize", "mixed", "--group-size", "32"]
    result = CliRunner().invoke(main, [*arguments, "--bits", "3.5"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["quantization"]["mixed"] == 2
    assert asked == [(3.5, 32, "float32")]
    assert KhalaConfig.load(tmp_path / "out" / "config.json").quantization == LAYERS
    song = Khala.from_pretrained(tmp_path / "out").compose(np.arange(9), max_frames=5, min_frames=5)
    assert song.shape == (2, 5)
    again = CliRunner().invoke(main, arguments)
    assert "exists already" in again.stderr
    assert len(asked) == 1
    for extra, sentence in (
        (["--quantize", "4", "--bits", "4"], "--bits is for --quantize mixed"),
        (["--quantize-part", "head=8"], "leave --quantize-part"),
    ):
        wrong = CliRunner().invoke(main, [*arguments, *extra])
        assert wrong.exit_code == 2
        assert sentence in wrong.stderr


def test_what_cannot_be_measured_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    plain = Khala.from_pretrained(tiny_folder)
    for bits in (3, 9, float("nan")):
        with pytest.raises(KhalaError, match="bits must lie above 3"):
            mixed(plain, bits, group_size=32)
    with pytest.raises(KhalaError, match="no row divides into groups of 128"):
        mixed(plain, 4, group_size=128)
    convert(tiny_folder, tmp_path / "four", dtype="float32", quantize="4", group_size=32)
    with pytest.raises(KhalaError, match="quantized already"):
        mixed(Khala.from_pretrained(tmp_path / "four"), 4)
    assert plain.parts._loaded == {}


def test_layers_by_name_exclude_rules(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="not both"):
        convert(tiny_folder, tmp_path / "x", quantize="4", quantize_layers=LAYERS)
    for name, group in (
        ("backbone.layers.9.mlp.up_proj", 32), ("codec.lm_head", 32), ("backbone.lm_head", 64),
    ):  # fmt: skip
        with pytest.raises(
            ConvertError, match=f"no such layers that can be quantized so: '?{name}"
        ):
            convert(tiny_folder, tmp_path / "x", quantize_layers={name: Quantization(4, group)})
    assert not (tmp_path / "x").exists()
