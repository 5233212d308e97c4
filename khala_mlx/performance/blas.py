"""A fast BLAS for MLX's CPU backend on Linux, whose wheel brings a slow reference BLAS.

Symbols that are loaded globally first win, so this must happen before the first import of mlx.
Without a fast BLAS everything works the same, several times slower.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from khala_mlx.errors import KhalaError

SWITCH = "KHALA_BLAS"
INSTALL = "apt install libopenblas0-pthread"
# System libraries, best first; each has the whole cblas interface that MLX calls.
_SYSTEM = ("libopenblas.so.0", "libblis.so.4", "libblis.so.3", "libmkl_rt.so.2")
_MACHINES = ("x86_64", "aarch64", "arm64")


@functools.cache
def load() -> str | None:
    """Load a fast BLAS if this machine can use one; return its name, or None.

    KHALA_BLAS=off keeps MLX's own, KHALA_BLAS=PATH names a library.

    Raises:
        KhalaError: if the library that KHALA_BLAS names cannot be loaded.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted.lower() == "off" or not _is_useful():
        return None
    if wanted:
        try:
            ctypes.CDLL(wanted, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise KhalaError(
                f"{SWITCH} names {wanted!r}, which cannot be loaded: {error}. "
                f"Name a library, or set {SWITCH}=off."
            ) from error
        return wanted
    for library in _candidates():
        with suppress(OSError):
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
            return library
    return None


def _is_useful() -> bool:
    """Return whether MLX will compute on a Linux CPU, and is not imported yet."""
    on_linux = sys.platform == "linux" and platform.machine() in _MACHINES
    return on_linux and "mlx.core" not in sys.modules and not _has_gpu_backend()


def _has_gpu_backend() -> bool:
    """Return whether MLX's CUDA backend is installed beside a card."""
    if not Path("/dev/nvidiactl").exists():
        return False
    folders = [Path(folder) for folder in sys.path if Path(folder).is_dir()]
    return any(next(folder.glob("mlx_cuda*"), None) for folder in folders)


def _candidates() -> Iterator[str]:
    yield from _SYSTEM
    # The wheel `mkl` puts its libraries into the environment's lib folder.
    yield str(Path(sys.prefix) / "lib" / "libmkl_rt.so.2")
    spec = find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield str(Path(spec.origin).parent / "lib" / "libtorch_cpu.so")
