"""the bundled demo model: small enough, complete, and what it sings is music like its corpus."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

import khala_mlx
from khala_mlx import Khala, Song
from khala_mlx.cli import main
from khala_mlx.train.losses import log_mel

pytestmark = pytest.mark.extended

FOLDER = Path(khala_mlx.__file__).parent / "demo"
EXAMPLES = Path(__file__).parents[1] / "examples" / "train_demo"
ASKED = {"tags": "waltz, slow, happy", "lyrics": "do re mi\nfa sol la\nti la sol do"}


# Half of the song is refined and rendered, which takes most of the time.
SECONDS = 6.0


@pytest.fixture(scope="module")
def coarse() -> np.ndarray:
    """Composed for twelve seconds."""
    khala = Khala.from_pretrained()
    ids, _ = khala.prompt_ids(**ASKED)
    frames = math.ceil(12 * khala.config.codec.frame_rate)
    return khala.compose(ids, max_frames=frames, min_frames=frames, seed=1)


@pytest.fixture(scope="module")
def song(coarse: np.ndarray) -> Song:
    khala = Khala.from_pretrained()
    _, ids = khala.prompt_ids(**ASKED)
    frames = round(SECONDS * khala.config.codec.frame_rate)
    codes = khala.refine(ids, coarse[:, :frames], seed=1)
    return Song(khala.render(codes), khala.config.codec.sample_rate, codes, {})


@pytest.fixture(scope="module")
def corpus_songs() -> Iterator[list[np.ndarray]]:
    """As many seconds each of 40 songs of the test split."""
    sys.path.insert(0, str(EXAMPLES))
    import corpus

    yield [corpus.song(seed, "test", seconds=SECONDS).waveform for seed in range(40)]
    sys.path.remove(str(EXAMPLES))


def test_it_is_small_and_a_real_khala() -> None:
    # In the wheel they are compressed, to 15.3 MB.
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16 * 2**20
    config = json.loads((FOLDER / "config.json").read_text())
    tokens, codec = config["tokens"], config["codec"]
    assert (tokens["num_codebooks"], tokens["num_coarse"]) == (64, 2)
    assert (codec["sample_rate"], codec["channels"]) == (44100, 2)
    assert np.prod(codec["encoder_strides"]) == 2048
    assert config["licence"] == "Apache-2.0"


def test_the_default_model_makes_a_file(tmp_path: Path) -> None:
    output = tmp_path / "song.wav"
    arguments = ["generate", "--lyrics", "do re", "--seconds", "1", "-o", str(output), "--json"]
    result = CliRunner().invoke(main, [*arguments, "--tags", "techno, fast, sad", "--seed", "1"])
    assert result.exit_code == 0, result.stderr
    assert output.stat().st_size > 80_000


def test_a_song_lasts_twelve_seconds_and_has_all_layers(coarse: np.ndarray, song: Song) -> None:
    assert coarse.shape[1] * 2048 / song.sample_rate >= 12
    # It continues to sing, and does not hold a note.
    assert all(len(np.unique(part)) > 8 for part in np.array_split(coarse, 4, axis=1))
    assert song.codes.shape[0] == 64
    # Every layer was filled by the model, not by one code.
    assert all(len(np.unique(layer)) > 8 for layer in song.codes)


def test_it_sounds_like_the_corpus(song: Song, corpus_songs: list[np.ndarray]) -> None:
    """No silence, no noise, no drone: each measure lies within the range of true songs."""
    ours = measures(song.waveform)
    theirs = [measures(wave) for wave in corpus_songs]
    for name, value in ours.items():
        values = [each[name] for each in theirs]
        # The corpus is levelled to a fraction of a dB. A small codec is noisier than the corpus.
        margin = {"level": 3.0, "flatness": max(values) - min(values)}.get(name, 0.0)
        assert min(values) - margin <= value <= max(values) + margin, name


def test_the_measures_tell_music_from_what_is_none(corpus_songs: list[np.ndarray]) -> None:
    rng, time = np.random.default_rng(0), np.arange(int(SECONDS * 44100)) / 44100
    drone = 0.2 * np.sin(2 * np.pi * 220 * time)
    theirs = [measures(wave) for wave in corpus_songs]
    others = [rng.normal(0, 0.1, len(time)), drone, 1e-4 * rng.normal(size=len(time))]
    for other in others:
        found = measures(np.stack([other, other], axis=1).astype(np.float32))
        assert any(
            not min(t[name] for t in theirs) <= value <= max(t[name] for t in theirs)
            for name, value in found.items()
        )


def measures(wave: np.ndarray) -> dict[str, float]:
    """Level in dB, centre and flatness of the spectrum, and onsets per second of wave [L, 2]."""
    mono = wave.mean(axis=1)
    power = np.abs(np.fft.rfft(mono)) ** 2
    bins = np.fft.rfftfreq(len(mono), 1 / 44100)
    # What lies 54 dB below a full-scale sine is not heard beside music.
    mel = np.log(np.exp(np.array(log_mel(mx.array(mono[None]), 44100, 64, 2048, 512))[0]) + 1)
    rise = np.maximum(mel[1:] - mel[:-1], 0).mean(axis=1)
    peaks = (rise[1:-1] > rise[:-2]) & (rise[1:-1] >= rise[2:]) & (rise[1:-1] > 0.08)
    return {
        "level": float(10 * np.log10(np.mean(mono**2) + 1e-12)),
        "centre": float((bins * power).sum() / power.sum()),
        "flatness": float(np.mean(mel.mean(axis=1) - np.log(np.exp(mel).mean(axis=1)))),
        "onsets": float(peaks.sum() / (len(mono) / 44100)),
    }
