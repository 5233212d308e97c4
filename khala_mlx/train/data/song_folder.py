"""The songs of a folder: its sound files, and the words that lie beside them or in a table.

Knows files and texts, neither sound nor codes. What cannot be used is an `Unusable`, which says
why in a word and in a sentence; it costs the one song, never the others.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from khala_mlx.errors import KhalaError
from khala_mlx.prompt.cleaning import clean_lyrics
from khala_mlx.prompt.lyrics import decode_text, has_voice, parse_lyrics
from khala_mlx.train.data.dataset import SPLITS, sound_files

TABLE = "metadata.jsonl"
# What spreadsheets write.
SHEETS = ("metadata.csv", "metadata.tsv")
# Names of the field that names the sound; Hugging Face's tables say file_name.
_FILE_FIELDS = ("file", "file_name", "filename", "audio", "path")
_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Unusable(KhalaError):
    """Why a song is left out: `reason` in a word, for counting, and as a sentence."""

    def __init__(self, reason: str, sentence: str) -> None:
        # File names may not be valid text, but the report must be.
        super().__init__(sentence.encode("utf-8", "replace").decode())
        self.reason = reason


@dataclass(frozen=True)
class Found:
    """A sound file, its name below the folder of songs, and the split whose folder it lies in.

    `split` is "" where it is still to be drawn, None where it lies beside the splits' folders.
    """

    path: Path
    name: str
    split: str | None


@dataclass(frozen=True)
class Words:
    """What is known of a song. `minutes` is 0 if only the sound can show it."""

    tags: str = ""
    lyrics: str = ""
    artist: str = ""
    language: str = ""
    instrumental: bool = False
    minutes: int = 0


def find_songs(folder: Path, out: Path) -> list[Found]:
    """The sound files below `folder` but not below `out`, sorted by name.

    Where `folder` has a subfolder for each of SPLITS, they are the splits.

    Raises:
        KhalaError: if it, or one of these subfolders, holds none.
    """
    by_folder = has_splits(folder)
    for searched in [folder / split for split in SPLITS] if by_folder else [folder]:
        sound_files(searched)
    files = sound_files(folder)
    found = []
    for path in files:
        if out.absolute() not in path.absolute().parents:
            top = path.relative_to(folder).parts[0]
            split = (top if top in SPLITS else None) if by_folder else ""
            found.append(Found(path, shown(path.relative_to(folder)), split))
    if not found:
        raise KhalaError(f"All sound files in {folder} lie in {out}, where the codes are to go.")
    return found


def has_splits(folder: Path) -> bool:
    """Whether the subfolders of `folder` say which songs are held out."""
    return all((folder / split).is_dir() for split in SPLITS)


def shown(path: Path) -> str:
    """A path as text; what is not valid text in it is replaced, so that it can be written."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def read_tables(
    folder: Path, found: Sequence[Found]
) -> tuple[dict[Path, Words | Unusable], list[tuple[str, Unusable]]]:
    """Read the tables (metadata.jsonl, .csv, .tsv) of `folder` and of its splits.

    Returns:
        Words by path of the sound, or why its row cannot be used; and what is wrong with rows that
        name no sound of the folder.
    """
    # Macs write names decomposed, tables mostly hold them composed.
    paths = {_composed(each.path): each.path for each in found}
    known: dict[Path, Words | Unusable] = {}
    problems = []
    for part in (folder, *(folder / split for split in SPLITS if has_splits(folder))):
        for where, row in _rows(part):
            label = f"{shown((part / where[0]).relative_to(folder))} line {where[1]}"
            name = ""
            try:
                name, words = _row(row, part)
                path = paths.get(_composed(part / name))
                if path is None:
                    raise Unusable("missing", f"there is no sound file {name}.")
                if path in known:
                    raise Unusable("table", f"{name} was listed before, which counts.")
                known[path] = words
            except Unusable as error:
                problems.append((label, error))
                path = paths.get(_composed(part / (name or _named(row))))
                if path is not None and path not in known:
                    # Its words are not known, so it must not be trained as if it had none.
                    known[path] = Unusable("table", f"Its row in the table is refused: {error}")
    return known, problems


def words_of(sound: Path, known: Words) -> tuple[Words, list[str]]:
    """Return the words of a song, and remarks on them; files go before the table.

    The caption is song.caption.txt, song_prompt.txt or a song.txt of one line. The lyrics are
    song.lyrics.txt, song_lyrics.txt, song.lrc, or a song.txt that is not the caption. A song
    without lyrics is an instrumental, as in generation.

    Raises:
        Unusable: if a file with words cannot be read.
    """
    caption = _text(sound, ".caption.txt", "_prompt.txt")
    lyrics = _text(sound, ".lyrics.txt", "_lyrics.txt", ".lrc")
    either = _text(sound, ".txt")
    if either is not None:
        is_lyrics = len(either.strip().splitlines()) > 1 or caption is not None or known.tags
        if is_lyrics and lyrics is None and not known.lyrics:
            lyrics = either
        elif caption is None and not is_lyrics:
            caption = either
    remarks = []
    words = replace(
        known,
        tags=known.tags if caption is None else caption.strip(),
        lyrics=known.lyrics if lyrics is None else lyrics.strip(),
    )
    if not words.tags.strip():
        remarks.append("It has no caption, so its prompt has no tags.")
    try:
        parsed = parse_lyrics(words.lyrics)
    except KhalaError as error:
        raise Unusable("words", str(error)) from error
    if parsed.note:
        remarks.append(parsed.note)
    words = replace(words, lyrics=parsed.text)
    cleaned = clean_lyrics(words.lyrics)
    if words.instrumental and cleaned:
        remarks.append("Its lyrics are left out, because it is marked as an instrumental.")
    elif not has_voice(cleaned, instrumental=words.instrumental) and not words.instrumental:
        remarks.append("It has no lyrics, so it counts as an instrumental.")
        words = replace(words, instrumental=True)
    if words.instrumental:
        return replace(words, lyrics=""), remarks
    return words, remarks + _changes(words.lyrics, cleaned)


