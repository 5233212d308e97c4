"""What the machine has: memory, bandwidth, arithmetic. Nothing here is measured on Apple chips."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass

import mlx.core as mx

from khala_mlx.errors import KhalaError

# Apple's published memory bandwidth in GB/s, and the TFLOPS of the GPU in float32 (cores x lanes x
# clock; the M1's is Apple's own figure). Where a chip was sold with fewer cores, the larger.
CHIPS = {
    "M1": (68, 2.6),
    "M1 Pro": (200, 5.2),
    "M1 Max": (400, 10.4),
    "M1 Ultra": (800, 20.8),
    "M2": (100, 3.6),
    "M2 Pro": (200, 6.8),
    "M2 Max": (400, 13.5),
    "M2 Ultra": (800, 27.0),
    "M3": (100, 3.5),
    "M3 Pro": (150, 6.4),
    "M3 Max": (400, 14.1),
    "M3 Ultra": (819, 28.2),
    "M4": (120, 4.3),
    "M4 Pro": (273, 8.6),
    "M4 Max": (546, 17.2),
    "M5": (153, 4.2),
}
# macOS lets the GPU use two thirds of up to this much memory, three quarters of more.
_SMALL_MAC = 36 * 2**30
# The rest of the process and of the system, on other machines.
_SHARE = 0.85
# Rows of the square matrices that are multiplied, and bytes that are read, to probe the CPU backend
# and a GPU, which takes some 0.2 ms to begin with anything and has caches of tens of megabytes.
_CPU_PROBE, _GPU_PROBE = (384, 1 << 24), (4096, 1 << 30)


@dataclass(frozen=True)
class Machine:
    """What a forecast needs to know of a machine.

    Attributes:
        name: the chip, where it is known.
        memory: bytes that MLX may use.
        on_cpu: whether MLX computes on its CPU backend.
        bandwidth: bytes a second that can be read.
        flops: float32 operations a second.
        published: whether those two are published figures or were probed here.
    """

    name: str
    memory: int
    on_cpu: bool
    bandwidth: float
    flops: float
    published: bool


def this_machine() -> Machine:
    """The machine this runs on; a chip that is not in the table is probed for some milliseconds."""
    name = chip_name()
    on_cpu = mx.default_device() == mx.cpu
    known = CHIPS.get(name.removeprefix("Apple "))
    if known is not None and not on_cpu:
        rates = known[0] * 1e9, known[1] * 1e12
    else:
        rates = _probe(*(_CPU_PROBE if on_cpu else _GPU_PROBE))
    return Machine(name, usable_memory(), on_cpu, *rates, known is not None and not on_cpu)


def chip_name() -> str:
    """ "Apple M3 Max", or what the system calls its processor."""
    if sys.platform == "darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return platform.processor()
    return platform.processor() or platform.machine()


def usable_memory() -> int:
    """Bytes of this machine that MLX may use."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return int(_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def usable_of_mac(memory: int) -> int:
    """Bytes the GPU of a Mac with `memory` bytes may use."""
    return memory * 2 // 3 if memory <= _SMALL_MAC else memory * 3 // 4


def mac_with(memory: int) -> Machine:
    """Return a Mac with this memory in bytes, and the rates of the slowest chip."""
    bandwidth, tflops = CHIPS["M1"]
    rates = bandwidth * 1e9, tflops * 1e12
    return Machine("a Mac", usable_of_mac(memory), False, *rates, published=True)


def parse_memory(text: str) -> int:
    """ "16GB", "16 GiB", "24" -> bytes; a Mac's gigabytes are powers of two.

    Raises:
        KhalaError: if it is not an amount of memory.
    """
    number = text.strip().upper().removesuffix("B").removesuffix("I").removesuffix("G").strip()
    try:
        gigabytes = float(number)
    except ValueError:
        gigabytes = -1.0
    if not 0 < gigabytes < 2**20:
        raise KhalaError(f"Memory is given as in 16GB, got {text!r}.")
    return int(gigabytes * 2**30)


def _probe(rows: int, size: int) -> tuple[float, float]:
    """Bytes and float32 operations a second, the best of a few short tries."""
    block = mx.zeros((size // 4096, 1024))
    square = mx.random.normal((rows, rows), key=mx.random.key(0))
    vector = mx.ones((1, 1024))
    mx.eval(block, square, vector)
    reading, multiplying = [], []
    for _ in range(5):
        began = time.perf_counter()
        mx.eval(vector @ block.T)
        reading.append(time.perf_counter() - began)
        began = time.perf_counter()
        mx.eval(square @ square)
        multiplying.append(time.perf_counter() - began)
    del block, square
    mx.clear_cache()
    return size / min(reading), 2 * rows**3 / min(multiplying)
