"""Show names and values in messages: printable, bounded, on one line."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

MOST_LISTED = 100
# Python refuses to write out much larger numbers, and nobody would read them.
_LARGEST_SHOWN = 10**40


def shown(name: object) -> str:
    """Return one value, fit for a terminal: printable, on one line, and not too long."""
    if isinstance(name, int) and abs(name) >= _LARGEST_SHOWN:
        return "a number of more than 40 digits"
    plain = name is None or isinstance(name, (str, float, int))
    text = str(name) if plain else type(name).__name__
    text = text if len(text) <= 200 else text[:200] + "..."
    return text if text.isprintable() else ascii(text)


def resuming(take: Path) -> str:
    """Return the command that resumes a take, quoted for a shell."""
    return f"khala generate --resume {shlex.quote(str(take))}"


def is_text(text: str) -> bool:
    """Return whether `text` can be encoded; JSON and the command line can give lone surrogates."""
    return not any("\ud800" <= each <= "\udfff" for each in text)


def is_plain_name(name: str) -> bool:
    """Return whether `name` is the name of a file, without a way out of its folder."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def listed(names: Iterable[object]) -> str:
    """Join names with commas, in their order; of a very long list only count the rest."""
    every = [shown(name) for name in names]
    more = len(every) - MOST_LISTED
    return ", ".join(every[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def clock_time(seconds: float) -> str:
    """Return seconds as minutes and seconds: 75.0 -> 1:15."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
