import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khala_mlx import Khala
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec
from khala_mlx.model.superres import SuperRes
from khala_mlx.pipeline.plan import Plan
from khala_mlx.storage import readahead as ahead
from khala_mlx.storage.readahead import ReadAhead


def cached(path: Path) -> bool:
    """Whether the system has the first bytes of a file in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is in its file cache")
def test_files_are_in_memory_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    try:
        if cached(path):
            pytest.skip("this file system keeps all files in memory")
    except OSError:
        pytest.skip("this file system does not tell")
    ReadAhead([path]).wait()
    assert cached(path)


def test_missing_files_are_for_the_loader_to_tell(tmp_path: Path) -> None:
    ReadAhead([tmp_path / "absent"]).wait()


def test_stopping_ends_a_long_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_BLOCK", 1)
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 24))
    before = threading.active_count()
    ReadAhead([path]).stop()
    assert threading.active_count() == before


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which files were read ahead, and when the stages ended."""
    told: list[str] = []

    class Told(ReadAhead):
        def __init__(self, paths: list[Path]) -> None:
            super().__init__(paths)
            told.extend(path.name for path in paths)

    def ending(kind: type, method: str) -> None:
        work = getattr(kind, method)

        def run(self: Any, *rest: Any, **named: Any) -> Any:
            result = work(self, *rest, **named)
            if told[-1:] != [method]:
                told.append(method)
            return result

        monkeypatch.setattr(kind, method, run)

    monkeypatch.setattr("khala_mlx.pipeline.parts.ReadAhead", Told)
    for kind, method in ((Backbone, "compose_many"), (SuperRes, "refine"), (Codec, "decode")):
        ending(kind, method)
    return told


def sing(khala: Khala) -> np.ndarray:
    return khala.generate(tags="pop", seconds=0.2, min_seconds=0.2, seed=5).waveform


def test_the_next_part_is_read_while_one_computes(
    tiny_folder: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    khala = Khala.from_pretrained(tiny_folder, keep_loaded=False)
    plenty = sing(khala)
    ahead_of_all = ["superres.safetensors", "compose_many", "codec.safetensors", "refine", "decode"]
    assert events == ahead_of_all
    events.clear()
    with monkeypatch.context() as without_room:
        without_room.setattr(Plan, "ahead_of", lambda *_: None)
        assert np.array_equal(sing(khala), plenty)
    assert events == ["compose_many", "refine", "decode"]
    # What is loaded already is not read again.
    khala = Khala.from_pretrained(tiny_folder)
    assert np.array_equal(sing(khala), plenty)
    events.clear()
    assert np.array_equal(sing(khala), plenty)
    assert events == ["compose_many", "refine", "decode"]
