from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from upstream_rules import write_tokens

from khala_mlx.config import CodecConfig, KhalaConfig, Quantization, TransformerConfig
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec
from khala_mlx.model.superres import SuperRes
from khala_mlx.model.weights import quantize_layers
from khala_mlx.performance import cost as counts
from khala_mlx.performance.op_counter import Tally

TINY, RELEASED = KhalaConfig.tiny(), KhalaConfig()


def size(model: nn.Module) -> int:
    # Never evaluated, so nothing is allocated even at the released sizes.
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize("config", [TINY, RELEASED], ids=["tiny", "released"])
def test_bytes_are_those_of_the_parameters(config: KhalaConfig) -> None:
    backbone, superres = (
        Backbone(config.backbone, config.tokens),
        SuperRes(config.superres, config.tokens),
    )
    assert counts.transformer_bytes(config, "backbone", 4) == size(backbone)
    assert counts.transformer_bytes(config, "superres", 4) == size(superres)
    assert counts.codec_bytes(config.codec) == size(Codec(config.codec))
    backbone.set_dtype(mx.bfloat16)
    assert counts.transformer_bytes(config, "backbone", 2) == size(backbone)


@pytest.mark.parametrize(
    "how",
    [Quantization(8, 64), Quantization(4, 32), Quantization(6, 64), Quantization(4, 32, "mxfp4")],
    ids=str,
)
def test_bytes_of_packed_layers(how: Quantization) -> None:
    wide = {"hidden_size": 64, "num_heads": 2, "head_dim": 32, "intermediate_size": 128}
    config = replace(TINY, backbone=replace(TINY.backbone, **wide))
    paths = ["lm_head", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"]
    config = replace(config, quantization={f"backbone.{path}": how for path in paths})
    model = Backbone(config.backbone, config.tokens)
    quantize_layers(model, "backbone", config)
    assert counts.transformer_bytes(config, "backbone", 4) == size(model)


def test_operations_of_refine() -> None:
    """What is done is the least that can be done."""
    model = SuperRes(TINY.superres, TINY.tokens)
    with Tally().counting() as counter:
        model._step(mx.zeros((1, 7, 32)), mx.zeros((1, 50, 32)), 3)
    assert counter.flops == counts.refine_flops(TINY, 7, 50)


def test_operations_of_compose() -> None:
    model = Backbone(TINY.backbone, TINY.tokens)
    with Tally().counting() as counter:
        write_tokens(model, [3] * 9, max_tokens=4, min_tokens=4, key=mx.random.key(0))
    least = counts.prompt_flops(TINY, 9) + 2 * 32 * counts.reachable_rows(TINY)
    least += sum(counts.compose_flops(TINY, cached) for cached in (9, 10, 11))
    assert counter.flops == least


def test_operations_of_render() -> None:
    """Nothing but the rows beyond both ends, which the transposed convs crop, is in excess."""
    config = CodecConfig.tiny()
    model = Codec(config)
    with Tally().counting() as counter:
        model.decoder(mx.zeros((1, 200, config.latent_dim)))
    assert 1 <= counter.flops / counts.render_flops(config, 200) < 1.01


def test_the_figures_of_the_released_model() -> None:
    # 2.2 GB a token in 16 bits, of which the whole-vocabulary head would take 0.5 more.
    assert counts.compose_bytes(RELEASED, 0, 2) == pytest.approx(2.17e9, rel=0.01)
    # Keys and values: 48 KiB a token.
    assert counts.cache_bytes(RELEASED.backbone, 1, 2, None) == 48 * 1024
    assert counts.cache_bytes(RELEASED.backbone, 1, 2, 8) == 48 * 1024 * 17 / 32
    one, four = (counts.compose_bytes(RELEASED, 1000, 2, songs=songs) for songs in (1, 4))
    assert four / one < 1.08


def test_a_prompt_costs_what_its_rows_cost() -> None:
    sizes: TransformerConfig = RELEASED.backbone
    flops = counts.prompt_flops(RELEASED, 1000)
    assert flops / (1000 * counts.compose_flops(RELEASED, 500)) == pytest.approx(0.96, abs=0.02)
    assert sizes.num_layers == 24
