"""The ops whose fast form differs between the CPU and the GPU. Arrays are [B, L, C].

Each op is one function; device_form() chooses its form. Every form is differentiable. This file
does not depend on the codec.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import mlx.core as mx

from khala_mlx.model.receptive_field import Span, windows

Form = Literal["cpu", "gpu"]

# Keeps snake finite for alpha = 0; the value is upstream's.
_SNAKE_EPS = 1e-9

# sin(pi f)^2 = f^2 (c0 + c1 f^2 + ...) for |f| <= 1/2: least relative error, fitted in float64,
# 1.4e-8 off as real numbers and 2e-7 when evaluated in float32.
_SIN_SQUARED = (
    9.869604110717773,
    -32.469661712646484,
    42.7269287109375,
    -30.098552703857422,
    13.037110328674316,
    -3.336209297180176,
)

# sin(2 pi f) = f (d0 + d1 f^2 + ...), the derivative of the above over pi.
_SIN_OF_DOUBLE = tuple((2 * n + 2) * c / math.pi for n, c in enumerate(_SIN_SQUARED))

# Elements of a tile. On the CPU larger arrays leave the caches, and malloc takes fresh pages for
# each; much smaller ones are dominated by call overhead; 2**20 to 2**22 are equally fast. On the
# GPU a tile only has to be small beside the whole and large beside the cost of a launch.
TILE = {"cpu": 1 << 21, "gpu": 1 << 24}


def device_form() -> Form:
    """Return the form that suits MLX's default device."""
    return "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"


