"""The Hugging Face Hub: only the files that are needed, at a pinned revision."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from khala_mlx.errors import HubError
from khala_mlx.names import shown

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class Unreachable(HubError):
    """The Hub does not answer, and there is no earlier download."""


@dataclass(frozen=True)
class Snapshot:
    """Downloaded files; `checksums` are the Hub's own SHA-256 by file name."""

    folder: Path
    revision: str
    checksums: dict[str, str] = field(default_factory=dict)


@contextmanager
def _quietly() -> Iterator[None]:
    """No log lines about every try again: the user gets one sentence in the end."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def is_repo_id(text: str | Path) -> bool:
    """Whether it could be the name of a repository: owner/name."""
    return isinstance(text, str) and _REPO_ID.fullmatch(text) is not None


def download(repo: str, patterns_for: Callable[[Iterable[str]], tuple[str, ...]]) -> Snapshot:
    """Fetch what `patterns_for` picks from the names of a repository's files.

    Raises:
        HubError: in one sentence, whatever the Hub or the network had against it.
    """
    import huggingface_hub

    try:
        with _quietly():
            info = huggingface_hub.HfApi().model_info(repo, files_metadata=True)
    except Exception as error:
        if _is_refusal(error):
            raise _told(repo, error) from error
        return _cached(repo, error)
    siblings = info.siblings or []
    patterns = patterns_for(each.rfilename for each in siblings)
    checksums = {each.rfilename: each.lfs.sha256 for each in siblings if each.lfs is not None}
    try:
        with _quietly():
            folder = huggingface_hub.snapshot_download(
                repo, revision=info.sha, allow_patterns=list(patterns)
            )
    except Exception as error:
        raise _told(repo, error) from error
    return Snapshot(Path(folder), str(info.sha), checksums)


def download_file(repo: str, name: str, *, also: str = "") -> Path:
    """Fetch one file, and `also` another where the repository has it."""
    import huggingface_hub

    try:
        with _quietly():
            path = Path(huggingface_hub.hf_hub_download(repo, name))
    except Exception as error:
        raise _told(repo, error) from error
    if also:
        try:
            huggingface_hub.hf_hub_download(repo, also)
        except Exception:
            # A file that may be absent; without it a minimal one is written.
            return path
    return path


def _cached(repo: str, reason: Exception) -> Snapshot:
    """An earlier download, when the Hub cannot be reached."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except Exception as error:
        raise _told(repo, reason) from error
    return Snapshot(folder, folder.name)


def _is_refusal(error: Exception) -> bool:
    from huggingface_hub import errors

    refusals: tuple[Any, ...] = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    )
    return isinstance(error, refusals)


def _told(repo: str, error: Exception) -> HubError:
    from huggingface_hub import errors

    name = shown(repo)
    if isinstance(error, errors.GatedRepoError):
        text = (
            f"{name} asks for consent to its terms: give it on its page and log in (hf auth login)."
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"There is no folder {name} here and no such repository on the Hugging Face Hub."
    elif isinstance(error, errors.LocalEntryNotFoundError):
        return Unreachable(
            f"{name} cannot be reached on the Hugging Face Hub and was not downloaded before."
        )
    elif isinstance(error, errors.EntryNotFoundError):
        text = f"{name} on the Hugging Face Hub lacks a file that is needed."
    elif isinstance(error, errors.HFValidationError):
        text = f"{name} is no valid name of a repository on the Hugging Face Hub."
    elif isinstance(error, OSError) and error.errno is not None and error.strerror:
        text = f"{name} cannot be downloaded: {error.strerror}."
    else:
        text = f"{name} cannot be fetched from the Hugging Face Hub ({type(error).__name__})."
    return HubError(text)
