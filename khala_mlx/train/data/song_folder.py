"""The songs of a folder: its sound files, and the words that lie beside them or in a table.

Knows files and texts, neither sound nor codes. What cannot be used is an `Unusable`, which says
why in a word and in a sentence; it costs the one song, never the others.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from khala_mlx.audio.files import CONVERTED
from khala_mlx.errors import KhalaError
from khala_mlx.prompt.cleaning import clean_lyrics
from khala_mlx.train.data.dataset import SOUNDS, SPLITS, sound_files

TABLE = "metadata.jsonl"
# Lyrics that say in words that there are none.
_NO_LYRICS = ("instrumental", "[instrumental]", "[inst]")


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
        sound_files(searched, (*SOUNDS, *CONVERTED))
    files = sound_files(folder, (*SOUNDS, *CONVERTED))
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
) -> tuple[dict[Path, Words], list[tuple[str, Unusable]]]:
    """What the metadata.jsonl files of `folder` and its splits tell of the songs found.

    Returns:
        Words by path of the sound, and what is wrong with which line.
    """
    # Macs write names decomposed, tables mostly hold them composed.
    paths = {_composed(each.path): each.path for each in found}
    told: dict[Path, Words] = {}
    problems = []
    for part in (folder, *(folder / split for split in SPLITS if has_splits(folder))):
        for number, line in enumerate(_lines(part / TABLE), 1):
            if not line.strip():
                continue
            where = f"{shown((part / TABLE).relative_to(folder))} line {number}"
            try:
                name, words = _row(line)
                path = paths.get(_composed(part / name))
                if path is None:
                    raise Unusable("missing", f"there is no sound file {name}.")
                if path in told:
                    raise Unusable("table", f"{name} was listed before, which counts.")
                told[path] = words
            except Unusable as error:
                problems.append((where, error))
    return told, problems


def words_of(sound: Path, told: Words) -> tuple[Words, list[str]]:
    """The words of a song, those beside it before those of the table, and remarks on them.

    Without lyrics a song is an instrumental.

    Raises:
        Unusable: if a file with words cannot be read.
    """
    tags = _text(sound, ".txt", told.tags)
    tags = _text(sound, ".caption.txt", tags)
    words, remarks = replace(told, tags=tags, lyrics=_text(sound, ".lyrics.txt", told.lyrics)), []
    if not words.tags.strip():
        remarks.append("It has no caption, so its prompt has no tags.")
    lyrics = clean_lyrics(words.lyrics)
    if words.instrumental and lyrics:
        remarks.append("Its lyrics are left out, as it is marked as an instrumental.")
    elif not words.instrumental and lyrics.casefold() in ("", *_NO_LYRICS):
        remarks.append("It has no lyrics, so it counts as an instrumental.")
        words = replace(words, instrumental=True)
    if words.instrumental:
        return replace(words, lyrics=""), remarks
    return words, remarks + _changes(words.lyrics, lyrics)


def _changes(lyrics: str, cleaned: str) -> list[str]:
    if cleaned == lyrics.replace("\r\n", "\n").strip():
        return []
    gone = sorted(set(lyrics) - set(cleaned) - {"\r", "\n"})
    named = [c if c.isprintable() and c != " " else f"U+{ord(c):04X}" for c in gone]
    return [f"The cleaning that generation does changes its lyrics: {' '.join(named)}."]


def _text(sound: Path, suffix: str, without: str) -> str:
    """The text file beside a sound; `without` if there is none."""
    path = sound.with_suffix(suffix)
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return without
    except UnicodeDecodeError as error:
        raise Unusable(
            "words", f"{path.name} is not valid UTF-8. Save it as UTF-8 and try again."
        ) from error
    except OSError as error:
        raise Unusable("words", f"{path.name} cannot be read: {error.strerror}.") from error


def _lines(table: Path) -> list[bytes]:
    # Bytes, so that one line in a wrong encoding does not cost the others.
    return table.read_bytes().splitlines() if table.is_file() else []


def _row(line: bytes) -> tuple[str, Words]:
    """The file that a line of a table names, and what it tells; unknown fields are passed over."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Unusable("table", "it is not valid JSON.") from error
    if not isinstance(row, dict):
        raise Unusable("table", "it is not a JSON object.")
    row = {name: value for name, value in row.items() if value is not None}
    # file_name is what Hugging Face's tables of sound say.
    name = _string("file", row.get("file", row.get("file_name", "")))
    if not name:
        raise Unusable("table", "it names no file.")
    row["tags"] = _tags(row.get("caption", row.get("tags", "")))
    values = {f.name: row[f.name] for f in fields(Words) if f.name in row}
    return name, _checked(values)


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
