import resource

import mlx.core as mx
import numpy as np
import pytest

from khala_mlx.model.attention import attend_quantized
from khala_mlx.model.cache import keep_rows, make_cache, spread


def filled(tokens: int) -> list:
    caches = make_cache(2, tokens)
    for number, cache in enumerate(caches):
        keys = mx.arange(tokens * 2 * 64, dtype=mx.float32).reshape(1, 2, tokens, 64) + number
        cache.update_and_fetch(keys, -keys)
    return caches


def test_mlx_lm_does_not_lower_the_file_limit() -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    make_cache(1, 4)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit


def test_spreading_and_keeping_rows() -> None:
    prompt, batch = filled(5), make_cache(2, 20)
    expected = np.array(prompt[1].keys)
    spread(prompt, batch, 3)
    assert prompt == [None, None]
    assert batch[0].keys.shape == (3, 2, 20, 64)
    for number in range(3):
        new = mx.full((3, 2, 1, 64), number)
        batch[1].update_and_fetch(new + mx.arange(3)[:, None, None, None], new)
    keep_rows(batch, mx.array([0, 2]))
    keys, values = batch[1].keys_and_values()
    assert keys.shape == (2, 2, 8, 64)
    assert np.array_equal(keys[1, :, :5], expected[0])
    assert np.array_equal(keys[:, 0, 5:, 0], [[0, 1, 2], [2, 3, 4]])
    assert np.array_equal(values[:, 0, 5:, 0], [[0, 1, 2]] * 2)
    # The room for more is still there.
    assert batch[1].keys.shape[2] == 20


def test_packed_heads_that_a_gpu_gets_wrong_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    (cache,) = make_cache(1, 20, kv_bits=8, head_dim=96)
    k, v = (mx.random.normal((2, 2, 9, 96), key=mx.random.key(n)) for n in range(2))
    known, q = cache.update_and_fetch(k, v), mx.random.normal((2, 4, 1, 96))
    expected = attend_quantized(mx.array(q), *known, cache, scale=0.1)
    mx.eval(expected)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "quantized_matmul", None)
    unpacked = attend_quantized(mx.array(q), *known, cache, scale=0.1)
    assert mx.abs(unpacked - expected).max() < 1e-5


@pytest.mark.parametrize("kv_bits", [4, 8])
def test_rows_of_a_packed_cache(kv_bits: int) -> None:
    batch = make_cache(2, 20, kv_bits=kv_bits)
    spread(filled(5), batch, 3)
    keep_rows(batch, mx.array([1]))
    assert [x.shape[:3] for x in batch[0].keys] == [(1, 2, 20)] * 3
    packed = [x[..., :5, :] for x in batch[0].keys]
    keys = mx.dequantize(*packed, group_size=64, bits=kv_bits)
    whole = filled(5)[0].keys
    assert mx.abs(keys - whole).max().item() <= 64 / 2**kv_bits
