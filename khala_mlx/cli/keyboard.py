"""Single keys from the terminal, and a terminal that is as before however the program ends."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# What terminals send for the keys that are not letters (ECMA-48, and xterm's application mode).
_SEQUENCES = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1b[C": "right",
    b"\x1b[D": "left",
    b"\x1b[H": "home",
    b"\x1b[1~": "home",
}
_LONGEST = max(map(len, _SEQUENCES))
_altered: list[tuple[int, Any]] = []

Reader = Callable[[float], str]


@contextmanager
def single_keys() -> Iterator[Reader]:
    """Yield a function that waits some seconds for a key and returns its name, or "".

    Letters are their own names; others are "up", "down", "left", "right", "home". Where standard
    input is not a terminal the function only waits.
    """
    if not sys.stdin.isatty():
        yield wait
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    _altered.append((descriptor, termios.tcgetattr(descriptor)))
    # Not raw: Ctrl-C stays Ctrl-C.
    tty.setcbreak(descriptor)
    try:
        yield lambda seconds: _key(descriptor, seconds)
    finally:
        restore()


def restore() -> None:
    """Put the terminal back; also called where the program is left without unwinding."""
    while _altered:
        import termios

        descriptor, before = _altered.pop()
        with suppress(termios.error, OSError):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def wait(seconds: float) -> str:
    """A reader of no keys."""
    time.sleep(seconds)
    return ""


def _key(descriptor: int, seconds: float) -> str:
    pressed = _byte(descriptor, seconds)
    if pressed is None:
        # The terminal has gone: nobody will press anything.
        return wait(seconds)
    if pressed != b"\x1b":
        return pressed.decode("ascii", "replace")
    # One byte at a time, as keys held down come faster than they are asked for.
    for _ in range(_LONGEST):
        following = _byte(descriptor, 0)
        if not following:
            return ""
        pressed = (pressed + following).replace(b"\x1bO", b"\x1b[")
        if pressed in _SEQUENCES or (len(pressed) > 2 and following.isalpha()):
            break
    return _SEQUENCES.get(pressed, "")


def _byte(descriptor: int, seconds: float) -> bytes | None:
    """The next byte, none in time, or None at the end."""
    if not select.select([descriptor], [], [], seconds)[0]:
        return b""
    return os.read(descriptor, 1) or None
