"""The BLAS that is loaded before MLX, each case in a process of its own."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from khala_mlx.performance import blas
found = blas.load()
assert "mlx.core" not in sys.modules
import mlx.core as mx
import numpy as np
rng = np.random.default_rng(0)
a, b = (rng.normal(size=(200, 200)).astype(np.float32) for _ in range(2))
error = np.abs(np.array(mx.array(a) @ mx.array(b)) - a.astype(np.float64) @ b).max()
print(found, error)
"""
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate and Metal")


def loaded(**environment: str) -> tuple[str, float]:
    result = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, **environment}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    name, error = result.stdout.split()
    return name, float(error)


@pytest.mark.parametrize("switch", ["", "off"])
def test_products_are_right_with_either(switch: str) -> None:
    name, error = loaded(KHALA_BLAS=switch)
    assert error < 1e-3
    if switch == "off" or sys.platform != "linux":
        assert name == "None"


@ON_LINUX
def test_a_library_can_be_named() -> None:
    assert loaded(KHALA_BLAS="libc.so.6")[0] == "libc.so.6"


@ON_LINUX
def test_a_wrong_name_is_one_clear_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "khala_mlx.cli", "doctor"],
        env={**os.environ, "KHALA_BLAS": "/absent.so"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith("Error: KHALA_BLAS names '/absent.so', which cannot be loaded")
    assert len(result.stderr.splitlines()) == 1


def test_nothing_is_loaded_once_mlx_is_imported() -> None:
    code = "import mlx.core; from khala_mlx.performance import blas; assert blas.load() is None"
    subprocess.run([sys.executable, "-c", code], check=True)
