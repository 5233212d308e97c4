"""Losses on waveforms: multi-resolution spectra, signal-to-noise ratio, mel spectra."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from khala_mlx.audio.mel import mel_bank

# Window lengths of the multi-resolution spectra, in samples; hops are a quarter of them.
RESOLUTIONS = (256, 512, 1024, 2048)
_FLOOR = 1e-5
# Where log magnitudes start to count: 60 dB below a full-scale sine under a window of 2048. Far
# lower, the empty bins of band-limited music outweigh what can be heard.
_LOG_FLOOR = 0.5


def frames_of(wave: mx.array, length: int) -> mx.array:
    """Overlapping frames [B, N, length] of wave [B, L], a quarter of `length` apart.

    Put together from four shifted views: the gradient of a gather is a slow scatter.
    """
    hop = length // 4
    blocks = wave[:, : wave.shape[1] // hop * hop].reshape(wave.shape[0], -1, hop)
    count = blocks.shape[1] - 3
    return mx.concatenate([blocks[:, shift : shift + count] for shift in range(4)], axis=-1)


def magnitudes(wave: mx.array, length: int) -> mx.array:
    """Magnitude spectra [B, N, length // 2 + 1] of wave [B, L] under a Hann window."""
    spectra = mx.fft.rfft(frames_of(wave, length) * _hann(length), axis=-1)
    # The square root of the sum, since the gradient of |z| at 0 is not defined.
    return mx.sqrt(mx.real(spectra) ** 2 + mx.imag(spectra) ** 2 + _FLOOR**2)


def stft_loss(ours: mx.array, target: mx.array) -> mx.array:
    """Spectral convergence and log-magnitude distance over all resolutions, mean.

    Both [B, L, 2]: compared as sum and difference, so that the stereo image counts.
    """
    ours, target = _mid_side(ours), _mid_side(target)
    total = mx.zeros(())
    for length in RESOLUTIONS:
        a, b = magnitudes(ours, length), magnitudes(target, length)
        # The floor also keeps the gradient of the root finite where both agree.
        convergence = mx.sqrt((mx.square(b - a).sum() + _FLOOR) / (mx.square(b).sum() + _FLOOR))
        logs = mx.abs(mx.log(a + _LOG_FLOOR) - mx.log(b + _LOG_FLOOR)).mean()
        total = total + convergence + logs
    return total / len(RESOLUTIONS)


def snr_db(ours: mx.array, target: mx.array) -> mx.array:
    """Signal-to-noise ratio in dB of waves [B, L, C], one for each of B."""
    axes = list(range(1, target.ndim))
    signal = (target**2).sum(axis=axes) + 1e-6
    noise = ((ours - target) ** 2).sum(axis=axes) + 1e-6
    return 10 * mx.log10(signal / noise)


def log_mel(wave: mx.array, sample_rate: int, bands: int, length: int, hop: int) -> mx.array:
    """Log-mel spectra [B, L // hop, bands] of wave [B, L], centred frames, floor 1e-2."""
    padded = mx.pad(wave, [(0, 0), (length // 2 - hop // 2, length)])
    count = wave.shape[1] // hop
    pieces = length // hop
    blocks = padded[:, : (count + pieces - 1) * hop].reshape(wave.shape[0], -1, hop)
    framed = mx.concatenate([blocks[:, p : p + count] for p in range(pieces)], axis=-1)
    spectra = mx.abs(mx.fft.rfft(framed * _hann(length), axis=-1))
    return mx.log(spectra @ _mel_bank(sample_rate, bands, length) + 1e-2)


def _mid_side(wave: mx.array) -> mx.array:
    """[B, L, 2] -> [2B, L]; other channel counts are stacked as they are."""
    if wave.shape[-1] == 2:
        left, right = wave[..., 0], wave[..., 1]
        return mx.concatenate([(left + right) / 2, (left - right) / 2])
    return mx.concatenate([wave[..., channel] for channel in range(wave.shape[-1])])


@lru_cache
def _hann(length: int) -> mx.array:
    return mx.array(np.hanning(length + 1)[:-1].astype(np.float32))


@lru_cache
def _mel_bank(sample_rate: int, bands: int, length: int) -> mx.array:
    return mx.array(mel_bank(sample_rate, bands, length))
