"""Several processes on this machine, as `mlx.launch` starts them."""

import socket
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import pytest

needs_ring = pytest.mark.skipif(
    not mx.distributed.is_available("ring"), reason="this MLX has no ring backend"
)
LAUNCH = "from mlx._distributed_utils.launch import main; main()"
KHALA = "from khala_mlx.cli import main; main()"


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for first in range(32400, 60000, count):
        with ExitStack() as taken:
            try:
                for port in range(first, first + count):
                    taken.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
    raise AssertionError("no port is free")


def alone(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """`khala ...` in a process of its own; MLX refuses a ring of one."""
    command = [sys.executable, "-c", KHALA, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def launched(count: int, *arguments: Any, code: str = KHALA) -> subprocess.CompletedProcess[str]:
    """`mlx.launch -n COUNT -- khala ...` on loopback, or other code in its place."""
    return subprocess.run(
        [
            sys.executable, "-c", LAUNCH, "-n", str(count), "--backend", "ring",
            "--starting-port", str(free_ports(count)), "--", sys.executable, "-c", code,
            *map(str, arguments),
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
