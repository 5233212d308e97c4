"""The tokenizer of a conversion: where it comes from and what is checked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import write_tokenizer

from khala_mlx.config import TokenLayout
from khala_mlx.convert import tokenizer
from khala_mlx.convert.tokenizer import RELEASED_SPECIALS, checked, find
from khala_mlx.errors import ConvertError, HubError
from khala_mlx.storage import hub

LAYOUT = TokenLayout()


def test_released_ids_are_upstreams(oracle: Path) -> None:
    specials = json.loads((oracle / "prompts.json").read_text())["specials"]
    assert specials.items() <= RELEASED_SPECIALS.items()
    assert sorted(RELEASED_SPECIALS.values()) == list(range(128000, 128256))
    found = checked(oracle / "tokenizer_small/tokenizer.json", "given", LAYOUT)
    assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
    assert found.config_path is not None
    assert "not Llama 3.1's" in found.notes[0]


def test_llamas_own_file_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokenizer(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(tokenizer, "SHA256", ("0" * 64, digest))
    assert checked(path, "given", LAYOUT).notes == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"<|eom_id|>": 128009, "<|eot_id|>": 128008},
            r"<\|eom_id\|> has id 128009 instead of 128008, <\|eot_id\|> has id 128008",
        ),
        ({"<|reserved_special_token_247|>": 128300}, "has id 128300 instead of 128255"),
        ({"<|image|>": 128256}, "has the id 128256, but audio codes begin at 128256"),
    ],
)
def test_other_ids_are_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    path = write_tokenizer(tmp_path, **changes)
    with pytest.raises(ConvertError, match=message):
        checked(path, "given", LAYOUT)


def test_missing_specials_are_named(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path)
    data = json.loads(path.read_text())
    data["added_tokens"] = data["added_tokens"][:-1]
    path.write_text(json.dumps(data))
    with pytest.raises(ConvertError, match="reserved_special_token_247|> is missing"):
        checked(path, "given", LAYOUT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "no vocabulary"),
        ('{"model":{"vocab":[]},"added_tokens":[]}', "no vocabulary"),
        ('{"model":{"vocab":{}},"added_tokens":[5]}', "malformed or contradictory"),
        ('{"model":{"vocab":{"a":1}},"added_tokens":[{"content":"a","id":2}]}', "contradictory"),
        ('{"model":{"vocab":{"a":"1"}},"added_tokens":[]}', "ids that are not numbers"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ConvertError, match=message):
        checked(path, "given", LAYOUT)


def test_a_malformed_config_beside_it(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path)
    path.with_name("tokenizer_config.json").write_text("{")
    with pytest.raises(ConvertError, match=r"tokenizer_config.json is not valid JSON"):
        checked(path, "given", LAYOUT)


def test_unreadable_and_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConvertError, match="cannot be read"):
        checked(tmp_path / "none.json", "given", LAYOUT)
    path = write_tokenizer(tmp_path)
    monkeypatch.setattr(tokenizer, "MOST_BYTES", 10)
    with pytest.raises(ConvertError, match="too large"):
        checked(path, "given", LAYOUT)


@pytest.mark.parametrize(
    "place", ["source", "source/tokenizer", "source/models/Tokenizer", ".", "Tokenizer"]
)
def test_found_beside_the_source(tmp_path: Path, place: str) -> None:
    (tmp_path / "source").mkdir()
    path = write_tokenizer(tmp_path / place)
    found = find(None, tmp_path / "source", LAYOUT)
    assert found.path.resolve() == path
    assert found.origin == "beside the source"


def test_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokenizer(tmp_path / "given")
    for given in (path, path.parent, str(path)):
        found = find(given, tmp_path, LAYOUT)
        assert (found.path, found.origin) == (path, "given")
    for given in (tmp_path / "none", "none.json", tmp_path):
        with pytest.raises(ConvertError, match=r"is not a tokenizer.json, nor a folder"):
            find(given, tmp_path, LAYOUT)
    monkeypatch.setattr(hub, "download_file", lambda *_, **__: path)
    assert find("owner/name", tmp_path, LAYOUT).origin == "owner/name"


def test_copies(tmp_path: Path) -> None:
    found = find(write_tokenizer(tmp_path / "a"), tmp_path, LAYOUT)
    (tmp_path / "b").mkdir()
    found.copy_to(tmp_path / "b")
    told = json.loads((tmp_path / "b/tokenizer_config.json").read_text())
    assert told["bos_token"] == "<|begin_of_text|>"
    (tmp_path / "a/tokenizer_config.json").write_text('{"x": 1}')
    find(tmp_path / "a", tmp_path, LAYOUT).copy_to(tmp_path / "b")
    assert (tmp_path / "b/tokenizer_config.json").read_text() == '{"x": 1}'


def test_llamas_tokenizer_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokenizer(tmp_path / "cache")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    asked: list[tuple[Any, ...]] = []

    def download(repo: str, name: str) -> Path:
        asked.append((repo, name))
        if len(asked) == 1:
            raise error(f"{repo} cannot be reached.")
        return path

    error: type[HubError] = hub.Unreachable
    monkeypatch.setattr(hub, "download_file", download)
    (tmp_path / "deep/source").mkdir(parents=True)
    with pytest.raises(ConvertError, match=r"pass --tokenizer .* cannot be reached"):
        find(None, tmp_path / "deep/source", LAYOUT)
    monkeypatch.setattr(tokenizer, "SHA256", (digest,))
    assert len(asked) == 1
    asked.clear()
    error = HubError
    found = find(None, tmp_path / "deep/source", LAYOUT)
    assert found.origin == tokenizer.HUB_COPIES[1]
    assert asked == [(repo, "tokenizer.json") for repo in tokenizer.HUB_COPIES]
