"""What a model knows, where its folder states it: the tags and words it was trained on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from khala_mlx.errors import KhalaError
from khala_mlx.prompt.lyrics import has_voice
from khala_mlx.prompt.request import Request
from khala_mlx.text import listed

FILE = "knows.json"
_SECTION = re.compile(r"\[[^\[\]\n]*\]")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@dataclass(frozen=True)
class Scope:
    """The vocabulary of a small model.

    Attributes:
        tags, words: all it was trained on; an empty list sets no limit.
        max_seconds: of its longest song; 0 sets no limit.
    """

    tags: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    max_seconds: float = 0.0

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read knows.json of a model folder; None if it has none.

        Raises:
            KhalaError: if it is malformed.
        """
        path = folder / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = cls(tuple(values["tags"]), tuple(values["words"]), float(values["max_seconds"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KhalaError(f"{path} is damaged. Remove it to use the model without.") from error
        return found

    @property
    def summary(self) -> str:
        """One line of what the model knows."""
        tags, words = ", ".join(self.tags), " ".join(self.words)
        return f"tags: {tags}; words: {words}; songs up to {self.max_seconds:g} s"

    def outside(self, request: Request) -> list[str]:
        """Return the tags and words of a request that the model does not know."""
        tags = [tag.strip() for tag in request.tags.split(",") if tag.strip()]
        found = [f"the tag {tag!r}" for tag in tags if self.tags and tag.lower() not in self.tags]
        if request.description.strip():
            found.append("a description")
        words = _WORD.findall(_SECTION.sub(" ", request.lyrics).casefold())
        unknown = list(dict.fromkeys(word for word in words if word not in self.words))
        if unknown and self.words and has_voice(request.lyrics, instrumental=request.instrumental):
            found.append(f"the words {listed(unknown[:5])}{' ...' if len(unknown) > 5 else ''}")
        return found
