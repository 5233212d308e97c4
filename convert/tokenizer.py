"""Llama 3.1's tokenizer: found beside the source or on the Hub, checked, copied; never shipped."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khala_mlx.config import TokenLayout
from khala_mlx.errors import ConvertError, HubError
from khala_mlx.storage import hub
from khala_mlx.text import listed, shown

FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MOST_BYTES = 64 << 20

# Llama 3.1's file without and with a final newline; both are published.
SHA256 = (
    "79e3e522635f3171300913bb421464a87de6222182a0570b9b2ccba2a964b2b4",
    "76e48799b099d43365bd24ccd8ecc5aedac831718da780552f03b0a6eb4412aa",
)
# Ungated repositories with a copy; what they give is only taken if its hash is one of these.
HUB_COPIES = (
    "NousResearch/Meta-Llama-3.1-8B-Instruct",
    "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF",
)
# Upstream's repository keeps it in models/Tokenizer.
_FOLDERS = ("", "tokenizer", "Tokenizer", "models/Tokenizer")

_NAMED = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|finetune_right_pad_id|>": 128004,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008,
    "<|eot_id|>": 128009,
    "<|python_tag|>": 128010,
}
_RESERVED = {0: 128002, 1: 128003, 2: 128005, **{n: 128008 + n for n in range(3, 248)}}
RELEASED_SPECIALS = _NAMED | {
    f"<|reserved_special_token_{number}|>": token for number, token in _RESERVED.items()
}
_MINIMAL = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
}


@dataclass(frozen=True)
class Tokenizer:
    """A checked tokenizer.json; `origin` says where it came from, without local paths."""

    path: Path
    config_path: Path | None
    origin: str
    sha256: str
    notes: tuple[str, ...]

    def copy_to(self, folder: Path) -> None:
        """Put tokenizer.json and tokenizer_config.json into a model folder."""
        shutil.copyfile(self.path, folder / FILE)
        if self.config_path:
            shutil.copyfile(self.config_path, folder / CONFIG_FILE)
        else:
            (folder / CONFIG_FILE).write_text(json.dumps(_MINIMAL, indent=2) + "\n")


def find(explicit: str | Path | None, root: Path, layout: TokenLayout) -> Tokenizer:
    """The given tokenizer, or the one beside the source, or Llama 3.1's from the Hub.

    Raises:
        ConvertError: if there is none or its special tokens have other ids than the model's.
    """
    if explicit is not None:
        path, origin = _explicit(explicit)
    elif beside := _beside(root):
        path, origin = beside, "beside the source"
    else:
        path, origin = _from_hub()
    return checked(path, origin, layout)


def checked(path: Path, origin: str, layout: TokenLayout) -> Tokenizer:
    """Check ids by name; another hash than Llama 3.1's is only noted."""
    data = _read(path)
    digest = hashlib.sha256(data).hexdigest()
    ids = _ids(_parse(data, path))
    _check_ids(ids, layout)
    config = path.with_name(CONFIG_FILE)
    if config.is_file():
        _parse(_read(config), config)
    notes = (
        ()
        if digest in SHA256
        else (
            f"tokenizer.json ({origin}) is not Llama 3.1's; only its special tokens were checked.",
        )
    )
    return Tokenizer(path, config if config.is_file() else None, origin, digest, notes)


def _explicit(given: str | Path) -> tuple[Path, str]:
    path = Path(given).expanduser()
    if path.is_dir():
        path = path / FILE
    if path.is_file():
        return path, "given"
    if hub.is_repo_id(given):
        return hub.download_file(str(given), FILE, also=CONFIG_FILE), str(given)
    raise ConvertError(f"{shown(str(given))} is not a tokenizer.json, nor a folder that holds one.")


def _beside(root: Path) -> Path | None:
    for base in (root, root.resolve().parent):
        for folder in _FOLDERS:
            if (path := base / folder / FILE).is_file():
                return path
    return None


def _from_hub() -> tuple[Path, str]:
    reasons = []
    for repo in HUB_COPIES:
        try:
            path = hub.download_file(repo, FILE)
        except HubError as error:
            reasons.append(str(error))
            if isinstance(error, hub.Unreachable):
                break
            continue
        if hashlib.sha256(_read(path)).hexdigest() in SHA256:
            return path, repo
        reasons.append(f"{repo} holds another file.")
    raise ConvertError(
        "There is no tokenizer.json beside the source; pass --tokenizer with Llama 3.1's "
        f"tokenizer.json. {reasons[0]}"
    )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConvertError(f"{shown(path.name)} is too large to be a tokenizer's.")
        return path.read_bytes()
    except OSError as error:
        raise ConvertError(f"{shown(path.name)} cannot be read: {error.strerror}.") from error


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{shown(path.name)} is not valid JSON.") from error
    if not isinstance(parsed, dict):
        raise ConvertError(f"{shown(path.name)} holds no JSON object.")
    return parsed


def _ids(parsed: dict[str, Any]) -> dict[str, int]:
    """Every token's id by its text."""
    model, added = parsed.get("model"), parsed.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise ConvertError("tokenizer.json holds no vocabulary with special tokens.")
    ids = dict(vocab)
    for entry in added:
        fields = entry if isinstance(entry, dict) else {}
        name, token = fields.get("content"), fields.get("id")
        if not isinstance(name, str) or ids.get(name, token) != token:
            raise ConvertError("tokenizer.json has malformed or contradictory added_tokens.")
        ids[name] = token
    if not all(type(token) is int and token >= 0 for token in ids.values()):
        raise ConvertError("tokenizer.json has ids that are not numbers.")
    return ids


def _check_ids(ids: dict[str, int], layout: TokenLayout) -> None:
    specials = layout.specials
    wanted: dict[str, int | None] = dict.fromkeys(
        (
            specials.begin,
            specials.separator,
            specials.lyrics,
            specials.newline,
            specials.end,
            specials.audio,
            *(specials.minutes.format(minutes=n) for n in range(1, layout.max_minutes + 1)),
        )
    )
    if layout.audio_start == TokenLayout.audio_start:
        wanted |= RELEASED_SPECIALS
    wrong = [
        f"{name} has id {ids[name]} instead of {token}" if name in ids else f"{name} is missing"
        for name, token in wanted.items()
        if name not in ids or token not in (None, ids[name])
    ]
    if wrong:
        raise ConvertError(f"tokenizer.json does not fit the model: {listed(wrong)}.")
    if (highest := max(ids.values())) >= layout.audio_start:
        raise ConvertError(
            f"tokenizer.json has the id {shown(highest)}, but audio codes begin at "
            f"{layout.audio_start}."
        )
