import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import soundfile
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import alone, launched, needs_ring

from khala_mlx.cli import main
from khala_mlx.cli.commands.batch import keep_awake
from khala_mlx.errors import KhalaError
from khala_mlx.model.codec import Codec
from khala_mlx.song.song_list import State, owners, read_list

SHORT = {"seconds": 0.1, "min_seconds": 0.1}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(*entries: Any) -> Path:
    path = Path("songs.jsonl")
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries))
    return path


def batch(model: Path, *arguments: Any) -> Result:
    return CliRunner().invoke(main, ["batch", "-m", str(model), *map(str, arguments)])


def test_a_list_is_made_and_errors_stay_with_their_song(tiny_folder: Path) -> None:
    path = write(
        {**SHORT, "tags": "pop", "seed": 1, "output": "a.mp3", "title": "First"},
        "no json",
        {**SHORT, "tempo": 3},
        {**SHORT, "minutes": 11, "output": "c.wav"},
        {**SHORT, "seed": 2},
        {**SHORT, "output": "../evil.wav"},
        {**SHORT, "output": "A.wav"},
    )
    result = batch(tiny_folder, path, "--out", "songs", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    states = [each["state"] for each in told["songs"]]
    assert states == ["made", "failed", "failed", "failed", "made", "failed", "failed"]
    assert (told["made"], told["failed"], told["not_begun"]) == (2, 5, 0)
    errors = [each.get("error", "") for each in told["songs"]]
    for error, sentence in zip(
        errors,
        ["", "one JSON object", "tempo", "1..10", "", "without folders", "output of line 1"],
        strict=True,
    ):
        assert sentence in error
    names = sorted(p.name for p in Path("songs").iterdir())
    assert [n for n in names if "take" not in n] == [
        "a.json", "a.mp3", "song-0005.json", "song-0005.wav",
    ]  # fmt: skip
    with soundfile.SoundFile("songs/a.mp3") as file:
        assert file.title == "First"
    # A pipe gets one line a song.
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Warning")]
    assert len(lines) == 7
    assert lines[0] == "1/7 a.mp3: made"
    assert not Path("evil.wav").exists()


def test_names_that_cannot_be_are_errors_of_their_own_lines(tiny_folder: Path) -> None:
    path = write(
        {**SHORT, "output": "x" * 300 + ".wav"},
        {**SHORT, "output": "y" * 240 + ".wav"},
        {**SHORT, "title": "\ud800"},
        {"min-seconds": 1},
        {"minutes": None},
        {**SHORT, "output": "last.wav"},
    )
    result = batch(tiny_folder, path, "--json")
    told = json.loads(result.stdout)
    assert [each["state"] for each in told["songs"]] == ["failed"] * 5 + ["made"]
    errors = [each["error"] for each in told["songs"][:5]]
    sentences = ["too long", "too long", "must be text", "Did you mean 'min_seconds'?", "minutes"]
    for error, sentence in zip(errors, sentences, strict=True):
        assert sentence in error
        assert error.count("line ") == 1


def test_empty_rows_of_a_spreadsheet_are_no_songs() -> None:
    Path("a.csv").write_text("tags,minutes,lyrics\npop,1,la\n,,\n , ,\n,,\nrock,,\n\n")
    assert [entry.values for entry in read_list(Path("a.csv"))] == [
        {"tags": "pop", "minutes": 1, "lyrics": "la"},
        {"tags": "rock"},
    ]


def test_short_memory_for_one_song_leaves_the_others(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = Codec.decode

    def short_once(self: Codec, *rest: Any, **named: Any) -> Any:
        monkeypatch.setattr(Codec, "decode", render)
        raise RuntimeError("[metal::malloc] Resource limit exceeded.")

    monkeypatch.setattr(Codec, "decode", short_once)
    result = batch(tiny_folder, write({**SHORT, "seed": 1}, {**SHORT, "seed": 2}), "--json")
    first, second = json.loads(result.stdout)["songs"]
    assert (first["state"], second["state"]) == ("failed", "made")
    assert first["error"] == "line 1: [metal::malloc] Resource limit exceeded."


def test_the_same_command_again_makes_what_is_missing(tiny_folder: Path) -> None:
    path = write({**SHORT, "tags": "pop", "output": "a.wav"}, {**SHORT, "output": "b.wav"})
    assert batch(tiny_folder, path).exit_code == 0
    before = Path("a.wav").read_bytes()
    kept = json.loads(Path("b.json").read_text())["request"]["seed"]
    # As if it had been stopped with b's take written and its sound not.
    Path("b.wav").unlink()
    Path("b.json").unlink()
    told = json.loads(batch(tiny_folder, path, "--json").stdout)
    assert [each["state"] for each in told["songs"]] == ["there already", "made"]
    assert Path("a.wav").read_bytes() == before
    assert json.loads(Path("b.json").read_text())["request"]["seed"] == kept
    path = write({**SHORT, "tags": "rock", "output": "a.wav"})
    assert "Another song has this output" in batch(tiny_folder, path).stderr


def test_csv(tiny_folder: Path) -> None:
    Path("songs.csv").write_text(
        "\ufefftags,lyrics,seed,seconds,min_seconds,instrumental,output,refine_seed\n"
        'pop,"la\nla",7,0.1,0.1,no,a.wav,9\n'
        "pop,,8,0.1,0.1,yes,b.wav\n"
        "pop,,x,0.1,0.1,perhaps,c.wav\n"
        "pop,,1,1,1,yes,d.wav,,more\n"
        # More digits than Python makes a number of.
        f"pop,,1,1,1,yes,e.wav,{'9' * 5000}\n",
        encoding="utf-8",
    )
    told = json.loads(batch(tiny_folder, "songs.csv", "--json").stdout)
    assert [e["state"] for e in told["songs"]] == ["made", "made", *["failed"] * 3]
    request = json.loads(Path("a.json").read_text())["request"]
    assert (request["lyrics"], request["seed"], request["instrumental"]) == ("la\nla", 7, False)
    assert request["refine_seed"] == 9


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b"", "names no songs"),
        ("a.txt", b"{}", ".jsonl or .csv"),
        ("a.jsonl", b"\xff\xfe", "not valid UTF-8"),
        ("absent.jsonl", None, "cannot be read"),
    ],
)
def test_wrong_lists(tiny_folder: Path, name: str, content: bytes | None, sentence: str) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    result = batch(tiny_folder, name)
    assert result.exit_code == 1
    assert sentence in result.stderr


