"""The memory forecast against what a training takes."""

import dataclasses
import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tolerances import ON_CPU

from khala_mlx.config import (
    BackboneConfig,
    CodecConfig,
    KhalaConfig,
    Quantization,
    SuperResConfig,
    TokenLayout,
)
from khala_mlx.model.backbone import Backbone
from khala_mlx.performance.machine import usable_of_mac
from khala_mlx.storage.shapes import linear_sizes
from khala_mlx.train.data.sequences import Example
from khala_mlx.train.finetune.lora import LoraRun, LoraTask, add_lora
from khala_mlx.train.finetune.memory import Machine, adapter_bytes, forecast, weight_bytes
from khala_mlx.train.settings import LoraTraining, Schedule

LAYOUT = dataclasses.replace(TokenLayout.tiny(), codebook_size=256)
HERE = Machine(width=4, on_cpu=ON_CPU)


def model_config(width: int = 256, layers: int = 4, **changes: Any) -> KhalaConfig:
    backbone = BackboneConfig(
        vocab_size=LAYOUT.backbone_vocab, context=4096, max_prompt=256, num_layers=layers,
        hidden_size=width, num_heads=width // 64, num_kv_heads=2, head_dim=64,
        intermediate_size=width * 11 // 4,
    )  # fmt: skip
    return KhalaConfig(
        tokens=LAYOUT,
        backbone=dataclasses.replace(backbone, **changes),
        superres=dataclasses.replace(SuperResConfig.tiny(), vocab_size=LAYOUT.superres_vocab),
        codec=dataclasses.replace(CodecConfig.tiny(), codebook_size=256),
    )


# Two minutes of sound at the released rate, behind a prompt of some 400 tokens.
TWO_MINUTES, FEW = 5568, 480


def packed(config: KhalaConfig, bits: int = 4) -> KhalaConfig:
    names = ["embed_tokens", "lm_head", *linear_sizes(config.backbone)]
    quantization = {f"backbone.{name}": Quantization(bits, 64) for name in names}
    return dataclasses.replace(config, quantization=quantization)


def example(tokens: int, seed: int = 0) -> Example:
    """A song whose rows are `tokens` long, which is a multiple of 32."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 250, 40)
    codes = rng.integers(0, 256, (8, (tokens - 42) // 2))
    # Superres' prompt plays no part.
    return Example(prompt, prompt, codes, whole=True)


def measured(config: KhalaConfig, settings: LoraTraining, tokens: int, tmp: Any) -> int:
    """The peak of two steps, the second with the optimiser's moments in place."""
    mx.random.seed(0)
    model = Backbone(config.backbone, config.tokens)
    mx.eval(model.parameters())
    if config.quantization:
        nn.quantize(model, 64, 4)
    add_lora(model, settings)
    songs = [example(tokens, seed) for seed in range(settings.schedule.batch_size)]
    task: Any = LoraTask(model, settings, songs, [])
    other = mx.get_active_memory() - sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    mx.clear_cache()
    mx.reset_peak_memory()
    LoraRun(task, settings.schedule, {}, tmp / "run", {}).train()
    return mx.get_peak_memory() - other


SLOW = pytest.mark.slow
# Every change once, and with -m slow also with its layers made twice or kept, whichever is missing.
CASES = [
    (256, 512, {}, False),
    (256, 512, {}, True),
    pytest.param(512, 512, {"rank": 64}, False, marks=SLOW),
    pytest.param(512, 512, {"rank": 64}, True, marks=SLOW),
    pytest.param(128, 1024, {}, False, marks=SLOW),
    (128, 1024, {}, True),
    (384, 512, {"modules": ("q_proj", "v_proj"), "layers": 2}, False),
    pytest.param(384, 512, {"modules": ("q_proj", "v_proj"), "layers": 2}, True, marks=SLOW),
    (256, 512, {"whole_vocabulary": True, "dropout": 0.1, "accumulate": 2}, False),
    pytest.param(
        *(256, 512, {"whole_vocabulary": True, "dropout": 0.1, "accumulate": 2}, True), marks=SLOW
    ),
    (256, 512, {"dora": True, "patience": 1}, False),
    pytest.param(256, 512, {"dora": True, "patience": 1}, True, marks=SLOW),
]


