"""A sounddevice whose device asks for samples from a thread of its own, as PortAudio does."""

from __future__ import annotations

import sys
import threading
import types
from typing import Any

import numpy as np
import pytest


class FakeDevice(types.ModuleType):
    """Plays `speed` times as fast as a real one and keeps what was heard."""

    class PortAudioError(Exception):
        pass

    def __init__(self, error: str = "", speed: float = 50.0, stalls: bool = False) -> None:
        super().__init__("sounddevice")
        self.error, self.speed, self.stalls = error, speed, stalls
        self.blocks: list[np.ndarray] = []
        self.format: tuple[int, int] | None = None

    @property
    def heard(self) -> np.ndarray:
        return np.concatenate(self.blocks)

    def query_devices(self) -> list[dict[str, Any]]:
        return [{"name": "Fake", "max_output_channels": 2}]

    def OutputStream(self, **options: Any) -> Any:
        if self.error:
            raise self.PortAudioError(self.error)
        self.format = (options["samplerate"], options["channels"])
        return _Stream(self, **options)


class _Stream:
    def __init__(
        self, device: FakeDevice, samplerate: int, channels: int, dtype: str, callback: Any
    ) -> None:
        assert dtype == "float32"
        self.device, self.callback = device, callback
        self.frames = samplerate // 50
        self.channels, self.samplerate = channels, samplerate
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        seconds = self.frames / self.samplerate / self.device.speed
        while not self.stop.wait(seconds):
            if not self.device.stalls:
                out = np.full((self.frames, self.channels), 9, np.float32)
                self.callback(out, self.frames, None, None)
                self.device.blocks.append(out)

    def __enter__(self) -> _Stream:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def install(monkeypatch: pytest.MonkeyPatch, **options: Any) -> FakeDevice:
    """Put a fake device in the place of the real module."""
    device = FakeDevice(**options)
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    return device