TEXT = st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))
CONTENT = st.binary(max_size=300) | TEXT
# Lists are read in a millisecond; writing them takes longer.
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


def is_one_line(error: KhalaError, *parts: str) -> bool:
    return "\n" not in str(error) and all(part in str(error) for part in parts)


@FUZZ
@given(content=CONTENT)
def test_lists_of_anything(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    told: list[bool] = []
    for name in ("a.jsonl", "a.csv"):
        (folder / name).write_bytes(content)
        try:
            entries = read_list(folder / name)
        except KhalaError as error:
            told.append(is_one_line(error))
            continue
        assert all(entry.error or not set(entry.output) & set("/\\") for entry in entries)
    assert all(told)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.lists(st.integers())
)
FIELDS = st.sampled_from(["tags", "lyrics", "minutes", "seed", "output", "title", "seconds", "x"])


@FUZZ
@given(values=st.dictionaries(FIELDS, VALUES, max_size=4))
def test_entries_of_anything(tmp_path_factory: pytest.TempPathFactory, values: Any) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.jsonl").write_text(json.dumps(values))
    told: list[bool] = []
    for entry in read_list(folder / "a.jsonl"):
        inside = (folder / entry.output).resolve().parent == folder.resolve()
        assert inside
        if not entry.error:
            try:
                entry.request(0)
            except KhalaError as error:
                told.append(is_one_line(error, f"line {entry.line}"))
    assert all(told)


SLOW = """
import sys, time
from khala_mlx.pipeline.khala import Khala
make = Khala.finish
def slowly(self, *rest, **named):
    print("making", flush=True)
    time.sleep(1.5)
    return make(self, *rest, **named)
Khala.finish = slowly
from khala_mlx.cli import main
main(sys.argv[1:])
"""


