"""The codec against upstream's goldens, and its blocks against the whole."""

from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from upstream_codec import load_codec
from upstream_rules import decode_crossfade

from khala_mlx.config import CodecConfig
from khala_mlx.errors import AudioError, KhalaError
from khala_mlx.model import codec as codec_module
from khala_mlx.model import ops
from khala_mlx.model.codec import Codec, decode_bytes, encode_bytes
from khala_mlx.model.receptive_field import decoder_halo, encoder_halo

Golden = dict[str, np.ndarray]
CHUNKED = ("T3_c5_o2", "T4_c5_o2", "T5_c5_o2", "T6_c5_o2", "T7_c5_o2", "T11_c5_o2", "T7_c5_o0",
           "T8_c4_o3")  # fmt: skip
RATES = [((2,), (2,)), ((2, 4), (4, 2)), ((4,), (2, 2)), ((2, 6), (12,)), ((2, 2, 4), (4, 4))]
properties = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def upstream(oracle: Path) -> Codec:
    return load_codec(oracle / "vinpolar" / "decoder_weights.pt")


@pytest.fixture(scope="module")
def golden(oracle: Path) -> Golden:
    arrays = mx.load(str(oracle / "goldens" / "codec.safetensors"))
    return {name: np.array(value) for name, value in arrays.items()}


def tiny_codec(
    strides: tuple[int, ...] = (2, 4), rates: tuple[int, ...] = (4, 2), seed: int = 0
) -> Codec:
    mx.random.seed(seed)
    return Codec(
        CodecConfig(
            encoder_dim=4, encoder_strides=strides, decoder_dim=3, decoder_rates=rates,
            latent_dim=5, num_codebooks=4, codebook_size=16,
        )
    )  # fmt: skip


def random_codes(codec: Codec, frames: int, seed: int = 0) -> np.ndarray:
    size = (codec.config.num_codebooks, frames)
    return np.random.default_rng(seed).integers(0, codec.config.codebook_size, size)


def random_wave(codec: Codec, samples: int, seed: int = 0) -> np.ndarray:
    shape = (samples, codec.config.channels)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def whole_decode(codec: Codec, codes: np.ndarray) -> np.ndarray:
    return np.array(codec.decoder(codec.quantizer.decode(mx.array(codes))[None])[0])


def whole_encode(codec: Codec, waveform: np.ndarray) -> np.ndarray:
    return np.array(codec.quantizer.encode(codec.encoder(mx.array(waveform)[None])[0]))


def rows(array: np.ndarray) -> np.ndarray:
    """Upstream's [1, C, L] as [L, C]."""
    return array[0].T


# --- upstream's goldens ---


@pytest.mark.parametrize("name", ["enc_a", "enc_b", "enc_c"])
def test_encoder_golden(upstream: Codec, golden: Golden, name: str) -> None:
    # Upstream lets the encoder floor: 18569 samples are 9 frames, the last 137 only context.
    latents = upstream.encoder(mx.array(rows(golden[f"{name}.wave"]))[None])
    np.testing.assert_allclose(latents[0], rows(golden[f"{name}.z"]), atol=2e-5)
    assert np.array_equal(upstream.quantizer.encode(latents[0]), golden[f"{name}.codes"][:, 0])


def test_encode_golden(upstream: Codec, golden: Golden) -> None:
    # 12288 samples are six frames exactly.
    codes = upstream.encode(rows(golden["enc_b.wave"]))
    assert codes.dtype.kind == "i"
    assert np.array_equal(codes, golden["enc_b.codes"][:, 0])


def test_encoder_activations(upstream: Codec, golden: Golden) -> None:
    x = upstream.encoder.conv_in(mx.array(rows(golden["enc_b.wave"]))[None])
    acts = {}
    for i, block in enumerate(upstream.encoder.blocks):
        acts[i + 1] = x = block(x)
    acts[5] = upstream.encoder.snake(x)
    for i in (3, 4, 5):
        np.testing.assert_allclose(acts[i][0], rows(golden[f"enc_b.act.{i}"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "wave"), [("enc_a", "recon"), ("dec_T1", "wave"), ("dec_T7", "wave")]
)
def test_decode_golden(upstream: Codec, golden: Golden, name: str, wave: str) -> None:
    samples = upstream.decode(golden[f"{name}.codes"][:, 0])
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, rows(golden[f"{name}.{wave}"]), atol=1e-5)


