"""The quantiser against upstream's codes and against a plain search in float64."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from upstream_codec import load_codec

from khala_mlx.model.quantizer import Quantizer, nearest


def small() -> Quantizer:
    quantizer = Quantizer(num_codebooks=5, codebook_size=32, dim=6)
    books = np.random.default_rng(0).standard_normal((5, 32, 6), dtype=np.float32)
    scale = 0.6 ** np.arange(5, dtype=np.float32)
    quantizer.codebooks = mx.array(books * scale[:, None, None])
    return quantizer


def test_codes_are_upstreams(oracle: Path) -> None:
    quantizer = load_codec(oracle / "vinpolar" / "decoder_weights.pt").quantizer
    golden = mx.load(str(oracle / "goldens" / "codec.safetensors"))
    for name in ("enc_a", "enc_b", "enc_c"):
        latents = golden[f"{name}.z"][0].T
        codes = golden[f"{name}.codes"][:, 0]
        assert mx.array_equal(quantizer.encode(latents), codes)
        assert mx.allclose(quantizer.decode(codes).T, golden[f"{name}.qz"][0], atol=1e-6)
    for name in ("dec_T1", "dec_T7"):
        summed = quantizer.decode(golden[f"{name}.codes"][:, 0])
        assert mx.allclose(summed.T, golden[f"{name}.qz"][0], atol=1e-6)


def test_each_layer_takes_the_nearest_row() -> None:
    quantizer = small()
    books = np.array(quantizer.codebooks, np.float64)
    latents = np.random.default_rng(1).standard_normal((40, 6))
    codes = np.array(quantizer.encode(mx.array(latents, mx.float32)))
    residual = latents
    for layer, book in enumerate(books):
        distances = np.square(residual[:, None] - book).sum(-1)
        assert np.array_equal(codes[layer], distances.argmin(1))
        residual = residual - book[codes[layer]]


def test_rows_near_each_other_are_told_apart_from_far() -> None:
    # |x|^2 is 1e6 here, where float32 steps by 0.06: adding it would hide the differences.
    book = mx.array([[0.0, 0.1], [0.0, 0.0], [0.0, -0.1]])
    points = mx.array([[1000.0, 0.06], [1000.0, 0.04], [1000.0, -0.06]])
    assert nearest(points, book).tolist() == [0, 1, 2]


def test_ties_go_to_the_first_row() -> None:
    book = mx.array([[2.0], [1.0], [-1.0], [1.0]])
    assert nearest(mx.array([[0.0], [1.0]]), book).tolist() == [1, 1]


def test_fewer_layers_are_a_prefix() -> None:
    quantizer = small()
    latents = mx.random.normal((12, 6), key=mx.random.key(3))
    codes = quantizer.encode(latents)
    assert codes.shape == (5, 12)
    assert mx.array_equal(quantizer.encode(latents, 2), codes[:2])
    for layers in (1, 3, 5):
        rows = [quantizer.codebooks[i][codes[i]] for i in range(layers)]
        assert mx.allclose(quantizer.decode(codes[:layers]), sum(rows[1:], rows[0]), atol=1e-6)


def test_any_leading_axes() -> None:
    quantizer = small()
    latents = mx.random.normal((2, 7, 6), key=mx.random.key(4))
    codes = quantizer.encode(latents)
    assert codes.shape == (5, 2, 7)
    assert mx.array_equal(codes[:, 1], quantizer.encode(latents[1]))
    assert quantizer.decode(codes).shape == latents.shape


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_distances_are_float32(dtype: mx.Dtype) -> None:
    quantizer = small()
    quantizer.set_dtype(dtype)
    exact = Quantizer(5, 32, 6)
    exact.codebooks = quantizer.codebooks.astype(mx.float32)
    latents = mx.random.normal((200, 6), key=mx.random.key(5))
    codes = quantizer.encode(latents)
    assert mx.array_equal(codes, exact.encode(latents))
    assert quantizer.decode(codes).dtype == dtype
    assert mx.allclose(quantizer.decode(codes), exact.decode(codes), atol=0.05)
