"""The receptive field of the codec's layers, and windows of rows whose results equal the whole.

Sizes only: which inputs an output depends on, and how rows are cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from khala_mlx.config import DILATIONS, KERNEL, LATENT_KERNEL, CodecConfig

Span = tuple[int, int]

# Rows that the three units of a block see on either side of a row.
UNITS_HALO = (KERNEL // 2 * sum(DILATIONS),) * 2


@dataclass(frozen=True)
class Window:
    """Rows start..stop, which are the input for the wanted rows first..last."""

    first: int
    last: int
    start: int
    stop: int

    def inside(self, scale: int = 1) -> Span:
        """Return where the wanted rows are in the window, when each row becomes `scale` rows."""
        return (self.first - self.start) * scale, (self.last - self.start) * scale


def windows(total: int, chunk: int, halo: Span) -> Iterator[Window]:
    """Cut `total` rows into even pieces of at most `chunk`, each with `halo` rows before and after.

    All windows have one size, so that buffers are reused: a window that would cross an end of the
    rows moves inwards. The ends of a window are then either the true ends, where zeros are right,
    or at least `halo` away from the wanted rows.
    """
    before, after = halo
    even = -(-total // -(-total // chunk))
    size = min(before + even + after, total)
    for first in range(0, total, even):
        start = min(max(first - before, 0), total - size)
        yield Window(first, min(first + even, total), start, start + size)


def padding_of(kernel: int, stride: int, dilation: int = 1) -> int:
    """Return the zeros on either side of a conv's input, as the DAC family pads."""
    return (stride + 1) // 2 if stride > 1 else dilation * (kernel - 1) // 2


def decoder_halo(config: CodecConfig) -> Span:
    """Return how many frames before and after a frame its samples depend on."""
    span = _read_by_conv((0, config.hop - 1), KERNEL)
    for rate in reversed(config.decoder_rates):
        span = _read_by_upsample(_read_by_units(span), rate)
    first, last = _read_by_conv(span, KERNEL)
    return -first, last


def encoder_halo(config: CodecConfig) -> Span:
    """Return how many frames before and after a frame its latent depends on."""
    span = _read_by_conv((0, 0), LATENT_KERNEL)
    for stride in reversed(config.encoder_strides):
        span = _read_by_units(_read_by_conv(span, 2 * stride, stride))
    first, last = _read_by_conv(span, KERNEL)
    return -(first // config.hop), last // config.hop


def _read_by_conv(span: Span, kernel: int, stride: int = 1) -> Span:
    # First and last input that the outputs first..last of a conv are made from.
    first, last = (end * stride - padding_of(kernel, stride) for end in span)
    return first, last + kernel - 1


def _read_by_units(span: Span) -> Span:
    return span[0] - UNITS_HALO[0], span[1] + UNITS_HALO[1]


def _read_by_upsample(span: Span, rate: int) -> Span:
    # Output n is made from inputs (n + padding - tap) / rate, for the taps 0..2 * rate - 1.
    first, last = (end + padding_of(2 * rate, rate) for end in span)
    return -((2 * rate - 1 - first) // rate), last // rate
