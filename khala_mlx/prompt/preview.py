"""What a dry run shows of a prompt before anything is loaded: how the models read it."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from typing import Any

from khala_mlx.config import KhalaConfig
from khala_mlx.errors import KhalaWarning
from khala_mlx.prompt.cleaning import changes, clean_lyrics
from khala_mlx.prompt.prompt import build_ids, cleaned, prompt_ids, prompt_texts
from khala_mlx.prompt.request import Request
from khala_mlx.prompt.tokenizer import Tokenizer
from khala_mlx.text import clock_time

# Syllables a second over a whole song, pauses and solos included: a song of three and a half
# minutes has about 370 words or 460 syllables. Slow and fast songs differ by half.
SYLLABLES_PER_SECOND = 2.2
_SLOW, _FAST = 1.5, 3.2
_SECTION = re.compile(r"\s*\[([^\[\]]+)\]\s*")
_VOWELS = re.compile(r"[aeiouyàáâãäåæèéêëìíîïòóôõöøœùúûüýÿāēīōūаеёиоуыэюяіїєαεηιουωάέήίόύώ]+")
_WORD = re.compile(r"[^\W\d_]+|\d+")
# Scripts whose every character is sung as one syllable: Chinese, Japanese, Korean.
_SYLLABIC = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_PATTERNS = {
    "looks like a control token, stays plain text": re.compile(r"<\|[^|<>\n]*\|>"),
    "looks like a link": re.compile(r"(?:https?://|www\.)\S+"),
    "looks like markdown": re.compile(r"(?m)^\s*(?:#{1,6}\s|```)|\*\*"),
    "section marks are written [Chorus]": re.compile(
        r"(?mi)^\s*\(?(?:verse|chorus|bridge|intro|outro|pre-chorus)(?:\s*\d+)?\)?\s*:?\s*$"
    ),
}
# A character that takes this many tokens is one that the tokenizer hardly ever met.
_MANY_TOKENS = 3
# Kinds of doubt about characters that are shown, and characters that are named for each.
_MOST_DOUBTS, _MOST_NAMED = 5, 5


def preview(tokenizer: Tokenizer, config: KhalaConfig, request: Request) -> dict[str, Any]:
    """Both prompts as texts and lengths, what cleaning changes, sections, times and doubts."""
    prompt = request.prompt
    backbone_text, superres_text = prompt_texts(config, prompt)
    with warnings.catch_warnings():
        # What would be cut is reported below, in full.
        warnings.simplefilter("ignore", KhalaWarning)
        ids = prompt_ids(tokenizer, config, prompt, truncate=True)
    told: dict[str, Any] = {
        "backbone_prompt": backbone_text,
        "superres_prompt": superres_text,
        "backbone_prompt_tokens": len(ids[0]),
        "superres_prompt_tokens": len(ids[1]),
    }
    if cut := _too_long(tokenizer, config, request):
        told["does_not_fit"] = cut
    if prompt.lyrics and not prompt.instrumental:
        lyrics = clean_lyrics(prompt.lyrics)
        told["cleaning"] = [
            f"{_shown(was)} becomes {_shown(now) if now else 'nothing'}, {times} times"
            for was, now, times in changes(prompt.lyrics)
        ]
        told["sections"] = _sections(lyrics)
        told["singing_time"] = _singing_time(lyrics)
    told["suspicious"] = _suspicious(tokenizer, request)
    return told


def too_much_to_sing(
    request: Request, most_seconds: float, so_far: list[str]
) -> dict[str, list[str]]:
    """`does_not_fit` with a word on lyrics that take longer than the song may last, if they do."""
    needed = 0.0 if request.instrumental else singing_seconds(clean_lyrics(request.lyrics))
    if needed > most_seconds:
        so_far = [
            *so_far,
            f"the lyrics take about {clock_time(needed)} to sing, the song may last "
            f"{clock_time(most_seconds)}: ask for more --minutes",
        ]
    return {"does_not_fit": so_far} if so_far else {}


def singing_seconds(lyrics: str) -> float:
    """About how long it takes to sing lyrics, by their syllables."""
    return syllables(lyrics) / SYLLABLES_PER_SECOND


def syllables(lyrics: str) -> int:
    """About how many syllables lyrics have, section marks left out.

    Groups of vowels in alphabets, characters in Chinese, Japanese and Korean; a word without
    either counts as one.
    """
    count = 0
    for line in lyrics.casefold().split("\n"):
        if not _SECTION.fullmatch(line):
            count += len(_SYLLABIC.findall(line))
            words = _WORD.findall(_SYLLABIC.sub(" ", line))
            count += sum(max(1, len(_VOWELS.findall(_without_silent_e(word)))) for word in words)
    return count


def _without_silent_e(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("e") and word[-2] not in "aeiouyl" else word


def _sections(lyrics: str) -> list[str]:
    """Name, lines and time of each section."""
    parts: list[tuple[str, list[str]]] = [("(no mark)", [])]
    for line in lyrics.split("\n"):
        if mark := _SECTION.fullmatch(line):
            parts.append((mark[1].strip(), []))
        elif line.strip():
            parts[-1][1].append(line)
    return [
        f"{name}: {len(lines)} lines, about {clock_time(singing_seconds(chr(10).join(lines)))}"
        for name, lines in parts
        if lines or name != "(no mark)"
    ]


def _singing_time(lyrics: str) -> str:
    count = syllables(lyrics)
    about, shortest, longest = (
        clock_time(count / rate) for rate in (SYLLABLES_PER_SECOND, _FAST, _SLOW)
    )
    return f"about {about} ({shortest} to {longest}) for {count} syllables"


def _too_long(tokenizer: Tokenizer, config: KhalaConfig, request: Request) -> list[str]:
    """Which prompt is too long, by how much, and where it would be cut."""
    prompt = cleaned(request.prompt)
    told = []
    limits = config.backbone.max_prompt, config.superres.max_prompt
    stages = ("the backbone", "superres")
    for stage, ids, limit in zip(
        stages, build_ids(prompt, config.tokens, tokenizer), limits, strict=True
    ):
        if len(ids) > limit:
            last = tokenizer.decode(ids[: limit - 1].tolist()).strip()[-40:]
            told.append(
                f"{len(ids)} tokens where {stage} allows {limit}; with --truncate-lyrics it would "
                f"end after {_shown(last)}"
            )
    return told


def _suspicious(tokenizer: Tokenizer, request: Request) -> list[str]:
    """What a reader of the prompt should look at twice."""
    found = []
    for name in ("tags", "description", "genre", "lyrics", "language"):
        text = getattr(request, name)
        for why, pattern in _PATTERNS.items():
            if name == "lyrics" or "section" not in why:
                found += [f"{name}: {_shown(m[0].strip())} {why}" for m in pattern.finditer(text)]
        text = clean_lyrics(text) if name == "lyrics" else text
        found += _doubtful_characters(tokenizer, name, text)
    return found


def _doubtful_characters(tokenizer: Tokenizer, name: str, text: str) -> list[str]:
    """Return a line for each kind of doubt, the most characters first, five of each named."""
    doubts: dict[str, Counter[str]] = {}
    for character, times in Counter(text).items():
        if why := _doubt(tokenizer, character):
            doubts.setdefault(why, Counter())[character] = times
    lines = []
    for why, characters in sorted(doubts.items(), key=lambda each: -each[1].total())[:_MOST_DOUBTS]:
        named = [f"{_shown(c)} ({n} times)" for c, n in characters.most_common(_MOST_NAMED)]
        more = len(characters) - len(named)
        rest = f" and {more} other characters" if more else ""
        lines.append(f"{name}: {', '.join(named)}{rest} {why}")
    return lines


def _doubt(tokenizer: Tokenizer, character: str) -> str:
    if character.isascii():
        return "is a control character" if unicodedata.category(character) == "Cc" and (
            character not in "\t\n\r"
        ) else ""  # fmt: skip
    if character == "\ufffd":
        return "stands for a character that was read with the wrong encoding"
    kind = unicodedata.category(character)
    if kind in ("Cf", "Co", "Cn", "Zl", "Zp"):
        return "is invisible or unknown"
    if len(tokenizer.encode(character)) >= _MANY_TOKENS:
        return f"takes {_MANY_TOKENS} tokens or more, so the model hardly knows it"
    return ""


def _shown(text: str) -> str:
    """Text that can be seen, in quotes; characters that cannot as their numbers."""
    if len(text) == 1 and (not text.isprintable() or text.isspace() or not text.isascii()):
        visible = f" {text}" if text.isprintable() and not text.isspace() else ""
        return f"U+{ord(text):04X}{visible}"
    return ascii(text) if not text.isprintable() else f"'{text}'"
