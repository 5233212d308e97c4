"""The DAC-style codec: sound to codes and back, in blocks that equal the whole.

Modules take and return mx arrays [B, L, C] and can be traced; the public methods of `Codec` take
and return NumPy arrays of one song. This file knows no files and no language models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from khala_mlx.config import DILATIONS, KERNEL, LATENT_KERNEL, CodecConfig, check_whole
from khala_mlx.errors import AudioError, KhalaError
from khala_mlx.model import Progress, ops
from khala_mlx.model.quantizer import Quantizer
from khala_mlx.model.receptive_field import (
    UNITS_HALO,
    Window,
    decoder_halo,
    encoder_halo,
    padding_of,
    windows,
)
from khala_mlx.token_ids import check_codes, plain_array

# Activations alive at once, in units of the largest (hop * width of the samples' end: rates are at
# least two, so no inner one is larger), with room for MLX to run ahead.
_LIVE = 6
# Room for a block of the default size, the same on all machines, so that all cut a song alike.
_DEFAULT_BYTES = 2 << 30
# Room for the largest block. It keeps every tensor below 2 GiB, which any Metal buffer holds and
# 32 bits can index (ml-explore/mlx#3248).
_MOST_BYTES = _LIVE * 2 << 30


class Conv(nn.Module):
    """A conv [B, L, I] -> [B, L // stride, O], weight [O, k, I], bias [O]."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs * kernel)
        self.weight = mx.random.uniform(-bound, bound, (outputs, kernel, inputs))
        self.bias = mx.zeros((outputs,))
        self.stride, self.dilation = stride, dilation
        self.padding = padding_of(kernel, stride, dilation)

    def __call__(self, x: mx.array) -> mx.array:
        return ops.conv1d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )


class Upsample(nn.Module):
    """A transposed conv [B, L, I] -> [B, stride * L, O], weight [O, 2 * stride, I], bias [O]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(2 * inputs)
        self.weight = mx.random.uniform(-bound, bound, (outputs, 2 * stride, inputs))
        self.bias = mx.zeros((outputs,))
        self.stride = stride

    def __call__(self, x: mx.array) -> mx.array:
        # Rearranged for each block, at the cost of one copy of the weight, so that it is never out
        # of date and gradients reach the weight.
        packed = ops.pack_transposed(self.weight, self.stride)
        return ops.conv_transpose1d(x, packed, self.bias, stride=self.stride)


class Snake(nn.Module):
    """The periodic activation, one alpha per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = mx.ones((width,))

    def __call__(self, x: mx.array) -> mx.array:
        return ops.snake(x, self.alpha)


class ResidualUnit(nn.Module):
    """[B, L, C] -> [B, L, C]."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.snake1 = Snake(width)
        self.conv1 = Conv(width, width, KERNEL, dilation=dilation)
        self.snake2 = Snake(width)
        self.conv2 = Conv(width, width, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))


def _apply(units: list[ResidualUnit], x: mx.array) -> mx.array:
    for unit in units:
        x = unit(x)
    return x


class EncoderBlock(nn.Module):
    """[B, L, C] -> [B, L / stride, 2 * C]."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.units = [ResidualUnit(width, dilation) for dilation in DILATIONS]
        self.snake = Snake(width)
        self.down = Conv(width, 2 * width, 2 * stride, stride=stride)

    def __call__(self, x: mx.array) -> mx.array:
        x = ops.in_tiles(lambda rows: self.snake(_apply(self.units, rows)), x, UNITS_HALO)
        return self.down(x)


class DecoderBlock(nn.Module):
    """[B, L, 2 * C] -> [B, rate * L, C]."""

    def __init__(self, width: int, rate: int) -> None:
        super().__init__()
        self.snake = Snake(2 * width)
        self.up = Upsample(2 * width, width, rate)
        self.units = [ResidualUnit(width, dilation) for dilation in DILATIONS]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.up(self.snake(x))
        return ops.in_tiles(lambda rows: _apply(self.units, rows), x, UNITS_HALO)


