"""Folders of songs as people have them: formats, words beside them, tables of spreadsheets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from khala_mlx.train.data.prepare import prepare, tools_of

pytestmark = pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")


def sound(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.random.default_rng(seed).normal(size=(2000, 2))
    soundfile.write(path, wave, 44100)
    return path


def prepared(model: Path, songs: Path, **how: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report, and the entries by file."""
    out = songs.parent / "out"
    report = prepare(songs, out, tools_of(out, str(model), None, None), **how)
    lines = (out / "metadata.jsonl").read_text(encoding="utf-8").split("\n")
    return report, {entry["id"]: entry for entry in map(json.loads, filter(None, lines))}


@pytest.mark.parametrize("suffix", [".aiff", ".aif", ".caf", ".w64", ".au", ".flac", ".AIFF"])
def test_whatever_libsndfile_reads_is_sound(tiny_folder: Path, tmp_path: Path, suffix: str) -> None:
    kind = {".aif": "AIFF", ".aiff": "AIFF"}.get(suffix.lower(), suffix[1:].upper())
    path = tmp_path / "songs" / f"a{suffix}"
    path.parent.mkdir()
    soundfile.write(path, 0.1 * np.random.default_rng(0).normal(size=(2000, 2)), 44100, format=kind)
    report, found = prepared(tiny_folder, tmp_path / "songs")
    assert list(found) == [f"a{suffix}"]
    assert report["skipped"] == []


def test_damaged_sound_is_reported_and_other_files_are_not_sound(
    tiny_folder: Path, tmp_path: Path
) -> None:
    songs = tmp_path / "songs"
    sound(songs / "good.wav")
    (songs / "bad.opus").write_bytes(b"not opus")
    (songs / "cover.jpg").write_bytes(b"\xff\xd8\xff")
    (songs / "notes.md").write_text("notes")
    report, found = prepared(tiny_folder, songs)
    assert list(found) == ["good.wav"]
    assert [each["file"] for each in report["skipped"]] == ["bad.opus"]


LYRICS = "la la\nli li"


@pytest.mark.parametrize(
    ("files", "tags", "lyrics"),
    [
        ({"a.caption.txt": "pop", "a.lyrics.txt": LYRICS}, "pop", LYRICS),
        ({"a.txt": "pop, slow"}, "pop, slow", ""),
        ({"a.txt": LYRICS}, "", LYRICS),
        ({"a.caption.txt": "pop", "a.txt": "la la la"}, "pop", "la la la"),
        ({"a_prompt.txt": "pop", "a_lyrics.txt": LYRICS}, "pop", LYRICS),
        ({"a.lrc": "[ti:X]\n[00:01.00]la la\n[00:02.00]li li"}, "", LYRICS),
        ({"a.lyrics.txt": LYRICS, "a.lrc": "[00:01.00]other"}, "", LYRICS),
        ({"a.caption.txt": "\ufeffpop", "a.txt": "\ufeff[Instrumental]"}, "pop", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_words_beside_a_song(
    tiny_folder: Path, tmp_path: Path, files: dict[str, str], tags: str, lyrics: str
) -> None:
    sound(tmp_path / "songs" / "a.wav")
    for name, text in files.items():
        (tmp_path / "songs" / name).write_text(text, encoding="utf-8")
    entry = prepared(tiny_folder, tmp_path / "songs")[1]["a.wav"]
    assert (entry["tags"], entry["lyrics"]) == (tags, lyrics)
    assert entry["instrumental"] == (not lyrics)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_spreadsheets(
    tiny_folder: Path, tmp_path: Path, delimiter: str, encoding: str
) -> None:
    songs = tmp_path / "songs"
    for number in range(2):
        sound(songs / f"{number}.wav", number)
    (songs / "words.txt").write_text(LYRICS)
    rows = [
        ["File Name", " Caption", "LYRICS", "Lyrics-File", "Instrumental", "Artist"],
        ["0.wav", "pop", "null", "words.txt", "FALSE", "A"],
        ["1.wav", "rock", "", "", "yes", "NaN"],
        ["", "", "", "", "", ""],
    ]
    text = "\r\n".join(delimiter.join(row) for row in rows)
    (songs / "metadata.csv").write_bytes(text.encode(encoding))
    found = prepared(tiny_folder, songs)[1]
    assert [found[n]["tags"] for n in ("0.wav", "1.wav")] == ["pop", "rock"]
    assert [found[n]["lyrics"] for n in ("0.wav", "1.wav")] == [LYRICS, ""]
    assert [found[n]["artist"] for n in ("0.wav", "1.wav")] == ["A", ""]


def test_a_song_whose_row_is_refused_is_left_out_and_counted(
    tiny_folder: Path, tmp_path: Path
) -> None:
    songs = tmp_path / "songs"
    for number in range(2):
        sound(songs / f"{number}.wav", number)
    rows = [{"file": "0.wav", "lyrics": 3}, {"file": "1.wav", "caption": "pop"}]
    (songs / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report, found = prepared(tiny_folder, songs)
    assert list(found) == ["1.wav"]
    assert {each["file"] for each in report["skipped"]} == {"metadata.jsonl line 1", "0.wav"}


@pytest.mark.parametrize(
    ("count", "share", "held"), [(1, None, 0), (3, None, 0), (5, None, 1), (3, 0.4, 1), (1, 0.9, 0)]
)
def test_small_sets_are_split_as_one_expects(
    tiny_folder: Path, tmp_path: Path, count: int, share: float | None, held: int
) -> None:
    for number in range(count):
        sound(tmp_path / "songs" / f"{number}.wav", number)
    report, _ = prepared(tiny_folder, tmp_path / "songs", valid_share=share)
    assert (report["train"]["songs"], report["valid"]["songs"]) == (count - held, held)
