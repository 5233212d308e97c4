"""From rendered samples to those of a finished file: fade, loudness, full scale."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from khala_mlx.audio import files as audio
from khala_mlx.audio import loudness
from khala_mlx.errors import AudioError, KhalaWarning
from khala_mlx.text import shown

# Quieter than any music, and the ceiling itself.
_QUIETEST, _LOUDEST = -70.0, 0.0


@dataclass(frozen=True)
class Mastering:
    """What is done to a song before it is written.

    Attributes:
        normalize: turn a song that would clip down to -1 dBFS.
        loudness: target in LUFS (EBU R 128 and broadcasters ask for -23, streaming services for
            about -14), limited by a true peak of -1 dBTP; None changes nothing.
        fade: seconds over which the end fades out.
        bit_depth: "16", "24" or "float".
    """

    normalize: bool = True
    loudness: float | None = None
    fade: float = 0.0
    bit_depth: str = "16"

    def __post_init__(self) -> None:
        for name in ("loudness", "fade"):
            value = getattr(self, name)
            if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
                # NumPy's numbers cannot be written into the sidecar.
                object.__setattr__(self, name, float(value))
            elif name == "fade" or value is not None:
                raise AudioError(f"{name} must be a number, got {shown(value)}.")
        if self.loudness is not None and not _QUIETEST <= self.loudness <= _LOUDEST:
            raise AudioError(f"loudness must be -70 to 0 LUFS, got {self.loudness:g}.")
        if not 0 <= self.fade < math.inf:
            raise AudioError(f"fade must be a number of seconds, got {self.fade:g}.")

    def apply(self, waveform: np.ndarray, sample_rate: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The finished samples [L, C], and a report of what was done for the sidecar."""
        report: dict[str, Any] = {}
        if self.fade:
            waveform = fade_out(waveform, sample_rate, self.fade)
            report["fade_seconds"] = self.fade
        if self.loudness is not None:
            waveform, told = to_loudness(waveform, sample_rate, self.loudness)
            report |= told
        waveform, told = audio.fit_scale(waveform, normalize=self.normalize)
        return waveform, {**told, **report}


def fade_out(waveform: np.ndarray, sample_rate: int, seconds: float) -> np.ndarray:
    """Fade the last `seconds` of samples [L, C] to silence along half a cosine."""
    return fade_part(waveform, 0, len(waveform), sample_rate, seconds)


def fade_part(
    block: np.ndarray, start: int, samples: int, sample_rate: int, seconds: float
) -> np.ndarray:
    """Apply `fade_out` to the block [n, C] at `start` of a song of `samples` samples."""
    length = round(min(samples, seconds * sample_rate))
    first = max(0, samples - length - start)
    if first >= len(block):
        return block
    steps = np.arange(start + first, start + len(block)) - (samples - length) + 1
    curve = 0.5 + 0.5 * np.cos(np.pi * steps / length)
    faded = block.copy()
    faded[first:] *= curve[:, None].astype(block.dtype)
    return faded


def to_loudness(
    waveform: np.ndarray, sample_rate: int, target: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """Samples [L, C] at `target` LUFS, or as near as a true peak of -1 dBTP allows.

    Returns:
        The samples, and {loudness_lufs, true_peak_dbtp, loudness_gain_db} of the result.
    """
    now = loudness.integrated(waveform, sample_rate)
    if now is None:
        warnings.warn(
            "The song is silent or shorter than 0.4 seconds: its loudness is left as it is.",
            KhalaWarning,
            stacklevel=3,
        )
        return waveform, {}
    peak = loudness.true_peak(waveform, sample_rate)
    gain = min(target - now, audio.CEILING_DBFS - peak)
    if gain < target - now - 0.05:
        warnings.warn(
            f"The song reaches {now + gain:.1f} LUFS, not {target:g}: more would push its true "
            f"peak over {audio.CEILING_DBFS:g} dBTP.",
            KhalaWarning,
            stacklevel=3,
        )
    report = {
        "loudness_lufs": round(now + gain, 2),
        "true_peak_dbtp": round(peak + gain, 2),
        "loudness_gain_db": round(gain, 2),
    }
    return waveform * np.float32(10 ** (gain / 20)), report
