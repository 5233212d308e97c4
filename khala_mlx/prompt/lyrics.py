"""Lyrics as people bring them: files in any Unicode encoding, LRC, subtitles, ChordPro, web pages.

What is certainly not words (time stamps, headers, chords, a page's own text) is removed and
reported. Whatever might be words stays.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from khala_mlx.errors import KhalaError

# A whole text that means: no voice. Training and generation use this one rule.
_NO_VOICE = re.compile(r"[\[(]?\s*(?:instrumental|inst\.?)\s*[\])]?", re.IGNORECASE)

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # Before UTF-16, whose mark begins that of UTF-32.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What editors take for the end of a line, beside \n.
_LINE_BREAKS = re.compile("\r\n|[\u0085\u2028\u2029\v\f]")

_HTML = re.compile(r"<!doctype html|<html\b|<(?:br|p|div|span|body)\b[^>]*>", re.IGNORECASE)
_STAMP = re.compile(r"\[(\d{1,3}):(\d{1,2})(?:[.:](\d{1,3}))?\]")
_WORD_STAMP = re.compile(r"<\d{1,3}:\d{1,2}(?:[.:]\d{1,3})?>")
_LRC_HEADER = re.compile(
    r"\s*\[(ti|ar|al|au|by|re|ve|la|lr|tool|offset|length|#)\s*:([^\[\]]*)\]\s*", re.IGNORECASE
)
_CUE = re.compile(r"\s*\d{1,3}:\d{2}(?::\d{2})?[.,]\d{3}\s*-->\s*\d{1,3}:\d{2}.*")
_CUE_TAG = re.compile(r"</?(?:[ibu]|font|c|v)\b[^>]*>", re.IGNORECASE)
_DIRECTIVE = re.compile(r"\s*\{\s*([a-z_]+)\s*(?::\s*([^{}]*?))?\s*\}\s*", re.IGNORECASE)
_CHORD_NAME = (
    r"[A-H][#b♯♭]?(?:maj|min|dim|aug|sus|add|m|M|°|ø|\+)?\d{0,2}"
    r"(?:(?:maj|sus|add|no|[#b])\d{1,2})*(?:/[A-H][#b♯♭]?)?"
)
_CHORD = re.compile(rf"\[(?:{_CHORD_NAME}|N\.?C\.?)\]")
_CHORD_LINE = re.compile(rf"\s*(?:\|?\s*{_CHORD_NAME}\s*\|?\s+)+{_CHORD_NAME}\s*\|?\s*")
_GENIUS_HEAD = re.compile(r"\s*\d+ Contributors?.*?Lyrics")
_GENIUS_LINES = re.compile(
    r"\s*(?:You might also like|See .+ LiveGet tickets as low as \$?\d+.*|\d*Embed|Read More\s*)\s*"
)
_GENIUS_TAIL = re.compile(r"(?<=\S)\d*Embed\s*$")
# ChordPro's environments as section marks.
_SECTIONS = {
    "soc": "Chorus",
    "start_of_chorus": "Chorus",
    "sov": "Verse",
    "start_of_verse": "Verse",
    "sob": "Bridge",
    "start_of_bridge": "Bridge",
}


@dataclass(frozen=True)
class Lyrics:
    """Lyrics without what is not words.

    Attributes:
        title, artist: of the song, where a header names them; "" elsewhere.
        removed: what was removed, in words.
    """

    text: str
    title: str = ""
    artist: str = ""
    removed: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """One sentence about what was removed; "" if nothing was."""
        return f"Removed from the lyrics: {', '.join(self.removed)}." if self.removed else ""


def decode_text(data: bytes, name: str) -> str:
    """Return the text of a file in UTF-8, or in the encoding of its byte-order mark.

    Raises:
        KhalaError: naming the file, the line of the first wrong byte, and how to convert it.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(encoding)
            except UnicodeDecodeError as error:
                raise KhalaError(f"{name} is damaged: it is not whole {encoding}.") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise KhalaError(
            f"{name} is not valid UTF-8: byte 0x{data[error.start]:02X} in line {line}. Save it as "
            "UTF-8, or convert it, for example with `iconv -f WINDOWS-1252 -t UTF-8`."
        ) from error


def has_voice(lyrics: str, *, instrumental: bool = False) -> bool:
    """Return whether a song with these lyrics has a voice.

    It has none if it is marked as an instrumental, if the lyrics are empty, or if they are nothing
    but a mark such as [Instrumental] or [inst].
    """
    text = lyrics.strip()
    return not instrumental and bool(text) and not _NO_VOICE.fullmatch(text)


