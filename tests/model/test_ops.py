"""Every form of every op against MLX's own, and against each other's gradients."""

from collections.abc import Callable
from shutil import which

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khala_mlx.model import ops
from khala_mlx.model.receptive_field import windows

sizes = st.integers(1, 6)
few = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    # One form for all examples is what is meant.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# MLX compiles CPU code with the system's compiler.
needs_compiler = pytest.mark.skipif(
    ops.device_form() == "cpu" and which("g++") is None, reason="compiling needs g++"
)


@pytest.fixture(params=["cpu", "gpu"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form of the ops, whatever the device."""
    monkeypatch.setattr(ops, "device_form", lambda: request.param)


def random(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32))


def difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return float(mx.abs(a - b).max()) if a.size else 0.0


@pytest.mark.usefixtures("form")
@few
@given(st.integers(1, 2), st.integers(1, 40), sizes, sizes, sizes, st.integers(1, 9), sizes)
def test_dilated_convs_equal_mlx(
    batch: int,
    length: int,
    inputs: int,
    outputs: int,
    kernel: int,
    dilation: int,
    padding: int,
) -> None:
    length += dilation * (kernel - 1)
    x, weight = random(batch, length, inputs), random(outputs, kernel, inputs)
    bias = random(outputs)
    ours = ops.conv1d(x, weight, bias, padding=padding, dilation=dilation)
    native = mx.conv1d(x, weight, padding=padding, dilation=dilation) + bias
    assert difference(ours, native) < 1e-4
    bare = ops.conv1d(x, weight, padding=padding, dilation=dilation)
    assert difference(bare + bias, native) < 1e-4


@pytest.mark.usefixtures("form")
@few
@given(st.integers(1, 40), sizes, sizes, st.integers(1, 12), st.integers(2, 9), sizes)
def test_strided_convs_equal_mlx(
    length: int, inputs: int, outputs: int, kernel: int, stride: int, padding: int
) -> None:
    x, weight = random(2, length + kernel, inputs), random(outputs, kernel, inputs)
    ours = ops.conv1d(x, weight, stride=stride, padding=padding)
    assert difference(ours, mx.conv1d(x, weight, stride=stride, padding=padding)) < 1e-4


@pytest.mark.usefixtures("form")
@few
@given(st.integers(1, 2), st.integers(1, 20), sizes, sizes, st.integers(2, 9))
def test_polyphase_equals_mlx(
    batch: int, length: int, inputs: int, outputs: int, stride: int
) -> None:
    x, weight = random(batch, length, inputs), random(outputs, 2 * stride, inputs)
    bias = random(outputs)
    packed = ops.pack_transposed(weight, stride)
    ours = ops.conv_transpose1d(x, packed, bias, stride=stride)
    native = mx.conv_transpose1d(x, weight, stride=stride, padding=(stride + 1) // 2) + bias
    assert difference(ours, native) < 1e-4
    assert ours.shape[1] == stride * length - stride % 2
    bare = ops.conv_transpose1d(x, packed, stride=stride)
    assert difference(bare + bias, native) < 1e-4


def snake_reference(x: mx.array, alpha: mx.array) -> np.ndarray:
    wide, a = np.array(x, np.float64), np.array(alpha, np.float64)
    return wide + np.sin(a * wide) ** 2 / (a + 1e-9)


@needs_compiler
@pytest.mark.usefixtures("form")
def test_snake_equals_float64() -> None:
    x = mx.concatenate([random(1, 200, 5), 30 * random(1, 300, 5)], axis=1)
    for alpha in (mx.array([1.0, 0.03, 7.0, -0.5, 1e-6]), mx.array([0.0, 2.0, 2.0, 2.0, 2.0])):
        error = np.abs(np.array(ops.snake(x, alpha)) - snake_reference(x, alpha))
        # What sin adds is at most |x|, so float32 rounding scales with that.
        assert (error / (1 + np.abs(x))).max() < 1e-6


@needs_compiler
@pytest.mark.usefixtures("form")
def test_snake_is_computed_in_float32() -> None:
    x, alpha = (20 * random(2, 50, 3)).astype(mx.float16), mx.array([0.5, 1.0, 3.0])
    y = ops.snake(x, alpha.astype(mx.float16))
    assert y.dtype == mx.float16
    np.testing.assert_allclose(np.array(y), snake_reference(x, alpha), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("form")
def test_narrow_types_stay() -> None:
    x, weight, bias = random(1, 300, 4), random(5, 7, 4), random(5)
    half = [a.astype(mx.float16) for a in (x, weight, bias)]
    y = ops.conv1d(*half, padding=3)
    assert y.dtype == mx.float16
    assert difference(y, ops.conv1d(x, weight, bias, padding=3)) < 0.05
    packed = ops.pack_transposed(half[1][:, :4], 2)
    up = ops.conv_transpose1d(half[0], packed, half[2], stride=2)
    assert up.dtype == mx.float16


def gradients(function: Callable[..., mx.array], *arguments: mx.array) -> list[mx.array]:
    def loss(*given: mx.array) -> mx.array:
        return mx.square(function(*given)).sum()

    return list(mx.grad(loss, argnums=list(range(len(arguments))))(*arguments))


def assert_same_gradients(
    ours: Callable[..., mx.array], native: Callable[..., mx.array], *arguments: mx.array
) -> None:
    for mine, theirs in zip(
        gradients(ours, *arguments), gradients(native, *arguments), strict=True
    ):
        assert difference(mine, theirs) < 1e-4 * (1 + float(mx.abs(theirs).max()))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("options", [{"dilation": 3, "padding": 9}, {"stride": 4, "padding": 2}])
def test_convs_can_be_trained(options: dict[str, int]) -> None:
    for outputs in (2, 50):  # few and many: taps, and one matmul
        assert_same_gradients(
            lambda x, w: ops.conv1d(x, w, **options),
            lambda x, w: mx.conv1d(x, w, **options),
            random(2, 32, 3),
            random(outputs, 7, 3),
        )


@pytest.mark.usefixtures("form")
def test_polyphase_can_be_trained() -> None:
    assert_same_gradients(
        lambda x, w: ops.conv_transpose1d(x, ops.pack_transposed(w, 4), stride=4),
        lambda x, w: mx.conv_transpose1d(x, w, stride=4, padding=2),
        random(2, 9, 3),
        random(5, 8, 3),
    )


@needs_compiler
@pytest.mark.usefixtures("form")
def test_snake_can_be_trained() -> None:
    assert_same_gradients(
        lambda x, a: ops.snake(x, a),
        lambda x, a: x + mx.square(mx.sin(a * x)) / (a + 1e-9),
        random(2, 30, 3),
        mx.array([0.5, 1.0, 3.0]),
    )


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 9), st.integers(0, 9))
def test_windows_cover_all_rows_once(total: int, chunk: int, before: int, after: int) -> None:
    cut = list(windows(total, chunk, (before, after)))
    assert [row for w in cut for row in range(w.first, w.last)] == list(range(total))
    assert len({w.stop - w.start for w in cut}) == 1
    assert len(cut) <= -(-total // chunk)
    for window in cut:
        assert window.last - window.first <= chunk
        assert 0 <= window.start <= max(0, window.first - before)
        assert min(total, window.last + after) <= window.stop <= total
        assert window.inside(3) == (
            3 * (window.first - window.start),
            3 * (window.last - window.start),
        )


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("tile", [1, 30, 100, 10_000])
def test_tiles_equal_the_whole(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "TILE", {"cpu": tile, "gpu": tile})
    x, weight = random(2, 57, 3), random(4, 7, 3)

    def convolve(rows: mx.array) -> mx.array:
        return ops.conv1d(rows, weight, padding=6, dilation=2)

    assert difference(ops.in_tiles(convolve, x, (6, 6)), convolve(x)) < 1e-5


def test_the_form_follows_the_device() -> None:
    device = mx.default_device()
    assert ops.device_form() == ("cpu" if device.type == mx.DeviceType.cpu else "gpu")
