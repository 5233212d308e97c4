"""Models by the name of a Hub repository, without a network; test_convert_hub.py has the rest."""

from pathlib import Path
from typing import Any

import pytest

from khala_mlx import Khala, KhalaError
from khala_mlx.errors import HubError, KhalaWarning
from khala_mlx.storage import hub


def test_a_hub_repository_is_fetched(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repo: str, patterns_for: Any) -> hub.Snapshot:
        asked.append((repo, patterns_for([])))
        return hub.Snapshot(tiny_folder, "f" * 40)

    monkeypatch.setattr(hub, "download", download)
    with pytest.warns(KhalaWarning, match="CC BY-NC 4.0"):
        assert Khala.from_pretrained("someone/khala-mlx").config.codec.hop == 128
    assert asked == [("someone/khala-mlx", ("*.json", "*.safetensors", "*.md"))]


def test_a_repository_of_checkpoints_points_to_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "download", lambda *_: hub.Snapshot(tmp_path, ""))
    wanted = "khala convert someone/raw DEST"
    with pytest.warns(KhalaWarning), pytest.raises(KhalaError, match=wanted):
        Khala.from_pretrained("someone/raw")


def test_the_hubs_refusal_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise HubError("someone/model cannot be reached.")

    monkeypatch.setattr(hub, "download", fail)
    with pytest.raises(KhalaError, match="someone/model cannot be reached"):
        Khala.from_pretrained("someone/model")


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "bad name/x y"])
def test_names_that_are_neither_folder_nor_repository(name: str) -> None:
    with pytest.raises(KhalaError, match="There is no model folder"):
        Khala.from_pretrained(name)


def test_a_name_too_long_for_any_file() -> None:
    with pytest.raises(KhalaError, match="is not a model folder") as error:
        Khala.from_pretrained("a" * 5000)
    assert len(str(error.value)) < 300
