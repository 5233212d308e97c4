"""`khala train prepare`: songs of any kind become training data, bad ones a line in the report."""

import json
import os
import stat
import struct
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from tiny_model import write_tiny_model

from khala_mlx import Khala, KhalaError
from khala_mlx.audio.files import read_audio
from khala_mlx.cli import main
from khala_mlx.config import TokenLayout
from khala_mlx.errors import KhalaWarning
from khala_mlx.model.codec import Codec
from khala_mlx.train.data import audio_index as hearing
from khala_mlx.train.data.dataset import read_coded
from khala_mlx.train.data.prepare import minutes_of, prepare, tools_of
from khala_mlx.train.data.sequences import examples_of
from khala_mlx.train.data.splits import draw_splits

LAYOUT = TokenLayout.tiny()


def noise(seed: int, samples: int = 3000, channels: int = 2) -> np.ndarray:
    wave = np.random.default_rng(seed).uniform(-0.3, 0.3, (samples, channels))
    return wave.astype(np.float32)


def song(path: Path, seed: int, caption: str | None = "pop", lyrics: str | None = "do re") -> Path:
    """A short noise at the codec's rate with the texts beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seed), 44100, format=path.suffix[1:].replace("m4a", "wav"))
    for kind, text in (("caption", caption), ("lyrics", lyrics)):
        if text is not None:
            path.with_suffix(f".{kind}.txt").write_text(text, encoding="utf-8")
    return path


def run(model: Path, songs: Path, out: Path, *options: Any) -> Result:
    arguments = ["train", "prepare", songs, out, "--model", model, *options]
    return CliRunner().invoke(main, [str(each) for each in arguments])


def told(model: Path, songs: Path, out: Path, *options: Any) -> dict[str, Any]:
    result = run(model, songs, out, "--json", *options)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    assert report == json.loads((out / "report.json").read_text())
    return report


def entries(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "metadata.jsonl").read_text(encoding="utf-8").split("\n")
    return {entry["id"]: entry for entry in map(json.loads, filter(None, lines))}


def splits(out: Path) -> dict[str, str]:
    return {name: entry["split"] for name, entry in entries(out).items()}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all sounds that are encoded from now on."""
    lengths: list[int] = []
    encode = Codec.encode

    def counted(codec: Codec, wave: np.ndarray, **options: Any) -> np.ndarray:
        lengths.append(len(wave))
        return encode(codec, wave, **options)

    monkeypatch.setattr(Codec, "encode", counted)
    return lengths


def write_ten_hours(path: Path) -> None:
    """A wav of ten hours at 8 kHz that takes no room."""
    size = 36000 * 8000 * 2
    sizes = struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    header = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + sizes
    path.write_bytes(header + b"data" + struct.pack("<I", size))
    os.truncate(path, 44 + size)


