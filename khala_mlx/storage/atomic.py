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
# Other machines may write to the same folder, and only this one's processes can be asked after.
_HOST = hashlib.sha256(socket.gethostname().split(".")[0].encode()).hexdigest()[:6]
_TEMPORARY = re.compile(rf"\..*\.khala-{_HOST}-(\d+)(\..*)?")


@contextmanager
def appears_whole(
    destination: Path, *, folder: bool = False, overwrite: bool = False
) -> Iterator[Path]:
    """Yield a temporary path beside `destination`; rename it when the block ends well.

    The temporary file keeps the suffix of the destination, so that writers that choose a format
    by suffix work. It reaches the disk before it is renamed, so that not even a power cut leaves
    half of it. When the block raises, the temporary path is removed, and so are those that killed
    processes left in the same folder.

    Raises:
        KhalaError: if the destination exists (and `overwrite` is false) or cannot be written.
    """
    if not overwrite:
        check_absent(destination)
    name = f".{destination.stem}.khala-{_HOST}-{os.getpid()}{destination.suffix}"
    temporary = destination.with_name(name)
    with _lock:
        _unfinished.add(temporary.absolute())
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
        # How MLX says that a file could not be written; it does not say why.
        if not str(error).startswith(("[write]", "[save_safetensors]")):
            raise
        raise KhalaError(f"{destination} cannot be written: the disk may be full.") from error
    finally:
        _remove(temporary)
        with _lock:
            _unfinished.discard(temporary.absolute())


@contextmanager
def provisional(path: Path) -> Iterator[Callable[[], None]]:
    """Remove `path` when an error or Ctrl-C ends the block, unless what it yields was called."""

    def settle() -> None:
        with _lock:
            _unfinished.discard(path.absolute())

    with _lock:
        _unfinished.add(path.absolute())
    try:
        yield settle
    except BaseException:
        with _lock:
            unsettled = path.absolute() in _unfinished
        if unsettled:
            _remove(path)
        raise
    finally:
        settle()


def discard_unfinished() -> None:
    """Remove every temporary path of this process; the command line calls it on Ctrl-C."""
    with _lock:
        paths = list(_unfinished)
    for path in paths:
        _remove(path)


def sweep(folder: Path) -> None:
    """Remove the temporary paths that processes of this machine left in `folder` when killed."""
    with suppress(OSError), os.scandir(folder) as entries:
        found = [(entry.name, _TEMPORARY.fullmatch(entry.name)) for entry in entries]
        for name, match in found:
            if match and not _in_use(folder / name, int(match[1])):
                _remove(folder / name)


def is_there(path: Path) -> bool:
    """Whether `path` exists; one that cannot, as its name is too long, does not."""
    try:
        return path.exists()
    except OSError:
        return False


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


def _in_use(path: Path, process: int) -> bool:
    if process == os.getpid():
        with _lock:
            return path.absolute() in _unfinished
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _flush(path: Path) -> None:
    """Wait until what was written to a file, or to the files of a folder, is on the disk."""
    for each in path.rglob("*") if path.is_dir() else (path,):
        if each.is_file() and not each.is_symlink():
            with each.open("rb") as file:
                if hasattr(fcntl, "F_FULLFSYNC"):
                    # On macOS fsync stops at the drive's own cache.
                    fcntl.fcntl(file, fcntl.F_FULLFSYNC)
                else:
                    os.fsync(file.fileno())


def _remove(path: Path) -> None:
    # Asking what a path is fails, too, where its name is too long.
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
