import io
import os
import pty
import select
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fake_sounddevice
import numpy as np
import pytest

from khala_mlx.audio import player
from khala_mlx.audio.player import Player, Track
from khala_mlx.cli import keyboard as keys
from khala_mlx.cli import playback
from khala_mlx.cli.playback import PositionLine, position_line
from khala_mlx.errors import AudioError

RATE = 1000


def ramp(seconds: float = 60) -> np.ndarray:
    """Samples that tell where they are from."""
    count = int(seconds * RATE)
    return np.repeat(np.arange(count)[:, None] / count, 2, axis=1).astype(np.float32)


def filled(player: Player, frames: int) -> np.ndarray:
    out = np.full((frames, 2), 9, np.float32)
    player.fill(out, frames)
    return out


def test_samples_are_played_in_order_and_end_in_silence() -> None:
    wave = ramp(1)
    playing = Player(Track.whole(wave, RATE))
    heard = np.concatenate([filled(playing, 300) for _ in range(4)])
    assert np.array_equal(heard[:1000], wave)
    assert not heard[1000:].any()
    assert playing.finished


def test_keys() -> None:
    playing = Player(Track.whole(ramp(), RATE))
    for key, expected in [
        ("right", 5),
        ("up", 35),
        ("left", 30),
        ("down", 0),
        ("left", 0),
        ("up", 30),
        ("up", 60),
        ("home", 0),
        ("x", 0),
        ("", 0),
    ]:
        assert playing.press(key)
        assert playing.position == expected * RATE, key
    assert not playing.press("q")


def test_a_pause_is_silent_and_stays() -> None:
    playing = Player(Track.whole(ramp() + 0.1, RATE))
    playing.press(" ")
    assert not filled(playing, 100).any()
    assert playing.position == 0
    playing.press(" ")
    assert filled(playing, 100).all()


def test_a_track_that_is_still_made() -> None:
    track = Track(300, 2, RATE)
    playing = Player(track)
    assert not filled(playing, 100).any()
    assert not playing.finished
    assert position_line(playing, 60).startswith("…")
    track.add(np.full((150, 2), 1.5, np.float32))
    heard = filled(playing, 200)
    assert np.all(heard[:150] == 1)
    assert not heard[150:].any()
    playing.seek(99)
    assert playing.position == 150
    track.add(np.full((999, 2), 0.5, np.float32))
    assert filled(playing, 150).all()
    assert playing.finished
    short = Track(300, 2, RATE)
    short.add(np.ones((10, 2), np.float32))
    short.end()
    assert len(short) == 10


def test_playing_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_sounddevice.install(monkeypatch)
    wave = ramp(3) + 0.001
    shown: list[int] = []
    player.play(Track.whole(wave, RATE), lambda playing: shown.append(playing.position))
    assert device.format == (RATE, 2)
    assert np.array_equal(device.heard[: len(wave)], wave.clip(-1, 1))
    assert shown == sorted(shown)
    assert shown[-1] == len(wave)


def test_playing_while_the_song_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_sounddevice.install(monkeypatch)
    wave, track = ramp(3) + 0.001, Track(3000, 2, RATE)

    def make() -> None:
        for start in range(0, 3000, 1000):
            time.sleep(0.1)
            track.add(wave[start : start + 1000])

    maker = threading.Thread(target=make)
    maker.start()
    player.play(track)
    maker.join()
    heard = device.heard[device.heard[:, 0] > 0]
    assert np.array_equal(heard, wave.clip(-1, 1))


def test_listening_while_a_song_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_sounddevice.install(monkeypatch)
    wave, track = ramp(3) + 0.001, Track(9000, 2, RATE)
    with player.heard_while_made(track) as listened:
        assert listened()
        track.add(wave)
    # It ended before the length that was expected.
    assert np.array_equal(device.heard[device.heard[:, 0] > 0], wave.clip(-1, 1))
    with pytest.raises(ValueError, match="broken"), player.heard_while_made(Track(10**6, 2, RATE)):
        raise ValueError("broken")
    fake_sounddevice.install(monkeypatch, error="none")
    with pytest.raises(AudioError, match="none"), player.heard_while_made(track):
        pass


