"""Where the codec's training starts: at the principal components of the sound.

A strided encoder can hold, stage by stage, a linear projection of blocks of samples, and the
decoder the way back. With the projections that lose least (principal components) the codec
reconstructs from its first step, and training only must improve on that; from random weights
the decoder ignores the latents for thousands of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from khala_mlx.model.codec import Codec, Conv, ResidualUnit, Snake, Upsample

# How far residual branches and snakes on the main path are from doing nothing at the start.
_BRANCH_GAIN = 0.02
_SNAKE_ALPHA = 0.002
# Rows that one stage's components are taken from: enough for the largest matrix of the demo.
_MOST_ROWS = 1 << 16
# Keeps the least squares solvable where latents hardly vary.
_RIDGE = 1e-3


@dataclass(frozen=True)
class _Stage:
    """basis [inputs, n] with orthonormal columns, and the gain on what it gives."""

    basis: np.ndarray
    gain: float


def start_from_components(codec: Codec, wave: mx.array) -> None:
    """Set encoder and decoder to principal components of wave [B, L, C], taken stage by stage.

    The first channels of every width carry the components, the largest first, scaled to unit mean
    square; where the decoder is narrower than the encoder the smallest are dropped. All other
    channels start at random, scaled to unit deviation, and reach the result only once training
    lets them. Blocks do not overlap at the start, so sound whose events keep to the codec's frames
    gains most.
    """
    level = float(mx.sqrt(mx.square(wave).mean())) + 1e-6
    stages = _start_encoder(codec, wave, level)
    _start_decoder(codec, stages, level, codec.encoder(wave))
    mx.eval(codec.parameters())


def start_linear(linear: nn.Linear, x: mx.array, y: mx.array) -> None:
    """Set a linear map to the least squares fit from x [..., I] to y [..., O].

    A map that starts at random would send gradients into the latents that undo their start.
    """
    rows = np.array(x, dtype=np.float64).reshape(-1, x.shape[-1])
    wanted = np.array(y, dtype=np.float64).reshape(-1, y.shape[-1])
    centre, mean = rows.mean(axis=0), wanted.mean(axis=0)
    rows = rows - centre
    # Sums in one order, whatever the threads of a BLAS are doing: runs start alike to the last bit.
    square = np.einsum("ni,nj->ij", rows, rows) + _RIDGE * len(rows) * np.eye(rows.shape[1])
    matrix = np.linalg.solve(square, np.einsum("ni,no->io", rows, wanted - mean))
    # In the order of a weight that is loaded: another order lets a BLAS round otherwise.
    linear.weight = mx.array(np.ascontiguousarray(matrix.T, dtype=np.float32))
    linear.bias = mx.array((mean - centre @ matrix).astype(np.float32))


def _start_encoder(codec: Codec, wave: mx.array, level: float) -> list[_Stage]:
    encoder, carried, stages = codec.encoder, wave.shape[-1], []
    _scaled(encoder.conv_in, wave)
    _pass_on(encoder.conv_in, np.eye(carried), 1 / level)
    x = encoder.conv_in(wave)
    for block in encoder.blocks:
        x = _start_units(block.units, x)
        x = _quiet(block.snake)(x)
        down, stride = block.down, block.down.stride
        _scaled(down, x)
        rows = np.array(x[..., :carried]).reshape(-1, stride * carried)
        stage = _components(rows, down.weight.shape[0])
        carried = stage.basis.shape[1]
        _project(down, stage)
        stages.append(stage)
        x = down(x)
        mx.eval(x)
    x = _quiet(encoder.snake)(x)
    _scaled(encoder.conv_out, x)
    stages.append(
        _components(np.array(x[..., :carried]).reshape(-1, carried), codec.config.latent_dim)
    )
    _pass_on(encoder.conv_out, stages[-1].basis.T, stages[-1].gain)
    return stages


def _start_decoder(codec: Codec, stages: list[_Stage], level: float, latents: mx.array) -> None:
    decoder = codec.decoder
    _scaled(decoder.conv_in, latents)
    _pass_on(decoder.conv_in, stages[-1].basis, 1 / stages[-1].gain)
    x = decoder.conv_in(latents)
    for block, stage in zip(decoder.blocks, stages[-2::-1], strict=True):
        x = _quiet(block.snake)(x)
        _scaled(block.up, x)
        _unproject(block.up, stage)
        x = _start_units(block.units, block.up(x))
        mx.eval(x)
    _quiet(decoder.snake)
    decoder.conv_out.weight = mx.zeros_like(decoder.conv_out.weight)
    _pass_on(decoder.conv_out, np.eye(codec.config.channels), level)


def _start_units(units: list[ResidualUnit], x: mx.array) -> mx.array:
    for unit in units:
        inner = unit.snake2(_scaled(unit.conv1, unit.snake1(x)))
        x = x + _scaled(unit.conv2, inner, _BRANCH_GAIN)
        mx.eval(x)
    return x


def _scaled(conv: Conv | Upsample, x: mx.array, gain: float = 1.0) -> mx.array:
    """conv(x), once its weight is scaled so that the result has the deviation `gain`."""
    out = conv(x)
    factor = gain / (mx.sqrt(mx.var(out)) + 1e-6)
    conv.weight = conv.weight * factor
    return out * factor


def _quiet(snake: Snake) -> Snake:
    snake.alpha = mx.full(snake.alpha.shape, _SNAKE_ALPHA)
    return snake


def _components(rows: np.ndarray, most: int) -> _Stage:
    """The largest components of rows [n, D], at most `most`, scaled to unit mean square."""
    step = -(-len(rows) // _MOST_ROWS)
    rows = rows[::step].astype(np.float64)
    _, vectors = np.linalg.eigh(rows.T @ rows)
    basis = vectors[:, ::-1][:, :most]
    # A sign that does not depend on the library: the largest entry of each is positive.
    largest = np.abs(basis).argmax(axis=0)
    basis = basis * np.sign(basis[largest, np.arange(basis.shape[1])])
    size = np.sqrt(np.mean((rows @ basis) ** 2))
    return _Stage(basis, 1 / max(float(size), 1e-6))


def _pass_on(conv: Conv, matrix: np.ndarray, gain: float) -> None:
    """Let the middle tap of a conv carry out `matrix` [outputs, inputs] on the first channels."""
    weight = np.array(conv.weight)
    outputs, inputs = min(len(matrix), len(weight)), matrix.shape[1]
    weight[:outputs] = 0
    weight[:outputs, weight.shape[1] // 2, :inputs] = gain * matrix[:outputs]
    conv.weight = mx.array(weight)


def _project(down: Conv, stage: _Stage) -> None:
    """The components of each block of `stride` rows: the middle half of the kernel."""
    weight = np.array(down.weight)
    _, kernel, _ = weight.shape
    inputs, count = stage.basis.shape
    stride = kernel // 2
    weight[:count] = 0
    inner = stage.basis.T.reshape(count, stride, inputs // stride)
    weight[:count, stride // 2 : stride // 2 + stride, : inputs // stride] = stage.gain * inner
    down.weight = mx.array(weight)


def _unproject(up: Upsample, stage: _Stage) -> None:
    """Each frame's components back to a block of `stride` rows."""
    weight = np.array(up.weight)
    outputs, kernel, width = weight.shape
    stride = kernel // 2
    inner = stage.basis.reshape(stride, -1, stage.basis.shape[1]) / stage.gain
    carried, count = min(inner.shape[1], outputs), min(inner.shape[2], width)
    weight[:carried] = 0
    inner = inner[:, :carried, :count].transpose(1, 0, 2)
    weight[:carried, stride // 2 : stride // 2 + stride, :count] = inner
    up.weight = mx.array(weight)
