"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """What can be fetched or learnt again: KHALA_CACHE, or khala in the user's cache folder.

    On macOS too it is ~/.cache, as for Hugging Face's own downloads: the system empties
    ~/Library/Caches when the disk is full, and iCloud takes away what lies under ~/Documents.
    """
    if given := os.environ.get("KHALA_CACHE"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "khala"


def models_folder() -> Path:
    """Downloaded models: KHALA_MODELS, or models in the cache folder."""
    if given := os.environ.get("KHALA_MODELS"):
        return Path(given).expanduser()
    return cache_folder() / "models"


def model_name(source: str) -> str:
    """The folder's name of a downloaded repository: owner/name -> owner--name."""
    return source.replace("/", "--")
