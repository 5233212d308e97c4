import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_model import write_tiny_model

from khala_mlx import Khala, KhalaError
from khala_mlx.cli import main
from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert
from khala_mlx.model import weights
from khala_mlx.performance import bench
from khala_mlx.performance import cost as counts
from khala_mlx.performance import memory as envelope
from khala_mlx.performance.bench import Turns, compared, measured, random_config

SMALL = ["--random", "1", "128", "--cached", "20", "--rows", "20", "--chunk-frames", "1"]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    result = run(*SMALL, "--turns", 2, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_report_has_what_others_rely_on(told: dict[str, Any]) -> None:
    for stage, speed in (
        ("compose", "tokens_per_second"),
        ("refine", "steps_per_second"),
        ("render", "realtime_factor"),
    ):
        assert told[stage][speed] > 0
        assert 0.1 < told[stage]["floor_ratio"] < 100
    assert told["compose"]["bytes_ratio"] == pytest.approx(1, abs=0.02)
    assert told["refine"]["flops_ratio"] == pytest.approx(1, abs=0.001)
    assert told["peak_bytes"] > 0
    assert told["forecast_bytes"] / told["peak_bytes"] == pytest.approx(1, abs=0.5)
    assert told["machine"]["name"]


@pytest.mark.parametrize("kept_packed", [False, True])
def test_bytes_are_those_of_the_weights_as_they_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_packed: bool
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    tiny = KhalaConfig.tiny()
    tiny = replace(
        tiny,
        backbone=replace(tiny.backbone, **sizes),
        superres=replace(tiny.superres, **sizes),
    )
    source, packed = write_tiny_model(tmp_path / "whole", tiny), tmp_path / "packed"
    convert(source, packed, dtype="float32", quantize=4, group_size=32)
    if kept_packed:
        for module in (envelope, weights):
            monkeypatch.setattr(module, "CPU_DEQUANTIZED_BYTES", 0)
    khala = Khala.from_pretrained(packed)
    told = measured(khala.parts, "x", {"cached": 20, "rows": 20, "turns": 1}, 1)["compose"]
    # The biases of quantized layers are added apart from their products, and not counted as read.
    assert (0.9 if kept_packed else 0.98) < told["bytes_ratio"] < 1.02
    whole = counts.compose_bytes(tiny, 20, 4)
    assert (told["bytes_per_token"] < whole) == kept_packed


def test_lines_and_a_comparison(told: dict[str, Any], tmp_path: Path) -> None:
    easy, hard = tmp_path / "easy.json", tmp_path / "hard.json"
    for path, ratio in ((easy, 1000.0), (hard, 0.001)):
        stages = ("compose", "refine", "render")
        old = {stage: {**told[stage], "floor_ratio": ratio} for stage in stages}
        path.write_text(json.dumps({**told, **old}))
    result = run(*SMALL, "--turns", 1, "--songs", 2, "--compare", easy)
    assert result.exit_code == 0, result.stderr
    for line in ("compose  ", "x floor", "GB/s", "compose.floor_ratio", "1000.00 ->"):
        assert line in result.stdout
    assert result.stderr == "Warning: Not alike: compose.songs 1, now 2.\n"
    result = run(*SMALL, "--turns", 1, "--compare", hard)
    assert result.exit_code == 1
    assert "Not alike" not in result.stderr
    assert (
        "More than 25% further from the kernel baseline: compose.floor_ratio, refine"
        in result.stderr
    )


def test_a_model_folder(tiny_folder: Path) -> None:
    result = run("-m", tiny_folder, "--turns", 1, "--chunk-frames", 4, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    # The defaults end where the tiny windows end.
    assert told["compose"]["cached_tokens"] == 512 - 32
    assert told["refine"]["rows"] == 384


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--random", "0", "128"], "at least one layer"),
        (["--random", "1", "100"], "n * 128"),
        (["--random", "1", "128", "--cached", "16000", "--turns", "30"], "room for"),
        (["--compare", "absent.json"], "absent.json cannot be read"),
        (["--compare", __file__], "is not a report of"),
    ],
)
def test_wrong_requests(arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert sentence in result.stderr


@pytest.mark.parametrize(
    "old",
    [
        [],
        {},
        {"compose": 3},
        {"compose": {"floor_ratio": "x"}},
        {stage: {"floor_ratio": 0} for stage in ("compose", "refine", "render")},
        {stage: {"floor_ratio": math.nan} for stage in ("compose", "refine", "render")},
    ],
)
def test_wrong_reports_are_refused(old: Any) -> None:
    with pytest.raises(KhalaError, match="not a report"):
        compared({stage: {"floor_ratio": 1.0} for stage in ("compose", "refine", "render")}, old)


def test_turns_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 2.0, 5.0, 6.0, 8.0, 12.0, 100.0, 101.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    turns = Turns(lambda: None)
    for done in range(4):
        turns(done, 4)
    # The first step, with all that precedes it, does not count; then 3 / 1, 2 / 4, 88 / 1.
    assert turns.ours == [3.0, 2.0, 88.0]
    assert turns.bare == [1.0, 4.0, 1.0]
    assert turns.ratio == 3.0
    assert turns.seconds == 3.0


def test_random_weights_have_the_released_shapes() -> None:
    full = random_config(24, 2048)
    assert full.backbone.intermediate_size == 5632
    assert (full.superres.num_heads, full.superres.num_kv_heads) == (32, 8)
    assert (full.codec.decoder_dim, full.codec.encoder_dim) == (192, 128)


def test_every_width_that_is_allowed_has_heads() -> None:
    for width in range(128, 2049, 128):
        sizes = random_config(1, width).backbone
        assert sizes.num_heads * sizes.head_dim == width


def test_a_model_of_small_windows_and_one_fine_layer(tmp_path: Path) -> None:
    config = KhalaConfig.tiny()
    layout = replace(config.tokens, num_codebooks=config.tokens.num_coarse + 1)
    sizes = {"num_codebooks": layout.num_codebooks}
    config = replace(
        config,
        tokens=layout,
        backbone=replace(config.backbone, context=96, max_prompt=40),
        superres=replace(
            config.superres, context=40, max_prompt=30, vocab_size=layout.superres_vocab
        ),
        codec=replace(config.codec, **sizes),
    )
    folder = write_tiny_model(tmp_path / "small", config)
    told = run("-m", folder, "--json", "--chunk-frames", 2)
    assert told.exit_code == 0, told.stderr
    refine = json.loads(told.stdout)["refine"]
    assert refine["floor_ratio"] > 0
    assert refine["flops_ratio"] == pytest.approx(1, rel=0.03)
