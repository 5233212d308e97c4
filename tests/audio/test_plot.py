import sys
from pathlib import Path

import numpy as np
import pytest

from khala_mlx.audio import plot as picture
from khala_mlx.audio.mel import mel_decibels, mel_edges
from khala_mlx.errors import KhalaError

RATE = 22050


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)
    return np.stack([wave, wave], axis=1).astype(np.float32)


@pytest.mark.parametrize("hertz", [300, 1000, 5000])
def test_a_tone_is_in_its_band(hertz: float) -> None:
    level = mel_decibels(tone(hertz)[:, 0], RATE, bands=64, length=2048, hop=512)
    loudest = level[5:-5].argmax(axis=1)
    peaks = mel_edges(RATE, 64)[1:-1]
    assert np.abs(peaks[loudest] - hertz).max() < 0.1 * hertz
    assert level.max() == 0
    assert level.min() >= -80


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
def test_a_song_is_drawn(tmp_path: Path, name: str) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (8, 30))
    sound = (tone(440), RATE)
    picture.draw(tmp_path / name, title="cost $5_$", sound=sound, codes=codes, frame_rate=30)
    assert (tmp_path / name).stat().st_size > 5000
    picture.draw(tmp_path / f"codes-{name}", codes=codes)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_waveform_reaches_the_picture(tmp_path: Path) -> None:
    from matplotlib.image import imread

    for name, level in (("loud.png", 1.0), ("quiet.png", 0.1)):
        picture.draw(tmp_path / name, sound=(level * tone(440), RATE))
    loud, quiet = (imread(tmp_path / name) for name in ("loud.png", "quiet.png"))
    # The upper panel: blue where the waveform is.
    blue = [(im[: im.shape[0] // 2, ..., 2] > im[: im.shape[0] // 2, ..., 0] + 0.3).sum()
            for im in (loud, quiet)]  # fmt: skip
    assert blue[0] > 5 * blue[1] > 0


def test_one_sample_can_be_drawn(tmp_path: Path) -> None:
    picture.draw(tmp_path / "a.png", sound=(np.zeros((1, 1), np.float32), RATE))


def test_wrong_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.png").write_text("")
    for name, sentence in [("a.jpg", r"\.png, \.svg, \.pdf"), ("there.png", "exists already")]:
        with pytest.raises(KhalaError, match=sentence):
            picture.check_picture(tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KhalaError, match=r"khala-mlx\[plot\]"):
        picture.check_picture(tmp_path / "a.png")