def test_bad_data_never_stops_the_run(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    songs = tmp_path / "songs"
    song(songs / "a.wav", 1)
    song(songs / "album" / "🎸 señor.flac", 2)
    song(songs / "no_caption.wav", 3, caption=None)
    song(songs / "no_lyrics.wav", 4, lyrics="\n")
    slow = song(songs / "slow_mono.wav", 5)
    soundfile.write(slow, noise(5, 2000, 1), 8000)
    soundfile.write(song(songs / "silent.wav", 6), np.zeros((9000, 2)), 44100)
    write_ten_hours(song(songs / "ten_hours.wav", 7))
    song(songs / "corrupt.mp3", 8).write_bytes(np.random.default_rng(0).bytes(50000))
    song(songs / "empty.ogg", 8).write_bytes(b"")
    soundfile.write(song(songs / "three.wav", 8), noise(8, 900, 9), 44100)
    soundfile.write(song(songs / "nan.wav", 8), np.full((9, 2), np.nan), 44100, subtype="FLOAT")
    same = soundfile.read(songs / "a.wav", dtype="int16")[0]
    soundfile.write(song(songs / "z_copy.flac", 1), same, 44100)
    song(songs / "latin.wav", 9).with_suffix(".lyrics.txt").write_bytes(b"caf\xe9")
    song(songs / "control.wav", 10, lyrics="do\x00re")
    song(songs / "endless.wav", 11, lyrics="la " * 400)
    (songs / "tape.m4a").write_bytes(b"no converter is there")
    (songs / "._a.wav").write_bytes(b"what a Mac leaves on other disks")
    # Linux takes names that are not text, Macs refuse them.
    unnamed = {"caf\ufffd.wav"} if sys.platform == "linux" else set()
    if unnamed:
        song(songs / "plain.wav", 12).rename(songs / os.fsdecode(b"caf\xe9.wav"))

    report = told(tiny_folder, songs, tmp_path / "out")
    used = {"a.wav", "album/🎸 señor.flac", "no_caption.wav", "no_lyrics.wav", "slow_mono.wav"}
    assert set(entries(tmp_path / "out")) == used | unnamed
    assert {each["file"]: each["reason"] for each in report["skipped"]} == {
        "silent.wav": "silent",
        "ten_hours.wav": "too long",
        "corrupt.mp3": "unreadable",
        "empty.ogg": "unreadable",
        "three.wav": "unreadable",
        "nan.wav": "unreadable",
        "z_copy.flac": "duplicate",
        "latin.wav": "words",
        "control.wav": "prompt",
        "endless.wav": "prompt",
        "tape.m4a": "unreadable",
    }
    details = {each["file"]: each["detail"] for each in report["skipped"]}
    assert details["ten_hours.wav"].startswith("It lasts 600.0 minutes, where 10 are allowed")
    assert details["corrupt.mp3"] == "corrupt.mp3 cannot be read as sound: it is damaged or none."
    assert details["z_copy.flac"] == "It holds the same sound as a.wav."
    assert "ffmpeg" in details["tape.m4a"]
    assert "UTF-8" in details["latin.wav"]
    assert "U+0000" in details["control.wav"]
    assert "where the backbone allows 256" in details["endless.wav"]
    remarked = {each["file"] for each in report["remarks"]}
    assert remarked == {"no_caption.wav", "no_lyrics.wav"} | unnamed
    assert report["songs"] == len(used | unnamed)
    assert report["train"]["songs"] + report["valid"]["songs"] == report["songs"]
    assert report["valid"]["songs"] >= 1


def test_codes_are_those_of_the_whole_song(tiny_folder: Path, tmp_path: Path) -> None:
    path = song(tmp_path / "songs" / "a.wav", 1)
    soundfile.write(path, noise(1, 5000, 1), 22050)
    song(tmp_path / "songs" / "b.wav", 2)
    told(tiny_folder, tmp_path / "songs", tmp_path / "out")
    entry = entries(tmp_path / "out")["a.wav"]
    stored = np.load(tmp_path / "out" / entry["codes"])["codes"]
    wave = read_audio(path, 44100, 2)
    assert len(wave) == 10000
    assert np.array_equal(stored, Khala.from_pretrained(tiny_folder).codec.encode(wave))
    assert stored.dtype == np.int16
    assert entry["frames"] == stored.shape[1] == -(-10000 // 128)
    coded = list(read_coded(tmp_path / "out", "train"))
    assert {each.about["id"] for each in coded} == {"a.wav", "b.wav"}


class Killed(Exception):
    pass


def test_a_killed_run_goes_on(tiny_folder: Path, tmp_path: Path, encoded: list[int]) -> None:
    songs, out = tmp_path / "songs", tmp_path / "out"
    for seed in range(4):
        song(songs / f"{seed}.wav", seed)
    tools = tools_of(out, str(tiny_folder), None, None)

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "encode" and len(encoded) == 3:
            raise Killed

    with pytest.raises(Killed):
        prepare(songs, out, tools, on_progress=kill)
    assert not (out / "metadata.jsonl").exists()
    assert len(list((out / "codes").iterdir())) == 2
    report = prepare(songs, out, tools)
    assert (report["encoded"], len(encoded)) == (2, 5)
    whole = prepare(songs, tmp_path / "whole", tools)
    assert (out / "metadata.jsonl").read_text() == (
        tmp_path / "whole" / "metadata.jsonl"
    ).read_text()
    assert whole["train"] == report["train"]


def test_only_new_sounds_and_new_codecs_are_encoded(
    tiny_folder: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    songs, out = tmp_path / "songs", tmp_path / "out"
    for seed in range(3):
        song(songs / f"{seed}.wav", seed)
    before = told(tiny_folder, songs, out)
    assert before["encoded"] == len(encoded) == 3

    drawn = splits(out)
    (songs / "0.wav").rename(songs / "renamed.wav")
    (songs / "1.caption.txt").write_text("rock")
    with monkeypatch.context() as patched:
        # What was heard once is not even decoded.
        patched.setattr(hearing, "read_audio", None)
        assert told(tiny_folder, songs, out)["encoded"] == 0
    assert entries(out)["1.wav"]["tags"] == "rock"
    assert splits(out)["renamed.wav"] == drawn["0.wav"]

    damaged = out / entries(out)["1.wav"]["codes"]
    damaged.write_bytes(damaged.read_bytes()[:40])
    (out / "heard.json").write_text("damaged")
    assert told(tiny_folder, songs, out)["encoded"] == 1
    other = write_tiny_model(tmp_path / "other", seed=1)
    assert told(other, songs, out)["encoded"] == 3
    assert told(tiny_folder, songs, out)["encoded"] == 0


def test_a_codec_is_named_by_what_decides_on_codes(tiny_folder: Path, tmp_path: Path) -> None:
    tools, again = (tools_of(tmp_path, str(tiny_folder), None, None) for _ in range(2))
    assert tools.identity == again.identity
    again.codec.decoder.conv_in.weight = again.codec.decoder.conv_in.weight + 1
    assert type(again)(again.codec, again.tokenizer, None).identity == tools.identity
    again.codec.quantizer.codebooks = again.codec.quantizer.codebooks + mx.array(0.01)
    assert type(again)(again.codec, again.tokenizer, None).identity != tools.identity


def test_words_come_from_texts_and_tables(tiny_folder: Path, tmp_path: Path) -> None:
    songs, out = tmp_path / "songs", tmp_path / "out"
    for number, name in enumerate(
        ["both.wav", "table.wav", "plain.wav", "o\u0308.wav", "inst.wav"]
    ):
        song(songs / name, number, caption=None, lyrics=None)
    (songs / "both.caption.txt").write_text("beside")
    (songs / "plain.txt").write_text("\ufeffplain\n", encoding="utf-8")
    (songs / "plain.lyrics.txt").write_text("“do”：re\r\nmi", newline="")
    rows: list[Any] = [
        {"file": "both.wav", "caption": "table", "lyrics": "la", "artist": "A", "seed": 3},
        {"file_name": "./table.wav", "tags": ["pop", "slow"], "lyrics": "la\u2028la",
         "minutes": 2.6},
        {"file": unicodedata.normalize("NFC", "o\u0308.wav"), "caption": "x", "lyrics": None},
        {"file": "inst.wav", "tags": "x", "lyrics": "la", "language": "Instrumental"},
        {"file": "absent.wav"},
        {"file": "both.wav"},
        {"tags": "no file"},
        {"file": "plain.wav", "lyrics": 3},
        {"file": "plain.wav", "lyrics": "\ud800"},
        {"file": "plain.wav", "minutes": True},
        {"file": "plain.wav", "instrumental": "yes"},
        [],
    ]  # fmt: skip
    table = [json.dumps(row).encode() for row in rows] + [b"\xe9", b"", b"{"]
    (songs / "metadata.jsonl").write_bytes(b"\n".join(table))
    report = told(tiny_folder, songs, out)
    found = entries(out)
    kept = {name: (each["tags"], each["lyrics"]) for name, each in found.items()}
    assert kept == {
        "both.wav": ("beside", "la"),
        "table.wav": ("pop, slow", "la\nla"),
        "o\u0308.wav": ("x", ""),
        "inst.wav": ("x", ""),
    }
    assert found["both.wav"]["artist"] == "A"
    assert [found[name]["minutes"] for name in ("both.wav", "table.wav")] == [1, 3]
    assert found["inst.wav"]["instrumental"]
    assert len(read_coded(out, "train")) == 4
    reasons = Counter(each["reason"] for each in report["skipped"])
    assert reasons == {"missing": 1, "table": 10}
    remarks = {each["file"]: each["detail"] for each in report["remarks"]}
    assert "plain.wav" not in remarks
    assert "left out" in remarks["inst.wav"]
    assert "instrumental" in remarks["o\u0308.wav"]


def test_prompts_are_those_of_generation(tiny_folder: Path, tmp_path: Path) -> None:
    songs, out = tmp_path / "songs", tmp_path / "out"
    song(songs / "train" / "sung.wav", 0, "pop", "“do” re\nmi")
    song(songs / "train" / "played.wav", 1, "jazz", "[Instrumental]")
    song(songs / "valid" / "a.wav", 2)
    told(tiny_folder, songs, out)
    khala = Khala.from_pretrained(tiny_folder)
    read = read_coded(out, "train")
    examples = examples_of(read, LAYOUT, khala.tokenizer, lambda *_: 100)
    asked = {
        "train/sung.wav": khala.prompt_ids(tags="pop", lyrics="“do” re\nmi", minutes=1),
        "train/played.wav": khala.prompt_ids(tags="jazz", instrumental=True, minutes=1),
    }
    assert len(read) == 2
    for each, example in zip(read, examples, strict=True):
        backbone, superres = asked[each.about["id"]]
        assert np.array_equal(example.backbone_prompt, backbone)
        assert np.array_equal(example.superres_prompt, superres)
    read[0].about["minutes"] = 99
    assert examples_of(read, LAYOUT, khala.tokenizer, lambda *_: 100)


@pytest.mark.parametrize(
    ("seconds", "minutes"), [(0.1, 1), (59, 1), (89, 1), (90, 2), (150, 3), (600, 10)]
)
def test_minutes_are_the_nearest(seconds: float, minutes: int) -> None:
    assert minutes_of(seconds) == minutes


def test_folders_of_an_earlier_version_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "codes").mkdir()
    np.savez(tmp_path / "codes" / "train-a.npz", codes=np.ones((8, 9), np.int32))
    entry = {"id": "train-a", "split": "train", "tags": "pop", "lyrics": "", "frames": 9}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
    khala = Khala.from_pretrained(tiny_folder)
    (example,) = examples_of(read_coded(tmp_path, "train"), LAYOUT, khala.tokenizer, lambda *_: 99)
    # Without lyrics, as it was trained then.
    assert np.array_equal(example.backbone_prompt, khala.prompt_ids(tags="pop")[0])


def test_subfolders_are_the_splits(tiny_folder: Path, tmp_path: Path) -> None:
    songs, out = tmp_path / "songs", tmp_path / "out"
    song(songs / "train" / "a.wav", 0, caption=None)
    song(songs / "train" / "album" / "b.wav", 1)
    song(songs / "valid" / "a.wav", 2)
    song(songs / "valid" / "same.wav", 1)
    song(songs / "stray.wav", 3)
    (songs / "train" / "metadata.jsonl").write_text('{"file": "a.wav", "tags": "x", "bpm": 99}')
    report = told(tiny_folder, songs, out)
    drawn = {"train/a.wav": "train", "train/album/b.wav": "train", "valid/a.wav": "valid"}
    assert splits(out) == drawn
    assert entries(out)["train/a.wav"]["tags"] == "x"
    left_out = [(each["file"], each["reason"], each.get("split")) for each in report["skipped"]]
    assert left_out == [
        ("stray.wav", "outside", None),
        ("valid/same.wav", "duplicate", "valid"),
    ]
    result = run(tiny_folder, songs, out)
    assert "train    2 songs" in result.stdout
    assert "  valid/same.wav: It holds the same sound as train/album/b.wav." in result.stdout


def test_songs_of_an_artist_stay_together(tiny_folder: Path, tmp_path: Path) -> None:
    songs, out = tmp_path / "songs", tmp_path / "out"
    rows = []
    for number in range(12):
        song(songs / f"{number:02d}.wav", number)
        artist = "ABCD"[number % 4] if number < 10 else ""
        rows.append(
            {"file": f"{number:02d}.wav", "artist": artist.lower() if number > 5 else artist}
        )
    (songs / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told(tiny_folder, songs, out, "--valid-share", 0.4)
    by_artist: dict[str, set[str]] = {}
    for entry in entries(out).values():
        by_artist.setdefault(entry["artist"].casefold() or entry["id"], set()).add(entry["split"])
    assert all(len(each) == 1 for each in by_artist.values())
    assert set(splits(out).values()) == {"train", "valid"}


def test_splits_are_stable(tiny_folder: Path, tmp_path: Path) -> None:
    songs, out = tmp_path / "songs", tmp_path / "out"
    song(songs / "0.wav", 0)
    with pytest.warns(KhalaWarning, match="No songs are held out"):
        prepare(songs, out, tools_of(out, str(tiny_folder), None, None))
    before: dict[str, str] = {}
    for number in range(1, 7):
        song(songs / f"{number}.wav", number)
        told(tiny_folder, songs, out)
        now = splits(out)
        assert before.items() <= now.items()
        held = list(now.values()).count("valid")
        assert held == (len(now) >= 5)
        before = now
    told(tiny_folder, songs, out, "--valid-share", 0.9)
    assert Counter(splits(out).values())["valid"] == 6


def test_splits_follow_from_content_and_seed() -> None:
    songs = [("", f"{number:x}") for number in range(400)]
    drawn = draw_splits(songs, 0.1, 0, {})
    assert drawn.count("valid") == 40
    assert draw_splits(songs, 0.1, 1, {}) != drawn
    # Songs that come later move no other.
    before = dict(zip([sound for _, sound in songs[:300]], drawn[:300], strict=True))
    assert draw_splits(songs, 0.1, 0, before)[:300] == drawn[:300]
    # Never the last, whatever the share.
    for share in (1e-9, 0.5, 1 - 1e-9):
        for few in (songs[:1], songs[:2], [("A", "1"), ("a ", "2")], [("A", "1"), ("B", "2")]):
            assert "train" in draw_splits(few, share, 0, {})
    assert [draw_splits(songs[:n], 0.1, 0, {}).count("valid") for n in (1, 4, 5, 14, 15)] == [
        0, 0, 1, 1, 2
    ]  # fmt: skip
    # An artist whose songs were apart before goes where the hash says.
    pair = [("A", "1"), ("A", "2"), ("B", "3")]
    parts = draw_splits(pair, 0.5, 0, {"1": "train", "2": "valid", "3": "train"})
    assert parts[0] == parts[1]
    assert parts[2] == "train"


def write_converter(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("ffmpeg", 'for last; do :; done; cp "$SOUND" "${last#file:}"'),
        ("afconvert", 'for last; do :; done; cp "$SOUND" "$last"'),
    ],
)
def test_a_converter_reads_m4a(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str
) -> None:
    songs, out = tmp_path / "songs", tmp_path / "out"
    song(songs / "a.wav", 1)
    song(songs / "b:c.m4a", 2).write_bytes(b"of another kind")
    soundfile.write(tmp_path / "sound.wav", noise(2), 44100)
    write_converter(tmp_path / "bin", name, script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("SOUND", str(tmp_path / "sound.wav"))
    assert told(tiny_folder, songs, out)["songs"] == 2
    wave = read_audio(songs / "b:c.m4a", 44100, 2)
    assert np.abs(wave - noise(2)).max() < 1e-4
    write_ten_hours(tmp_path / "sound.wav")
    (songs / "b:c.m4a").write_bytes(b"something new")
    assert told(tiny_folder, songs, out)["skipped"][0]["reason"] == "too long"
    write_converter(tmp_path / "bin", name, "echo no moov atom. >&2; exit 1")
    (songs / "b:c.m4a").write_bytes(b"something damaged")
    (skipped,) = told(tiny_folder, songs, out)["skipped"]
    assert skipped["detail"] == "b:c.m4a cannot be read as sound: no moov atom."


def test_a_file_that_changes_meanwhile_is_left_out(tiny_folder: Path, tmp_path: Path) -> None:
    songs, out = tmp_path / "songs", tmp_path / "out"
    for seed in range(3):
        song(songs / f"{seed}.wav", seed)
    stages: list[tuple[str, int, int]] = []

    def change(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("read", total):
            song(songs / "1.wav", 9)
            (songs / "2.wav").unlink()
        stages.append((stage, done, total))

    tools = tools_of(out, str(tiny_folder), None, None)
    with pytest.warns(KhalaWarning, match="No songs are held out"):
        report = prepare(songs, out, tools, on_progress=change)
    assert {each["file"] for each in report["skipped"]} == {"1.wav", "2.wav"}
    assert list(entries(out)) == ["0.wav"]
    assert stages[:3] == [("read", n, 3) for n in (1, 2, 3)]
    assert stages[-1] == ("encode", 1, 1)


def test_memory_and_access_cost_one_song(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs, out = tmp_path / "songs", tmp_path / "out"
    for seed in range(3):
        song(songs / f"{seed}.wav", seed)
    read, digest = hearing.read_audio, hearing.hashlib.file_digest

    def starved(path: Path, *rest: Any) -> np.ndarray:
        if path.name == "1.wav":
            raise MemoryError
        return read(path, *rest)

    def denied(file: Any, name: str) -> Any:
        if file.name.endswith("2.wav"):
            raise PermissionError(13, "Permission denied")
        return digest(file, name)

    monkeypatch.setattr(hearing, "read_audio", starved)
    monkeypatch.setattr(hearing.hashlib, "file_digest", denied)
    details = [each["detail"] for each in told(tiny_folder, songs, out)["skipped"]]
    assert details == [
        "There is not enough memory for 1.wav.", "2.wav cannot be read: Permission denied.",
    ]  # fmt: skip


def test_nothing_to_use_is_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    songs, out = tmp_path / "songs", tmp_path / "out"
    result = run(tiny_folder, songs, out)
    assert (result.exit_code, "no sound files" in result.stderr) == (1, True)
    songs.mkdir()
    for number in range(30):
        (songs / f"{number:02d}.wav").write_text("no sound")
    result = run(tiny_folder, songs, out)
    assert result.exit_code == 1
    assert "None of the sound files" in result.stderr
    assert "00.wav cannot be read as sound" in result.stderr
    song(songs / "good.wav", 0)
    song(songs / "better.wav", 1)
    result = run(tiny_folder, songs, out)
    assert result.exit_code == 0
    assert "... and 10 more, see" in result.stdout
    (songs / "train").mkdir()
    (songs / "valid").mkdir()
    tools = tools_of(out, str(tiny_folder), None, None)
    with pytest.raises(KhalaError, match="train has no sound files"):
        prepare(songs, out, tools)


def test_a_folder_may_lie_inside_its_songs(tiny_folder: Path, tmp_path: Path) -> None:
    song(tmp_path / "a.wav", 0)
    song(tmp_path / "b.wav", 1)
    song(tmp_path / "out" / "heard.wav", 2)
    for _ in range(2):
        assert told(tiny_folder, tmp_path, tmp_path / "out")["songs"] == 2


def test_a_table_of_songs_is_not_written_over(tiny_folder: Path, tmp_path: Path) -> None:
    songs = tmp_path / "songs"
    song(songs / "a.wav", 1)
    table = songs / "metadata.jsonl"
    table.write_text('{"file": "a.wav", "lyrics": "typed by hand"}\n')
    before = {path: path.read_bytes() for path in songs.iterdir()}
    for out in (songs, songs / ".." / "songs"):
        result = run(tiny_folder, songs, out)
        assert result.exit_code == 1
        assert "would be written over" in result.stderr
        assert {path: path.read_bytes() for path in songs.iterdir()} == before
    table.unlink()
    result = run(tiny_folder, songs, songs)
    assert result.exit_code == 1
    assert "where the codes are to go" in result.stderr


def test_options_that_are_no_numbers(tiny_folder: Path, tmp_path: Path) -> None:
    song(tmp_path / "songs" / "a.wav", 1)
    for option in ("--valid-share", "--max-minutes"):
        result = run(tiny_folder, tmp_path / "songs", tmp_path / "out", option, "nan")
        assert result.exit_code == 1
        assert "must be between" in result.stderr
