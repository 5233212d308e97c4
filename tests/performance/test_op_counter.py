import mlx.core as mx
import mlx.nn as nn
import pytest

from khala_mlx.performance.op_counter import Tally


def test_products_norms_and_attention() -> None:
    linear, norm = nn.Linear(64, 10), nn.RMSNorm(64)
    x, q, k = mx.zeros((2, 3, 64)), mx.zeros((1, 4, 6, 8)), mx.zeros((1, 2, 6, 8))
    with Tally().counting() as tally:
        linear(norm(x))
    assert tally.flops == 2 * 2 * 3 * 64 * 10
    assert tally.bytes_read == 4 * (64 * 10 + 10 + 64)
    for mask, pairs in ((None, 36), ("causal", 21)):
        with Tally().counting() as tally:
            mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask=mask)
        assert tally.flops == 4 * 4 * pairs * 8
        assert tally.bytes_read == 2 * k.nbytes


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_packed_products(mode: str) -> None:
    packed = nn.QuantizedLinear(64, 128, bias=False, group_size=32, bits=4, mode=mode)
    with Tally().counting() as tally:
        packed(mx.zeros((3, 64)))
    assert tally.flops == 2 * 3 * 64 * 128
    assert tally.bytes_read == sum(v.nbytes for v in packed.parameters().values())


def test_nothing_is_counted_outside_or_in_a_pause() -> None:
    before, tally, x = mx.addmm, Tally(), mx.zeros((4, 4))
    with tally.counting(), tally.paused():
        x @ x
    x @ x
    assert tally.flops == 0
    with pytest.raises(ZeroDivisionError), tally.counting():
        raise ZeroDivisionError
    assert mx.addmm is before
