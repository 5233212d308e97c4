"""What a user asks for, as the two prompts: readable texts and token ids.

Control tokens are placed by name, which the config gives; everything a user types is encoded as
plain text, so `<|eot_id|>` typed into a lyric stays ten harmless characters (upstream obeys it).

Differences to upstream, all deliberate: minutes outside the range are refused (its worker clamps
them to 1..10), over-long prompts are refused unless truncation is asked for, and control
characters such as NUL are refused, since they come from files read with the wrong encoding.
"""

from __future__ import annotations

import unicodedata
import warnings
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np

from khala_mlx.config import KhalaConfig, TokenLayout
from khala_mlx.errors import KhalaWarning, PromptError
from khala_mlx.prompt.cleaning import clean_lyrics
from khala_mlx.prompt.tokenizer import minutes_special
from khala_mlx.text import is_text, shown

if TYPE_CHECKING:
    from khala_mlx.prompt.tokenizer import Tokenizer

SAME = "same_as_backbone"
SAME_NO_DESCRIPTION = "same_as_backbone_no_description"
SEPARATE = "separate"
TEXT_MODES = (SAME_NO_DESCRIPTION, SAME, SEPARATE)
_UPSTREAM_NAMES = {"different": SEPARATE}
_INSTRUMENTAL = "Instrumental"


@dataclass(frozen=True)
class Control:
    """A special token by name, as opposed to text."""

    name: str


Part = str | Control


@dataclass(frozen=True)
class Prompt:
    """What a user asks for. A description comes before tags, tags before a genre.

    `text_mode` decides the prompt of superres: `same_as_backbone`; the same but, if there is a
    description, only the genre (`same_as_backbone_no_description`, the published default); or
    `separate`, always only the genre, and the one mode that sends `language` to both models.
    """

    tags: str = ""
    description: str = ""
    genre: str = ""
    lyrics: str = ""
    instrumental: bool = False
    language: str = ""
    minutes: int = 1
    text_mode: str = SAME_NO_DESCRIPTION

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), type(field.default))
        mode = _UPSTREAM_NAMES.get(self.text_mode, self.text_mode)
        if mode not in TEXT_MODES:
            raise PromptError(
                f"text_mode must be one of {', '.join(TEXT_MODES)}, got {shown(self.text_mode)}."
            )
        object.__setattr__(self, "text_mode", mode)
        # The published interface asks for an instrumental by setting the language to that word.
        if self.language.strip().casefold() == _INSTRUMENTAL.casefold():
            object.__setattr__(self, "instrumental", True)

    @property
    def metadata(self) -> str:
        """The one text that says what the song is like."""
        return self.description.strip() or self.tags.strip() or self.genre.strip()

    @property
    def language_word(self) -> str:
        """What stands between the first two separators."""
        if self.instrumental:
            return _INSTRUMENTAL
        return self.language.strip() if self.text_mode == SEPARATE else ""

    @property
    def for_superres(self) -> Prompt:
        """The prompt as superres sees it."""
        described = self.text_mode == SAME_NO_DESCRIPTION and self.description.strip()
        if described or self.text_mode == SEPARATE:
            return replace(self, description="", tags="")
        return self

    def parts(self, layout: TokenLayout) -> list[Part]:
        """The prompt in order, its lyrics as they are (uncleaned).

        Raises:
            PromptError: if the model has no token for `minutes`.
        """
        if not 1 <= self.minutes <= layout.max_minutes:
            raise PromptError(f"minutes must be 1..{layout.max_minutes}, got {self.minutes}.")
        names = layout.specials
        separator, newline = Control(names.separator), Control(names.newline)
        parts: list[Part] = [Control(names.begin), self.metadata, separator]
        parts += [self.language_word, separator]
        if not self.instrumental:
            parts.append(Control(names.lyrics))
            for line in self.lyrics.strip().split("\n"):
                parts += [newline, line]
            parts.append(separator)
        minutes = minutes_special(names, self.minutes)
        return [*parts, Control(minutes), Control(names.end), Control(names.audio)]


def prompt_texts(config: KhalaConfig, prompt: Prompt) -> tuple[str, str]:
    """The backbone's and the superres prompt as texts, with cleaned lyrics, to be shown.

    Not to be tokenised: a control token's name typed by the user looks like the token here.
    """
    return build_texts(cleaned(prompt), config.tokens)


