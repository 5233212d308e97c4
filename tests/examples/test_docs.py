"""The documentation: links resolve, the architecture page is true, and Python examples run."""

import re
from pathlib import Path

import pytest

from khala_mlx import Khala, Song

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "README.md" or f"]({name})" in index, name


def test_readme_fits_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert (ROOT / "docs/images/song.png").stat().st_size <= 300_000


def described_modules() -> set[str]:
    """The modules in the tree of docs/architecture.md, as paths without suffix."""
    tree = (ROOT / "docs/architecture.md").read_text().split("```")[1]
    found, folders = set(), dict[int, str]()
    for line in tree.splitlines():
        words, depth = line.split(), len(line) - len(line.lstrip())
        folders = {at: name for at, name in folders.items() if at < depth}
        parent = "/".join(folders[at] for at in sorted(folders))
        if not words:
            continue
        if words[0].endswith("/"):
            folders[depth] = words[0].rstrip("/")
        elif parent == "khala_mlx":
            found.add(f"{parent}/{words[0]}")
        else:
            found |= {f"{parent}/{word}" for word in words}
    return found


def test_the_architecture_page_lists_every_module() -> None:
    modules = {
        str(path.relative_to(ROOT).with_suffix(""))
        for folder in ("khala_mlx", "convert")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py" or path.parent.name == "khala_mlx"
    }
    assert described_modules() == modules


@pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")
def test_the_python_page_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run all examples in order, with a tiny model and short songs, and without sound."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Song, "play", lambda song: None)
    monkeypatch.setattr(Khala, "load_adapters", lambda *_, **__: None)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S)
    code = "\n".join(blocks).replace('"khala-model"', repr(str(tiny_folder)))
    code = code.replace("minutes=1,", "minutes=1, seconds=0.1,").replace("1292", "20")
    code = code.replace('"song.take', '"resumed.take')
    names: dict[str, object] = {}
    exec(code, names)
    for name in ("song.wav", "song-4.wav", "other-detail.wav", "resumed.take.safetensors"):
        assert (tmp_path / name).exists()
