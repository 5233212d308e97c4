"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from khala_mlx.errors import KhalaError

_unfinished: set[Path] = set()
_lock = threading.Lock()


@contextmanager
def appears_whole(
    destination: Path, *, folder: bool = False, overwrite: bool = False
) -> Iterator[Path]:
    """Yield a temporary path beside `destination`; rename it when the block ends well.

    The temporary file keeps the suffix of the destination, so that writers that choose a format
    by suffix work. When the block raises, the temporary path is removed.

    Raises:
        KhalaError: if the destination exists (and `overwrite` is false) or cannot be written.
    """
    if not overwrite:
        check_absent(destination)
    temporary = destination.with_name(f".{destination.stem}.{os.getpid()}{destination.suffix}")
    with _lock:
        _unfinished.add(temporary)
    try:
        if folder:
            temporary.mkdir(parents=True)
        else:
            temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _rename(temporary, destination, overwrite)
    except OSError as error:
        reason = error.strerror or str(error)
        raise KhalaError(f"{destination} cannot be written: {reason}.") from error
    except RuntimeError as error:
        # How MLX says that a file could not be written; it does not say why.
        if not str(error).startswith(("[write]", "[save_safetensors]")):
            raise
        raise KhalaError(f"{destination} cannot be written: the disk may be full.") from error
    finally:
        _remove(temporary)
        with _lock:
            _unfinished.discard(temporary)


def discard_unfinished() -> None:
    """Remove every temporary path of this process; the command line calls it on Ctrl-C."""
    with _lock:
        paths = list(_unfinished)
    for path in paths:
        _remove(path)


def check_absent(destination: Path) -> None:
    """Refuse a destination that exists, dangling links included."""
    if os.path.lexists(destination):
        raise KhalaError(f"{destination} exists already; remove it or choose another name.")


def check_destination(destination: Path) -> None:
    """Refuse, before any work, a destination that exists or whose place cannot be written to."""
    check_absent(destination)
    try:
        with suppress(FileNotFoundError):
            destination.lstat()
        ancestors = destination.absolute().parents
        with tempfile.TemporaryFile(dir=next(each for each in ancestors if each.exists())):
            pass
    except OSError as error:
        raise KhalaError(f"{destination} cannot be written: {error.strerror}.") from error


def _rename(temporary: Path, destination: Path, overwrite: bool) -> None:
    # The rename itself would replace silently what has appeared meanwhile.
    if not overwrite:
        check_absent(destination)
    temporary.replace(destination)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
