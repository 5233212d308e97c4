import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from khala_mlx.audio import files as audio
from khala_mlx.errors import AudioError, KhalaError, KhalaWarning


def tone(seconds: float = 0.5, level: float = 0.5) -> np.ndarray:
    time = np.arange(int(44100 * seconds)) / 44100
    wave = level * np.sin(2 * np.pi * 440 * time)
    return np.stack([wave, -wave], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "depth", "error"),
    [
        ("a.wav", "16", 4e-5),
        ("a.wav", "24", 2e-7),
        ("a.wav", "float", 0),
        ("a.flac", "24", 2e-7),
        ("a.flac", "16", 4e-5),
        ("a.ogg", "16", 0.1),
        ("a.mp3", "16", 0.1),
        ("A.WAV", "16", 4e-5),
    ],
)
def test_files_read_back(tmp_path: Path, name: str, depth: str, error: float) -> None:
    path, wave = tmp_path / name, tone()
    audio.write_audio(path, wave, 44100, bit_depth=depth, tags={"title": "a song"})
    back = audio.read_audio(path, 44100, 2)
    middle = slice(4000, 16000)
    assert back.dtype == np.float32
    assert np.abs(back[middle] - wave[middle]).max() <= error + 1e-9
    with soundfile.SoundFile(path) as file:
        assert file.title == "a song"


def test_a_long_ogg_is_written_in_blocks(tmp_path: Path) -> None:
    audio.write_audio(tmp_path / "a.ogg", tone(60), 44100)
    assert soundfile.info(tmp_path / "a.ogg").duration == pytest.approx(60)


def test_beyond_full_scale_is_turned_down_and_told() -> None:
    with pytest.warns(KhalaWarning, match=r"turned down by 7\.0 dB"):
        wave, report = audio.fit_scale(tone(level=2.0), normalize=True)
    assert np.abs(wave).max() == pytest.approx(10 ** (-1 / 20), abs=1e-5)
    assert report["samples_over"] > 1000
    assert report["gain_db"] == pytest.approx(-7.02, abs=0.01)


def test_beyond_full_scale_is_kept_when_asked() -> None:
    with pytest.warns(KhalaWarning, match="they clip"):
        wave, report = audio.fit_scale(tone(level=2.0), normalize=False)
    assert np.abs(wave).max() > 1.9
    assert report["gain_db"] == 0


def test_within_full_scale_nothing_changes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wave in (tone(), np.zeros((10, 2), np.float32)):
            scaled, report = audio.fit_scale(wave, normalize=True)
            assert scaled is wave
            assert report["samples_over"] == 0


def test_sixteen_bit_files_equal_upstreams(oracle: Path, tmp_path: Path) -> None:
    import mlx.core as mx

    golden = mx.load(str(oracle / "goldens" / "end_to_end.safetensors"))
    audio.write_audio(tmp_path / "x.wav", np.array(golden["single.wave"]), 44100)
    ours, _ = soundfile.read(tmp_path / "x.wav", dtype="int16")
    theirs, _ = soundfile.read(oracle / "goldens" / "e2e_single.wav", dtype="int16")
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_mono_is_copied_to_both_channels(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "mono.wav", tone()[:, 0], 44100)
    assert audio.read_audio(tmp_path / "mono.wav", 44100, 2).shape == (22050, 2)


@pytest.mark.parametrize("rate", [8000, 22050, 48000, 96000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    time = np.arange(rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate, subtype="FLOAT")
    wave = audio.read_audio(tmp_path / "a.wav", 44100, 2)
    assert wave.shape == (44100, 2)
    assert audio.sound_length(tmp_path / "a.wav", 44100) == 44100
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)
    assert np.abs(wave[4000:-4000, 0] - expected[4000:-4000]).max() < 1e-5
    part = audio.read_audio(tmp_path / "a.wav", 44100, 2, start=300, samples=50)
    assert np.array_equal(part, wave[300:350])


def test_what_a_lower_rate_cannot_hold_is_filtered_out(tmp_path: Path) -> None:
    time = np.arange(96000) / 96000
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 30000 * time), 96000)
    assert np.abs(audio.read_audio(tmp_path / "a.wav", 44100, 1)[4000:-4000]).max() < 1e-4


