"""Mel filters and spectrograms on NumPy arrays."""

from __future__ import annotations

import numpy as np


def mel_bank(sample_rate: int, bands: int, length: int) -> np.ndarray:
    """Triangular filters, float32 [length // 2 + 1, bands], spaced on O'Shaughnessy's mel scale."""
    edges = mel_edges(sample_rate, bands)
    bins = np.fft.rfftfreq(length, 1 / sample_rate)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    bank = np.maximum(0, np.minimum(rising, falling))
    scaled: np.ndarray = (bank / np.maximum(bank.sum(0), 1e-9)).astype(np.float32)
    return scaled


def mel_edges(sample_rate: int, bands: int) -> np.ndarray:
    """Where the filters begin, peak and end, in Hz: [bands + 2]."""
    highest = 2595 * np.log10(1 + sample_rate / 2 / 700)
    edges: np.ndarray = 700 * (10 ** (np.linspace(0, highest, bands + 2) / 2595) - 1)
    return edges


def mel_decibels(
    wave: np.ndarray, sample_rate: int, *, bands: int, length: int, hop: int
) -> np.ndarray:
    """Mel spectrum of wave [L] in dB below its own maximum, at least -80: [frames, bands]."""
    bank, window = mel_bank(sample_rate, bands, length), np.hanning(length + 1)[:-1]
    padded = np.pad(wave, (length // 2, length))
    frames = np.lib.stride_tricks.sliding_window_view(padded, length)[: len(wave) : hop]
    # By blocks, as the frames of a long song are many times its samples.
    power = np.concatenate(
        [
            np.abs(np.fft.rfft(frames[at : at + 512] * window, axis=-1)) ** 2 @ bank
            for at in range(0, len(frames), 512)
        ]
    )
    level = 10 * np.log10(np.maximum(power, 1e-20))
    below: np.ndarray = np.maximum(level - level.max(), -80.0)
    return below