def prompt_ids(
    tokenizer: Tokenizer, config: KhalaConfig, prompt: Prompt, *, truncate: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The backbone's and the superres prompt as ids [P], with cleaned lyrics.

    With `truncate` an over-long prompt is cut as upstream cuts it: the first tokens and the very
    last one stay, so the minutes go with the end of the lyrics.

    Raises:
        PromptError: if a value cannot be part of a prompt, or a prompt exceeds its limit.
    """
    prompt = cleaned(prompt)
    _warn_unused(prompt)
    backbone, superres = build_ids(prompt, config.tokens, tokenizer)
    limits = config.backbone.max_prompt, config.superres.max_prompt
    _check_limits(prompt, (len(backbone), len(superres)), limits, truncate)
    return clamp(backbone, limits[0]), clamp(superres, limits[1])


def build_texts(prompt: Prompt, layout: TokenLayout) -> tuple[str, str]:
    """Both prompts as texts, exactly as upstream composes them (no cleaning)."""
    return _text(prompt.parts(layout)), _text(prompt.for_superres.parts(layout))


def build_ids(
    prompt: Prompt, layout: TokenLayout, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Both prompts as ids [P], int64, neither cleaned nor limited."""
    superres = prompt.for_superres
    return _ids(prompt.parts(layout), tokenizer), _ids(superres.parts(layout), tokenizer)


def clamp(ids: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` ids: the first ones and the last, as upstream cuts prompts."""
    if len(ids) <= limit:
        return ids
    return np.concatenate([ids[: limit - 1], ids[-1:]])


def _text(parts: list[Part]) -> str:
    return "".join(part.name if isinstance(part, Control) else part for part in parts)


def _ids(parts: list[Part], tokenizer: Tokenizer) -> np.ndarray:
    ids: list[int] = []
    for part in parts:
        if isinstance(part, Control):
            ids.append(tokenizer.special(part.name))
        else:
            ids += tokenizer.encode(part)
    return np.array(ids, dtype=np.int64)


def cleaned(prompt: Prompt) -> Prompt:
    """The prompt as the models read it: lyrics cleaned, control characters refused."""
    # Control characters are looked for after the cleaning, which repairs some wrong decodings.
    prompt = replace(prompt, lyrics=clean_lyrics(prompt.lyrics))
    for name in ("tags", "description", "genre", "lyrics", "language"):
        for character in getattr(prompt, name):
            if unicodedata.category(character) == "Cc" and character not in "\t\n\r":
                raise PromptError(
                    f"{name} holds the control character U+{ord(character):04X}; remove it, or "
                    "read the file with the right encoding."
                )
    return prompt


def _check_type(name: str, value: object, wanted: type) -> None:
    if wanted is int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise PromptError(f"{name} must be a whole number, got {shown(value)}.")
    elif not isinstance(value, wanted):
        kind = "text" if wanted is str else "True or False"
        raise PromptError(f"{name} must be {kind}, got {shown(value)}.")
    elif isinstance(value, str) and not is_text(value):
        raise PromptError(f"{name} is not valid text: it holds a lone surrogate.")


def _check_limits(
    prompt: Prompt, taken: tuple[int, int], limits: tuple[int, int], truncate: bool
) -> None:
    excess = [
        (count - limit, f"{count} tokens where {stage} allows {limit}")
        for stage, count, limit in zip(("the backbone", "superres"), taken, limits, strict=True)
        if count > limit
    ]
    if not excess:
        return
    message = f"The prompt takes {' and '.join(words for _, words in excess)}"
    if truncate:
        warnings.warn(f"{message}; its end is cut off.", KhalaWarning, stacklevel=3)
        return
    longest = max(("lyrics", "description", "tags", "genre"), key=lambda n: len(getattr(prompt, n)))
    raise PromptError(
        f"{message}: shorten the {longest} by about {max(excess)[0]} tokens or pass "
        "--truncate-lyrics (truncate_lyrics=True in Python)."
    )


def _warn_unused(prompt: Prompt) -> None:
    """Upstream drops these silently."""
    used = {prompt.metadata, prompt.for_superres.metadata}
    unused = []
    if prompt.tags.strip() and prompt.tags.strip() not in used:
        unused.append("tags (a description comes before them)")
    if prompt.genre.strip() and prompt.genre.strip() not in used:
        unused.append("genre (a description or tags come before it)")
    if prompt.instrumental and prompt.lyrics:
        unused.append("lyrics (an instrumental has none)")
    if prompt.language.strip() and not prompt.language_word:
        unused.append("language (only text_mode separate sends it)")
    if unused:
        text = f"The prompt leaves out {', '.join(unused)}."
        warnings.warn(text, KhalaWarning, stacklevel=3)
