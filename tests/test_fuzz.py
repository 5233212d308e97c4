"""Damaged songs, tags and sidecars end in one sentence or in an answer, and nothing is written."""

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khala_mlx.audio import files as audio
from khala_mlx.audio import tags
from khala_mlx.errors import KhalaError
from khala_mlx.song.info import describe
from khala_mlx.song.record import Record

FORMATS = (".wav", ".flac", ".ogg", ".mp3")
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


@lru_cache
def whole(suffix: str, folder: Path) -> bytes:
    """A tagged sound file."""
    record = json.dumps({"request": {"tags": "pop", "seed": 3}})
    told = {"title": "Ö", "lyrics": "la " * 50, "record": record, "comment": "x"}
    path = folder / f"whole{suffix}"
    audio.write_audio(path, np.zeros((3000, 2), np.float32), 44100, tags=told)
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def is_one_line(error: KhalaError) -> bool:
    return "\n" not in str(error) and len(str(error)) < 2000


@FUZZ
@given(
    suffix=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    cut=st.floats(0, 1),
)
def test_damaged_sounds(
    folder: Path, suffix: str, changes: list[tuple[float, int]], cut: float
) -> None:
    data = bytearray(whole(suffix, folder))
    for place, value in changes:
        # Headers and tags, where damage does most, are at the ends.
        data[int(place**3 * len(data))] = value
    path = folder / f"damaged{suffix}"
    path.write_bytes(data[: int((1 - cut**4) * len(data))])
    before = sorted(folder.iterdir())
    told: list[bool] = []
    for look in (describe, tags.read, Record.read):
        try:
            look(path)
        except KhalaError as error:
            told.append(is_one_line(error))
    assert all(told)
    assert sorted(folder.iterdir()) == before


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(["tags", "seed", "minutes", "lyrics", "top_k", "model", "evil"])


@FUZZ
@given(
    content=st.dictionaries(
        st.sampled_from(["request", "model", "created"]),
        VALUES | st.dictionaries(NAMES, VALUES, max_size=4),
    )
)
def test_sidecars_of_anything(folder: Path, content: Any) -> None:
    (folder / "any.json").write_text(json.dumps(content))
    soundfile.write(folder / "any.wav", np.zeros((2000, 2)), 44100)
    told: list[bool] = []
    for look, path in ((Record.read, "any.json"), (describe, "any.wav")):
        try:
            look(folder / path)
        except KhalaError as error:
            told.append(is_one_line(error))
    assert all(told)


@FUZZ
@given(content=st.binary(max_size=200))
def test_sidecars_of_bytes(folder: Path, content: bytes) -> None:
    (folder / "raw.json").write_bytes(content)
    with pytest.raises(KhalaError) as told:
        _ = Record.read(folder / "raw.json").request
    assert is_one_line(told.value)


@FUZZ
@given(texts=st.dictionaries(st.sampled_from(tags.NAMES), st.text(max_size=60), max_size=5),
       suffix=st.sampled_from(FORMATS))  # fmt: skip
def test_tags_of_anything_come_back(folder: Path, texts: dict[str, str], suffix: str) -> None:
    path = folder / f"tagged{suffix}"
    audio.write_audio(path, np.zeros((500, 2), np.float32), 44100, tags=texts, overwrite=True)
    found = tags.read(path)
    for name, text in texts.items():
        # What cannot be kept is reported (test_tags.py); the rest is exact.
        assert found.get(name, "") in ("", tags.clean(text))
    assert soundfile.info(io.BytesIO(path.read_bytes())).channels == 2


def test_links_and_names_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "outside.wav").write_bytes(b"precious")
    (tmp_path / "link.wav").symlink_to(tmp_path / "outside.wav")
    (tmp_path / "dangling.wav").symlink_to(tmp_path / "absent.wav")
    wave = np.zeros((500, 2), np.float32)
    for name in ("link.wav", "dangling.wav"):
        with pytest.raises(KhalaError, match="exists already"):
            audio.write_audio(tmp_path / name, wave, 44100)
    assert (tmp_path / "outside.wav").read_bytes() == b"precious"
    assert not (tmp_path / "absent.wav").exists()
    # Asked to overwrite, the link is replaced and what it leads to stays.
    audio.write_audio(tmp_path / "link.wav", wave, 44100, overwrite=True)
    assert (tmp_path / "outside.wav").read_bytes() == b"precious"
