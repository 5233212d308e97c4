import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from khala_mlx.errors import KhalaError
from khala_mlx.storage.atomic import (
    appears_whole,
    check_destination,
    discard_unfinished,
    provisional,
)


def test_a_file_appears_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "song.wav"
    with appears_whole(target) as temporary:
        assert temporary.suffix == ".wav"
        temporary.write_text("sound")
        assert not target.exists()
    assert target.read_text() == "sound"
    assert [p.name for p in target.parent.iterdir()] == ["song.wav"]


def test_a_folder_appears_when_whole(tmp_path: Path) -> None:
    with appears_whole(tmp_path / "model", folder=True) as temporary:
        (temporary / "config.json").write_text("{}")
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize("folder", [False, True])
def test_nothing_is_left_of_a_failure(tmp_path: Path, folder: bool) -> None:
    def fail() -> None:
        with appears_whole(tmp_path / "x", folder=folder) as temporary:
            (temporary / "a" if folder else temporary).write_text("half")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("x", "link"):
        with (
            pytest.raises(KhalaError, match="exists already"),
            appears_whole(tmp_path / name),
        ):
            pytest.fail("the block must not run")
    assert (tmp_path / "x").read_text() == "kept"
    with appears_whole(tmp_path / "x", overwrite=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "x").read_text() == "new"


def test_a_name_taken_meanwhile_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(KhalaError, match="exists already"),
        appears_whole(tmp_path / "x") as temporary,
    ):
        temporary.write_text("late")
        (tmp_path / "x").write_text("first")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "first"


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (False, True):
        with (
            pytest.raises(KhalaError, match=r"x cannot be written: .*\.$"),
            appears_whole(tmp_path / "file" / "x", folder=folder),
        ):
            pytest.fail("the block must not run")


def test_discarding_removes_what_is_unfinished(tmp_path: Path) -> None:
    with (
        pytest.raises(KhalaError, match="cannot be written"),
        appears_whole(tmp_path / "x") as path,
    ):
        path.write_text("half")
        discard_unfinished()
        assert list(tmp_path.iterdir()) == []


def test_mlx_without_room_is_one_sentence(tmp_path: Path) -> None:
    def save() -> None:
        with appears_whole(tmp_path / "x.safetensors"):
            raise RuntimeError("[write] Unable to write 9 bytes to file.")

    with pytest.raises(KhalaError, match=r"x\.safetensors cannot be written. The disk may be full"):
        save()
    with pytest.raises(RuntimeError, match="other"), appears_whole(tmp_path / "y"):
        raise RuntimeError("other")
    assert list(tmp_path.iterdir()) == []


def test_a_place_is_checked_before_the_work(tmp_path: Path) -> None:
    check_destination(tmp_path / "deep" / "er" / "song.wav")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "song.wav", tmp_path / ("a" * 300 + ".wav")):
        with pytest.raises(KhalaError, match=r"cannot be written: .*\.$"):
            check_destination(path)
    with pytest.raises(KhalaError, match="exists already"):
        check_destination(tmp_path / "file")


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with appears_whole(tmp_path / "song.wav") as ours:
        mine = ours.name
        ours.write_text("half")
        dead = [mine.replace(str(os.getpid()), str(number)) for number in (ended.pid, 2**70)]
        alive = mine.replace(str(os.getpid()), str(os.getppid()))
        elsewhere = re.sub("khala-......-", "khala-000000-", dead[0])
        for name in (*dead, alive, elsewhere, ".song.wav", "song.khala-1.wav"):
            (tmp_path / name).write_text("x")
        (tmp_path / dead[0].replace(".wav", "")).mkdir()
        check_destination(tmp_path / "other.wav")
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {mine, alive, elsewhere, ".song.wav", "song.khala-1.wav"}
    # Of this very process, which may have got the number of a dead one.
    (tmp_path / mine).write_text("x")
    with appears_whole(tmp_path / "third.wav") as path:
        path.write_text("x")
    assert mine not in {path.name for path in tmp_path.iterdir()}


def test_sweeping_follows_no_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    with appears_whole(tmp_path / "a.wav") as path:
        name = path.name
        path.write_text("x")
    (tmp_path / name).symlink_to(tmp_path / "kept")
    check_destination(tmp_path / "b.wav")
    assert (tmp_path / "kept" / "file").exists()
    assert not (tmp_path / name).is_symlink()


def test_a_name_that_is_too_long_is_refused_and_forgotten(tmp_path: Path) -> None:
    with (
        pytest.raises(KhalaError, match="cannot be written: File name too long"),
        appears_whole(tmp_path / ("x" * 250)) as temporary,
    ):
        temporary.write_text("")
    discard_unfinished()


def test_what_is_provisional_goes_unless_settled(tmp_path: Path) -> None:
    path = tmp_path / "take"
    for settled in (False, True):
        path.write_text("x")
        with pytest.raises(ValueError), provisional(path) as settle:  # noqa: PT011
            if settled:
                settle()
            raise ValueError
        assert path.exists() == settled
    with provisional(path):
        discard_unfinished()
    assert not path.exists()
