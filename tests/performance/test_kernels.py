"""The floor does the least work there is, no less and no more."""

import mlx.core as mx

from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec
from khala_mlx.model.superres import SuperRes
from khala_mlx.performance import cost as counts
from khala_mlx.performance.bench import random_config
from khala_mlx.performance.kernels import compose_floor, refine_floor, render_floor
from khala_mlx.performance.op_counter import Tally

CONFIG = random_config(2, 128)


def flops(kernel: object) -> int:
    with Tally().counting() as tally:
        kernel()  # type: ignore[operator]
    return tally.flops


def test_compose() -> None:
    model = Backbone(CONFIG.backbone, CONFIG.tokens)
    for songs in (1, 3):
        kernel, held = compose_floor(model, 20, songs)
        assert flops(kernel) == songs * counts.compose_flops(CONFIG, 20)
        assert held == songs * counts.cache_bytes(CONFIG.backbone, 21, 4, None)
    with Tally().counting() as tally:
        compose_floor(model, 20, 1)[0]()
    # All but the row of the embedding, which is looked up.
    assert tally.bytes_read == counts.compose_bytes(CONFIG, 20, 4) - 128 * 4


def test_refine() -> None:
    model = SuperRes(CONFIG.superres, CONFIG.tokens)
    assert flops(refine_floor(model, 5, 60)) == counts.refine_flops(CONFIG, 5, 60)


def test_render() -> None:
    model = Codec(CONFIG.codec)
    mx.eval(model.parameters())
    assert flops(render_floor(model, 3)) == counts.render_flops(CONFIG.codec, 3)
