"""Read files in the background, so that they are in the system's file cache when needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_BLOCK = 8 << 20


class ReadAhead:
    """Reads files to their ends in its own thread and discards the data.

    The data stays in the system's file cache while nothing else needs the memory. No array is made,
    because MLX's arrays belong to the thread that makes them.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(list(paths),), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until all files are read."""
        self._thread.join()

    def stop(self) -> None:
        """Stop reading."""
        self._stopped.set()
        self._thread.join()

    def _run(self, paths: list[Path]) -> None:
        block = bytearray(_BLOCK)
        # Loading the files reports what is wrong with them.
        with suppress(OSError):
            for path in paths:
                with path.open("rb", buffering=0) as file:
                    while not self._stopped.is_set() and file.readinto(block):
                        pass
