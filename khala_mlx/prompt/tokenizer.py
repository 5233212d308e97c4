"""Text to token ids and back, with control tokens only where the program puts them.

A thin wrapper over the `tokenizers` package. Text is always plain: a special token's name typed
by a user is encoded as the characters it is made of.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from khala_mlx import token_ids as tokens
from khala_mlx.config import SpecialTokens, TokenLayout
from khala_mlx.errors import KhalaError, PromptError

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Encodes plain text, and looks control tokens up by name."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # A tokenizer.json may carry limits for training batches; they would cut lyrics silently.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: id for id, token in added.items() if token.special}
        self._control = frozenset(self._special.values())

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            KhalaError: if it cannot be read, is not a tokenizer, or gives tokens other ids than
                it declares.
        """
        import tokenizers

        try:
            text = Path(path).read_text(encoding="utf-8")
            backend = tokenizers.Tokenizer.from_str(text)
        except OSError as error:
            raise KhalaError(f"{path} cannot be read: {error.strerror}.") from error
        except Exception as error:  # the package raises bare Exceptions
            raise KhalaError(f"{path} is not a valid tokenizer file: {error}.") from error
        _check_declared_ids(backend, json.loads(text), path)
        return cls(backend)

    @cached_property
    def vocab_size(self) -> int:
        """The highest id + 1."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never the id of a special token.

        Raises:
            PromptError: if the text holds half of a surrogate pair, or a character that the
                tokenizer knows only as a special token.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"{text[:40]!a} is not a text: it holds a lone surrogate.") from error
        return self._encode_apart(text)

    def special(self, name: str) -> int:
        """Id of the special token `name`.

        Raises:
            KhalaError: if there is none.
        """
        if name not in self._special:
            raise KhalaError(f"The tokenizer has no special token {name}.")
        return self._special[name]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens appear by name."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def check(self, layout: TokenLayout) -> None:
        """Refuse a tokenizer whose ids do not agree with the token layout of the model.

        Raises:
            KhalaError: listing every disagreement.
        """
        problems = self._missing(layout) + self._misplaced(layout)
        if problems:
            raise KhalaError(f"The tokenizer does not fit the model: {'; '.join(problems)}.")

    def _encode_apart(self, text: str) -> list[int]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        spans = [
            span
            for id, span in zip(encoding.ids, encoding.offsets, strict=True)
            if id in self._control
        ]
        if not spans:
            return encoding.ids
        # A special token can also be a whole word of the vocabulary: cut such words in two.
        if single := [text[start:stop] for start, stop in spans if stop - start < 2]:
            raise PromptError(f"Remove {single[0]!r}, which the tokenizer has as a special token.")
        cuts = [(start + stop) // 2 for start, stop in spans]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [id for piece in pieces for id in self._encode_apart(piece)]

    def _missing(self, layout: TokenLayout) -> list[str]:
        names = [name for name in prompt_specials(layout) if name not in self._special]
        return [f"it has no special token {', '.join(names)}"] if names else []

    def _misplaced(self, layout: TokenLayout) -> list[str]:
        problems = []
        if self.vocab_size > layout.audio_start:
            last = self.vocab_size - 1
            problems.append(f"its highest id {last} is not below audio_start {layout.audio_start}")
        used = {self._special[n]: n for n in prompt_specials(layout) if n in self._special}
        for id, role in _reserved(layout).items():
            token = self._backend.id_to_token(id)
            if id in used:
                problems.append(f"{used[id]} has id {id}, which is {role}")
            elif token is not None and id not in self._control:
                problems.append(f"id {id}, which is {role}, is the ordinary token {token!r}")
        return problems


def prompt_specials(layout: TokenLayout) -> list[str]:
    """Names of all special tokens that a prompt can be built from."""
    names = layout.specials
    fixed = [names.begin, names.separator, names.lyrics, names.newline, names.end, names.audio]
    return fixed + [minutes_special(names, n) for n in range(1, layout.max_minutes + 1)]


def minutes_special(names: SpecialTokens, minutes: int) -> str:
    """Name of the special token that asks for a song of `minutes`."""
    return names.minutes.replace("{minutes}", str(minutes))


def _reserved(layout: TokenLayout) -> dict[int, str]:
    """Ids that mean something to the models and must appear in no prompt text."""
    layers = range(layout.num_coarse, layout.num_codebooks)
    markers = {tokens.marker(layout, layer): f"the marker of layer {layer}" for layer in layers}
    return {**markers, layout.end_of_song: "the end of the song", layout.padding: "padding"}


def _check_declared_ids(backend: tokenizers.Tokenizer, data: Any, path: str | Path) -> None:
    # The package renumbers added tokens that leave a gap after the vocabulary, without a word.
    for token in data.get("added_tokens") or []:
        if (actual := backend.token_to_id(token["content"])) != token["id"]:
            raise KhalaError(
                f"{path} gives {token['content']} the id {token['id']}, but it loads as {actual}."
            )
