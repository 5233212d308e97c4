"""The Hugging Face Hub: only the files that are needed, at a pinned revision."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from khala_mlx.errors import HubError
from khala_mlx.text import shown

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

# Seconds without a byte after which a server counts as gone; by itself huggingface_hub waits on.
_PATIENCE = 30.0


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
            info = huggingface_hub.HfApi().model_info(repo, files_metadata=True, timeout=_PATIENCE)
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
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
        error.__cause__, errors.HfHubHTTPError
    ):
        # Why there is no such entry.
        error = error.__cause__
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
        text = f"{name} on the Hugging Face Hub is missing a file that is needed."
    elif isinstance(error, errors.HFValidationError):
        text = f"{name} is not a valid name of a repository on the Hugging Face Hub."
    elif isinstance(error, OSError) and error.errno is not None and error.strerror:
        text = f"{name} cannot be downloaded: {error.strerror}."
    else:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"the Hub answered {status}" if status else plain_reason(error)
        text = f"{name} cannot be fetched from the Hugging Face Hub ({reason})."
    return HubError(text)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: bytes, and its SHA-256 if the Hub states it."""

    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Listing:
    """A repository at one revision."""

    repo: str
    revision: str
    files: dict[str, RemoteFile]
    licence: str = "unknown"


def listing(repo: str, revision: str | None = None) -> Listing:
    """What a repository holds at a revision, by default the newest.

    Raises:
        HubError: in one sentence; Unreachable where the Hub does not answer or must not be asked.
    """
    import huggingface_hub

    try:
        with _quietly():
            info = huggingface_hub.HfApi().model_info(
                repo, revision=revision, files_metadata=True, timeout=_PATIENCE
            )
        return _listed(repo, info)
    except Exception as error:
        raise _unreachable(repo, error) or _told(repo, error) from error


def _listed(repo: str, info: Any) -> Listing:
    """What the Hub, or a mirror, said of a repository."""
    files = {
        str(each.rfilename): RemoteFile(int(each.size or 0), each.lfs.sha256 if each.lfs else None)
        for each in info.siblings or []
    }
    tags = (str(tag).partition(":") for tag in info.tags or [])
    licence = next((value for kind, _, value in tags if kind == "license"), "unknown")
    if not isinstance(info.sha, str):
        raise TypeError("no revision")
    return Listing(repo, info.sha, files, shown(licence))


def fetch(
    repo: str, revision: str, name: str, folder: Path, on_bytes: Callable[[int], None]
) -> Path:
    """Fetch one file into a folder, unless it is there already and complete.

    Raises:
        HubError: in one sentence; what has come stays for the next time.
    """
    import huggingface_hub
    from huggingface_hub import utils

    class Counter(utils.tqdm):
        """Reports instead of drawing."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            on_bytes(int(options.get("initial") or 0))

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

    try:
        with _quietly():
            found = huggingface_hub.hf_hub_download(
                repo, name, revision=revision, local_dir=folder, tqdm_class=Counter
            )
    except Exception as error:
        raise _unreachable(repo, error) or _told(repo, error) from error
    return Path(found)


class NoParts(HubError):
    """The Hub, or a mirror of it, gives no parts of files."""


def read_range(repo: str, revision: str, name: str, start: int, stop: int) -> bytes:
    """The bytes of a file from start to stop.

    Raises:
        HubError: in one sentence; NoParts where only whole files are given.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(), "range": f"bytes={start}-{stop - 1}"}
    where = f"{shown(name)} of {shown(repo)}"
    come, broken = bytearray(), None
    try:
        with (
            _quietly(),
            http_stream_backoff(
                "GET",
                hf_hub_url(repo, name, revision=revision),
                headers=headers,
                max_retries=2,
                timeout=_PATIENCE,
            ) as response,
        ):
            hf_raise_for_status(response)
            if response.status_code != 206:
                # What follows is the whole file, which may not fit into memory.
                raise NoParts(f"No part of {where} can be had.")
            try:
                for piece in response.iter_bytes():
                    come += piece
                    if len(come) > stop - start:
                        break
            except Exception as error:
                # Raised in here it would be taken for a reason to ask once more.
                broken = error
        if broken is not None:
            raise broken
    except NoParts:
        raise
    except Exception as error:
        raise _unreachable(repo, error) or _told(repo, error) from error
    if len(come) != stop - start:
        raise HubError(f"The Hub did not send the part of {where} that was asked for: try again.")
    return bytes(come)


def plain_reason(error: Exception) -> str:
    """Return why a request failed, in words instead of an exception's name."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if any("Timeout" in kind for kind in kinds):
        return "no answer in time"
    if "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE is set"
    if kinds & {"TransportError", "ConnectionError", "NetworkError"}:
        return "no connection"
    words = " ".join(str(error).split())
    return words[:200] or "no reason given"


def _unreachable(repo: str, error: Exception) -> HubError | None:
    """That the Hub must not be asked, or does not answer; None if it refused."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return Unreachable(f"{shown(repo)} is not here, and HF_HUB_OFFLINE forbids to fetch it.")
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"TransportError", "ConnectionError", "TimeoutError", "ReadTimeout"}:
        return Unreachable(
            f"The connection to the Hugging Face Hub failed while {shown(repo)} was asked for "
            f"({plain_reason(error)}). Try again; what has arrived is kept."
        )
    return None
