"""Models on this machine: downloaded, converted and kept in one folder, listed, removed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert
from khala_mlx.convert.partial_download import fetch_codec
from khala_mlx.convert.source import Located, hub_patterns, layout_of
from khala_mlx.errors import HubError, KhalaError
from khala_mlx.performance.memory import Setting, weight_bytes
from khala_mlx.storage import hub
from khala_mlx.storage.atomic import appears_whole, check_absent
from khala_mlx.storage.paths import model_name, models_folder
from khala_mlx.text import is_plain_name, shown

Progress = Callable[[str, int, int], None]

# What has come of models that are not whole yet, and which licences were accepted.
_STAGING, _LICENCES = ".downloads", ".licences.json"
_LISTING = ".listing.json"
_IN_THE_BOX = "demo"
# Only of Lightning's checkpoint most bytes are not needed.
_PARTIAL = "*.ckpt"
# A model of our own layout is used as it is.
_FINISHED = "khala"
# Beside what is asked for, a disk should keep something.
_SPARE_BYTES = 1 << 28


def download(
    repo: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    accept: Callable[[str, str], bool],
    on_progress: Progress | None = None,
    **how: Any,
) -> Path:
    """Fetch a repository of Khala weights and convert it into the models' folder.

    Args:
        name: what the model is called here, by default the repository with -- for /.
        revision: branch, tag or commit; the commit it names is kept to throughout.
        accept: asked with the repository and its licence, once; False stops.
        how: options of convert.convert.

    Raises:
        KhalaError: in one sentence. What has come stays: the next call continues from there.
    """
    name = checked_name(name or model_name(repo))
    if name == _IN_THE_BOX:
        raise KhalaError(f"{name} is the bundled demo model: choose another --name.")
    target = models_folder() / name
    check_absent(target)
    there = _listing(repo, revision)
    _require_consent(there, accept)
    wanted = _wanted(there)
    staging = _staging(there)
    layout = layout_of(wanted, repo)
    finished = layout == _FINISHED and not how
    # A model of our own layout is moved, not written again.
    written = 0 if finished else _at_most_written(how.get("dtype", "bfloat16"))
    _require_space(there, wanted, staging, written)
    staging.mkdir(parents=True, exist_ok=True)
    with appears_whole(staging / _LISTING, overwrite=True) as temporary:
        temporary.write_text(json.dumps(_plain(there)), encoding="utf-8")
    partial = _fetch_all(there, wanted, staging, on_progress)
    sums = {n: f.sha256 for n, f in there.files.items() if f.sha256}
    located = Located(staging, layout, repo, there.revision, sums, partial)
    if finished:
        _adopt(located, wanted, target)
    else:
        convert(located, target, on_progress=on_progress, **how)
    shutil.rmtree(staging, ignore_errors=True)
    return target


def models() -> list[dict[str, Any]]:
    """What is in the models' folder, whole or damaged, and the bundled demo model."""
    from khala_mlx.model.weights import find_model

    folder = models_folder()
    found = [(_IN_THE_BOX, find_model(_IN_THE_BOX))]
    if folder.is_dir():
        found += [(p.name, p) for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    return [_described(name, path) for name, path in found if path.is_dir()]


def remove(name: str) -> int:
    """Delete a downloaded model and what has come of it; returns the bytes freed.

    Raises:
        KhalaError: if there is no such model.
    """
    name = checked_name(model_name(name))
    folder = models_folder()
    path, staged = folder / name, list((folder / _STAGING).glob(f"{escape(name)}@*"))
    if not (path.is_dir() or path.is_symlink() or staged):
        raise KhalaError(f"There is no model {shown(name)} in {folder}.")
    freed = 0
    for each in (path, *staged):
        if each.is_symlink():
            each.unlink()
        elif each.is_dir():
            freed += _size(each)
            shutil.rmtree(each)
    return freed


def checked_name(name: str) -> str:
    """A model's name, if it can be that of a folder here.

    Raises:
        KhalaError: if it could lead elsewhere.
    """
    if not is_plain_name(name) or name.startswith(".") or not name.isprintable() or "*" in name:
        raise KhalaError(f"{shown(name)} cannot be the name of a model.")
    return name


def _listing(repo: str, revision: str | None) -> hub.Listing:
    """The Hub's, or where it cannot be asked that of a download that was started."""
    if not hub.is_repo_id(repo):
        raise KhalaError(f"{shown(repo)} is not a name of a Hub repository (owner/name).")
    try:
        return hub.listing(repo, revision)
    except hub.Unreachable:
        begun = sorted((models_folder() / _STAGING).glob(f"{model_name(repo)}@*/{_LISTING}"))
        for path in begun:
            if (known := _read_listing(path)) and revision in (None, known.revision):
                return known
        raise


def _plain(listing: hub.Listing) -> dict[str, Any]:
    files = {name: [file.size, file.sha256] for name, file in listing.files.items()}
    told = {"repo": listing.repo, "revision": listing.revision, "licence": listing.licence}
    return {**told, "files": files}


def _read_listing(path: Path) -> hub.Listing | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        files = {n: hub.RemoteFile(int(size), sha) for n, (size, sha) in told["files"].items()}
        return hub.Listing(told["repo"], told["revision"], files, told["licence"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _wanted(there: hub.Listing) -> list[str]:
    patterns = hub_patterns(there.files, there.repo)
    names = [n for n in there.files if any(fnmatch(n, pattern) for pattern in patterns)]
    if layout_of(there.files, there.repo) == _FINISHED:
        # What lies deeper, an adapter perhaps, is not a part of the model.
        names = [n for n in names if "/" not in n]
    for name in names:
        if not all(map(is_plain_name, name.split("/"))):
            raise HubError(f"{shown(there.repo)} holds a file with the name {shown(name)}.")
    return names


def _staging(there: hub.Listing) -> Path:
    revision = "".join(filter(str.isalnum, there.revision))
    return models_folder() / _STAGING / f"{model_name(there.repo)}@{revision}"


def _require_consent(there: hub.Listing, accept: Callable[[str, str], bool]) -> None:
    path = models_folder() / _LICENCES
    try:
        accepted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        accepted = {}
    accepted = accepted if isinstance(accepted, dict) else {}
    if accepted.get(there.repo) == there.licence:
        return
    if not accept(there.repo, there.licence):
        raise KhalaError(f"{there.repo} was not fetched: its licence was not accepted.")
    with appears_whole(path, overwrite=True) as temporary:
        told = {**accepted, there.repo: there.licence}
        temporary.write_text(json.dumps(told, indent=2), encoding="utf-8")


def _at_most_written(dtype: str) -> int:
    """Bytes of the released model in this dtype, the codec in float32; quantized it has fewer."""
    setting = Setting(dtype, on_cpu=False)
    parts = ("backbone", "superres", "codec")
    return sum(weight_bytes(KhalaConfig(), part, setting) for part in parts)


def _require_space(there: hub.Listing, wanted: list[str], staging: Path, written: int) -> None:
    """The files and, beside them, what is written, which is at most as much again."""
    folder = models_folder()
    parent = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    size = sum(there.files[name].size for name in wanted)
    come = _size(staging) if staging.is_dir() else 0
    need = size + min(size, written) - come + _SPARE_BYTES
    free = shutil.disk_usage(parent).free
    if free < need:
        raise KhalaError(
            f"{there.repo} takes up to {need / 1e9:.1f} GB while it is converted, {folder} has "
            f"{free / 1e9:.1f} GB free: make room, or name another folder in KHALA_MODELS."
        )


def _fetch_all(
    there: hub.Listing, wanted: list[str], staging: Path, on_progress: Progress | None
) -> frozenset[str]:
    """Fetch the files; return the names of those that were fetched in part."""
    total = sum(there.files[name].size for name in wanted)
    done, partial = 0, set()
    for name in wanted:
        come = 0

        def count(bytes_: int, before: int = done) -> None:
            nonlocal come
            come += bytes_
            if on_progress:
                on_progress("download", min(before + come, total), total)

        if fnmatch(name, _PARTIAL) and _fetch_part(there, name, staging, count):
            partial.add(name)
        else:
            _fetch_whole(there, name, staging, count)
        done += there.files[name].size
        if on_progress:
            on_progress("download", done, total)
    return frozenset(partial)


def _fetch_whole(
    there: hub.Listing, name: str, staging: Path, count: Callable[[int], None]
) -> None:
    path = hub.fetch(there.repo, there.revision, name, staging, count)
    wanted = there.files[name].sha256
    if wanted and _sha256(path) != wanted:
        path.unlink()
        raise HubError(
            f"{shown(name)} is not what the Hub says it holds, it was damaged on its way: try "
            "again, the other files are kept."
        )


def _fetch_part(there: hub.Listing, name: str, staging: Path, count: Callable[[int], None]) -> bool:
    path = staging / name
    if path.exists():
        return True
    path.parent.mkdir(parents=True, exist_ok=True)

    def read(start: int, stop: int) -> bytes:
        return hub.read_range(there.repo, there.revision, name, start, stop)

    try:
        return fetch_codec(path, there.files[name].size, read, count)
    except hub.NoParts:
        # Then the file comes whole.
        path.with_name(f"{path.name}.partial").unlink(missing_ok=True)
        return False
    except OSError as error:
        raise KhalaError(f"{path} cannot be written: {error.strerror}.") from error


def _adopt(located: Located, wanted: list[str], target: Path) -> None:
    """Take a model of our own layout as it is, once it was read strictly."""
    located.open()
    with appears_whole(target, folder=True) as temporary:
        for name in wanted:
            (located.root / name).replace(temporary / name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(folder: Path) -> int:
    """Bytes on the disk, without holes."""
    return sum(512 * p.lstat().st_blocks for p in folder.rglob("*") if p.is_file())


def _described(name: str, path: Path) -> dict[str, Any]:
    told: dict[str, Any] = {"name": name, "folder": str(path)}
    try:
        config = KhalaConfig.load(path / "config.json")
    except KhalaError as error:
        return {**told, "damaged": str(error)}
    bits = sorted({how.bits for how in config.quantization.values()})
    told["dtype"] = ", ".join(f"{b} bit" for b in bits) or config.dtype
    told["bytes"] = _size(path)
    told["licence"] = config.licence
    told["source"] = str(config.source.get("repo") or config.source.get("layout") or "unknown")
    if revision := config.source.get("revision"):
        told["revision"] = str(revision)
    return told