def parse_lyrics(text: str, name: str = "The lyrics") -> Lyrics:
    """Return the words of lyrics in any of the formats above.

    Raises:
        KhalaError: for RTF and HTML, which must be converted to plain text first.
    """
    text = _LINE_BREAKS.sub("\n", text.lstrip("\ufeff"))
    if text.lstrip().startswith("{\\rtf"):
        raise KhalaError(
            f"{name} is RTF, not plain text. Save it as plain text, or convert it with "
            "`textutil -convert txt FILE`."
        )
    if _HTML.search(text):
        raise KhalaError(
            f"{name} is HTML, not plain text. Copy the words from the page, or convert it with "
            "`textutil -convert txt FILE`."
        )
    removed: list[str] = []
    if "\\n" in text and "\n" not in text.strip():
        text = text.replace("\\n", "\n")
    text = _without_page(text, removed)
    text = _without_cues(text, removed)
    text, title, artist = _without_stamps(text, removed)
    text, title, artist = _without_chords(text, title, artist, removed)
    return Lyrics(text, title, artist, tuple(removed))


def _without_page(text: str, removed: list[str]) -> str:
    """Remove what a lyrics page adds around the words."""
    head = _GENIUS_HEAD.match(text)
    body = text[head.end() :] if head else text
    lines = body.split("\n")
    kept = [line for line in lines if not _GENIUS_LINES.fullmatch(line)]
    body = "\n".join(kept)
    if head or len(kept) < len(lines):
        body = _GENIUS_TAIL.sub("", body.rstrip())
        removed.append("a web page's own text")
    return body


def _without_cues(text: str, removed: list[str]) -> str:
    """Remove the numbers and times of subtitles (SRT, WebVTT)."""
    lines = text.split("\n")
    cues = {number for number, line in enumerate(lines) if _CUE.fullmatch(line)}
    if not cues:
        return text
    removed.append("subtitle times")
    drop = cues | {n - 1 for n in cues if n and re.fullmatch(r"\s*\d+\s*", lines[n - 1])}
    kept = [_CUE_TAG.sub("", line) for number, line in enumerate(lines) if number not in drop]
    if kept and kept[0].strip().startswith("WEBVTT"):
        del kept[0]
    # Each cue ends with a blank line, which is not a pause of the song.
    return "\n".join(line for line in kept if line.strip())


def _without_stamps(text: str, removed: list[str]) -> tuple[str, str, str]:
    """Remove LRC's headers and stamps; a line with several stamps is sung at each of them."""
    headers: dict[str, str] = {}
    timed: list[tuple[float, int, str]] = []
    latest, stamped = 0.0, False
    for number, line in enumerate(text.split("\n")):
        if header := _LRC_HEADER.fullmatch(line):
            headers[header[1].lower()] = header[2].strip()
            continue
        times, words = _leading_stamps(line)
        stamped = stamped or bool(times) or bool(_WORD_STAMP.search(words))
        words = _WORD_STAMP.sub("", _STAMP.sub("", words)).strip() if stamped else words
        latest = times[0] if times else latest
        timed += [(time, number, words) for time in times or [latest]]
    if headers:
        removed.append("headers such as [ti:]")
    if stamped:
        removed.append("time stamps")
        timed.sort(key=lambda each: each[:2])
    if not headers and not stamped:
        return text, "", ""
    lines = [words for _, _, words in timed]
    return "\n".join(lines).strip("\n"), headers.get("ti", ""), headers.get("ar", "")


def _leading_stamps(line: str) -> tuple[list[float], str]:
    """Return the seconds of the stamps that a line starts with, and the rest of the line."""
    times, rest = [], line.lstrip()
    while stamp := _STAMP.match(rest):
        fraction = float(f"0.{stamp[3]}") if stamp[3] else 0.0
        times.append(int(stamp[1]) * 60 + int(stamp[2]) + fraction)
        rest = rest[stamp.end() :].lstrip()
    return times, rest if times else line


def _without_chords(text: str, title: str, artist: str, removed: list[str]) -> tuple[str, str, str]:
    """Remove ChordPro's directives, chords over words, and lines of nothing but chords."""
    chordpro = _is_chordpro(text)
    directives = chords = False
    lines: list[str] = []
    for line in text.split("\n"):
        if directive := _DIRECTIVE.fullmatch(line):
            name, value = directive[1].lower(), (directive[2] or "").strip()
            directives = True
            if name in ("title", "t"):
                title = title or value
            elif name in ("artist", "composer"):
                artist = artist or value
            elif name in _SECTIONS:
                lines.append(f"[{value or _SECTIONS[name]}]")
            continue
        if _CHORD_LINE.fullmatch(line):
            chords = True
            continue
        if chordpro and _CHORD.search(line):
            chords = True
            line = re.sub(r" {2,}", " ", _CHORD.sub("", line)).strip()
            if not line:
                continue
        lines.append(line)
    if directives:
        removed.append("directives such as {title:}")
    if chords:
        removed.append("chords")
    return ("\n".join(lines) if directives or chords else text), title, artist


def _is_chordpro(text: str) -> bool:
    """Return whether [A] and the like are chords: some stand within a line, or directives do."""
    inside = any(_CHORD.search(line) and _CHORD.sub("", line).strip() for line in text.split("\n"))
    return inside or any(_DIRECTIVE.fullmatch(line) for line in text.split("\n"))