def test_a_stream_without_a_length_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", tone(), 44100)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    # 36 bits of the stream's header, 0 where the encoder could not know.
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(content)
    for read in (audio.sound_length, lambda path, rate: audio.read_audio(path, rate, 2)):
        with pytest.raises(AudioError, match="does not state its length"):
            read(tmp_path / "a.flac", 44100)


def test_wrong_sound_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "three.wav", np.zeros((9, 9)), 44100)
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), 44100)
    soundfile.write(tmp_path / "nan.wav", np.full((9, 2), np.nan), 44100, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no sound")
    for name, sentence in [
        ("three.wav", "9 channels"),
        ("empty.wav", "no samples"),
        ("nan.wav", "NaN or infinite"),
        ("text.wav", "cannot be read as sound"),
        ("absent.wav", "cannot be read"),
    ]:
        with pytest.raises(AudioError, match=sentence):
            audio.read_audio(tmp_path / name, 44100, 2)
    soundfile.write(tmp_path / "long.wav", tone(), 44100)
    monkeypatch.setattr(audio, "_memory", lambda: 1000)
    with pytest.raises(AudioError, match="too long"):
        audio.read_audio(tmp_path / "long.wav", 44100, 2)


@pytest.mark.parametrize(
    ("name", "depth", "sentence"),
    [
        ("a.aac", "16", r"\.wav, \.flac, \.ogg, \.mp3"),
        ("a.mp3", "24", "only 16"),
        ("a", "16", "end in"),
    ],
)
def test_wrong_outputs_are_refused(tmp_path: Path, name: str, depth: str, sentence: str) -> None:
    with pytest.raises(AudioError, match=sentence):
        audio.write_audio(tmp_path / name, tone(), 44100, bit_depth=depth)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wave", [np.zeros(9), np.zeros((0, 2)), np.zeros((9, 2), int)])
def test_wrong_waveforms_are_refused(tmp_path: Path, wave: np.ndarray) -> None:
    with pytest.raises(AudioError, match="floats of shape"):
        audio.write_audio(tmp_path / "a.wav", wave, 44100)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise soundfile.LibsndfileError(2, "Error : disk: ")

    monkeypatch.setattr(soundfile.SoundFile, "write", fail)
    with pytest.raises(AudioError, match="cannot be written"):
        audio.write_audio(tmp_path / "a.wav", tone(), 44100)
    assert list(tmp_path.iterdir()) == []


def test_codes_round_trip(tmp_path: Path) -> None:
    codes = np.arange(12).reshape(3, 4)
    audio.save_codes(tmp_path / "codes.npz", codes)
    assert np.array_equal(audio.load_codes(tmp_path / "codes.npz"), codes)
    with pytest.raises(KhalaError, match="exists already"):
        audio.save_codes(tmp_path / "codes.npz", codes)
    with pytest.raises(AudioError, match=r"\.npz"):
        audio.save_codes(tmp_path / "codes.npy", codes)


def test_wrong_code_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", values=np.zeros(3))
    np.savez(tmp_path / "floats.npz", codes=np.zeros((3, 4)))
    np.savez(tmp_path / "flat.npz", codes=np.zeros(3, int))
    np.savez(tmp_path / "pickle.npz", codes=np.array([{}], dtype=object))
    np.save(tmp_path / "array.npy", np.zeros((3, 4), int))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "void.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "floats.npz").read_bytes()[:60])
    for name in ("other", "floats", "flat", "pickle", "text", "void", "cut", "absent"):
        with pytest.raises(AudioError, match=f"{name}.npz"):
            audio.load_codes(tmp_path / f"{name}.npz")
    with pytest.raises(AudioError, match="integer array"):
        audio.load_codes(tmp_path / "array.npy")


def test_a_file_cut_by_a_full_disk_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoders of lossy formats say nothing."""
    monkeypatch.setattr(soundfile, "info", lambda _: types.SimpleNamespace(frames=9000))
    with pytest.raises(AudioError, match="cannot be written whole: the disk seems full"):
        audio.write_audio(tmp_path / "a.ogg", tone(), 44100)
    assert list(tmp_path.iterdir()) == []