def test_q_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sounddevice.install(monkeypatch)
    pressed: Iterator[str] = iter(["", "q"])
    player.play(Track.whole(ramp(600), RATE), keys=lambda _: next(pressed))


def test_a_device_that_stops_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sounddevice.install(monkeypatch, stalls=True)
    monkeypatch.setattr(player, "_PATIENCE", 0.2)
    with pytest.raises(AudioError, match="stopped asking"):
        player.play(Track.whole(ramp(), RATE))


def test_no_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sounddevice.install(monkeypatch, error="Error querying device -1")
    with pytest.raises(AudioError, match=r"may be no audio device: Error querying device -1\.$"):
        player.play(Track.whole(ramp(), RATE))


def test_no_portaudio_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(AudioError, match="needs PortAudio"):
        player.play(Track.whole(ramp(), RATE))


@pytest.mark.parametrize("columns", [1, 8, 20, 30, 79])
def test_the_line_fits(columns: int) -> None:
    playing = Player(Track.whole(ramp(130), RATE))
    playing.seek(65)
    line = position_line(playing, columns)
    assert len(line) <= columns
    assert "▶ 1:05 / 2:10".startswith(line[:13])
    if columns > 30:
        assert line.count("━") == line.count("─")
    playing.paused = True
    assert position_line(playing, 79).startswith("‖")


def test_a_pipe_gets_no_line() -> None:
    stream = io.StringIO()
    line = PositionLine(stream)
    line(Player(Track.whole(ramp(), RATE)))
    line.close()
    assert stream.getvalue() == ""


@contextmanager
def in_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The leading end of a pseudo-terminal that is standard input and error.

    No fixture, as pytest puts its own streams back between a fixture and its test.
    """
    leader, follower = pty.openpty()
    with os.fdopen(follower, "r", closefd=False) as source, os.fdopen(follower, "w") as sink:
        monkeypatch.setattr(sys, "stdin", source)
        monkeypatch.setattr(sys, "stderr", sink)
        yield leader
        os.close(leader)


def test_keys_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_terminal(monkeypatch) as terminal:
        before = termios.tcgetattr(sys.stdin.fileno())
        with keys.single_keys() as read:
            for sent, name in [
                (b"q", "q"),
                (b" ", " "),
                (b"\x1b[D", "left"),
                (b"\x1bOC", "right"),
                (b"\x1b[H", "home"),
                (b"\x1b", ""),
                (b"\x1b[99Q", ""),
                (b"\xff", "\ufffd"),
            ]:
                os.write(terminal, sent)
                assert read(5) == name
            assert read(0.01) == ""
            os.write(terminal, b"\x1b[C\x1b[C\x1b[Dq")
            assert [read(5) for _ in range(4)] == ["right", "right", "left", "q"]
            # Echo off, line mode off; Ctrl-C still is one.
            now = termios.tcgetattr(sys.stdin.fileno())[3]
            assert not now & (termios.ECHO | termios.ICANON)
            assert now & termios.ISIG
        assert termios.tcgetattr(sys.stdin.fileno()) == before


def test_seeking_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_sounddevice.install(monkeypatch, speed=1)
    with in_terminal(monkeypatch) as terminal:
        timers = [threading.Timer(0.3, os.write, (terminal, b"\x1b[A"))]
        timers += [threading.Timer(1.0, os.write, (terminal, b"q"))]
        for timer in timers:
            timer.start()
        playback.play_in_terminal(Track.whole(ramp(60), RATE))
        shown = b""
        while select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096)
    text = shown.decode()
    assert playback.HELP in text
    assert "▶ 0:00 / 1:00 ─" in text
    assert "▶ 0:30 / 1:00 ━" in text
    assert device.heard.max() >= 0.5
