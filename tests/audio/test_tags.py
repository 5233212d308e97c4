"""Tags in all four formats, with mutagen and without."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from khala_mlx.audio import files as audio
from khala_mlx.audio import tags
from khala_mlx.errors import AudioError, KhalaWarning

FORMATS = ["a.wav", "a.flac", "a.ogg", "a.mp3"]
WAVE = np.zeros((4410, 2), np.float32)
FULL = {
    "title": "Über den Wolken 雲の上 ♪",
    "artist": "Ærø",
    "lyrics": "[Verse 1]\ndo ré mi\n" + "la 歌 " * 20_000,
    "comment": "Made by a test.",
    "licence": "Made with weights under CC BY-NC 4.0",
    "prompt": 'rock, "loud"\n; rm -rf',
    "seed": "7",
    "model": "khala",
    "record": '{"request":{"seed":7}}',
}


@pytest.fixture
def _without_mutagen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tags, "with_mutagen", lambda: False)


@pytest.mark.parametrize("name", FORMATS)
def test_everything_comes_back(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audio.write_audio(tmp_path / name, WAVE, 44100, tags=FULL)
    assert tags.read(tmp_path / name) == FULL
    assert soundfile.info(tmp_path / name).frames == 4410


@pytest.mark.parametrize("name", FORMATS)
def test_players_find_them_under_the_usual_names(tmp_path: Path, name: str) -> None:
    import mutagen

    audio.write_audio(tmp_path / name, WAVE, 44100, tags=FULL)
    found: Any = mutagen.File(tmp_path / name).tags
    if name in ("a.wav", "a.mp3"):
        assert found.getall("TIT2")[0].text == [FULL["title"]]
        assert found.getall("USLT")[0].text == FULL["lyrics"]
        assert len(found.getall("COMM")) == 1
    else:
        assert found["TITLE"] == [FULL["title"]]
        assert found["LYRICS"] == [FULL["lyrics"]]


@pytest.mark.usefixtures("_without_mutagen")
@pytest.mark.parametrize("name", FORMATS)
def test_without_mutagen_the_record_is_there(tmp_path: Path, name: str) -> None:
    wanted = {**FULL, "title": "Plain"}
    del wanted["artist"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audio.write_audio(tmp_path / name, WAVE, 44100, tags=wanted)
    there = tags.read(tmp_path / name)
    assert {n: there[n] for n in ("title", "comment", "record")} == {
        n: wanted[n] for n in ("title", "comment", "record")
    }


@pytest.mark.usefixtures("_without_mutagen")
@pytest.mark.parametrize(
    ("name", "wanted", "missing"),
    [
        # libsndfile would mark the title as Latin-1.
        ("a.mp3", FULL, "title, artist;"),
        # One long tag would cost a wav all of them.
        ("a.wav", {"title": "a", "seed": "7", "record": "x" * 3000}, "seed, record;"),
        ("a.flac", {"title": "a", "lyrics": "la"}, "lyrics;"),
    ],
)
def test_without_mutagen_what_is_missing_is_told(
    tmp_path: Path, name: str, wanted: dict[str, str], missing: str
) -> None:
    with pytest.warns(KhalaWarning, match=rf"does not hold these tags: {missing} .*\[tags\]"):
        audio.write_audio(tmp_path / name, WAVE, 44100, tags=wanted)
    assert tags.read(tmp_path / name).get("title", "a") == "a"


@pytest.mark.parametrize("name", FORMATS)
def test_what_no_format_holds_is_cleaned(tmp_path: Path, name: str) -> None:
    wanted = {"title": "a\0b\udcff\ufffe", "lyrics": "\0", "comment": "\0"}
    # libsndfile corrupts the heap over U+FFFE: not to be tried before it is known to be gone.
    assert tags.plain(tmp_path / name, {**wanted, "artist": "\uffff"}) == {"title": "ab?"}
    audio.write_audio(tmp_path / name, WAVE, 44100, tags=wanted)
    assert tags.read(tmp_path / name) == {"title": "ab?"}


def test_files_without_tags(tmp_path: Path) -> None:
    for name in FORMATS:
        audio.write_audio(tmp_path / name, WAVE, 44100)
        assert tags.read(tmp_path / name) == {}
    (tmp_path / "text.mp3").write_text("no sound")
    assert tags.read(tmp_path / "text.mp3") == {}
    assert tags.read(tmp_path / "absent.mp3") == {}
    with pytest.raises(AudioError, match="cannot be tagged"):
        tags.write(tmp_path / "text.mp3", {"title": "a"})