def test_decoder_activations(upstream: Codec, golden: Golden) -> None:
    decoder = upstream.decoder
    acts = [decoder.conv_in(mx.array(rows(golden["dec_T1.qz"]))[None])]
    for block in decoder.blocks:
        acts.append(block(acts[-1]))
    acts.append(decoder.snake(acts[-1]))
    for i, act in enumerate(acts):
        np.testing.assert_allclose(act[0], rows(golden[f"dec_T1.act.{i}"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CHUNKED)
def test_crossfade_golden(upstream: Codec, golden: Golden, case: str) -> None:
    _, chunk, overlap = (int(part[1:]) for part in case.split("_"))
    samples = decode_crossfade(
        upstream, golden[f"chunk_{case}.codes"][:, 0], chunk_frames=chunk, overlap_frames=overlap
    )
    np.testing.assert_allclose(samples, golden[f"chunk_{case}.wave"], atol=1e-5)


def test_end_to_end_goldens(upstream: Codec, oracle: Path) -> None:
    arrays = mx.load(str(oracle / "goldens" / "end_to_end.safetensors"))
    golden = {name: np.array(value) for name, value in arrays.items() if "single" in name}
    codes = golden["single.codes"].reshape(64, -1)
    faded = decode_crossfade(upstream, codes, chunk_frames=5, overlap_frames=2)
    np.testing.assert_allclose(faded, golden["single.wave_chunk5_2"], atol=1e-5)
    # 12 frames are one chunk of upstream's size: nothing to fade.
    assert np.array_equal(decode_crossfade(upstream, codes), upstream.decode(codes))
    assert np.array_equal(
        upstream.encode(upstream.decode(codes)), golden["single.reencoded_codes"][:, 0]
    )


@pytest.mark.skipif(
    ops.device_form() == "cpu" and which("g++") is None, reason="compiling needs g++"
)
def test_goldens_in_the_other_form(
    upstream: Codec, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "cpu" if ops.device_form() == "gpu" else "gpu"
    monkeypatch.setattr(ops, "device_form", lambda: other)
    samples = upstream.decode(golden["dec_T7.codes"][:, 0])
    np.testing.assert_allclose(samples, rows(golden["dec_T7.wave"]), atol=1e-4)
    codes = upstream.encode(rows(golden["enc_b.wave"]))
    assert np.array_equal(codes, golden["enc_b.codes"][:, 0])


# --- blocks equal the whole ---


@properties
@example(RATES[1], 1, 1, False)
@example(RATES[2], 70, 1, False)
@given(st.sampled_from(RATES), st.integers(1, 90), st.integers(1, 100), st.booleans())
def test_blocks_decode_as_the_whole(
    rates: tuple[Any, Any], frames: int, chunk: int, first_codebooks: bool
) -> None:
    codec = tiny_codec(*rates)
    codes = random_codes(codec, frames)[: 2 if first_codebooks else None]
    whole = whole_decode(codec, codes)
    assert whole.shape == (frames * codec.config.hop, 2)
    np.testing.assert_allclose(codec.decode(codes, chunk_frames=chunk), whole, atol=1e-5)


@properties
@example(RATES[1], 1, 1)
@example(RATES[1], 400, 1)
@given(st.sampled_from(RATES), st.integers(1, 1000), st.integers(1, 100))
def test_blocks_encode_as_the_whole(rates: tuple[Any, Any], samples: int, chunk: int) -> None:
    codec = tiny_codec(*rates)
    wave = random_wave(codec, samples)
    codes = codec.encode(wave, chunk_frames=chunk)
    hop = codec.config.hop
    assert codes.shape == (4, -(-samples // hop))
    padded = np.pad(wave, [(0, -samples % hop), (0, 0)])
    assert np.array_equal(codes, whole_encode(codec, padded))


def test_blocks_longer_than_the_halo(upstream: Codec) -> None:
    # At the released strides, where the halo is 10 frames.
    codes = random_codes(upstream, 25)
    whole = whole_decode(upstream, codes)
    np.testing.assert_allclose(upstream.decode(codes, chunk_frames=13), whole, atol=1e-5)


def test_tiles_change_nothing(upstream: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(upstream, 5)
    whole = whole_decode(upstream, codes)
    wave = random_wave(upstream, 4 * 2048)
    latents = upstream.encoder(mx.array(wave)[None])
    monkeypatch.setattr(ops, "TILE", {"cpu": 2000, "gpu": 2000})
    np.testing.assert_allclose(whole_decode(upstream, codes), whole, atol=1e-5)
    assert mx.allclose(upstream.encoder(mx.array(wave)[None]), latents, atol=1e-4)


def support(response: np.ndarray) -> tuple[int, int]:
    """First and last row that is not zero."""
    found = np.flatnonzero(np.abs(response).sum(axis=-1))
    return int(found[0]), int(found[-1])


def linear_codec(config: CodecConfig) -> Codec:
    """All snakes off, all weights positive and no bias: any input that is seen shows."""
    codec = Codec(config)
    for name, value in tree_flatten(codec.parameters()):
        if name.endswith("alpha"):
            codec.load_weights([(name, mx.zeros_like(value))], strict=False)
        elif name.endswith("weight"):
            mean = mx.full(value.shape, 1 / (value.shape[1] * value.shape[2]))
            codec.load_weights([(name, mean)], strict=False)
    return codec


@pytest.mark.parametrize("rates", [*RATES, ((4, 8, 8, 8), (8, 8, 8, 4))])
def test_halos_are_exact(rates: tuple[Any, Any]) -> None:
    config = CodecConfig(
        encoder_dim=1, encoder_strides=rates[0], decoder_dim=1, decoder_rates=rates[1], latent_dim=1
    )
    codec, hop = linear_codec(config), config.hop
    before, after = decoder_halo(config)
    frames = before + after + 1
    impulse = mx.zeros((1, frames, 1)).at[0, after].add(1.0)
    first, last = support(np.array(codec.decoder(impulse)[0]).reshape(frames, -1))
    assert (first, last) == (0, frames - 1)

    before, after = encoder_halo(config)
    frames = before + after + 3
    wave = mx.zeros((1, frames * hop, 2)).at[0, (after + 1) * hop : (after + 2) * hop].add(1.0)
    assert support(np.array(codec.encoder(wave)[0])) == (1, frames - 2)


def test_halos_are_no_wider_than_needed() -> None:
    config = linear_codec(CodecConfig(encoder_dim=1, decoder_dim=1, latent_dim=1)).config
    codec = linear_codec(config)
    before, after = decoder_halo(config)
    assert (before, after) == (10, 10)
    impulse = mx.zeros((1, before + after + 5, 1)).at[0, after + 2].add(1.0)
    shown = np.array(codec.decoder(impulse)[0]).reshape(before + after + 5, -1)
    assert support(shown) == (2, before + after + 2)


def test_the_tail_is_kept() -> None:
    codec = tiny_codec()
    hop, wave = codec.config.hop, random_wave(tiny_codec(), 101)
    codes = codec.encode(wave)
    assert codes.shape == (4, 13)
    assert codec.decode(codes).shape == (13 * hop, 2)
    assert np.array_equal(codes, codec.encode(np.pad(wave, [(0, 3), (0, 0)])))
    loud = wave.copy()
    loud[96:] += 3
    assert not np.array_equal(codec.encode(loud)[:, -1], codes[:, -1])


# --- streaming, progress, memory ---


def test_a_stream_is_the_song_in_pieces() -> None:
    codec = tiny_codec()
    codes = random_codes(codec, 50)
    pieces = list(codec.decode_stream(codes, chunk_frames=20))
    assert [len(piece) // codec.config.hop for piece in pieces] == [17, 17, 16]
    assert np.array_equal(np.concatenate(pieces), codec.decode(codes, chunk_frames=20))


def test_a_stream_renders_no_more_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = tiny_codec()
    made = []
    call = type(codec.decoder).__call__

    def count(self: Any, z: mx.array) -> mx.array:
        made.append(z.shape)
        result: mx.array = call(self, z)
        return result

    monkeypatch.setattr(type(codec.decoder), "__call__", count)
    stream = codec.decode_stream(random_codes(codec, 200), chunk_frames=10)
    assert len(made) == 0
    next(stream)
    next(stream)
    assert len(made) == 2
    assert made[0] == made[1]


def test_progress() -> None:
    codec = tiny_codec()
    for function, argument in (
        (codec.decode, random_codes(codec, 25)),
        (codec.encode, random_wave(codec, 25 * codec.config.hop - 1)),
    ):
        steps: list[tuple[int, int]] = []
        function(argument, chunk_frames=10, on_progress=lambda *step, s=steps: s.append(step))
        assert steps == [(9, 25), (18, 25), (25, 25)]


def test_default_blocks_of_the_released_size() -> None:
    config, chunk = CodecConfig(), codec_module._chunk
    assert decode_bytes(config, 128) < 2 << 30 < decode_bytes(config, 256)
    assert chunk(config, decode_bytes, None) == 128
    assert chunk(config, encode_bytes, None) == 256
    # An hour at once would be a tensor that Metal cannot index.
    assert chunk(config, decode_bytes, 77520) == 1024
    assert chunk(config, decode_bytes, 77) == 77


@pytest.mark.parametrize("side", ["encode", "decode"])
def test_the_memory_forecast_holds(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "TILE", {"cpu": 1 << 16, "gpu": 1 << 16})
    codec = Codec(CodecConfig(encoder_dim=8, decoder_dim=6, num_codebooks=2, latent_dim=8))
    mx.eval(codec.parameters())
    work: Callable[[], Any] = lambda: codec.decode(random_codes(codec, 40), chunk_frames=20)  # noqa: E731
    if side == "encode":
        work = lambda: codec.encode(random_wave(codec, 40 * 2048), chunk_frames=20)  # noqa: E731
    forecast = (decode_bytes if side == "decode" else encode_bytes)(codec.config, 20)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    used = mx.get_peak_memory() - before
    assert forecast / 4 < used < 1.5 * forecast


# --- parameters ---


def test_parameter_names() -> None:
    names = {name for name, _ in tree_flatten(tiny_codec().parameters())}
    unit = {f"{part}.{leaf}" for part in ("conv1", "conv2") for leaf in ("weight", "bias")}
    unit |= {"snake1.alpha", "snake2.alpha"}
    expected = {"quantizer.codebooks"}
    for side, resampler in (("encoder", "down"), ("decoder", "up")):
        leaves = {"snake.alpha"}
        leaves |= {f"{c}.{p}" for c in ("conv_in", "conv_out") for p in ("weight", "bias")}
        for i in range(2):
            leaves |= {f"blocks.{i}.units.{j}.{leaf}" for j in range(3) for leaf in unit}
            leaves |= {f"blocks.{i}.snake.alpha"}
            leaves |= {f"blocks.{i}.{resampler}.{leaf}" for leaf in ("weight", "bias")}
        expected |= {f"{side}.{leaf}" for leaf in leaves}
    assert names == expected


def test_new_weights_are_used_at_once() -> None:
    first, second = tiny_codec(seed=1), tiny_codec(seed=2)
    codes = random_codes(first, 9)
    assert not np.allclose(first.decode(codes), second.decode(codes), atol=1e-3)
    first.load_weights(tree_flatten(second.parameters()), strict=True)
    assert np.array_equal(first.decode(codes), second.decode(codes))


def test_every_weight_can_be_trained() -> None:
    codec = tiny_codec()
    wave = mx.array(random_wave(codec, 2 * 8 * 16)).reshape(2, -1, 2)

    def loss(parameters: dict[str, Any]) -> mx.array:
        codec.update(parameters)
        return mx.abs(codec.decoder(codec.encoder(wave)) - wave).mean()

    value, gradients = mx.value_and_grad(loss)(codec.trainable_parameters())
    assert np.isfinite(value.item())
    for name, gradient in tree_flatten(gradients):
        assert mx.isfinite(gradient).all(), name
        assert mx.any(gradient != 0) or name == "quantizer.codebooks", name


def test_float16_weights() -> None:
    codec = tiny_codec()
    codes, wave = random_codes(codec, 30), random_wave(codec, 200)
    exact = codec.decode(codes)
    codec.set_dtype(mx.float16)
    samples = codec.decode(codes, chunk_frames=7)
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, exact, atol=0.02)
    assert codec.encode(wave).shape == (4, 25)
    assert codec.decoder(mx.zeros((1, 3, 5))).dtype == mx.float16


# --- wrong arguments ---


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([1], r"shape \[1..4, T\], got \[1\]"),
        (np.zeros(4, int), r"got \[4\]"),
        (np.zeros((5, 2), int), r"got \[5, 2\]"),
        (np.zeros((0, 2), int), r"got \[0, 2\]"),
        (np.zeros((4, 2)), "integers, got float64"),
        (np.zeros((4, 2), bool), "integers, got bool"),
        (np.zeros((4, 0), int), "at least one frame"),
        (np.full((4, 2), 16), r"0..15, got 16..16"),
        (np.full((4, 2), -1), r"0..15, got -1..-1"),
    ],
)
def test_wrong_codes(codes: Any, message: str) -> None:
    codec = tiny_codec()
    for decode in (codec.decode, codec.decode_stream):
        with pytest.raises(KhalaError, match=message):
            decode(codes)


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        ([0.0], r"shape \[L, 2\], got \[1\]"),
        (np.zeros(8, np.float32), r"got \[8\]"),
        (np.zeros((8, 1), np.float32), r"got \[8, 1\]"),
        (np.zeros((8, 2), np.int16), "floats from -1 to 1, got int16"),
        (np.zeros((0, 2), np.float32), "at least one sample"),
        (np.full((8, 2), np.nan, np.float32), "NaN or infinite"),
        (np.full((8, 2), -np.inf, np.float32), "NaN or infinite"),
    ],
)
def test_wrong_waveforms(wave: Any, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        tiny_codec().encode(wave)


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "4", True])
def test_wrong_chunks(chunk: Any) -> None:
    codec = tiny_codec()
    with pytest.raises(KhalaError, match="chunk_frames must be a whole number at least 1"):
        codec.decode(random_codes(codec, 2), chunk_frames=chunk)
    with pytest.raises(KhalaError, match="chunk_frames must be a whole number at least 1"):
        codec.encode(random_wave(codec, 2), chunk_frames=chunk)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_broken_samples_are_refused(value: float) -> None:
    codec = tiny_codec()
    last = codec.decoder.conv_out
    last.weight = mx.zeros_like(last.weight)
    last.bias = mx.full(last.bias.shape, value)
    with pytest.raises(KhalaError, match="no usable samples"):
        codec.decode(random_codes(codec, 3))


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_broken_latents_are_refused(value: float) -> None:
    codec = tiny_codec()
    last = codec.encoder.conv_out
    last.weight = mx.zeros_like(last.weight)
    last.bias = mx.full(last.bias.shape, value)
    with pytest.raises(KhalaError, match="no usable latents"):
        codec.encode(random_wave(codec, 300))


def test_silence_is_encoded() -> None:
    codec = tiny_codec()
    silent = np.zeros((30 * codec.config.hop, 2), np.float32)
    assert codec.encode(silent, chunk_frames=4).shape[1] == 30
    silent[-1] = 0.5
    assert codec.encode(silent, chunk_frames=4).shape[1] == 30


def test_other_floats_and_lists_are_taken() -> None:
    codec = tiny_codec()
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, (300, 2))
    assert np.array_equal(codec.encode(wave), codec.encode(wave.astype(np.float32)))
    assert np.array_equal(codec.decode([[1, 2]]), codec.decode(np.array([[1, 2]])))
