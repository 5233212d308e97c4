"""Training of the codec on tiny tones, and the losses and codebooks behind it."""

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from tiny_tokenizer import write_tiny_tokenizer
from tiny_training import TINY

from khala_mlx import KhalaError
from khala_mlx.cli import main
from khala_mlx.errors import ConfigError
from khala_mlx.model.codec import Codec
from khala_mlx.model.quantizer import Quantizer
from khala_mlx.train import codebooks as rvq
from khala_mlx.train import losses
from khala_mlx.train.codec import load_codec, mel_correlation, train_codec
from khala_mlx.train.codec_init import start_from_components, start_linear
from khala_mlx.train.data.dataset import Sounds
from khala_mlx.train.data.prepare import prepare, tools_of
from khala_mlx.train.settings import CodecTraining, Schedule


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds of tones each, split in train and valid."""
    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    time = np.arange(2 * 44100) / 44100
    for split, count in (("train", 3), ("valid", 1)):
        (folder / split).mkdir()
        for number in range(count):
            tones = [0.2 * np.sin(2 * np.pi * f * time) for f in rng.uniform(100, 800, 2)]
            path = folder / split / f"tone{number}.wav"
            soundfile.write(path, np.stack(tones, axis=1), 44100)
            path.with_suffix(".caption.txt").write_text("tone, low\n")
    return folder


def log(folder: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def trained(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "codec"
    figures = train_codec(TINY, sounds, folder)
    assert set(figures) == {"snr_db", "mel_correlation"}
    return folder


@pytest.mark.parametrize("step", [2, 5, 9])
@pytest.mark.extended
def test_a_killed_run_goes_on_exactly(
    sounds: Path, trained: Path, tmp_path: Path, step: int
) -> None:
    """Before, at and after the step at which the codebooks start."""

    def progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train_codec(TINY, sounds, folder, on_progress=progress)
    train_codec(TINY, sounds, folder, resume=True)
    assert log(folder) == log(trained)
    ours, theirs = (mx.load(str(f / "codec.safetensors")) for f in (folder, trained))
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


def test_the_trained_codec_loads(trained: Path) -> None:
    codec = load_codec(trained)
    wave = 0.2 * np.sin(np.arange(128 * 20) / 20)[:, None].repeat(2, 1)
    assert codec.decode(codec.encode(wave)).shape == (2560, 2)


@pytest.mark.extended
def test_training_improves_the_codec(sounds: Path, tmp_path: Path) -> None:
    schedule = dataclasses.replace(TINY.schedule, steps=60, learning_rate=5e-4, validate_every=60)
    settings = dataclasses.replace(TINY, schedule=schedule, quantise_after=1000)
    train_codec(settings, sounds, tmp_path / "run")
    entries = log(tmp_path / "run")
    first, last = ([e["snr_db"] for e in part] for part in (entries[:10], entries[-10:]))
    assert np.mean(last) > np.mean(first) + 5


def test_songs_become_training_data(sounds: Path, trained: Path, tmp_path: Path) -> None:
    tokenizer = write_tiny_tokenizer(tmp_path / "tiny.json")
    tools = tools_of(tmp_path / "out", None, trained, tokenizer)
    for count in (4, 0):
        report = prepare(sounds, tmp_path / "out", tools)
        assert (report["encoded"], report["songs"]) == (count, 4)
    lines = (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["split"] for entry in entries] == ["train", "train", "train", "valid"]
    assert entries[1]["tags"] == "tone, low"
    assert entries[1]["frames"] == 2 * 44100 // 128 + 1


def test_prompts_are_held_to_a_limit_that_is_named(
    sounds: Path, trained: Path, tmp_path: Path
) -> None:
    tokenizer = write_tiny_tokenizer(tmp_path / "tiny.json")
    reasons = []
    for limit in (200, 12):
        tools = tools_of(tmp_path / "out", None, trained, tokenizer, limit)
        with suppress(KhalaError):
            prepare(sounds, tmp_path / "out", tools)
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        reasons.append({each["reason"] for each in report["skipped"]})
    assert reasons == [set(), {"prompt"}]
    assert "where the backbone allows 12" in report["skipped"][0]["detail"]
    command = ["train", "prepare", str(sounds), str(tmp_path / "o"), "--model", "x"]
    result = CliRunner().invoke(main, [*command, "--max-prompt", "9"])
    assert result.exit_code == 2
    assert "--max-prompt goes with --codec" in result.stderr


def tones(seconds: float, pitches: np.ndarray) -> mx.array:
    """[B, L, 2] of a tone each, at different phases left and right."""
    time = np.arange(int(seconds * 44100)) / 44100
    waves = [[np.sin(2 * np.pi * f * time), np.cos(2 * np.pi * f * time)] for f in pitches]
    return mx.array(0.2 * np.array(waves).swapaxes(1, 2).astype(np.float32))


@pytest.mark.parametrize("decoder_dim", [4, 3])
def test_a_codec_starts_as_a_projection(decoder_dim: int) -> None:
    """Low tones need few components, also where the decoder is narrower than the encoder."""
    mx.random.seed(0)
    config = dataclasses.replace(TINY.codec, decoder_dim=decoder_dim)
    codec, rng = Codec(config), np.random.default_rng(0)
    start_from_components(codec, tones(0.5, rng.uniform(50, 700, 12)))
    wave = tones(0.1, rng.uniform(50, 700, 4))[:, :4096]
    latents = codec.encoder(wave)
    assert mx.sqrt(mx.square(latents).mean()).item() == pytest.approx(1, abs=0.2)
    assert losses.snr_db(codec.decoder(latents), wave).mean().item() > 10


def test_a_linear_map_starts_as_least_squares() -> None:
    rng = np.random.default_rng(0)
    x, matrix = rng.normal(size=(50, 8, 5)), rng.normal(size=(5, 3))
    linear = nn.Linear(5, 3)
    start_linear(linear, mx.array(x.astype(np.float32)), mx.array((x @ matrix + 2).astype("f4")))
    assert np.allclose(np.array(linear.weight).T, matrix, atol=0.01)
    assert np.allclose(np.array(linear.bias), 2, atol=0.01)


def clusters(count: int, size: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(size, dim)) * 5
    labels = rng.integers(0, size, count)
    return centres, centres[labels] + rng.normal(size=(count, dim)) * 0.05


def test_k_means_finds_clusters() -> None:
    centres, points = clusters(800, 8, 4)
    fitted = rvq.fit_layer(mx.array(points.astype(np.float32)), 8, np.random.default_rng(0))
    distances = np.linalg.norm(np.array(fitted)[:, None] - centres[None], axis=-1).min(axis=0)
    # From a random start k-means may merge two clusters and split another.
    assert (distances < 0.1).sum() >= 6


def test_more_fitted_layers_leave_less() -> None:
    points = mx.array(np.random.default_rng(0).normal(size=(900, 6)).astype(np.float32))
    quantizer = Quantizer(4, 16, 6)
    rvq.fit(quantizer, points, 4, np.random.default_rng(0))
    codes = quantizer.encode(points)
    left = [mx.square(points - quantizer.decode(codes[:k])).mean().item() for k in (1, 2, 3, 4)]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.5 * left[0]


def test_codebooks_follow_and_dead_codes_start_anew() -> None:
    _, points = clusters(400, 8, 4)
    latents = mx.array(points.astype(np.float32))
    quantizer = Quantizer(1, 8, 4)
    # One code has all the points, seven are far away and dead.
    quantizer.codebooks = mx.concatenate([mx.zeros((1, 1, 4)), mx.full((1, 7, 4), 1e3)], axis=1)
    averages = rvq.start_averages(quantizer, 1)
    rng = np.random.default_rng(0)
    for _ in range(60):
        averages = rvq.follow(quantizer, averages, latents, decay=0.8, dead_below=0.5, rng=rng)
    codes = np.array(quantizer.encode(latents))
    assert len(np.unique(codes)) >= 6
    assert np.abs(np.array(quantizer.codebooks)).max() < 100


def test_gradients_pass_straight_through() -> None:
    quantizer = Quantizer(4, 16, 6)
    latents = mx.random.normal((2, 5, 6))

    def total(latents: mx.array) -> mx.array:
        return (rvq.straight_through(quantizer, latents, 3)[0] * 2).sum()

    assert mx.array_equal(mx.grad(total)(latents), mx.full(latents.shape, 2.0)).item()
    untouched, commitment, coarse = rvq.straight_through(quantizer, latents, 0)
    assert mx.array_equal(untouched, latents).item()
    assert commitment.item() == 0
    decoded = quantizer.decode(quantizer.encode(latents, 2))
    assert mx.allclose(coarse, decoded, atol=1e-5).item()


def test_losses_on_known_sounds() -> None:
    time = mx.arange(8192) / 44100
    wave = mx.stack([mx.sin(2 * np.pi * 440 * time)] * 2, axis=-1)[None]
    assert losses.stft_loss(wave, wave).item() == pytest.approx(0, abs=1e-4)
    assert losses.stft_loss(0.5 * wave, wave).item() > 0.3
    assert losses.snr_db(0.9 * wave, wave).item() == pytest.approx(20, abs=0.01)
    assert mel_correlation(wave, wave, 44100) == pytest.approx(1)
    assert losses.log_mel(wave.mean(-1), 44100, 64, 2048, 512).shape == (1, 16, 64)
    assert losses.frames_of(wave[..., 0], 1024).shape == (1, 29, 1024)
    mono = losses.stft_loss(wave[..., :1], wave[..., :1])
    assert mono.item() == pytest.approx(0, abs=1e-4)
    for sound in (wave, mx.zeros_like(wave)):
        gradient = mx.grad(lambda x: losses.stft_loss(x, wave))(sound)
        assert mx.isfinite(gradient).all().item()


def test_crops_are_drawn_alike_and_padded(sounds: Path, tmp_path: Path) -> None:
    found = Sounds.of(sounds / "train", 44100, 2)
    first, again = (found.crops(np.random.default_rng(3), 4, 1000) for _ in range(2))
    assert first.shape == (4, 1000, 2)
    assert np.array_equal(first, again)
    whole, grid = found.crops(np.random.default_rng(0), 1, 2 * 44100 // 128 * 128), 128
    aligned = found.crops(np.random.default_rng(3), 1, 1000, grid)[0]
    starts = range(0, len(whole[0]) - 1000, grid)
    files = [found.crops(np.random.default_rng(n), 1, 88200)[0] for n in range(8)]
    assert any(np.array_equal(f[s : s + 1000], aligned) for f in files for s in starts)
    soundfile.write(tmp_path / "slow.wav", np.full((22050, 1), 0.25), 22050)
    slow = Sounds.of(tmp_path, 44100, 2)
    assert list(slow.lengths.values()) == [44100]
    assert np.allclose(slow.crops(np.random.default_rng(0), 1, 900)[:, 200:-200], 0.25, atol=0.01)
    longer = found.crops(np.random.default_rng(3), 1, 200000)
    assert np.abs(longer[0, 2 * 44100 :]).max() == 0
    with pytest.raises(KhalaError, match="no sound files"):
        Sounds.of(sounds.parent / "absent", 44100, 2)


def test_settings_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"schedule": {"steps": 7}, "crop_frames": 3}')
    settings = CodecTraining.from_file(path)
    assert (settings.schedule.steps, settings.crop_frames) == (7, 3)
    assert settings.schedule.batch_size == Schedule().batch_size
    assert CodecTraining.from_file(None) == CodecTraining()
    assert CodecTraining.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"crop": 3}', "unknown keys: crop"),
        ('{"schedule": {"step": 3}}', "unknown keys: step"),
        ('{"schedule": 3}', "must be an object"),
        ('{"schedule": {"steps": 0}}', "steps must be above 0"),
        ('{"schedule": {"betas": [0.5]}}', "betas"),
        ('{"schedule": {"learning_rate": -1}}', "learning_rate"),
        ('{"schedule": {"keep_every": -1}}', "keep_every"),
        ('{"trained_layers": 65}', "trained_layers"),
        ('{"layer_choices": [17]}', "layer_choices"),
        ("[]", "must be an object"),
        ("{", "not valid JSON"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path: Any = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        CodecTraining.from_file(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        CodecTraining.from_file(tmp_path / "absent.json")
