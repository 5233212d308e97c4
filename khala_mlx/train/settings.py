"""The settings of a training run: strict dataclasses that a JSON file can fill."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from khala_mlx.config import (
    LINEARS,
    BackboneConfig,
    CodecConfig,
    Strict,
    SuperResConfig,
    TokenLayout,
    read_object,
)
from khala_mlx.errors import ConfigError
from khala_mlx.text import listed

# All but the first layer are drawn as good as never long before.
_MOST_FOCUS = 100.0


@dataclass(frozen=True)
class Schedule(Strict):
    """Length, optimiser and bookkeeping of a run; everything random follows from `seed` and step.

    The learning rate rises over `warmup` steps and falls on a cosine to `final_fraction` of it.
    Every `keep_every` steps (0: never) the weights are kept as weights-STEP.safetensors.
    """

    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 1e-3
    final_fraction: float = 0.1
    warmup: int = 50
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 200
    validate_every: int = 200
    keep_every: int = 0

    def __post_init__(self) -> None:
        self.check_types("schedule")
        for name in ("steps", "batch_size", "checkpoint_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"schedule: {name} must be above 0.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("schedule: betas must be two numbers from 0 to below 1.")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ConfigError("schedule: learning_rate and clip_norm must be above 0.")
        if self.final_fraction < 0 or self.weight_decay < 0:
            raise ConfigError("schedule: final_fraction and weight_decay must be 0 or above.")
        if not 0 <= self.seed < 2**64:
            raise ConfigError("schedule: seed must be a whole number from 0 to 2**64 - 1.")
        if self.warmup < 0 or self.keep_every < 0:
            raise ConfigError("schedule: warmup and keep_every must be 0 or above.")


class _FromFile(Strict):
    @classmethod
    def from_file(cls, path: Path | None) -> Self:
        """Settings of a JSON file; what it leaves out has its default, also inside sections."""
        if path is None:
            return cls()
        given = read_object(path)
        merged = cls().to_dict()
        for name, value in given.items():
            section = merged.get(name)
            if isinstance(section, dict) and isinstance(value, dict):
                value = {**section, **value}
            merged[name] = value
        return cls.from_dict(merged, str(path))


@dataclass(frozen=True)
class CodecTraining(_FromFile):
    """Training of the codec.

    `layer_choices` is the quantiser dropout: each step draws how many layers quantise, 0 being
    none. Only `trained_layers` follow the encoder while it moves; all are fitted at the end, on
    `fit_frames` frames. `aux_weight` scales linear maps from the latents, and from their first
    two layers, to the log-mel spectrum: they put the voice into the coarse codes.

    With `whole_frames` crops start on the codec's frames. Music whose events keep to that grid then
    meets the codec in one phase only, and needs far fewer numbers; other sound loses.
    """

    codec: CodecConfig = field(default_factory=CodecConfig)
    schedule: Schedule = field(default_factory=Schedule)
    crop_frames: int = 10
    whole_frames: bool = False
    stft_weight: float = 2.0
    wave_weight: float = 0.5
    snr_weight: float = 0.7
    aux_weight: float = 1.0
    commitment_weight: float = 0.25
    quantise_after: int = 1
    trained_layers: int = 16
    layer_choices: tuple[int, ...] = (0, 0, 0, 0, 1, 2, 2, 4, 8, 16)
    ema_decay: float = 0.99
    dead_below: float = 0.1
    fit_frames: int = 16384

    def __post_init__(self) -> None:
        for name in ("crop_frames", "quantise_after", "fit_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be above 0.")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError("ema_decay must lie in 0 to below 1.")
        if not 1 <= self.trained_layers <= self.codec.num_codebooks:
            raise ConfigError("trained_layers must lie in 1..codec.num_codebooks.")
        if not self.layer_choices or not all(
            0 <= n <= self.trained_layers for n in self.layer_choices
        ):
            raise ConfigError("layer_choices must lie in 0..trained_layers.")


@dataclass(frozen=True)
class BackboneTraining(_FromFile):
    """Training of the backbone: next-token prediction, loss on the audio tokens only.

    `start` is the folder of a finished run whose weights to start from; "" starts from scratch.
    """

    tokens: TokenLayout = field(default_factory=TokenLayout)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    schedule: Schedule = field(default_factory=Schedule)
    start: str = ""

    def __post_init__(self) -> None:
        _check_vocabulary("backbone", self.backbone.vocab_size, self.tokens.backbone_vocab)


@dataclass(frozen=True)
class SuperResTraining(_FromFile):
    """Training of superres.

    Attributes:
        align_weight: weight of the causal alignment objective; 0 leaves the full-attention
            refinement alone.
        align_songs: songs of a batch that the causal objective sees; 0 is all. Its sequences are
            more than twice as long as those of the refinement.
        layer_focus: how often layer k is drawn goes as k ** -layer_focus; 0 draws all alike. What
            the first layers leave open is most of the sound.
        start: folder of a finished run of superres whose weights to start from; `backbone` and
            `codec` are not looked at then. "" starts afresh.
        backbone: folder of a trained backbone to start from; "" starts from scratch.
        codec: folder of the codec run whose codebooks the rows start from: those of the fine layers
            beside a backbone, or else of all; "" starts them at random.
    """

    tokens: TokenLayout = field(default_factory=TokenLayout)
    superres: SuperResConfig = field(default_factory=SuperResConfig)
    schedule: Schedule = field(default_factory=Schedule)
    align_weight: float = 0.5
    align_songs: int = 0
    layer_focus: float = 0.0
    start: str = ""
    backbone: str = ""
    codec: str = ""

    def __post_init__(self) -> None:
        _check_vocabulary("superres", self.superres.vocab_size, self.tokens.superres_vocab)
        if min(self.align_weight, self.align_songs, self.layer_focus) < 0:
            raise ConfigError("align_weight, align_songs and layer_focus must be 0 or above.")
        if self.layer_focus > _MOST_FOCUS:
            raise ConfigError(f"layer_focus must be {_MOST_FOCUS:g} at most.")


def _check_vocabulary(part: str, size: int, wanted: int) -> None:
    """Ids beyond a smaller one would be learnt as garbage, and the run be refused by `pack`."""
    if size != wanted:
        raise ConfigError(f"{part}.vocab_size is {size}, the token layout says {wanted}.")


@dataclass(frozen=True)
class LoraTraining(Strict):
    """Training of an adapter on a frozen backbone.

    Attributes:
        rank, scale: of mlx-lm's LoRA layers, y + scale * x A B; scale is what others call
            alpha / rank.
        layers: how many layers, the last ones, get an adapter; 0 is all.
        modules: the linear layers in each.
        dora: learn the lengths of the matrices' rows, too.
        grad_checkpoint: make the inside of each layer twice instead of keeping it.
        accumulate: batches whose gradients make one step.
        whole_vocabulary: predict from every token instead of those that can follow.
        max_seconds: songs are cut to so much sound; 0 is what fits the trained window.
        replay_share: of the batches that are drawn from songs which are not to be forgotten.
        patience: validations without a better loss after which to stop, with the best adapter;
            0 never stops and keeps the last one.
    """

    schedule: Schedule = field(default_factory=Schedule)
    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    layers: int = 0
    modules: tuple[str, ...] = LINEARS
    dora: bool = False
    grad_checkpoint: bool = False
    accumulate: int = 1
    whole_vocabulary: bool = False
    max_seconds: float = 0.0
    replay_share: float = 0.0
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"lora: {name} must be above 0.")
        for name in ("scale", "max_seconds"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"lora: {name} must be a number.")
        for name in ("layers", "max_seconds", "patience"):
            if getattr(self, name) < 0:
                raise ConfigError(f"lora: {name} must be 0 or above.")
        for name in ("dropout", "replay_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"lora: {name} must lie in 0 to below 1.")
        if unknown := [name for name in self.modules if name not in LINEARS]:
            raise ConfigError(f"lora: modules are {', '.join(LINEARS)}, not {listed(unknown)}.")
        if not self.modules or len(set(self.modules)) < len(self.modules):
            raise ConfigError("lora: modules must name each linear layer once.")
