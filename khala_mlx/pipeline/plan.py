"""What a request will take on a machine, and how it is made to fit: before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx

from khala_mlx.config import KhalaConfig
from khala_mlx.errors import KhalaError
from khala_mlx.model.codec import default_chunk
from khala_mlx.performance import cost as counts
from khala_mlx.performance import memory as envelope
from khala_mlx.performance.machine import Machine
from khala_mlx.performance.memory import Setting

# Buffers kept for the next use: below this MLX allocates again all the time, above it a Mac swaps.
_LEAST_CACHE, _MOST_CACHE = 1 << 30, 4 << 30


@dataclass(frozen=True)
class Job:
    """The sizes of what is asked for.

    Attributes:
        backbone_prompt, superres_prompt: tokens of the prompts.
        frames: of the longest song.
        songs: how many.
        kv_bits: quantization of the key-value cache.
        begun: frames of each song that are taken over from another one.
        judged: whether the backbone reads each song once more, to measure its likelihood.
        expected: whether the detail is chosen by expectation, which takes the codec's codebooks.
        draft: the layers that songs are refined to, if not to all.
        finished: how many of them are refined to all layers nevertheless, and rendered again.
    """

    backbone_prompt: int
    superres_prompt: int
    frames: int
    songs: int = 1
    kv_bits: int | None = None
    begun: int = 0
    judged: bool = False
    expected: bool = False
    draft: int | None = None
    finished: int = 0

    def read_tokens(self, config: KhalaConfig) -> int:
        """Tokens that the backbone reads before it writes."""
        return self.backbone_prompt + self.begun * config.tokens.num_coarse

    def steps(self, config: KhalaConfig) -> int:
        """Refine steps of all songs."""
        layout = config.tokens
        all_steps = layout.num_codebooks - layout.num_coarse
        if self.draft is None:
            return self.songs * all_steps
        rest = self.finished * (layout.num_codebooks - self.draft)
        return self.songs * (self.draft - layout.num_coarse) + rest

    def written_tokens(self, config: KhalaConfig) -> int:
        """Tokens that the backbone writes for a song."""
        return (self.frames - self.begun) * config.tokens.num_coarse


@dataclass(frozen=True)
class Stage:
    """Bytes and, at best, seconds of one stage."""

    name: str
    part: str
    weights: int
    working: int
    seconds: float

    @property
    def peak(self) -> int:
        """The most bytes while only this stage's part is loaded."""
        return self.weights + self.working


