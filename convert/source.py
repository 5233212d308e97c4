"""What a SOURCE is: a folder in one of three layouts, or a repository on the Hub that holds one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from khala_mlx.convert.layouts import megatron, model_folder
from khala_mlx.convert.layouts import torch_port as vinpolar
from khala_mlx.convert.layouts.parts import Opened
from khala_mlx.errors import ConvertError
from khala_mlx.storage import hub
from khala_mlx.text import listed, shown


@dataclass(frozen=True)
class Located:
    """A folder to read; repository and revision when it was downloaded.

    `partial` names files that have holes where nothing is needed: of them the Hub's checksum is
    recorded, and only what is read is checked.
    """

    root: Path
    layout: str
    repo: str | None = None
    revision: str | None = None
    checksums: dict[str, str] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()

    def open(self) -> Opened:
        """Read the structure; tensors stay in their files."""
        return _READERS[self.layout](self.root)


_READERS: dict[str, Callable[[Path], Opened]] = {
    "megatron": megatron.open_megatron,
    "vinpolar": vinpolar.open_vinpolar,
    model_folder.LAYOUT: model_folder.open_model_folder,
}
_HUB_PATTERNS = {
    "megatron": megatron.HUB_PATTERNS,
    "vinpolar": vinpolar.HUB_PATTERNS,
    model_folder.LAYOUT: model_folder.HUB_PATTERNS,
}


def hub_patterns(names: Iterable[str], repo: str) -> tuple[str, ...]:
    """Which of a repository's files its layout needs, as patterns for fnmatch."""
    return _HUB_PATTERNS[layout_of(names, repo)]


def locate(source: str | Path | Located) -> Located:
    """Find the source and its layout, downloading it where it is a repository.

    Raises:
        ConvertError: if there is no such thing, or it is not clear which layout it has.
    """
    if isinstance(source, Located):
        return source
    root = Path(source).expanduser()
    if root.is_dir():
        return Located(root, layout_of(_names(root), shown(str(source))))
    if root.exists():
        raise ConvertError(f"{shown(str(source))} is a file; give the folder that holds it.")
    if not hub.is_repo_id(source):
        raise ConvertError(f"{shown(str(source))} does not exist.")
    repo = str(source)
    snapshot = hub.download(repo, lambda names: hub_patterns(names, repo))
    layout = layout_of(_names(snapshot.folder), repo)
    return Located(snapshot.folder, layout, repo, snapshot.revision, snapshot.checksums)


def layout_of(names: Iterable[str], what: str) -> str:
    """The one layout that file names, relative to the source, speak for."""
    names = list(names)
    found = []
    if any(
        name.startswith(tuple(f"{each}/" for each in megatron.FOLDERS.values())) for name in names
    ):
        found.append("megatron")
    if any(fnmatch(name, vinpolar.HUB_PATTERNS[0]) for name in names):
        found.append("vinpolar")
    if model_folder.CONFIG in names and any(
        fnmatch(name, "backbone*.safetensors") for name in names
    ):
        found.append(model_folder.LAYOUT)
    if len(found) > 1:
        raise ConvertError(f"{what} holds several layouts at once: {listed(found)}.")
    if not found:
        raise ConvertError(
            f"{what} holds no Khala weights: neither backbone/ and superresolution/, nor "
            "khala_*.safetensors, nor a converted model."
        )
    return found[0]


def _names(root: Path) -> list[str]:
    try:
        return sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())
    except OSError as error:
        raise ConvertError(f"{shown(str(root))} cannot be read: {error.strerror}.") from error