class Encoder(nn.Module):
    """Encode samples [B, L, channels] to latents [B, L // hop, latent_dim]."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths = _encoder_widths(config)
        self.conv_in = Conv(config.channels, widths[0], KERNEL)
        self.blocks = [
            EncoderBlock(width, stride)
            for width, stride in zip(widths, config.encoder_strides, strict=False)
        ]
        self.snake = Snake(widths[-1])
        self.conv_out = Conv(widths[-1], config.latent_dim, LATENT_KERNEL)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x.astype(self.conv_in.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.conv_out(self.snake(x))


class Decoder(nn.Module):
    """Decode latents [B, T, latent_dim] to samples [B, hop * T, channels] of any range."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths = _decoder_widths(config)
        self.conv_in = Conv(config.latent_dim, widths[0], KERNEL)
        self.blocks = [
            DecoderBlock(width, rate)
            for width, rate in zip(widths[1:], config.decoder_rates, strict=True)
        ]
        self.snake = Snake(widths[-1])
        self.conv_out = Conv(widths[-1], config.channels, KERNEL)

    def __call__(self, z: mx.array) -> mx.array:
        x = self.conv_in(z.astype(self.conv_in.weight.dtype))
        for block in self.blocks:
            x = block(x)
        halo = (KERNEL // 2, KERNEL // 2)
        return ops.in_tiles(lambda rows: self.conv_out(self.snake(rows)), x, halo)


class Codec(nn.Module):
    """Encoder, quantizer and decoder of one model."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config.num_codebooks, config.codebook_size, config.latent_dim)
        self.decoder = Decoder(config)

    def encode(
        self,
        waveform: np.ndarray,
        *,
        chunk_frames: int | None = None,
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Encode float samples [L, channels] to int32 codes [K, T], T = L / hop rounded up.

        Zeros fill the last frame. It works in blocks like `decode`.

        Raises:
            AudioError: if the samples have another shape or type, are empty or not finite.
            KhalaError: if chunk_frames is not a whole number above 0, or the device returns no
                usable latents.
        """
        config = self.config
        waveform = _checked_waveform(waveform, config.channels)
        chunk = _chunk(config, encode_bytes, chunk_frames)
        total = -(-len(waveform) // config.hop)
        codes = np.empty((config.num_codebooks, total), dtype=np.int32)
        try:
            for window in windows(total, chunk, encoder_halo(config)):
                codes[:, window.first : window.last] = self._encode_window(waveform, window)
                if on_progress:
                    on_progress(window.last, total)
        finally:
            mx.clear_cache()
        return codes

    def decode(
        self,
        codes: np.ndarray,
        *,
        chunk_frames: int | None = None,
        on_progress: Progress | None = None,
        on_block: Callable[[np.ndarray, int], None] | None = None,
    ) -> np.ndarray:
        """Decode codes [k, T] of the first k <= K codebooks to float32 samples [L, channels].

        L is hop * T. It works in blocks of `chunk_frames` frames, by default as many as fit 2 GiB,
        each with its real neighbours around it: the result equals that of decoding all at once.
        `on_block` receives each block and the count of all samples.

        Raises:
            KhalaError: if the codes have another shape or type, are empty or out of range; if
                chunk_frames is not a whole number above 0; or if the device returns no usable
                samples.
        """
        codes = self._checked(codes)
        blocks = self.decode_stream(codes, chunk_frames=chunk_frames)
        hop, total = self.config.hop, codes.shape[1]
        samples = np.empty((hop * total, self.config.channels), dtype=np.float32)
        done = 0
        for block in blocks:
            samples[done : done + len(block)] = block
            done += len(block)
            if on_block:
                on_block(block, len(samples))
            if on_progress:
                on_progress(done // hop, total)
        return samples

    def decode_stream(
        self, codes: np.ndarray, *, chunk_frames: int | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the blocks of `decode`, so that a song can be heard while the rest is rendered."""
        chunk = _chunk(self.config, decode_bytes, chunk_frames)
        return self._decode_blocks(self._checked(codes), chunk)

    def _checked(self, codes: np.ndarray) -> np.ndarray:
        most, size = self.config.num_codebooks, self.config.codebook_size
        return check_codes(codes, codebooks=most, size=size, fewer=True)

    def _decode_blocks(self, codes: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
        hop = self.config.hop
        try:
            for window in windows(codes.shape[1], chunk, decoder_halo(self.config)):
                part = mx.array(codes[:, window.start : window.stop].astype(np.int32))
                samples = self.decoder(self.quantizer.decode(part)[None])[0]
                first, last = window.inside(hop)
                block = np.array(samples[first:last].astype(mx.float32))
                # A GPU that is out of memory returns zeros (ml-explore/mlx#3979).
                if not (np.isfinite(block).all() and block.any()):
                    raise KhalaError(
                        "The codec made no usable samples. Try a smaller chunk_frames, or float32 "
                        "weights."
                    )
                yield block
        finally:
            mx.clear_cache()

    def _encode_window(self, waveform: np.ndarray, window: Window) -> np.ndarray:
        hop = self.config.hop
        part = waveform[window.start * hop : window.stop * hop]
        part = np.pad(part, [(0, (window.stop - window.start) * hop - len(part)), (0, 0)])
        latents = self.encoder(mx.array(part)[None])[0]
        found = np.array(latents.astype(mx.float32))
        # A GPU that is out of memory returns zeros (ml-explore/mlx#3979).
        if not np.isfinite(found).all() or (part.any() and not found.any()):
            raise KhalaError("The codec made no usable latents. Try a smaller chunk_frames.")
        first, last = window.inside()
        # On the CPU: some GPUs multiply float32 with 10-bit mantissas, and near codes would swap.
        with mx.stream(mx.cpu):
            return np.array(self.quantizer.encode(latents[first:last]))


def default_chunk(config: CodecConfig) -> int:
    """Return how many frames `decode` makes at once by default."""
    return _chunk(config, decode_bytes, None)


def decode_bytes(config: CodecConfig, chunk_frames: int) -> int:
    """Return about the bytes that `decode` needs beside the parameters and its result."""
    # The largest upsampling's weights, [2 * width, 2 * rate, width].
    widths = _decoder_widths(config)
    pairs = zip(widths, widths[1:], config.decoder_rates, strict=False)
    packed = max(2 * rate * inputs * outputs for inputs, outputs, rate in pairs)
    frames = chunk_frames + sum(decoder_halo(config))
    return 4 * (packed + _LIVE * frames * config.hop * config.decoder_dim)


def encode_bytes(config: CodecConfig, chunk_frames: int) -> int:
    """Return about the bytes that `encode` needs beside parameters, samples and codes."""
    frames = chunk_frames + sum(encoder_halo(config))
    return 4 * _LIVE * frames * config.hop * config.encoder_dim


def _chunk(config: CodecConfig, needs: Callable[[CodecConfig, int], int], asked: int | None) -> int:
    """Return the frames of a block: those asked for if they fit, or a power of two that fits."""
    room = _DEFAULT_BYTES if asked is None else _MOST_BYTES
    frames = 1
    while needs(config, 2 * frames) <= room:
        frames *= 2
    return frames if asked is None else min(check_whole("chunk_frames", asked, 1), frames)


def _encoder_widths(config: CodecConfig) -> list[int]:
    return [config.encoder_dim * 2**i for i in range(len(config.encoder_strides) + 1)]


def _decoder_widths(config: CodecConfig) -> list[int]:
    return [config.decoder_dim * 2**i for i in range(len(config.decoder_rates), -1, -1)]


def _checked_waveform(given: np.ndarray, channels: int) -> np.ndarray:
    waveform = plain_array(given, "A waveform")
    if waveform.ndim != 2 or waveform.shape[1] != channels:
        shape = list(waveform.shape)
        raise AudioError(f"A waveform must be an array of shape [L, {channels}], got {shape}.")
    if waveform.dtype.kind != "f":
        raise AudioError(f"A waveform must be floats from -1 to 1, got {waveform.dtype}.")
    if len(waveform) == 0:
        raise AudioError("A waveform must hold at least one sample.")
    with np.errstate(over="ignore"):
        waveform = waveform.astype(np.float32, copy=False)
    if not np.isfinite(waveform).all():
        raise AudioError("The waveform contains NaN or infinite samples.")
    return waveform
