"""What a sound file says of itself: title, artist, lyrics, and the record a song is made again by.

Tags are written with mutagen (the extra `tags`). libsndfile, which is always there, has no tag for
lyrics, marks UTF-8 in mp3 as Latin-1, keeps no licence in wav and mp3, and drops every tag of a wav
once one exceeds 2045 bytes. Without mutagen it writes what it can write well, and `write` returns
the names of what it could not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from khala_mlx.errors import AudioError

# Name here -> ID3 frame (mp3, wav) and Vorbis comment (flac, ogg); TXXX frames carry a description.
_FRAMES: Mapping[str, tuple[str, str]] = {
    "title": ("TIT2", "TITLE"),
    "artist": ("TPE1", "ARTIST"),
    "lyrics": ("USLT", "LYRICS"),
    "comment": ("COMM", "COMMENT"),
    "licence": ("TCOP", "LICENSE"),
    "prompt": ("TXXX:PROMPT", "PROMPT"),
    "seed": ("TXXX:SEED", "SEED"),
    "model": ("TXXX:MODEL", "MODEL"),
    "record": ("TXXX:KHALA", "KHALA"),
}
NAMES = tuple(_FRAMES)
# What libsndfile calls the tags that it keeps in all four formats.
_PLAIN = {"title": "title", "artist": "artist", "comment": "comment", "licence": "copyright"}
# What a record contains too, see song.Song.
_RECORDED = ("lyrics", "licence", "prompt", "seed", "model")
# libsndfile loses every tag of a wav with a longer one.
_LONGEST_IN_WAV = 2045
_HELD_NOWHERE = re.compile("[\0\ufffe\uffff]")
# Behind this mark the comment holds the record where there is no tag for it.
_MARK = "\nkhala:"
_ID3 = (".mp3", ".wav")


def with_mutagen() -> bool:
    """Whether the extra `tags` is installed."""
    return find_spec("mutagen") is not None


def plain(path: Path, tags: Mapping[str, str]) -> dict[str, str]:
    """The attributes of soundfile.SoundFile that hold `tags` in a file of this suffix, unharmed."""
    values = {_PLAIN[n]: kept for n, text in tags.items() if n in _PLAIN and (kept := clean(text))}
    if not with_mutagen() and "record" in tags:
        told = values.get("comment", "") + _MARK + clean(tags["record"])
        if _fits(path, told):
            values["comment"] = told
    return {name: text for name, text in values.items() if _fits(path, text)}


def write(path: Path, tags: Mapping[str, str], *, suffix: str = "") -> list[str]:
    """Add tags to a finished wav, flac, ogg or mp3 that holds `plain` of them already.

    Args:
        path: the file, changed in place.
        tags: text by name, of NAMES; empty texts are left out.
        suffix: the format, where `path` does not end in it.

    Returns:
        The names of the tags that are neither in the file nor in its record.

    Raises:
        AudioError: if they cannot be written.
    """
    wanted = {name: kept for name, text in tags.items() if (kept := clean(text))}
    if with_mutagen() and wanted:
        _write_with_mutagen(path, (suffix or path.suffix).lower(), wanted)
    found = read(path)
    missing = [name for name, text in wanted.items() if found.get(name) != text]
    told = _RECORDED if "record" in wanted and "record" not in missing else ()
    return [name for name in missing if name not in told]


def read(path: Path) -> dict[str, str]:
    """The tags of a sound file by name, of NAMES; none where it has none or they are damaged."""
    found = _read_with_soundfile(path)
    if with_mutagen():
        found |= _read_with_mutagen(path)
    return found


def clean(text: str) -> str:
    """Text as every format can hold it.

    NUL separates values in ID3; U+FFFE and U+FFFF, which are not characters, let libFLAC refuse a
    tag and libsndfile then free it twice.
    """
    return _HELD_NOWHERE.sub("", text.encode("utf-8", "replace").decode())


def _fits(path: Path, text: str) -> bool:
    if path.suffix.lower() == ".mp3":
        return text.isascii()
    return path.suffix.lower() != ".wav" or len(text.encode()) <= _LONGEST_IN_WAV


def _write_with_mutagen(path: Path, suffix: str, tags: Mapping[str, str]) -> None:
    import mutagen

    try:
        # By content: the temporary file of a song keeps its suffix, but nothing here relies on it.
        file = mutagen.File(path)
        if file is None:
            raise AudioError(f"{path} cannot be tagged: it is not a sound file.")
        if file.tags is None:
            file.add_tags()
        for name, text in tags.items():
            if suffix in _ID3:
                _add_frame(file.tags, _FRAMES[name][0], text)
            else:
                file.tags[_FRAMES[name][1]] = [text]
        file.save()
    except mutagen.MutagenError as error:
        raise AudioError(f"{path} cannot be tagged: {error}.") from error


def _add_frame(tags: Any, frame: str, text: str) -> None:
    from mutagen import id3

    name, _, description = frame.partition(":")
    more: dict[str, Any] = {"desc": description} if name in ("TXXX", "COMM", "USLT") else {}
    if name in ("COMM", "USLT"):
        # ISO 639-2's code for a language that nobody told.
        more |= {"lang": "und"}
        tags.delall(name)
    value = text if name == "USLT" else [text]
    tags.add(getattr(id3, name)(encoding=id3.Encoding.UTF8, text=value, **more))


def _read_with_soundfile(path: Path) -> dict[str, str]:
    import soundfile

    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            found = {name: str(getattr(file, there) or "") for name, there in _PLAIN.items()}
    except (soundfile.SoundFileError, OSError, UnicodeDecodeError):
        return {}
    comment, mark, record = found["comment"].partition(_MARK)
    if mark:
        found |= {"comment": comment, "record": record}
    return {name: text for name, text in found.items() if text}


def _read_with_mutagen(path: Path) -> dict[str, str]:
    import mutagen

    try:
        file = mutagen.File(path)
        tags = None if file is None else file.tags
        if not tags:
            return {}
        texts = {name: _text(tags, *keys) for name, keys in _FRAMES.items()}
    except Exception:
        # Damaged files raise whatever their damage leads to; they have no tags then.
        return {}
    return {name: text for name, text in texts.items() if text}


def _text(tags: Any, frame: str, comment: str) -> str:
    if hasattr(tags, "getall"):
        found = tags.getall(frame)
        value = found[0].text if found else ""
    else:
        value = tags.get(comment, "")
    if isinstance(value, list):
        value = value[0] if value else ""
    return str(value)
