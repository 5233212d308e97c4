"""Training of the codec: sound in, sound out, with the codebooks following the encoder.

The reconstruction is judged by spectra, samples and signal-to-noise ratio; the codebooks learn by
moving averages (rvq.py). Auxiliary linear maps from the latents, and from their first two
quantised layers, to the log-mel spectrum put what matters to the ear into the coarse codes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from khala_mlx.config import CodecConfig
from khala_mlx.errors import KhalaError
from khala_mlx.model.codec import Codec
from khala_mlx.model.weights import fill_part
from khala_mlx.train import codebooks as rvq
from khala_mlx.train import losses
from khala_mlx.train.codec_init import start_from_components, start_linear
from khala_mlx.train.data.dataset import SPLITS, Sounds
from khala_mlx.train.loop import Run, save_part
from khala_mlx.train.settings import CodecTraining

_BANDS = 64
_MEL_WINDOW = 2048
# Log-mel patches per frame that the auxiliary maps predict.
_PATCH = 4
# Frames whose principal components the codec starts from.
_START_FRAMES = 2048


class Trainee(nn.Module):
    """The codec and the auxiliary maps that are thrown away after training."""

    def __init__(self, settings: CodecTraining) -> None:
        super().__init__()
        self.codec = Codec(settings.codec)
        size = settings.codec.latent_dim
        self.from_latents = nn.Linear(size, _PATCH * _BANDS)
        self.from_coarse = nn.Linear(size, _PATCH * _BANDS)


class CodecTask:
    """Crops of sound, the loss on them, and the codebooks (see loop.Task)."""

    def __init__(
        self, settings: CodecTraining, sounds: Sounds, held_out: Sounds, *, fresh: bool = True
    ) -> None:
        """`fresh` is False for a run that continues: its weights come from the checkpoint."""
        self.settings, self.sounds, self.held_out = settings, sounds, held_out
        mx.random.seed(settings.schedule.seed)
        self.model = Trainee(settings)
        self.state: dict[str, mx.array] = {}
        codec = self.model.codec
        # Codebooks follow averages; no gradient and no decay may touch them.
        codec.quantizer.freeze()
        if fresh:
            self._start()
        mx.eval(self.model.parameters())

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Any]:
        wave = self._crops(self.sounds, rng, self.settings.schedule.batch_size)
        return {"wave": wave, "layers": self._layers(rng, step)}

    def loss(self, batch: dict[str, Any]) -> tuple[mx.array, dict[str, mx.array]]:
        s, codec, wave = self.settings, self.model.codec, batch["wave"]
        latents = codec.encoder(wave)
        quantised, commitment, coarse = latents, mx.zeros(()), mx.stop_gradient(latents)
        if batch["layers"] is not None:
            quantised, commitment, coarse = rvq.straight_through(
                codec.quantizer, latents, batch["layers"]
            )
        ours = codec.decoder(quantised)
        parts = {
            "stft": losses.stft_loss(ours, wave),
            "wave": mx.abs(ours - wave).mean() / (mx.abs(wave).mean() + 1e-4),
            "snr_db": losses.snr_db(ours, wave).mean(),
            "aux": self._auxiliary(latents, coarse, wave),
            "commitment": commitment,
            "latents": mx.stop_gradient(latents),
        }
        total = (
            s.stft_weight * parts["stft"]
            + s.aux_weight * parts["aux"]
            + s.wave_weight * parts["wave"]
            # dB are 4.34 nats of power ratio each: the weight is that of the log ratio.
            - s.snr_weight * parts["snr_db"] / 4.34
            + s.commitment_weight * parts["commitment"]
        )
        return total, parts

    def after(self, parts: dict[str, mx.array], rng: np.random.Generator, step: int) -> None:
        s, quantizer = self.settings, self.model.codec.quantizer
        if step + 1 == s.quantise_after:
            points = self._latents(rng, s.fit_frames)
            rvq.fit(quantizer, points, s.trained_layers, rng)
            self.state = rvq.start_averages(quantizer, s.trained_layers)
        elif self.state:
            self.state = rvq.follow(
                quantizer,
                self.state,
                parts["latents"].reshape(-1, s.codec.latent_dim),
                decay=s.ema_decay,
                dead_below=s.dead_below,
                rng=rng,
            )

    def validate(self, layers: int | None = None) -> dict[str, float]:
        """SNR and log-mel correlation on held-out crops, through `layers` (the trained ones)."""
        wave = self._crops(self.held_out, np.random.default_rng(1), 16)
        codec = self.model.codec
        latents = codec.encoder(wave)
        if self.state:
            codes = codec.quantizer.encode(latents, layers or self.settings.trained_layers)
            latents = codec.quantizer.decode(codes)
        ours = codec.decoder(latents)
        return {
            "snr_db": float(losses.snr_db(ours, wave).mean()),
            "mel_correlation": mel_correlation(ours, wave, self.settings.codec.sample_rate),
        }

    def finish(self, rng: np.random.Generator) -> None:
        """Fit every codebook to the encoder as it is now."""
        points = self._latents(rng, self.settings.fit_frames)
        rvq.fit(self.model.codec.quantizer, points, self.settings.codec.num_codebooks, rng)

    def _start(self) -> None:
        count = -(-_START_FRAMES // self.settings.crop_frames)
        wave = self._crops(self.sounds, np.random.default_rng(0), count)
        start_from_components(self.model.codec, wave)
        latents, patches = self.model.codec.encoder(wave), self._patches(wave)
        start_linear(self.model.from_latents, latents, patches)
        start_linear(self.model.from_coarse, latents, patches)

    def _layers(self, rng: np.random.Generator, step: int) -> int | None:
        drawn = int(rng.choice(self.settings.layer_choices))
        return None if step < self.settings.quantise_after else drawn

    def _crops(self, sounds: Sounds, rng: np.random.Generator, count: int) -> mx.array:
        samples = self.settings.crop_frames * self.settings.codec.hop
        grid = self.settings.codec.hop if self.settings.whole_frames else 1
        return mx.array(sounds.crops(rng, count, samples, grid))

    def _latents(self, rng: np.random.Generator, count: int) -> mx.array:
        """At least `count` latents [n, D] of random crops."""
        found, collected = 0, []
        while found < count:
            latents = self.model.codec.encoder(self._crops(self.sounds, rng, 16))
            collected.append(latents.reshape(-1, latents.shape[-1]))
            mx.eval(collected[-1])
            found += collected[-1].shape[0]
        return mx.concatenate(collected)[:count]

    def _auxiliary(self, latents: mx.array, coarse: mx.array, wave: mx.array) -> mx.array:
        target = self._patches(wave)
        ours = mx.abs(self.model.from_latents(latents) - target).mean()
        return ours + mx.abs(self.model.from_coarse(coarse) - target).mean()

    def _patches(self, wave: mx.array) -> mx.array:
        """The log-mel patch [B, T, _PATCH * _BANDS] of each frame of wave [B, L, C]."""
        codec = self.settings.codec
        mel = losses.log_mel(
            wave.mean(-1), codec.sample_rate, _BANDS, _MEL_WINDOW, codec.hop // _PATCH
        )
        return mel.reshape(wave.shape[0], -1, _PATCH * _BANDS)


def mel_correlation(ours: mx.array, target: mx.array, sample_rate: int) -> float:
    """Correlation of the log-mel spectra (64 bands, floor 1e-2) of waves [B, L, C], mean over B."""
    pair = [
        np.array(losses.log_mel(wave.mean(-1), sample_rate, _BANDS, _MEL_WINDOW, 512))
        for wave in (ours, target)
    ]
    found = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(*pair, strict=True)]
    return float(np.mean(found))


def train_codec(
    settings: CodecTraining,
    data: Path,
    folder: Path,
    *,
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Train on the sound files below `data`/train, validate on those below `data`/valid.

    Writes codec.safetensors and config.json (the codec's sizes) into `folder` when done, beside
    the checkpoint, log.jsonl and loss.png. Returns the last validation, all layers fitted.

    Raises:
        KhalaError: if there is no data, or the run cannot be started, resumed or finished.
    """
    config = settings.codec
    train, valid = (
        Sounds.of(data / split, config.sample_rate, config.channels) for split in SPLITS
    )
    task = CodecTask(settings, train, valid, fresh=not resume)
    run = Run(task, settings.schedule, settings.to_dict(), folder)
    run.train(resume=resume, on_progress=on_progress)
    task.finish(np.random.default_rng([settings.schedule.seed, settings.schedule.steps]))
    figures = task.validate(config.num_codebooks)
    save_part(folder, "codec", task.model.codec, config)
    return figures


def load_codec(folder: Path) -> Codec:
    """The codec that a finished run left in `folder`.

    Raises:
        KhalaError: if there is none, or its weights do not match its sizes.
    """
    config = folder / "config.json"
    try:
        sizes = json.loads(config.read_text(encoding="utf-8"))["codec"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KhalaError(f"{folder} holds no finished codec run.") from error
    codec = Codec(CodecConfig.from_dict(sizes, str(config)))
    return fill_part(codec, folder, "codec", mx.float32)
