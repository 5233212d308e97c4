"""Files read before they are needed, so that the system has them in memory by then."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_BLOCK = 8 << 20


class ReadAhead:
    """Reads files to their ends in a thread of its own and keeps nothing.

    What was read stays in the system's file cache as long as nothing else needs the memory. No
    array is made, for MLX's arrays belong to the thread that makes them; who loads the files
    meanwhile or later gets the same bytes.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(list(paths),), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all is read."""
        self._thread.join()

    def stop(self) -> None:
        """Read no further."""
        self._stopped.set()
        self._thread.join()

    def _run(self, paths: list[Path]) -> None:
        block = bytearray(_BLOCK)
        # Who loads the files says what is wrong with them.
        with suppress(OSError):
            for path in paths:
                with path.open("rb", buffering=0) as file:
                    while not self._stopped.is_set() and file.readinto(block):
                        pass
