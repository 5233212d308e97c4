"""Playback with seeking, of finished sound or sound that is still being made."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np

from khala_mlx.errors import AudioError, KhalaWarning

# Seconds that the keys jump.
STEPS = {"left": -5.0, "right": 5.0, "down": -30.0, "up": 30.0}
# Seconds between two looks at the keys and two drawings of the position.
_TICK = 0.1
# A device that has not asked for samples for so long has stopped, as when it was unplugged.
_PATIENCE = 5.0


class Track:
    """Samples [L, C] of known length; the first `ready` exist, and `add` appends more."""

    def __init__(self, samples: int, channels: int, sample_rate: int) -> None:
        self._samples = np.zeros((samples, channels), np.float32)
        self.sample_rate = sample_rate
        self.ready = 0

    @classmethod
    def whole(cls, waveform: np.ndarray, sample_rate: int) -> Track:
        """A track that is all there."""
        track = cls(len(waveform), waveform.shape[1], sample_rate)
        track.add(waveform)
        return track

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def channels(self) -> int:
        """Channels."""
        return int(self._samples.shape[1])

    def add(self, block: np.ndarray) -> None:
        """Append samples [n, C]; what exceeds full scale is cut there, as a device would."""
        stop = min(self.ready + len(block), len(self))
        self._samples[self.ready : stop] = np.clip(block[: stop - self.ready], -1, 1)
        self.ready = stop

    def end(self, samples: int | None = None) -> None:
        """Say that nothing will be added: the track ends where it is, or after `samples`."""
        self.ready = self.ready if samples is None else min(samples, self.ready)
        self._samples = self._samples[: self.ready]

    def read(self, start: int, samples: int) -> np.ndarray:
        """At most `samples` of what is ready from `start` on."""
        return self._samples[start : min(start + samples, self.ready)]


class Player:
    """Where in a track the playback is; `fill` is called by the device's own thread."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self.position = 0
        self.paused = False
        self.asked = time.monotonic()
        self._lock = threading.Lock()

    @property
    def finished(self) -> bool:
        """Whether the end was reached; waiting for samples is not the end."""
        return self.position >= len(self.track)

    def fill(self, out: np.ndarray, frames: int, *_: object) -> None:
        """Write the next `frames` samples into out [frames, C], silence where there are none."""
        self.asked = time.monotonic()
        with self._lock:
            block = self.track.read(self.position, 0 if self.paused else frames)
            self.position += len(block)
        out[: len(block)] = block
        out[len(block) :] = 0

    def seek(self, seconds: float) -> None:
        """Go to a time in seconds from the start, within what is ready."""
        with self._lock:
            wanted = round(seconds * self.track.sample_rate)
            self.position = min(max(0, wanted), self.track.ready)

    def press(self, key: str) -> bool:
        """Act on a key; whether playing continues."""
        if key in ("q", "Q"):
            return False
        if key == " ":
            self.paused = not self.paused
        elif key == "home":
            self.seek(0)
        elif key in STEPS:
            self.seek(self.position / self.track.sample_rate + STEPS[key])
        return True


def play(
    track: Track,
    show: Callable[[Player], None] | None = None,
    keys: Callable[[float], str] | None = None,
) -> None:
    """Play a track on the default device until its end or the key q.

    Args:
        show: called about ten times a second and at the end.
        keys: called with seconds; waits so long for a key and returns its name, or "".

    Raises:
        AudioError: if there is no PortAudio or no device, or the device stops.
    """
    player = Player(track)
    with _device(track, player.fill):
        while not player.finished:
            if show:
                show(player)
            if keys is None:
                time.sleep(_TICK)
            elif not player.press(keys(_TICK)):
                break
            if time.monotonic() - player.asked > _PATIENCE:
                raise AudioError("The audio device has stopped asking for sound.")
        if show:
            show(player)


@contextmanager
def heard_while_made(
    track: Track, play: Callable[[Track], None] = play
) -> Iterator[Callable[[], bool]]:
    """Play a track in a thread of its own while the block adds to it, then until its end.

    Yields:
        Whether anybody still listens.

    Raises:
        AudioError: at the end, see `play`.
    """
    failure: list[AudioError] = []

    def target() -> None:
        try:
            play(track)
        except AudioError as error:
            failure.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    try:
        yield thread.is_alive
    except BaseException:
        track.end(0)
        raise
    finally:
        track.end()
        thread.join()
    if failure:
        raise failure[0]


class Live:
    """Plays a song from the first piece that is rendered on; a failure is a warning at the end."""

    def __init__(
        self,
        sample_rate: int,
        shape: Callable[[np.ndarray, int, int], np.ndarray] | None = None,
        play: Callable[[Track], None] = play,
    ) -> None:
        """`shape` makes of a block [n, C], where it starts and the song's samples what is heard."""
        self._rate, self._shape, self._play = sample_rate, shape, play
        self._track: Track | None = None
        self._stack = ExitStack()

    def __call__(self, block: np.ndarray, samples: int) -> None:
        """Add samples [n, C] of a song of `samples` samples; see OnSound."""
        if self._track is None:
            self._track = Track(samples, block.shape[1], self._rate)
            self._stack.enter_context(heard_while_made(self._track, self._play))
        if self._shape:
            block = self._shape(block, self._track.ready, samples)
        self._track.add(block)

    def stop(self) -> None:
        """Be silent at once."""
        if self._track:
            self._track.end(0)
        with suppress(AudioError):
            self._stack.close()

    def finish(self) -> None:
        """Play to the end; no device is a KhalaWarning, as the song is written."""
        try:
            self._stack.close()
        except AudioError as error:
            warnings.warn(f"{error} The song is written.", KhalaWarning, stacklevel=2)


@contextmanager
def _device(track: Track, fill: Callable[..., None]) -> Iterator[None]:
    """The default device, asking `fill` for samples; plays out what it holds at the end."""
    try:
        # Raises OSError at import where PortAudio is missing, so it waits until now.
        import sounddevice
    except OSError as error:
        raise AudioError(
            "Playing needs PortAudio, which is missing here: install it (on Linux "
            "`apt install libportaudio2`) or open the written file in a player."
        ) from error
    try:
        with sounddevice.OutputStream(
            samplerate=track.sample_rate, channels=track.channels, dtype="float32", callback=fill
        ):
            yield
    except sounddevice.PortAudioError as error:
        reason = str(error).rsplit(": ", 1)[-1].rstrip(".")
        raise AudioError(
            f"No sound could be played, there may be no audio device: {reason}."
        ) from error
