"""The character cleaning that the published interface applies to lyrics, as a table.

Every entry is evidenced by a pair in the reference sets (tests/fixtures); nothing is added for
symmetry. So ｛ ｜ ｝ stay, the one gap in the full-width block, and so do the zero-width joiners,
which some scripts and emoji need.
"""

from __future__ import annotations

import re
from collections import Counter

_PUNCTUATION = dict(
    zip("。，！？：；（）【】「」『』《》、“”‘’", ".,!?:;()[]\"\"''<>,\"\"''", strict=True)
)
_RARER = dict(zip("﹏～・،〖〗〈〉–—―﹣∶｀", "_~ ,[]<>----:'", strict=True))
# Also the ASCII | and ^; the pipe is why no control token survives in cleaned lyrics.
_SIGNS = dict(zip("′ʼ´^¨·×÷|", "''''\".x/-", strict=True))
_FULL_WIDTH = {wide: chr(ord(wide) - 0xFEE0) for wide in map(chr, range(0xFF02, 0xFF5B))}
# Letters that look Latin, without regard to the script around them: Cyrillic small, Greek capital.
_LOOK_ALIKES = dict(zip("еаорсухΑΒΕΗΙΚΜΝΟΡΤΥΧΖ", "eaopcyxABEHIKMNOPTYXZ", strict=True))
# The reference shows ten blank or invisible characters in one go, with five spaces as the result:
# as many as Unicode counts as white space. U+3000 and U+200B are also shown alone and agree.
_SPACES = dict.fromkeys("\u00a0\u2005\u2006\u2028\u3000", " ")
_TABLE = str.maketrans(
    {**_FULL_WIDTH, **_PUNCTUATION, **_RARER, **_SIGNS, **_LOOK_ALIKES, **_SPACES, "…": "..."}
)
# Zero-width space, byte order mark, direction marks, Mongolian separator, a private-use glyph.
_REMOVED = str.maketrans("", "", "\u200b\ufeff\u202a\u202c\u180e\ue3ac★")
# A doubled dash is one dash; the second is ’ read as Latin-1 instead of UTF-8.
_SEQUENCES = {"——": "-", "\u00e2\u0080\u0099": "'"}


def clean_lyrics(text: str) -> str:
    """Lyrics as the published interface sends them: plain punctuation and spaces, outer blanks off.

    Windows line ends become "\\n", unlike upstream; a lone "\\r" stays, as upstream has it.
    Cleaning twice equals cleaning once, except that upstream turns a full-width ＾ into ^ and a
    ^ into '.
    """
    text = text.translate(_REMOVED)
    for sequence, plain in _SEQUENCES.items():
        text = text.replace(sequence, plain)
    text = text.translate(_TABLE)
    return re.sub("\r+\n", "\n", text).strip()


def changes(text: str) -> list[tuple[str, str, int]]:
    """What `clean_lyrics` changes in a text: (was, becomes, how often), in the order met.

    Blanks that are cut off at both ends count as one change.
    """
    found: Counter[tuple[str, str]] = Counter()
    removed = [c for c in text if ord(c) in _REMOVED]
    found.update((c, "") for c in removed)
    text = text.translate(_REMOVED)
    for sequence, plain in _SEQUENCES.items():
        found[sequence, plain] += text.count(sequence)
        text = text.replace(sequence, plain)
    found.update((c, str(_TABLE[ord(c)])) for c in text if ord(c) in _TABLE)
    text = text.translate(_TABLE)
    found["\r\n", "\n"] += len(re.findall("\r+\n", text))
    text = re.sub("\r+\n", "\n", text)
    for blank in (text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]):
        found[blank, ""] += bool(blank.strip("\n"))
    return [(was, now, times) for (was, now), times in found.items() if times]
