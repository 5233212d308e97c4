"""Sources on the Hugging Face Hub, without a network."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from fake_checkpoints import Sizes, write_megatron, write_tokenizer, write_vinpolar
from huggingface_hub import errors

from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert
from khala_mlx.convert.source import locate
from khala_mlx.errors import KhalaError
from khala_mlx.storage import hub

pytestmark = pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")

REPO = "someone/khala"
SHA = "f" * 40


def http_error(kind: type[Any]) -> Exception:
    """One of the Hub's errors, as it raises them."""
    response = SimpleNamespace(headers={}, request=None)
    made: Exception = kind("404 Client Error.\nRequest ID: x", response=response)
    return made


class Hub:
    """What huggingface_hub answers: files in a local folder, or errors."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.patterns: list[str] = []
        self.info_error: Exception | None = None
        self.download_error: Exception | None = None
        self.wrong_checksum = ""
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repo: str, *, files_metadata: bool, timeout: float) -> Any:
        assert (repo, files_metadata) == (REPO, True)
        # Whoever never answers is not waited for.
        assert timeout < 60
        if self.info_error:
            raise self.info_error
        siblings = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(self.folder).as_posix()
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                digest = "0" * 64 if name == self.wrong_checksum else digest
                lfs = SimpleNamespace(sha256=digest) if path.suffix != ".json" else None
                siblings.append(SimpleNamespace(rfilename=name, lfs=lfs))
        return SimpleNamespace(sha=SHA, siblings=siblings)

    def snapshot_download(
        self,
        repo: str,
        *,
        revision: str | None = None,
        allow_patterns: Any = (),
        local_files_only: bool = False,
    ) -> str:
        if self.download_error:
            raise self.download_error
        assert local_files_only or revision == SHA
        self.patterns = list(allow_patterns)
        return str(self.folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    sizes = Sizes(layers=1)
    write_megatron(root / "megatron", sizes)
    write_vinpolar(root / "vinpolar", sizes)
    write_tokenizer(root / "tokenizer")
    convert(root / "vinpolar", root / "khala", tokenizer=root / "tokenizer")
    return root


@pytest.mark.parametrize("layout", ["megatron", "vinpolar", "khala"])
def test_only_what_is_needed(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    from fnmatch import fnmatch

    fake = Hub(folders / layout, monkeypatch)
    report = convert(REPO, tmp_path / "model", tokenizer=folders / "tokenizer")
    assert (report["layout"], report["repo"], report["revision"]) == (layout, REPO, SHA)
    config = KhalaConfig.load(tmp_path / "model/config.json")
    source = config.source["converted_from"] if layout == "khala" else config.source
    assert (source["repo"], source["revision"]) == (REPO, SHA)
    needed = list(report["source_files"])
    assert all(any(fnmatch(name, pattern) for pattern in fake.patterns) for name in needed)
    assert not any(fnmatch("pictures/cover.png", pattern) for pattern in fake.patterns)
    if layout != "khala":
        text = (tmp_path / "model/README.md").read_text()
        assert f"base_model: {REPO}\n" in text
        assert f"{REPO} at revision {SHA}" in text


def test_a_damaged_download(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Hub(folders / "vinpolar", monkeypatch)
    fake.wrong_checksum = "khala_superres.safetensors"
    with pytest.raises(KhalaError, match="superres: khala_superres.safetensors is not what the"):
        convert(REPO, tmp_path / "model", tokenizer=folders / "tokenizer")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.RepositoryNotFoundError), "no folder someone/khala here and no such"),
        (http_error(errors.GatedRepoError), "asks for consent"),
        (errors.HFValidationError("bad\nname"), "not a valid name"),
    ],
)
def test_refusals(
    folders: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    fake = Hub(folders / "vinpolar", monkeypatch)
    fake.info_error = error
    with pytest.raises(KhalaError, match=message) as told:
        locate(REPO)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.EntryNotFoundError("no\nfile"), "is missing a file"),
        (http_error(errors.HfHubHTTPError), r"cannot be fetched from the Hugging Face Hub \("),
        (OSError(28, "No space left on device"), "cannot be downloaded: No space left on device"),
        (ConnectionError("no\nroute"), r"cannot be fetched .*\(no connection\)"),
        (errors.LocalEntryNotFoundError("no\nroute"), "cannot be reached"),
    ],
)
def test_downloads_that_fail(
    folders: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    fake = Hub(folders / "vinpolar", monkeypatch)
    fake.download_error = error
    with pytest.raises(KhalaError, match=message) as told:
        locate(REPO)
    assert "\n" not in str(told.value)


def test_an_earlier_download_serves_without_a_network(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Hub(folders / "vinpolar", monkeypatch)
    fake.info_error = ConnectionError("no route")
    assert locate(REPO).revision == "vinpolar"
    fake.download_error = errors.LocalEntryNotFoundError("nothing\nthere")
    with pytest.raises(KhalaError, match=r"cannot be fetched .*\(no connection\)"):
        locate(REPO)


def test_repositories_without_khala(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.bin").write_text("x")
    Hub(tmp_path, monkeypatch)
    with pytest.raises(KhalaError, match="someone/khala holds no Khala weights"):
        locate(REPO)


def test_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repo: str, name: str, *, revision: str | None = None) -> str:
        asked.append(name)
        if name == "absent.json":
            raise errors.EntryNotFoundError("no\nfile")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for also in ("", "other.json", "absent.json"):
        assert hub.download_file(REPO, "a.json", also=also) == tmp_path / "a.json"
    assert asked == ["a.json", "a.json", "other.json", "a.json", "absent.json"]
    with pytest.raises(KhalaError, match="is missing a file"):
        hub.download_file(REPO, "absent.json")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a/b", True),
        ("a/b/c", False),
        ("/a/b", False),
        ("a", False),
        ("../b", False),
        ("a/b\n", False),
    ],
)
def test_names_of_repositories(text: str, answer: bool) -> None:
    assert hub.is_repo_id(text) is answer
    assert not hub.is_repo_id(Path(text))
