from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from khala_mlx import Khala, KhalaError


def test_a_hub_repository_is_fetched(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(repo: str, **arguments: Any) -> str:
        asked.append((repo, arguments["allow_patterns"]))
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert Khala.from_pretrained("someone/khala-mlx").config.codec.hop == 128
    assert asked == [("someone/khala-mlx", ["*.json", "*.safetensors", "*.md"])]


def test_a_repository_of_checkpoints_points_to_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(KhalaError, match="khala convert someone/raw DEST"):
        Khala.from_pretrained("someone/raw")


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no network and nothing cached"),
        OSError("no space left"),
        HfHubHTTPError("403 Forbidden", response=SimpleNamespace(headers={}, request=None)),  # type: ignore[arg-type]
    ],
)
def test_a_failed_fetch_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        KhalaError, match="someone/model cannot be fetched from the Hub: "
    ) as caught:
        Khala.from_pretrained("someone/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "bad name/x y"])
def test_names_that_are_neither_folder_nor_repository(name: str) -> None:
    with pytest.raises(KhalaError, match="There is no model folder"):
        Khala.from_pretrained(name)