def started(model: Path, path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "batch", "-m", str(model), str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    process.send_signal(signal.SIGINT)
    return process


@pytest.mark.extended
def test_ctrl_c_once_finishes_the_song_at_hand(tiny_folder: Path) -> None:
    path = write({**SHORT, "output": "a.wav"}, {**SHORT, "output": "b.wav"})
    process = started(tiny_folder, path)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Finishing the current song" in stderr
    assert "not_begun      1" in stdout
    assert Path("a.wav").exists()
    assert not Path("b.take.safetensors").exists()


def test_ctrl_c_twice_stops(tiny_folder: Path) -> None:
    process = started(tiny_folder, write({**SHORT, "output": "a.wav"}))
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < 1.4
    assert process.returncode == 1
    assert "Stopped" in stderr
    assert stderr.count("Finishing the current song") == 1
    assert not Path("a.wav").exists()


@settings(deadline=None)
@given(data=st.data(), ranks=st.integers(1, 4), songs=st.integers(0, 9))
def test_each_song_has_one_owner(data: st.DataObject, ranks: int, songs: int) -> None:
    rows = st.lists(st.sampled_from(State), min_size=songs, max_size=songs)
    states = data.draw(st.lists(rows, min_size=ranks, max_size=ranks))
    result = owners(states)
    assert len(result) == songs
    # A song that is there or begun somewhere is not made again elsewhere.
    for song, owner in enumerate(result):
        assert states[owner][song] == max(row[song] for row in states)
    fresh = owners([[State.ABSENT] * songs] * ranks)
    assert [fresh.count(rank) for rank in range(ranks)] == [
        len(range(rank, songs, ranks)) for rank in range(ranks)
    ]


# Process 1 is killed in its second song, once that is composed.
DIES = """
import os, sys
from khala_mlx.performance.blas import load
load()
from khala_mlx.model.superres import SuperRes
refine, calls = SuperRes.refine, []
def mortal(self, *rest, **named):
    calls.append(1)
    if os.environ["MLX_RANK"] == "1" and len(calls) == 2:
        os.kill(os.getpid(), 9)
    return refine(self, *rest, **named)
SuperRes.refine = mortal
from khala_mlx.cli import main
main(sys.argv[1:])
"""


@needs_ring
@pytest.mark.extended
def test_processes_share_a_list(tiny_folder: Path) -> None:
    songs = [{**SHORT, "tags": "pop", "seed": seed} for seed in range(4)]
    path = write(*songs[:2], "no json", *songs[2:])
    command = ["batch", "-m", tiny_folder, path, "--json", "--out"]

    def sounds(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(folder).glob("*.wav")}

    assert json.loads(alone(*command, "one").stdout)["made"] == 4
    together = launched(2, *command, "two")
    told = json.loads(together.stdout)
    assert [each["line"] for each in told["songs"]] == list(range(1, 6))
    assert (told["made"], told["failed"], told["not_begun"]) == (4, 1, 0)
    assert sounds("two") == sounds("one")
    assert len(sounds("one")) == 4

    died = launched(2, *command, "three", code=DIES)
    assert died.stdout == ""
    left = {path: path.stat().st_mtime_ns for path in Path("three").glob("*.wav")}
    assert 1 <= len(left) < 4
    assert len(list(Path("three").glob("*.take.safetensors"))) > len(left)
    # What process 1 did not come to is done by whoever is there.
    told = json.loads(alone(*command, "three").stdout)
    assert (told["made"], told["there_already"]) == (4 - len(left), len(left))
    assert sounds("three") == sounds("one")
    assert all(path.stat().st_mtime_ns == time for path, time in left.items())


@needs_ring
@pytest.mark.extended
def test_processes_with_different_lists_stop(tiny_folder: Path) -> None:
    for rank in range(2):
        Path(f"{rank}.jsonl").write_text(json.dumps({**SHORT, "seed": rank}))
    code = """
import os, sys
from khala_mlx.cli import main
main([*sys.argv[1:], os.environ["MLX_RANK"] + ".jsonl"])
"""
    result = launched(2, "batch", "-m", tiny_folder, code=code)
    assert "do not start from the same list of songs" in result.stderr
    assert not list(Path().glob("*.wav"))


class Caffeinate:
    def __init__(self) -> None:
        self.command: list[str] = []
        self.ended = False

    def __call__(self, command: list[str], **_: Any) -> "Caffeinate":
        self.command = command
        return self

    def terminate(self) -> None:
        self.ended = True

    def wait(self) -> None:
        assert self.ended


def test_a_mac_stays_awake() -> None:
    fake = Caffeinate()
    with keep_awake("darwin", fake):
        assert fake.command == ["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]
        assert not fake.ended
    assert fake.ended
    other = Caffeinate()
    with keep_awake("linux", other):
        assert other.command == []

    def absent(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    with keep_awake("darwin", absent):
        pass
