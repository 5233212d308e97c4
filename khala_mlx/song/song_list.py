"""A list of songs to make: read from JSON lines or CSV, checked line by line. Knows no models."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import IntEnum
from pathlib import Path
from typing import Any, get_type_hints

from khala_mlx.audio import files as audio
from khala_mlx.errors import KhalaError
from khala_mlx.prompt.request import Request
from khala_mlx.text import is_plain_name, is_text, listed, shown

# What an entry may say beside the fields of a request.
OUTPUT, OF_THE_FILE = "output", ("title", "artist")
_FIELDS = {field.name for field in dataclasses.fields(Request)}
# No honest list is larger.
_MOST_BYTES = 64 << 20
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


class State(IntEnum):
    """How far a song is on a machine."""

    ABSENT, BEGUN, THERE = range(3)


@dataclass(frozen=True)
class Entry:
    """One song of a list.

    Attributes:
        line: where it stands, from 1.
        output: its file, relative to the destination.
        values: fields of a request, as given.
        names: title and artist, if given.
        error: why it cannot be made, if so.
    """

    line: int
    output: str
    values: dict[str, Any]
    names: dict[str, str]
    error: str = ""

    def request(self, seed: int) -> Request:
        """What is asked for, with `seed` where the list names none.

        Raises:
            KhalaError: if a value is wrong.
        """
        where = f"line {self.line}"
        values = {"seed": seed, **self.values}
        return Request.from_dict({**Request().to_dict(), **values}, where)


def read_list(path: Path, suffix: str = ".wav") -> list[Entry]:
    """The songs of a .jsonl or .csv file; wrong lines become entries with an error.

    An entry's `output` is a plain file name; without one it is song-0001.wav and so on by line.

    Raises:
        KhalaError: if the file cannot be read or names no songs.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise KhalaError(f"{path} is too large to be a list of songs.")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise KhalaError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise KhalaError(f"{path} is not valid UTF-8. Save it as UTF-8 and try again.") from error
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise KhalaError(f"{path} must end in .jsonl or .csv, the formats of lists.")
    lines = _json_lines(text) if path.suffix.lower() == ".jsonl" else _csv_lines(text, path)
    entries = [_entry(line, values, suffix) for line, values in lines]
    if not entries:
        raise KhalaError(f"{path} names no songs.")
    return _without_doubles(entries)


def owners(states: Sequence[Sequence[int]]) -> list[int]:
    """Which rank sees to each song of a list, from how far it is on each: states[rank][song].

    Where a song is furthest, it stays; those that are to be made are spread evenly. Every rank
    comes to the same result, so that no song is left out and none is made twice.
    """
    load = [0] * len(states)
    result = []
    for found in zip(*states, strict=True):
        furthest = max(found)
        having = [rank for rank, state in enumerate(found) if state == furthest]
        owner = min(having, key=lambda rank: load[rank])
        load[owner] += furthest != State.THERE
        result.append(owner)
    return result


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for line, each in enumerate(text.split("\n"), 1):
        if each.strip():
            try:
                yield line, json.loads(each)
            except (ValueError, RecursionError):
                yield line, None


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            # A row longer than its header is kept under None.
            if None in row:
                yield reader.line_num, None
            # Spreadsheets leave rows of nothing but commas: nobody asked for those songs.
            elif told := {k: v for k, v in row.items() if v and v.strip()}:
                yield reader.line_num, _typed(told)
    except csv.Error as error:
        raise KhalaError(f"{path} is not a CSV file: {error}.") from error


def _typed(row: Mapping[str, str]) -> dict[str, Any]:
    """Text as the fields of a request want it; what cannot be so is left for them to refuse."""
    hints = get_type_hints(Request)
    return {name: _value(hints.get(name, str), text) for name, text in row.items()}


def _value(kind: Any, text: str) -> Any:
    if kind is bool:
        word = text.strip().lower()
        return True if word in _TRUE else False if word in _FALSE else text
    for number in (int, float):
        # Also those that may be None.
        if kind is number or number.__name__ in str(kind):
            try:
                return number(text)
            except ValueError:
                return text
    return text


def _entry(line: int, values: Any, suffix: str) -> Entry:
    name = f"song-{line:04d}{suffix}"
    if not isinstance(values, dict):
        return Entry(line, name, {}, {}, f"line {line} is not a song: it must be one JSON object.")
    known = {*_FIELDS, OUTPUT, *OF_THE_FILE}
    if unknown := sorted(str(each) for each in values if each not in known):
        near = get_close_matches(unknown[0].replace("-", "_"), sorted(known), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        error = f"line {line} has unknown fields: {listed(unknown)}.{hint}"
        return Entry(line, name, {}, {}, error)
    output = values.get(OUTPUT, name)
    names = {each: values[each] for each in OF_THE_FILE if each in values}
    error = _wrong_name(line, output)
    if not all(isinstance(text, str) and is_text(text) for text in names.values()):
        error = f"line {line}: title and artist must be text."
    if error:
        return Entry(line, name, {}, {}, error)
    return Entry(line, output, {k: v for k, v in values.items() if k in _FIELDS}, names)


def _wrong_name(line: int, output: Any) -> str:
    """Why a name cannot be a song's; it must not lead out of the destination."""
    if not isinstance(output, str) or not is_plain_name(output) or not output.isprintable():
        return f"line {line}: output must be a file name without folders, got {shown(output)}."
    if output.startswith(".") or Path(output).suffix.lower() not in audio.SUFFIXES:
        return f"line {line}: output must end in one of {', '.join(audio.SUFFIXES)}."
    return ""


def _without_doubles(entries: list[Entry]) -> list[Entry]:
    seen: dict[str, int] = {}
    result = []
    for entry in entries:
        # Two suffixes would share the sidecar; some file systems ignore case.
        stem = Path(entry.output).stem.casefold()
        if not entry.error and seen.setdefault(stem, entry.line) != entry.line:
            entry = dataclasses.replace(
                entry, error=f"line {entry.line} has the output of line {seen[stem]}."
            )
        result.append(entry)
    return result
