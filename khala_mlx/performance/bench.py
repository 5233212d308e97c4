"""Measures each stage and its kernel baseline alternately, so that ratios hold under load."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from khala_mlx.config import CodecConfig, KhalaConfig, TokenLayout
from khala_mlx.errors import KhalaError
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec, default_chunk
from khala_mlx.model.superres import SuperRes
from khala_mlx.model.weights import working_dtype
from khala_mlx.performance import cost as counts
from khala_mlx.performance import memory as envelope
from khala_mlx.performance.kernels import (
    Kernel,
    compose_floor,
    frames_of_a_block,
    refine_floor,
    render_floor,
)
from khala_mlx.performance.machine import this_machine
from khala_mlx.performance.memory import Setting
from khala_mlx.performance.op_counter import Tally
from khala_mlx.text import shown

# Tokens between two looks of the backbone at what it wrote, and of a measurement.
_BLOCK = 16
_PROMPT = 32
# Frames of a block of sound: enough to hide the neighbours that are rendered for nothing.
_SHORT_BLOCK = 64
# A ratio that grew by more than this share is a regression.
WORSE = 0.25
# In which reports must agree, or their ratios are of different things.
SETTINGS = (
    "machine.name",
    "machine.device",
    "model",
    "dtype",
    "compose.cached_tokens",
    "compose.songs",
    "refine.rows",
    "render.chunk_frames",
)
RATIOS = tuple(f"{stage}.floor_ratio" for stage in ("compose", "refine", "render"))


@dataclass(frozen=True)
class Sizes:
    """What is measured: tokens in the cache, songs at once, rows of superres, turns of each."""

    cached: int = 1000
    songs: int = 1
    rows: int = 500
    turns: int = 7


@dataclass
class Turns:
    """Progress of a stage that runs the kernel baseline after each step of ours, and times both."""

    floor: Kernel
    each: int = 1
    tally: Tally = field(default_factory=Tally)
    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    peak: int = 0
    _began: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        # The stage has issued its next step by now: its end is the end of ours.
        mx.synchronize()
        now = time.perf_counter()
        if self._began:
            self.ours.append(now - self._began)
            self.peak = max(self.peak, mx.get_peak_memory())
        with self.tally.paused():
            for _ in range(self.each):
                self.floor()
        mx.reset_peak_memory()
        self._began = time.perf_counter()
        if self.ours:
            self.bare.append(self._began - now)

    @property
    def ratio(self) -> float:
        """Ours divided by the kernel baseline beside it, the median of all turns."""
        pairs = zip(self.ours, self.bare, strict=True)
        return statistics.median(ours / bare for ours, bare in pairs)

    @property
    def seconds(self) -> float:
        """One turn of ours, the median."""
        return statistics.median(self.ours)


def bench_compose(
    model: Backbone, config: KhalaConfig, setting: Setting, sizes: Sizes
) -> dict[str, Any]:
    """Writing tokens behind `cached` ones."""
    floor, held = compose_floor(model, sizes.cached, sizes.songs)
    before = mx.get_active_memory() - held
    turns = Turns(floor, _BLOCK)
    tokens = _BLOCK * (sizes.turns + 1)
    room = max(0, model.config.context - tokens)
    if sizes.cached > room:
        raise KhalaError(f"The backbone's window leaves room for {room} cached tokens.")
    prompt = np.arange(sizes.cached) % model.layout.audio_start
    keys = [mx.random.key(seed) for seed in range(sizes.songs)]
    model.generate_many(prompt, keys=keys, max_tokens=tokens, min_tokens=tokens, on_progress=turns)
    counted = _bytes_of_a_token(model)
    in_memory = envelope.as_held(config, "backbone", setting)
    least = counts.compose_bytes(in_memory, _PROMPT, setting.width)
    read = counts.compose_bytes(in_memory, sizes.cached, setting.width, songs=sizes.songs)
    flops = sizes.songs * counts.compose_flops(config, sizes.cached)
    seconds = turns.seconds / _BLOCK
    weights = envelope.weight_bytes(config, "backbone", setting)
    working = envelope.compose_bytes(config, setting, 1, sizes.cached + tokens, sizes.songs)
    return {
        "cached_tokens": sizes.cached,
        "songs": sizes.songs,
        "tokens_per_second": sizes.songs / seconds,
        "realtime_factor": sizes.songs / seconds / _token_rate(config),
        "floor_ratio": turns.ratio,
        "bytes_per_token": read,
        "bytes_ratio": counted / least,
        "flops_per_token": flops,
        "gigabytes_per_second": read / seconds / 1e9,
        "gigaflops_per_second": flops / seconds / 1e9,
        "peak_bytes": turns.peak - held - before + weights,
        "forecast_bytes": weights + working,
    }


def bench_refine(
    model: SuperRes, config: KhalaConfig, setting: Setting, sizes: Sizes
) -> dict[str, Any]:
    """Steps over `rows` rows."""
    prompt, layout = min(_PROMPT, sizes.rows // 2), model.layout
    frames = sizes.rows - prompt
    if sizes.rows > model.config.context:
        raise KhalaError(f"Superres was trained on {model.config.context} rows, not {sizes.rows}.")
    before = mx.get_active_memory()
    turns = Turns(refine_floor(model, prompt, frames))
    most = layout.num_codebooks - layout.num_coarse
    steps = min(sizes.turns + 1, most)
    # The first step is not timed: a model of one fine layer makes it twice.
    songs = 1 if steps > 1 else 2
    with turns.tally.counting():
        for _ in range(songs):
            model.refine(
                np.arange(prompt) % layout.audio_start,
                np.zeros((layout.num_coarse, frames), dtype=np.int64),
                codebooks=layout.num_coarse + steps,
                key=mx.random.key(0),
                on_progress=turns,
            )
    flops = counts.refine_flops(config, prompt, frames)
    weights = envelope.weight_bytes(config, "superres", setting)
    return {
        "rows": sizes.rows,
        "steps_per_second": 1 / turns.seconds,
        "realtime_factor": frames / config.codec.frame_rate / (most * turns.seconds),
        "floor_ratio": turns.ratio,
        "flops_per_step": flops,
        "flops_ratio": turns.tally.flops / (songs * steps) / flops,
        "gigaflops_per_second": flops / turns.seconds / 1e9,
        "gigabytes_per_second": weights / turns.seconds / 1e9,
        "peak_bytes": turns.peak - before + weights,
        "forecast_bytes": weights + envelope.refine_bytes(config, setting, prompt, frames),
    }


def bench_render(codec: Codec, setting: Setting, sizes: Sizes, chunk: int) -> dict[str, Any]:
    """Sound in blocks of `chunk` frames."""
    config = codec.config
    before = mx.get_active_memory()
    total = chunk * (sizes.turns + 1)
    # A song shorter than a block with its neighbours goes through the decoder whole.
    turns = Turns(render_floor(codec, min(total, frames_of_a_block(codec, chunk))))
    codes = np.zeros((config.num_codebooks, total), dtype=np.int64)
    codec.decode(codes, chunk_frames=chunk, on_progress=turns)
    flops = counts.render_flops(config, chunk)
    weights = counts.codec_bytes(config)
    return {
        "chunk_frames": chunk,
        "realtime_factor": chunk / config.frame_rate / turns.seconds,
        "frames_per_second": chunk / turns.seconds,
        "floor_ratio": turns.ratio,
        "gigaflops_per_second": flops / turns.seconds / 1e9,
        "peak_bytes": turns.peak - before + weights,
        "forecast_bytes": weights + envelope.render_bytes(config, chunk, on_cpu=setting.on_cpu),
    }


def random_config(layers: int, width: int) -> KhalaConfig:
    """The released shapes with fewer layers, another width, and little text: for measurements.

    Neither embedding nor head is read whole, so that a small vocabulary changes no time.
    """
    if layers < 1 or width < 128 or width % 128:
        raise KhalaError("Random weights need at least one layer and a width of n * 128.")
    layout = TokenLayout(audio_start=1024, end_of_song=1, padding=2, marker_base=1023)
    released = KhalaConfig()
    heads = width // 64
    # Four queries to a key, or as near to it as divides.
    groups = next(n for n in range(max(1, heads // 4), 0, -1) if heads % n == 0)
    body = {
        "num_layers": layers,
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": groups,
        "intermediate_size": width * 11 // 4,
    }
    backbone = replace(released.backbone, vocab_size=layout.backbone_vocab, **body)
    superres = replace(released.superres, vocab_size=layout.superres_vocab, **body)
    scale = width / released.backbone.hidden_size
    codec = CodecConfig(decoder_dim=round(192 * scale), encoder_dim=round(128 * scale))
    return KhalaConfig(
        tokens=layout, backbone=backbone, superres=superres, codec=codec, dtype="float32"
    )


def compared(now: dict[str, Any], old: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Old, new and change of every ratio to the kernel baseline; see `WORSE`.

    Raises:
        KhalaError: if `old` is not a report of `khala bench --json`.
    """
    try:
        pairs = {name: (float(_at(old, name)), float(_at(now, name))) for name in RATIOS}
        if not all(0 < before < math.inf for before, _ in pairs.values()):
            raise ValueError("a ratio is not a positive number")
    except (KeyError, TypeError, ValueError) as error:
        raise KhalaError(
            "The file to compare with is not a report of `khala bench --json`."
        ) from error
    return {
        name: {"old": before, "new": after, "change": after / before - 1}
        for name, (before, after) in pairs.items()
    }


