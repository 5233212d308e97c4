"""How loud a sound is: integrated loudness and true peak after ITU-R BS.1770-4."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from khala_mlx.errors import AudioError

# BS.1770-4's two filters, given there for 48 kHz, as analogue parameters that serve any rate
# (De Man, "Evaluation of implementations of the EBU R128 loudness measurement", 2018).
_SHELF = {"hertz": 1681.974450955533, "quality": 0.7071752369554196, "gain": 3.999843853973347}
_HIGH_PASS = {"hertz": 38.13547087602444, "quality": 0.5003270373238773}
# Gating: blocks of 400 ms every 100 ms, absolute and relative thresholds in LUFS and LU.
_BLOCK, _HOP = 0.4, 0.1
_ABSOLUTE, _RELATIVE = -70.0, -10.0
_OFFSET = -0.691
# Below it the shelf lies beyond what the rate can hold.
_LEAST_RATE = 4000
# The filters' response is below -200 dB after a third of a second.
_RESPONSE = 1 / 3
# BS.1770-4, annex 2: a true peak is measured at 192 kHz or more.
_TRUE_PEAK_RATE = 4 * 48_000
# Enough for any rate; a header that says 1 Hz would take an hour.
_MOST_RAISED = 64
# Seconds upsampled at once, and of context on both sides.
_PIECE, _CONTEXT = 10, 0.05
# A sample this close to full scale is taken for a clipped one: one step of 16 bits.
FULL_SCALE = 32767 / 32768
# More channels have weights of their own in BS.1770-4.
MOST_CHANNELS = 2


def integrated(waveform: np.ndarray, sample_rate: int) -> float | None:
    """Integrated loudness in LUFS of samples [L, C], C at most 2.

    None if they are silent, shorter than 0.4 s, or at a rate too low for the filters.
    """
    if waveform.shape[1] > MOST_CHANNELS:
        raise AudioError(f"Loudness is measured of 1 or 2 channels, not of {waveform.shape[1]}.")
    if sample_rate < _LEAST_RATE:
        return None
    energy = _block_energy(waveform, sample_rate)
    if not len(energy):
        return None
    heard = energy[_lufs(energy) > _ABSOLUTE]
    if not len(heard):
        return None
    heard = heard[_lufs(heard) > _lufs(heard.mean()) + _RELATIVE]
    return float(_lufs(heard.mean()))


def true_peak(waveform: np.ndarray, sample_rate: int) -> float:
    """True peak of samples [L, C] in dBTP; -inf of silence."""
    import soxr

    factor = min(_MOST_RAISED, max(1, math.ceil(_TRUE_PEAK_RATE / sample_rate)))
    piece, context = _PIECE * sample_rate, math.ceil(_CONTEXT * sample_rate)
    peak = float(np.abs(waveform).max(initial=0.0))
    for start in range(0, len(waveform), piece):
        before = min(start, context)
        part = waveform[start - before : start + piece + context]
        raised = soxr.resample(part, sample_rate, factor * sample_rate, quality="VHQ")
        inner = raised[before * factor : (before + piece) * factor]
        peak = max(peak, float(np.abs(inner).max(initial=0.0)))
    return decibels(peak)


def levels(waveform: np.ndarray, sample_rate: int) -> dict[str, Any]:
    """Return the levels of samples [L, C]: LUFS, dBTP, dBFS, clipped samples."""
    clipped = int(np.count_nonzero(np.abs(waveform) >= FULL_SCALE))
    loud = integrated(waveform, sample_rate)
    return {
        "loudness_lufs": None if loud is None else round(loud, 1),
        "true_peak_dbtp": _finite(true_peak(waveform, sample_rate)),
        "peak_dbfs": _finite(decibels(float(np.abs(waveform).max(initial=0.0)))),
        "clipped_samples": clipped,
    }


def decibels(level: float) -> float:
    """20 log10 of a level; -inf of 0."""
    return 20 * math.log10(level) if level > 0 else -math.inf


def _finite(value: float) -> float | None:
    return round(value, 1) if math.isfinite(value) else None


def _lufs(energy: Any) -> Any:
    with np.errstate(divide="ignore"):
        return _OFFSET + 10 * np.log10(energy)


def _block_energy(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Mean square of each gating block, summed over channels: [blocks]."""
    hop, block = round(_HOP * rate), round(_BLOCK * rate)
    total = np.zeros(len(waveform) // hop)
    if len(waveform) < block:
        return total[:0]
    for channel in waveform.T:
        square = _weighted(channel, rate)[: len(total) * hop] ** 2
        total += square.reshape(-1, hop).sum(axis=1)
    hops = block // hop
    return np.convolve(total, np.ones(hops), "valid") / block


def _weighted(channel: np.ndarray, rate: int) -> np.ndarray:
    """One channel [L] through both filters, by blocks in the frequency domain: float64 [L]."""
    length = math.ceil(_RESPONSE * rate)
    size = 2 ** math.ceil(math.log2(4 * length))
    response = np.fft.irfft(_k_weighting(size, rate))[:length]
    spectrum = np.fft.rfft(response, size)
    step = size - length + 1
    result = np.zeros(len(channel) + size)
    for start in range(0, len(channel), step):
        part = np.fft.rfft(channel[start : start + step].astype(np.float64), size)
        result[start : start + size] += np.fft.irfft(part * spectrum, size)
    return result[: len(channel)]


def _k_weighting(size: int, rate: int) -> np.ndarray:
    """Frequency response of both filters at the bins of a real transform of `size`."""
    z = np.exp(-2j * math.pi * np.arange(size // 2 + 1) / size)
    response = np.ones(len(z), complex)
    k = math.tan(math.pi * _SHELF["hertz"] / rate)
    high = 10 ** (_SHELF["gain"] / 20)
    band, q = high**0.4996667741545416, _SHELF["quality"]
    rise = [high + band * k / q + k * k, 2 * (k * k - high), high - band * k / q + k * k]
    response *= _ratio(rise, k, q, z)
    k = math.tan(math.pi * _HIGH_PASS["hertz"] / rate)
    q = _HIGH_PASS["quality"]
    # Normalised by the denominator alone, as the recommendation's own coefficients are.
    scale = 1 + k / q + k * k
    return response * _ratio([scale, -2 * scale, scale], k, q, z)


def _ratio(numerator: list[float], k: float, q: float, z: np.ndarray) -> np.ndarray:
    denominator = [1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k]
    above = numerator[0] + numerator[1] * z + numerator[2] * z * z
    below: np.ndarray = denominator[0] + denominator[1] * z + denominator[2] * z * z
    return above / below