def conv1d(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> mx.array:
    """Cross-correlate x [B, L, I] with weight [O, k, I], zeros beyond both ends -> [B, L', O].

    A stride above 1 excludes a dilation above 1.
    """
    if stride > 1:
        assert dilation == 1
        x, weight = _fold_stride(x, weight, stride, padding)
        padding = 0
    if device_form() == "cpu":
        return _conv1d_as_matmuls(x, weight, bias, padding, dilation)
    y = mx.conv1d(x, weight, padding=padding, dilation=dilation)
    return y if bias is None else y + bias


def pack_transposed(weight: mx.array, stride: int) -> mx.array:
    """Rearrange a transposed conv's weight [O, 2 * stride, C] to a dense conv's [stride * O, 2, C].

    Row (r, o) makes phase r of output channel o from a frame and the one before. Whole rows of C
    move, at the cost of one copy of the weight.
    """
    out, kernel, width = weight.shape
    assert kernel == 2 * stride
    now_and_before = weight.reshape(out, 2, stride, width)
    packed = now_and_before[:, ::-1].transpose(2, 0, 1, 3)
    return packed.reshape(stride * out, 2, width)


def conv_transpose1d(
    x: mx.array,
    packed: mx.array,
    bias: mx.array | None = None,
    *,
    stride: int,
) -> mx.array:
    """Upsample x [B, L, C] by a kernel of 2 * stride, padding ceil(stride / 2) -> [B, L', O].

    L' is stride * L, for odd strides one less. `packed` comes from `pack_transposed`: all phases
    are the channels of one dense conv over two frames, on the CPU one matmul. MLX's own op
    multiplies mostly zeros and, on Metal, unfolds them in memory; a bare matmul would lose digits
    on GPUs that round float32 to 10 bits in matmuls, but not in convs.
    """
    batch, length, _ = x.shape
    phases = conv1d(x, packed, padding=1)
    y = phases.reshape(batch, (length + 1) * stride, packed.shape[0] // stride)
    crop = (stride + 1) // 2
    y = y[:, crop : y.shape[1] - crop]
    return y if bias is None else y + bias


def snake(x: mx.array, alpha: mx.array) -> mx.array:
    """Return x + sin(alpha x)^2 / (alpha + 1e-9), x [B, L, C], alpha [C]; computed in float32."""
    function: Any = _snake_by_polynomial if device_form() == "cpu" else _snake_fused
    result: mx.array = function(x, alpha)
    return result


def in_tiles(
    function: Callable[[mx.array], mx.array],
    x: mx.array,
    halo: Span,
) -> mx.array:
    """Apply a function that keeps the length of x [B, L, C] and sees `halo` rows around each row.

    It runs tile by tile, so that only one tile's intermediate results are in memory.
    """
    rows = max(1, TILE[device_form()] // (x.shape[0] * x.shape[2]))
    if x.shape[1] <= rows:
        return function(x)
    tiles = []
    for window in windows(x.shape[1], rows, halo):
        first, last = window.inside()
        tiles.append(function(x[:, window.start : window.stop])[:, first:last])
    return mx.concatenate(tiles, axis=1)


def _fold_stride(
    x: mx.array, weight: mx.array, stride: int, padding: int
) -> tuple[mx.array, mx.array]:
    # `stride` rows become one wide row: a strided conv is a dense one over those, and neither it
    # nor its gradient must unfold anything.
    batch, length, width = x.shape
    out, kernel, _ = weight.shape
    taps = -(-kernel // stride)
    rows = (length + 2 * padding - kernel) // stride + taps
    right = max(0, rows * stride - length - padding)
    x = mx.pad(x, [(0, 0), (padding, right), (0, 0)])[:, : rows * stride]
    weight = mx.pad(weight, [(0, 0), (0, taps * stride - kernel), (0, 0)])
    return x.reshape(batch, rows, stride * width), weight.reshape(out, taps, stride * width)


def _conv1d_as_matmuls(
    x: mx.array, weight: mx.array, bias: mx.array | None, padding: int, dilation: int
) -> mx.array:
    # MLX's CPU conv unfolds the input, or, dilated, runs scalar loops 100 times slower. Only its
    # float32 matmul is fast.
    bias = mx.zeros((weight.shape[0],)) if bias is None else bias
    arrays = (array.astype(mx.float32) for array in (x, weight, bias))
    result: mx.array = _with_gradient(padding, dilation)(*arrays)
    return result.astype(x.dtype)


@lru_cache
def _with_gradient(padding: int, dilation: int) -> Callable[..., Any]:
    """Return the conv with gradients that are convs; MLX's own pad and add for each tap."""

    @mx.custom_function
    def conv(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        return _taps(x, weight, bias, padding, dilation)

    @conv.vjp
    def gradients(
        primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, ...]:
        x, weight, _bias = primals
        reach = dilation * (weight.shape[1] - 1)
        # Padding beyond the kernel's reach sees only zeros: those rows have no gradient in x.
        beyond = max(0, padding - reach)
        seen = cotangent[:, beyond : cotangent.shape[1] - beyond]
        flipped = weight[:, ::-1].transpose(2, 1, 0)
        to_x = _taps(seen, flipped, mx.zeros((x.shape[2],)), max(0, reach - padding), dilation)
        parts = _shifted(x, weight.shape[1], padding, dilation)
        turned = cotangent.swapaxes(1, 2)
        to_weight = mx.stack([(turned @ part).sum(0) for part in parts], axis=1)
        return to_x, to_weight, cotangent.sum((0, 1))

    return conv


def _shifted(x: mx.array, taps: int, padding: int, dilation: int) -> list[mx.array]:
    if padding:
        x = mx.pad(x, [(0, 0), (padding, padding), (0, 0)])
    rows = x.shape[1] - dilation * (taps - 1)
    return [x[:, tap * dilation : tap * dilation + rows] for tap in range(taps)]


def _taps(x: mx.array, weight: mx.array, bias: mx.array, padding: int, dilation: int) -> mx.array:
    out, taps, width = weight.shape
    shifted = _shifted(x, taps, padding, dilation)
    if taps * width <= out or x.shape[0] * shifted[0].shape[1] <= out:
        # Here the unfolded input is no larger than the output or the weight: one matmul.
        return mx.addmm(bias, mx.concatenate(shifted, axis=-1), weight.reshape(out, -1).T)
    y = bias
    for tap, part in enumerate(shifted):
        y = mx.addmm(y, part, weight[:, tap].T)
    return y


def _snake_plain(x: mx.array, alpha: mx.array) -> mx.array:
    wide, alpha = x.astype(mx.float32), alpha.astype(mx.float32)
    return (wide + mx.square(mx.sin(alpha * wide)) / (alpha + _SNAKE_EPS)).astype(x.dtype)


_snake_fused = mx.compile(_snake_plain, shapeless=True)


@mx.custom_function
def _snake_by_polynomial(x: mx.array, alpha: mx.array) -> mx.array:
    # MLX's CPU sine is scalar: it would take longer than all matmuls.
    wide, alpha = x.astype(mx.float32), alpha.astype(mx.float32)
    square = mx.square(_turns(wide, alpha))
    value = _polynomial(_SIN_SQUARED, square)
    return (wide + value * square * (1 / (alpha + _SNAKE_EPS))).astype(x.dtype)


@_snake_by_polynomial.vjp
def _snake_gradients(
    primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    x, alpha = primals
    wide, slope = x.astype(mx.float32), cotangent.astype(mx.float32)
    inverse = 1 / (alpha.astype(mx.float32) + _SNAKE_EPS)
    turns = _turns(wide, alpha.astype(mx.float32))
    # slope * sin(2 alpha x): the derivative of the polynomial for sin^2 is one for sin.
    turned = slope * turns * _polynomial(_SIN_OF_DOUBLE, mx.square(turns))
    to_x = slope + turned * (alpha * inverse)
    axes = tuple(range(x.ndim - 1))
    added = slope * (output.astype(mx.float32) - wide)
    to_alpha = ((turned * wide).sum(axes) - added.sum(axes)) * inverse
    return to_x.astype(x.dtype), to_alpha.astype(alpha.dtype)


def _turns(x: mx.array, alpha: mx.array) -> mx.array:
    # alpha x / pi to the nearest whole: sin^2 has the period pi.
    turns = x * (alpha / math.pi)
    return turns - mx.round(turns)


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * x + coefficient
    return value