def unlike(now: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """Return the names of settings in which two reports differ, if both have them."""
    found = []
    for name in SETTINGS:
        before, after = (_told(report, name) for report in (old, now))
        if before is not None and before != after:
            found.append(f"{name} {shown(before)}, now {shown(after)}")
    return found


class Measurable(Protocol):
    """The parts of a model, each loaded when first used; a pipeline's Parts, or RandomParts."""

    config: KhalaConfig
    dtype: str

    @property
    def backbone(self) -> Backbone:
        """The backbone."""

    @property
    def superres(self) -> SuperRes:
        """The superres."""

    @property
    def codec(self) -> Codec:
        """The codec."""

    def release(self, part: str) -> None:
        """Free a part."""


class RandomParts:
    """Parts of random weights, for measurements without a model."""

    def __init__(self, layers: int, width: int) -> None:
        self.config = random_config(layers, width)
        self.dtype = working_dtype(self.config)
        self.source = f"random weights, {layers} layers of width {width}"
        self._part: Any = None

    @property
    def backbone(self) -> Backbone:
        """A random backbone."""
        return self._built(lambda: Backbone(self.config.backbone, self.config.tokens))

    @property
    def superres(self) -> SuperRes:
        """A random superres."""
        return self._built(lambda: SuperRes(self.config.superres, self.config.tokens))

    @property
    def codec(self) -> Codec:
        """A random codec."""
        return self._built(lambda: Codec(self.config.codec))

    def release(self, part: str) -> None:
        """Free what was built last."""
        self._part = None
        mx.clear_cache()

    def _built(self, make: Callable[[], Any]) -> Any:
        if self._part is None:
            self._part = make()
            self._part.eval()
            mx.eval(self._part.parameters())
        return self._part


def fitting(config: KhalaConfig, asked: dict[str, int | None]) -> Sizes:
    """Return the sizes asked for; the others are defaults within the model's windows.

    There are fewer turns where the backbone's window has no room for the tokens of all.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    sizes = Sizes(**given)
    turns = max(1, min(sizes.turns, (config.backbone.context - 1) // _BLOCK - 1))
    sizes = replace(sizes, turns=turns)
    room = config.backbone.context - _BLOCK * (sizes.turns + 1)
    fit = {
        "cached": max(1, min(sizes.cached, room)),
        "rows": min(sizes.rows, config.superres.context),
    }
    return replace(sizes, **{name: value for name, value in fit.items() if name not in given})


def measured(
    parts: Measurable, source: str, asked: dict[str, int | None], chunk_frames: int | None = None
) -> dict[str, Any]:
    """Return the report of `khala bench`; one part is loaded at a time."""
    machine, config = this_machine(), parts.config
    setting, sizes = Setting(parts.dtype, machine.on_cpu), fitting(config, asked)
    chunk = chunk_frames or min(_SHORT_BLOCK, default_chunk(config.codec))
    told: dict[str, Any] = {
        "machine": {
            "name": machine.name,
            "device": str(mx.default_device()),
            "published_bandwidth": machine.bandwidth if machine.published else None,
            "memory": machine.memory,
        },
        "model": source,
        "dtype": parts.dtype,
    }
    told["compose"] = bench_compose(parts.backbone, config, setting, sizes)
    parts.release("backbone")
    told["refine"] = bench_refine(parts.superres, config, setting, sizes)
    parts.release("superres")
    told["render"] = bench_render(parts.codec, setting, sizes, chunk)
    parts.release("codec")
    for name in ("peak_bytes", "forecast_bytes"):
        told[name] = max(told[stage][name] for stage in ("compose", "refine", "render"))
    return told


def _bytes_of_a_token(model: Backbone) -> int:
    """Counted: what the second token reads that the first did not."""
    read = []
    for tokens in (1, 2):
        tally, ids = Tally(), np.arange(_PROMPT)
        with tally.counting():
            model.generate_many(ids, keys=[mx.random.key(0)], max_tokens=tokens, min_tokens=tokens)
        read.append(tally.bytes_read)
    return read[1] - read[0]


def _token_rate(config: KhalaConfig) -> float:
    return config.codec.frame_rate * config.tokens.num_coarse


def _told(report: dict[str, Any], name: str) -> Any:
    """As `_at`, or None where a report has nothing of the kind."""
    value: Any = report
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _at(report: dict[str, Any], name: str) -> Any:
    stage, key = name.split(".")
    return report[stage][key]