@dataclass(frozen=True)
class Plan:
    """How a job is done.

    Attributes:
        staged: each part is loaded for its stage and freed after it; otherwise all stay.
        songs_at_once: songs composed together.
        chunk_frames: frames rendered at once.
        problem: why it cannot be done, or None.
    """

    stages: tuple[Stage, ...]
    staged: bool
    songs_at_once: int
    chunk_frames: int
    memory: int
    problem: str | None

    @property
    def peak(self) -> int:
        """The most bytes that MLX will hold at a time."""
        if self.staged:
            return max(stage.peak for stage in self.stages)
        working = max(stage.working for stage in self.stages)
        return sum(stage.weights for stage in self.stages) + working

    def ahead_of(self, part: str) -> str | None:
        """The part that is needed after `part`, if its weights have room beside that one's work."""
        for stage, following in pairwise(self.stages):
            if stage.part == part and stage.peak + following.weights <= self.memory:
                return following.part
        return None

    def check(self) -> None:
        """Raise KhalaError if the job does not fit."""
        if self.problem is not None:
            raise KhalaError(self.problem)

    def summary(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        stages = {
            stage.name: {
                "weights_bytes": stage.weights,
                "peak_bytes": stage.peak,
                "least_seconds": round(stage.seconds, 2),
            }
            for stage in self.stages
        }
        return {
            "usable_bytes": self.memory,
            "peak_bytes": self.peak,
            "fits": self.problem is None,
            "one_part_at_a_time": self.staged,
            "songs_at_once": self.songs_at_once,
            "chunk_frames": self.chunk_frames,
            "stages": stages,
        }


def make_plan(
    config: KhalaConfig, setting: Setting, machine: Machine, job: Job, *, keep_loaded: bool
) -> Plan:
    """The plan that holds the most at a time of what fits.

    All parts stay loaded if that is wished and fits. Then as many songs as fit are composed
    together, and as many frames as fit are rendered at once.
    """
    memory = machine.memory
    songs, chunk = job.songs, min(default_chunk(config.codec), job.frames)
    if keep_loaded:
        together = _plan(config, setting, machine, job, (songs, chunk), staged=False)
        if together.peak <= memory:
            return together

    def staged() -> Plan:
        return _plan(config, setting, machine, job, (songs, chunk), staged=True)

    while songs > 1 and staged().stages[0].peak > memory:
        songs -= 1
    while chunk > 1 and staged().stages[2].peak > memory:
        chunk //= 2
    return staged()


@contextmanager
def limits(plan: Plan) -> Iterator[None]:
    """MLX's limits while a plan is carried out, put back after it.

    On Metal what the plan needs is wired, so that the system does not swap it out between two
    tokens. How many freed buffers are kept is limited everywhere.
    """
    spare = min(max(plan.memory - plan.peak, _LEAST_CACHE), _MOST_CACHE)
    cache, wired = mx.set_cache_limit(spare), None
    try:
        if mx.metal.is_available():
            wired = mx.set_wired_limit(min(plan.peak, plan.memory))
        yield
    finally:
        if wired is not None:
            # Unfinished work must not lose its wired memory.
            mx.synchronize()
            mx.set_wired_limit(wired)
        mx.set_cache_limit(cache)


def _plan(
    config: KhalaConfig,
    setting: Setting,
    machine: Machine,
    job: Job,
    at_once: tuple[int, int],
    *,
    staged: bool,
) -> Plan:
    (songs, chunk), memory = at_once, machine.memory
    seconds = _seconds(config, setting, machine, job, songs)
    read, written = job.read_tokens(config), job.written_tokens(config)
    composing = envelope.compose_bytes(config, setting, read, written, songs)
    if job.judged:
        composing = max(composing, envelope.judge_bytes(config, setting, read + written))
    refining = envelope.refine_bytes(config, setting, job.superres_prompt, job.frames)
    if job.expected:
        refining += envelope.expected_bytes(config, job.frames)
    working = (
        composing,
        refining,
        envelope.render_bytes(config.codec, chunk, on_cpu=setting.on_cpu),
    )
    names = (("compose", "backbone"), ("refine", "superres"), ("render", "codec"))
    stages = tuple(
        Stage(name, part, envelope.weight_bytes(config, part, setting), needed, time)
        for (name, part), needed, time in zip(names, working, seconds, strict=True)
    )
    over = next((stage for stage in stages if stage.peak > memory), None)
    problem = None
    if over is not None:
        problem = (
            f"To {over.name} this song needs {over.peak / 1e9:.1f} GB and {memory / 1e9:.1f} GB "
            "can be used: ask for fewer seconds, or quantize the model with "
            "`khala convert --quantize`."
        )
    return Plan(stages, staged, songs, chunk, memory, problem)


def _seconds(
    config: KhalaConfig, setting: Setting, machine: Machine, job: Job, at_once: int
) -> tuple[float, float, float]:
    """What the stages take at best: at the machine's full rates, nothing lost."""
    prompt, tokens = job.read_tokens(config), job.written_tokens(config)
    adapters = setting.adapters.parameters
    batches = -(-job.songs // at_once)
    # The cache grows evenly, so the middle stands for all.
    cached = prompt + tokens // 2
    held = envelope.as_held(config, "backbone", setting)
    read = 4 * adapters + counts.compose_bytes(
        held, cached, setting.width, songs=at_once, kv_bits=setting.kv_bits
    )
    multiplied = 2 * adapters + counts.compose_flops(config, cached)
    token = max(read / machine.bandwidth, at_once * multiplied / machine.flops)
    reading = counts.prompt_flops(config, prompt) + 2 * adapters * prompt
    judging = job.songs * job.judged * counts.prompt_flops(config, prompt + tokens)
    step = counts.refine_flops(config, job.superres_prompt, job.frames) / machine.flops
    render = counts.render_flops(config.codec, job.frames) / machine.flops
    composing = batches * (reading / machine.flops + tokens * token) + judging / machine.flops
    rendered = job.songs if job.draft is None else job.songs + job.finished
    return composing, job.steps(config) * step, rendered * render
