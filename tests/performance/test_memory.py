"""The forecast against the peak that MLX counts, at sizes where one or the other part dominates."""

import gc
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from tiny_songs import random_adapter
from upstream_rules import write_tokens

from khala_mlx.config import (
    BackboneConfig,
    CodecConfig,
    KhalaConfig,
    Quantization,
    SuperResConfig,
    TokenLayout,
)
from khala_mlx.model import attention
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec
from khala_mlx.model.lora import Adapters, put_on
from khala_mlx.model.superres import SuperRes
from khala_mlx.performance import memory as envelope
from khala_mlx.performance.bench import random_config
from khala_mlx.performance.memory import Setting, refine_bytes
from khala_mlx.storage.adapter import Adapter

LAYOUT = TokenLayout(
    audio_start=1000,
    end_of_song=500,
    padding=501,
    marker_base=999,
    codebook_size=64,
    num_codebooks=3,
)
HERE = Setting("float32", on_cpu=mx.default_device() == mx.cpu)
PROMPT = 40


def sized(
    hidden: int, inner: int, heads: int, decoder: int, *, head_dim: int = 64, layers: int = 3
) -> KhalaConfig:
    body = {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "head_dim": head_dim,
        "num_heads": heads,
        "num_kv_heads": max(1, heads // 4),
    }
    return KhalaConfig(
        tokens=LAYOUT,
        backbone=BackboneConfig(vocab_size=LAYOUT.backbone_vocab, **body),
        superres=SuperResConfig(vocab_size=LAYOUT.superres_vocab, **body),
        codec=CodecConfig(
            encoder_dim=8,
            decoder_dim=decoder,
            latent_dim=32,
            num_codebooks=LAYOUT.num_codebooks,
            codebook_size=LAYOUT.codebook_size,
        ),
    )


# (config, rows, frames rendered at once): scores in one piece, nearly chunked, chunked, and small
# beside the feed-forward part, as at the released width; sound within a tile, and of several.
SIZES = {
    "small": (sized(128, 384, 2, 8), 300, 16),
    "middle": (sized(256, 256, 8, 16), 1000, 64),
    "large": (sized(256, 704, 8, 24, layers=2), 1600, 128),
    "wide": (sized(16, 16384, 16, 8, head_dim=16, layers=2), 1100, 16),
}


def peak(build: Callable[[], object], work: Callable[..., object]) -> int:
    """Bytes from before the model is built to the most while it works."""
    # What earlier tests left must not go while this one is measured.
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model = build()
    model.eval()  # type: ignore[attr-defined]
    mx.eval(model.parameters())  # type: ignore[attr-defined]
    mx.reset_peak_memory()
    work(model)
    return mx.get_peak_memory() - before


@pytest.mark.skipif(not HERE.on_cpu, reason="the fitted counts are the CPU backend's")
@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.extended
def test_the_forecast_is_within_a_tenth(name: str) -> None:
    config, rows, chunk = SIZES[name]
    frames = rows - PROMPT
    cases = {
        "backbone": (
            lambda: Backbone(config.backbone, config.tokens),
            lambda m: m.generate_many(
                np.zeros(rows, int), keys=[mx.random.key(0)] * 2, max_tokens=5, min_tokens=5
            ),
            envelope.compose_bytes(config, HERE, rows, 5, songs=2),
        ),
        "superres": (
            lambda: SuperRes(config.superres, config.tokens),
            lambda m: m.refine(
                np.zeros(PROMPT, int), np.zeros((2, frames), int), key=mx.random.key(0)
            ),
            envelope.refine_bytes(config, HERE, PROMPT, frames),
        ),
        "codec": (
            lambda: Codec(config.codec),
            lambda m: m.decode(np.zeros((3, 2 * chunk), int), chunk_frames=chunk),
            envelope.render_bytes(config.codec, chunk, on_cpu=True),
        ),
    }
    for part, (build, work, working) in cases.items():
        forecast = envelope.weight_bytes(config, part, HERE) + working
        measured = peak(build, work)
        assert forecast / measured == pytest.approx(1, abs=0.1), (part, forecast, measured)


@pytest.mark.slow
@pytest.mark.skipif(not HERE.on_cpu, reason="the fitted counts are the CPU backend's")
def test_a_step_at_the_released_width() -> None:
    """4000 rows in float32: at most 1.2 GB beside the weights, and as forecast."""
    config, rows = random_config(2, 2048), 4000
    frames = rows - PROMPT
    measured = peak(
        lambda: SuperRes(config.superres, config.tokens),
        lambda m: m.refine(
            np.zeros(PROMPT, int), np.zeros((2, frames), int), codebooks=3, key=mx.random.key(0)
        ),
    ) - envelope.weight_bytes(config, "superres", HERE)
    print(f"refine, {rows} rows: {measured / 1e9:.3f} GB beside the weights")
    assert measured < 1.2e9
    forecast = envelope.refine_bytes(config, HERE, PROMPT, frames)
    assert forecast / measured == pytest.approx(1, abs=0.1)


def on_backbone(config: KhalaConfig, adapters: list[Adapter]) -> Callable[[], Backbone]:
    def build() -> Backbone:
        model = Backbone(config.backbone, config.tokens)
        put_on(model, [(adapter, 1.0) for adapter in adapters])
        return model

    return build


@pytest.mark.skipif(not HERE.on_cpu, reason="the fitted counts are the CPU backend's")
@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("kinds", [[False], [False, True]], ids=["lora", "lora and dora"])
def test_adapters_are_counted(name: str, kinds: list[bool]) -> None:
    config, rows, _ = SIZES[name]
    adapters = [
        random_adapter(config, seed=seed, rank=24, dora=dora) for seed, dora in enumerate(kinds)
    ]
    chosen = Adapters()
    chosen.choose(config, [*adapters, adapters[0]], [*[1.0] * len(kinds), 0.0])
    setting = replace(HERE, adapters=chosen.extent)
    forecast = envelope.weight_bytes(config, "backbone", setting)
    base = envelope.weight_bytes(config, "backbone", HERE)
    assert forecast - base == 4 * sum(adapter.extent.parameters for adapter in adapters)
    forecast += envelope.compose_bytes(config, setting, rows, 20)
    measured = peak(
        on_backbone(config, adapters),
        lambda m: write_tokens(m, np.zeros(rows, int), key=mx.random.key(0), max_tokens=20),
    )
    assert forecast / measured == pytest.approx(1, abs=0.1)
    # The superres has none.
    assert envelope.weight_bytes(config, "superres", setting) == envelope.weight_bytes(
        config, "superres", HERE
    )


@pytest.mark.skipif(not HERE.on_cpu, reason="the fitted counts are the CPU backend's")
@pytest.mark.parametrize("name", list(SIZES))
def test_judging_a_song_is_counted(name: str) -> None:
    config, rows, _ = SIZES[name]
    measured = peak(
        lambda: Backbone(config.backbone, config.tokens),
        lambda m: m.nats_per_token(np.zeros(PROMPT, int), np.zeros((2, (rows - PROMPT) // 2), int)),
    )
    forecast = envelope.weight_bytes(config, "backbone", HERE)
    forecast += envelope.judge_bytes(config, HERE, rows)
    assert forecast / measured == pytest.approx(1, abs=0.1)


def test_writing_many_long_songs_is_their_caches() -> None:
    config = sized(128, 384, 2, 8)
    keys = [mx.random.key(n) for n in range(3)]
    measured = peak(
        lambda: Backbone(config.backbone, config.tokens),
        lambda m: m.generate_many(np.zeros(30, int), keys=keys, max_tokens=6000, min_tokens=0),
    )
    forecast = envelope.weight_bytes(config, "backbone", HERE)
    forecast += envelope.compose_bytes(config, HERE, 30, 6000, songs=3)
    assert forecast / measured == pytest.approx(1, abs=0.1)


def test_the_released_model() -> None:
    """The figures of docs/install.md: 3.2 GB of backbone in 16 bits; 0.13 GB of cache a minute."""
    config = KhalaConfig()
    metal, cpu = Setting("bfloat16", on_cpu=False), Setting("float32", on_cpu=True)
    assert envelope.weight_bytes(config, "backbone", metal) == pytest.approx(3.23e9, rel=0.01)
    assert envelope.weight_bytes(config, "codec", metal) == pytest.approx(1.06e9, rel=0.01)
    minute = envelope.compose_bytes(config, metal, 100, 2584) - envelope.compose_bytes(
        config, metal, 100, 0
    )
    assert 0.1e9 < minute < 0.14e9
    packed = envelope.compose_bytes(config, replace(metal, kv_bits=8), 100, 16000)
    assert packed < 0.6 * envelope.compose_bytes(config, metal, 100, 16000)
    # The bar: at most 1.2 GB above the weights at 4000 rows in float32.
    assert 0.3e9 < envelope.refine_bytes(config, cpu, 100, 3900) < 1.2e9
    # Beyond the trained rows windows keep it where it is.
    longest = envelope.refine_bytes(config, cpu, 100, 8092)
    assert envelope.refine_bytes(config, cpu, 100, 20000) == longest


def test_a_gpu_writes_the_scores_of_odd_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    released, metal = KhalaConfig(), Setting("bfloat16", on_cpu=False)
    odd = replace(released, superres=replace(released.superres, head_dim=48))
    written = refine_bytes(odd, metal, 100, 200)
    # Longer songs have their scores written in chunks.
    assert refine_bytes(odd, metal, 100, 6000) < 10 * refine_bytes(odd, metal, 100, 1500)
    monkeypatch.setattr(attention, "FUSED_HEADS", (48,))
    assert written - refine_bytes(odd, metal, 100, 200) == 4 * 32 * 300**2


def test_small_packed_parts_are_unpacked_on_the_cpu() -> None:
    config = sized(128, 384, 2, 8)
    packed = replace(config, quantization={"backbone.lm_head": Quantization(4, 64)})
    cpu, metal = Setting("float32", on_cpu=True), Setting("float32", on_cpu=False)
    plain = envelope.weight_bytes(config, "backbone", cpu)
    assert envelope.weight_bytes(packed, "backbone", cpu) == plain
    assert envelope.weight_bytes(packed, "backbone", metal) < plain
