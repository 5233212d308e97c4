"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from khala_mlx.errors import KhalaError

_unfinished: set[Path] = set()
_lock = threading.Lock()
# Other machines may write to the same folder, and only processes of this one can be looked up.
_HOST = hashlib.sha256(socket.gethostname().split(".")[0].encode()).hexdigest()[:6]
_TEMPORARY = re.compile(rf"\..*\.khala-{_HOST}-(\d+)(\..*)?")


@contextmanager
def appears_whole(
    destination: Path, *, folder: bool = False, overwrite: bool = False
) -> Iterator[Path]:
    """Yield a temporary path beside `destination`, and rename it if the block succeeds.

    The temporary path keeps the suffix of the destination, for writers that choose a format by
    suffix. It is flushed to disk before it is renamed, so that a power cut leaves no half file. If
    the block raises, the temporary path is removed. So are those that killed processes left in the
    same folder.

    Raises:
        KhalaError: if the destination exists (and `overwrite` is false) or cannot be written.
    """
    if not overwrite:
        check_absent(destination)
    name = f".{destination.stem}.khala-{_HOST}-{os.getpid()}{destination.suffix}"
    temporary = destination.with_name(name)
    _register(temporary)
    try:
        if folder:
            temporary.mkdir(parents=True)
        else:
            temporary.parent.mkdir(parents=True, exist_ok=True)
        sweep(temporary.parent)
        yield temporary
        _flush(temporary)
        _rename(temporary, destination, overwrite)
    except OSError as error:
        reason = error.strerror or str(error)
        raise KhalaError(f"{destination} cannot be written: {reason}.") from error
    except RuntimeError as error:
        # MLX reports that a file could not be written in this way, without the reason.
        if not str(error).startswith(("[write]", "[save_safetensors]")):
            raise
        raise KhalaError(f"{destination} cannot be written. The disk may be full.") from error
    finally:
        _remove(temporary)
        _forget(temporary)


@contextmanager
def provisional(path: Path) -> Iterator[Callable[[], None]]:
    """Remove `path` if an error or Ctrl-C ends the block; calling the yielded function keeps it."""
    _register(path)
    try:
        yield lambda: _forget(path)
    except BaseException:
        if _registered(path):
            _remove(path)
        raise
    finally:
        _forget(path)


def discard_unfinished() -> None:
    """Remove every temporary path of this process, as the command line does on Ctrl-C."""
    with _lock:
        paths = list(_unfinished)
    for path in paths:
        _remove(path)


def sweep(folder: Path) -> None:
    """Remove the temporary paths that killed processes of this machine left in `folder`."""
    with suppress(OSError), os.scandir(folder) as entries:
        found = [(entry.name, _TEMPORARY.fullmatch(entry.name)) for entry in entries]
        for name, match in found:
            if match and not _in_use(folder / name, int(match[1])):
                _remove(folder / name)


def is_there(path: Path) -> bool:
    """Return whether `path` exists; a path whose name is too long does not."""
    try:
        return path.exists()
    except OSError:
        return False


def check_absent(destination: Path) -> None:
    """Raise KhalaError if a destination exists, also as a dangling link."""
    if os.path.lexists(destination):
        raise KhalaError(f"{destination} exists already. Remove it or choose another name.")


def check_destination(destination: Path) -> None:
    """Raise KhalaError, before any work, if a destination exists or cannot be written."""
    check_absent(destination)
    try:
        with suppress(FileNotFoundError):
            destination.lstat()
        folder = next(each for each in destination.absolute().parents if each.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
        sweep(folder)
    except OSError as error:
        raise KhalaError(f"{destination} cannot be written: {error.strerror}.") from error


def _rename(temporary: Path, destination: Path, overwrite: bool) -> None:
    if not overwrite:
        # A rename would silently replace what has appeared meanwhile; a link fails instead.
        with suppress(OSError):
            if temporary.is_file():
                os.link(temporary, destination)
                return
        check_absent(destination)
    temporary.replace(destination)


def _register(path: Path) -> None:
    with _lock:
        _unfinished.add(path.absolute())


def _forget(path: Path) -> None:
    with _lock:
        _unfinished.discard(path.absolute())


def _registered(path: Path) -> bool:
    with _lock:
        return path.absolute() in _unfinished


def _in_use(path: Path, process: int) -> bool:
    if process == os.getpid():
        return _registered(path)
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _flush(path: Path) -> None:
    """Wait until a file, or the files of a folder, have reached the disk."""
    for each in path.rglob("*") if path.is_dir() else (path,):
        if each.is_file() and not each.is_symlink():
            with each.open("rb") as file:
                if hasattr(fcntl, "F_FULLFSYNC"):
                    # On macOS fsync stops at the drive's own cache.
                    fcntl.fcntl(file, fcntl.F_FULLFSYNC)
                else:
                    os.fsync(file.fileno())


def _remove(path: Path) -> None:
    # is_dir raises, too, if the name is too long.
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
