"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from khala_mlx.errors import KhalaError


def cache_folder() -> Path:
    """What can be fetched or learnt again: KHALA_CACHE, or khala in the user's cache folder.

    On macOS too it is ~/.cache, as for Hugging Face's own downloads: the system empties
    ~/Library/Caches when the disk is full, and iCloud takes away what lies under ~/Documents.
    """
    if given := _named("KHALA_CACHE"):
        return given
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "khala"
    except RuntimeError as error:
        raise KhalaError(
            "This user has no home folder: name one for the cache by KHALA_CACHE."
        ) from error


def models_folder() -> Path:
    """Downloaded models: KHALA_MODELS, or models in the cache folder."""
    return _named("KHALA_MODELS") or cache_folder() / "models"


def named_settings() -> Path | None:
    """The user's own defaults, if KHALA_CONFIG names them."""
    return _named("KHALA_CONFIG")


def model_name(source: str) -> str:
    """The folder's name of a downloaded repository: owner/name -> owner--name."""
    return source.replace("/", "--")


def _named(variable: str) -> Path | None:
    """What an environment variable names, if it is set."""
    given = os.environ.get(variable)
    try:
        return Path(given).expanduser() if given else None
    except RuntimeError as error:
        raise KhalaError(
            f"{variable} names the home of a user who is not here: {given}."
        ) from error
