"""Folders of this machine: the cache, downloaded models, and the user's settings."""

from __future__ import annotations

import os
from pathlib import Path

from khala_mlx.errors import KhalaError


def cache_folder() -> Path:
    """Return the folder for downloads and measurements: KHALA_CACHE, or ~/.cache/khala.

    It is ~/.cache on macOS too, as for Hugging Face's own downloads: the system empties
    ~/Library/Caches when the disk is full, and iCloud moves files out of ~/Documents.
    """
    if given := _named("KHALA_CACHE"):
        return given
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "khala"
    except RuntimeError as error:
        raise KhalaError(
            "This user has no home folder. Set KHALA_CACHE to a folder for the cache."
        ) from error


def models_folder() -> Path:
    """Return the folder of downloaded models: KHALA_MODELS, or models in the cache folder."""
    return _named("KHALA_MODELS") or cache_folder() / "models"


def named_settings() -> Path | None:
    """Return the settings file that KHALA_CONFIG names, if it is set."""
    return _named("KHALA_CONFIG")


def model_name(source: str) -> str:
    """Return the folder name of a downloaded repository: owner/name -> owner--name."""
    return source.replace("/", "--")


def _named(variable: str) -> Path | None:
    """Return the path in an environment variable, if it is set."""
    given = os.environ.get(variable)
    try:
        return Path(given).expanduser() if given else None
    except RuntimeError as error:
        raise KhalaError(
            f"{variable} is {given}, but there is no such user. Set it to another folder."
        ) from error
