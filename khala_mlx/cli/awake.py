"""No sleep while songs are made: macOS would stop a long run when nobody touches the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def keep_awake(
    platform: str = sys.platform, start: Callable[..., Any] = subprocess.Popen
) -> Iterator[None]:
    """Hold off idle sleep with macOS's own caffeinate; elsewhere, and without it, do nothing."""
    process: Any = None
    if platform == "darwin":
        # -w: caffeinate ends with this process, even if that is killed.
        command = ["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with suppress(OSError):
            process = start(command, **quiet)
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            process.wait()