def _changes(lyrics: str, cleaned: str) -> list[str]:
    if cleaned == lyrics.replace("\r\n", "\n").strip():
        return []
    gone = sorted(set(lyrics) - set(cleaned) - {"\r", "\n"})
    named = [c if c.isprintable() and c != " " else f"U+{ord(c):04X}" for c in gone]
    return [f"The cleaning that generation does changes its lyrics: {' '.join(named)}."]


def _text(sound: Path, *endings: str) -> str | None:
    """Return the first text file beside a sound with one of these endings; None without any."""
    for ending in endings:
        path = sound.with_name(sound.stem + ending)
        try:
            return decode_text(path.read_bytes(), path.name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Unusable("words", f"{path.name} cannot be read: {error.strerror}.") from error
        except KhalaError as error:
            raise Unusable("words", str(error)) from error
    return None


def _rows(folder: Path) -> Iterator[tuple[tuple[str, int], Any]]:
    """Yield ((table, line), row or Unusable) of the tables of a folder."""
    table = folder / TABLE
    # Bytes, so that one line in a wrong encoding does not cost the others.
    for number, line in enumerate(table.read_bytes().splitlines() if table.is_file() else [], 1):
        if line.strip():
            try:
                yield (TABLE, number), json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                yield (TABLE, number), Unusable("table", "it is not valid JSON.")
    for name in SHEETS:
        if (folder / name).is_file():
            yield from (((name, number), row) for number, row in _sheet_rows(folder / name))


def _sheet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, row) of a table that a spreadsheet wrote, with commas, semicolons or tabs."""
    try:
        text = decode_text(path.read_bytes(), path.name)
    except KhalaError as error:
        yield 1, Unusable("table", str(error))
        return
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            filled = {str(name): value for name, value in row.items() if value and name}
            if filled:
                yield reader.line_num, filled
    except csv.Error as error:
        yield reader.line_num, Unusable("table", f"it is not CSV: {error}.")


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with field names in small letters, without what spreadsheets write for none."""
    named = {re.sub(r"[\s-]+", "_", str(name).strip().casefold()): v for name, v in row.items()}
    empty = ("null", "none", "nan", "n/a")
    return {
        name: value
        for name, value in named.items()
        if value is not None
        and not (isinstance(value, float) and math.isnan(value))
        and not (isinstance(value, str) and value.strip().casefold() in empty)
    }


def _named(row: Any) -> str:
    """Return the file that a row names, or "" if it names none."""
    fields_of_row = _fields(row) if isinstance(row, dict) else {}
    for name in _FILE_FIELDS:
        if isinstance(value := fields_of_row.get(name), str) and value.strip():
            return value.strip()
    return ""


def _row(row: Any, folder: Path) -> tuple[str, Words]:
    """Return the file that a row names, and its words; unknown fields are ignored."""
    if isinstance(row, Unusable):
        raise row
    if not isinstance(row, dict):
        raise Unusable("table", "it is not a JSON object.")
    name = _string("file", _named(row))
    if not name:
        raise Unusable("table", "it names no file.")
    row = _fields(row)
    row["tags"] = _tags(row.get("caption", row.get("prompt", row.get("tags", ""))))
    if isinstance(row.get("instrumental"), str):
        row["instrumental"] = _SWITCH.get(row["instrumental"].strip().casefold(), "?")
    if isinstance(row.get("minutes"), str):
        with suppress(ValueError):
            row["minutes"] = float(row["minutes"].replace(",", "."))
    if "lyrics_file" in row and not row.get("lyrics"):
        row["lyrics"] = _lyrics_file(folder, _string("lyrics_file", row["lyrics_file"]))
    return name, _checked({f.name: row[f.name] for f in fields(Words) if f.name in row})


def _lyrics_file(folder: Path, name: str) -> str:
    path = folder / name
    try:
        return decode_text(path.read_bytes(), name)
    except OSError as error:
        raise Unusable("words", f"{name} cannot be read: {error.strerror}.") from error
    except KhalaError as error:
        raise Unusable("words", str(error)) from error


def _tags(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    return value


def _checked(values: Mapping[str, Any]) -> Words:
    for name in ("tags", "lyrics", "artist", "language"):
        _string(name, values.get(name, ""))
    if not isinstance(values.get("instrumental", False), bool):
        raise Unusable("table", "instrumental must be true or false.")
    minutes = values.get("minutes", 1)
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes < 1e6:
        raise Unusable("table", "minutes must be a number above 0.")
    if "minutes" in values:
        values = {**values, "minutes": max(1, int(minutes + 0.5))}
    words = Words(**values)
    # The published interface asks for an instrumental by this word in the place of a language.
    if words.language.strip().casefold() == "instrumental":
        words = replace(words, instrumental=True)
    return words


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Unusable("table", f"{name} must be text.")
    if any(unicodedata.category(character) == "Cs" for character in value):
        raise Unusable("table", f"{name} is not valid text: it holds a lone surrogate.")
    return value


def _composed(path: Path) -> str:
    return unicodedata.normalize("NFC", os.path.normpath(path.absolute()))