@pytest.mark.skipif(not ON_CPU, reason="fitted to the CPU backend")
@pytest.mark.parametrize(("width", "tokens", "changes", "checkpointed"), CASES, ids=str)
@pytest.mark.extended
def test_the_forecast_is_within_15_percent(
    tmp_path: Any, width: int, tokens: int, changes: dict[str, Any], checkpointed: bool
) -> None:
    schedule = Schedule(steps=2, batch_size=1, validate_every=5)
    settings = LoraTraining(schedule, grad_checkpoint=checkpointed, **changes)
    config = model_config(width)
    expected = forecast(config, settings, (1, tokens - 1), HERE)
    peak = measured(config, settings, tokens, tmp_path)
    print(f"{expected.total / peak:.3f}", expected.to_dict())
    assert expected.total == pytest.approx(peak, rel=0.15)


@pytest.mark.skipif(not ON_CPU, reason="fitted to the CPU backend")
@pytest.mark.extended
def test_a_packed_base_and_a_batch_of_three(tmp_path: Any) -> None:
    config = packed(model_config())
    settings = LoraTraining(Schedule(steps=2, batch_size=3))
    expected = forecast(config, settings, (3, 255), HERE)
    assert expected.total == pytest.approx(measured(config, settings, 256, tmp_path), rel=0.15)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_weights_and_adapters_are_counted_exactly(bits: int | None) -> None:
    config, settings = model_config(256), LoraTraining(rank=5, layers=3, dora=True)
    model = Backbone(config.backbone, LAYOUT)
    if bits:
        nn.quantize(model, 64, bits)
        config = packed(config, bits)
    parameters = tree_flatten(model.parameters())
    assert weight_bytes(config, HERE) == sum(array.nbytes for _, array in parameters)
    plain = dataclasses.replace(config, quantization={})
    unpacked = dataclasses.replace(HERE, unpacked=True)
    assert weight_bytes(config, unpacked) == weight_bytes(plain, HERE)
    half = Machine(width=2, on_cpu=False)
    assert 2 * weight_bytes(plain, half) == weight_bytes(plain, HERE)
    add_lora(model, settings)
    trained = tree_flatten(model.trainable_parameters())
    assert adapter_bytes(config, settings) == sum(array.nbytes for _, array in trained)


def test_the_released_sizes_on_a_laptop() -> None:
    """Rank 16, two minutes of sound: what docs/fine-tuning.md says."""
    config, tokens = KhalaConfig(), TWO_MINUTES
    four_bit, metal = packed(config), Machine(width=2, on_cpu=False)
    settings = LoraTraining(Schedule(batch_size=1), grad_checkpoint=True)
    told = {
        name: forecast(model, settings, (1, tokens), metal)
        for name, model in (("bfloat16", config), ("4 bit", four_bit))
    }
    print(json.dumps({name: each.to_dict() for name, each in told.items()}, indent=2))
    assert adapter_bytes(config, settings) == 4 * 13_959_168
    assert told["4 bit"].total < usable_of_mac(16 * 2**30)
    without = forecast(four_bit, LoraTraining(Schedule(batch_size=1)), (1, tokens), metal)
    assert without.total > usable_of_mac(16 * 2**30)


@pytest.mark.slow
# Quantized matrices are slow on the CPU backend: two minutes of sound would take an hour.
@pytest.mark.parametrize(("bits", "tokens"), [(None, TWO_MINUTES), (4, FEW)])
def test_a_quarter_of_the_released_depth(tmp_path: Any, bits: int | None, tokens: int) -> None:
    """Six of 24 layers, all widths and the vocabulary as released, in float32."""
    config = KhalaConfig()
    config = dataclasses.replace(
        config, backbone=dataclasses.replace(config.backbone, num_layers=6)
    )
    config = packed(config) if bits else config
    schedule = Schedule(steps=1, batch_size=1)
    settings = LoraTraining(schedule, grad_checkpoint=True)
    expected = forecast(config, settings, (1, tokens - 1), HERE)
    peak = measured(config, settings, tokens, tmp_path)
    print(f"peak {peak / 1e9:.2f} GB, forecast {expected.to_dict()}")
    assert expected.total == pytest.approx(peak, rel=0.15)
