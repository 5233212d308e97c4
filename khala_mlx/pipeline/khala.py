"""Khala: makes songs from the parts of one model folder, stage by stage."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import numpy as np

from khala_mlx import token_ids
from khala_mlx.audio.files import SILENCE
from khala_mlx.config import KhalaConfig, check_whole
from khala_mlx.errors import KhalaError, KhalaWarning, NoSongError
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec
from khala_mlx.model.sampling import DEFAULT_SAMPLING, Detail, Sampling, stage_key
from khala_mlx.model.superres import Expected, SuperRes
from khala_mlx.performance.machine import Machine, this_machine
from khala_mlx.performance.memory import Setting
from khala_mlx.pipeline.begin import (
    carry_over,
    check_request,
    detail_of,
    new_take,
    prepared,
    sampling_of,
    song_budget,
)
from khala_mlx.pipeline.parts import Parts
from khala_mlx.pipeline.plan import Job, Plan, make_plan
from khala_mlx.pipeline.timing import Progress, timed
from khala_mlx.prompt.duration import backbone_room, warn_window
from khala_mlx.prompt.preview import preview, too_much_to_sing
from khala_mlx.prompt.prompt import Prompt, prompt_ids
from khala_mlx.prompt.request import Request
from khala_mlx.prompt.tokenizer import Tokenizer
from khala_mlx.song.song import Song
from khala_mlx.song.take import Take
from khala_mlx.storage.adapter import Adapter
from khala_mlx.text import shown

OnTake = Callable[[Take], None]
StageProgress = Callable[[int, int], None]
# Receives each rendered piece [n, C] and the samples of the whole song.
OnSound = Callable[[np.ndarray, int], None]

# Codebooks refined between two states of a take that are worth keeping.
KEEP_EVERY = 8
# Length of the pieces of a song that is played while it is rendered: the first comes soon.
HEARD_SECONDS = 5.0


class Khala:
    """A model that makes songs.

    Attributes:
        parts: the loaded parts of the model folder.
        source: the model as the user named it.
        machine: the machine that work is planned for.
    """

    def __init__(self, parts: Parts, source: str, machine: Machine | None = None) -> None:
        self.parts = parts
        self.source = source
        self.machine = machine or this_machine()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "demo",
        *,
        dtype: str | None = None,
        keep_loaded: bool = True,
        machine: Machine | None = None,
    ) -> Self:
        """Open a model.

        Args:
            source: "demo" (the bundled demo model), a model folder, or a Hub repository that
                contains one.
            dtype: what the language models compute in, "bfloat16", "float16" or "float32". The
                default is what they are stored in; on the CPU backend it is float32, because
                16-bit matrix products are slower there by orders of magnitude. For the same
                reason a quantized model that takes at most 1 GiB in float32 is dequantized there.
                The codec is always float32.
            keep_loaded: keep every stage in memory for the next song, if all fit. Otherwise each
                stage is freed when it is done, so that only the largest must fit.
            machine: plan for this machine instead of the one the program runs on.

        Raises:
            KhalaError: if there is no such model or it is damaged.
        """
        parts = Parts.open(source, dtype=dtype, keep_loaded=keep_loaded)
        return cls(parts, str(source), machine)

    # The model's parts

    @property
    def config(self) -> KhalaConfig:
        """Sizes, token layout and origin of the model."""
        return self.parts.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.parts.tokenizer

    @property
    def backbone(self) -> Backbone:
        """The backbone, loaded when first used, with the adapters of `load_adapters`."""
        return self.parts.backbone

    @property
    def superres(self) -> SuperRes:
        """The superres, loaded when first used."""
        return self.parts.superres

    @property
    def codec(self) -> Codec:
        """The codec, loaded when first used."""
        return self.parts.codec

    @property
    def adapters(self) -> list[dict[str, Any]]:
        """Name, sha256 and scale of each adapter of `load_adapters`."""
        return self.parts.adapters.summary()

    def load_adapters(
        self, adapters: Sequence[str | Path | Adapter], scales: Sequence[float] | None = None
    ) -> None:
        """Use these adapters, and no others, on the backbone; an empty list removes all.

        The base model is neither loaded again nor changed: without adapters, or with scales of 0,
        it gives bit-identical results.

        Args:
            adapters: folders written by `khala train lora` or mlx-lm, or results of
                `khala_mlx.convert.read_adapter` for other formats.
            scales: the strength of each adapter, 1 as trained.

        Raises:
            KhalaError: if an adapter cannot be read or does not fit the model. The adapters in
                use before then stay.
        """
        self.parts.load_adapters(adapters, scales)

    # Songs

    def generate(
        self,
        *,
        tags: str = "",
        description: str = "",
        genre: str = "",
        lyrics: str = "",
        instrumental: bool = False,
        language: str = "",
        minutes: int = 1,
        text_mode: str = "same_as_backbone_no_description",
        truncate_lyrics: bool = False,
        seconds: float | None = None,
        min_seconds: float = 0.0,
        seed: int | None = None,
        temperature: float = 1.0,
        top_k: int = 50,
        refine_top_k: int = 10,
        reachable_only: bool = True,
        refine_seed: int | None = None,
        kv_bits: int | None = None,
        refine_expected: bool = False,
        on_progress: Progress | None = None,
        on_take: OnTake | None = None,
    ) -> Song:
        """Make a song: prompt, compose, refine, render.

        Args:
            minutes: the length that the prompt asks for, 1..10.
            seconds: maximum length; the default is `minutes` plus 0.8 minutes.
            min_seconds: the song does not end before.
            seed: the same seed gives the same song on the same backend; random when None.
            refine_seed: the seed of the detail; `seed` when None.
            kv_bits: quantize the key-value cache to 8 or 4 bits, which changes the song.
            refine_expected: choose the detail by expectation instead of drawing it; seeds do not
                change it then.
            on_progress: called as (stage, done, total), stage "compose", "refine" or "render".
            on_take: called with each state worth keeping: `Take.save` writes it, `resume` and
                `finish` continue from it.

        Raises:
            KhalaError: before any model is loaded if the request cannot be served.
        """
        values = locals()
        asked = {field.name: values[field.name] for field in fields(Request)}
        asked["seed"] = secrets.randbelow(2**32) if seed is None else seed
        return self.finish(self.begin(Request(**asked)), on_progress, on_take)

    def begin(self, request: Request, prefix: np.ndarray | None = None) -> Take:
        """Return the take of a song that is not composed yet. Loads no model.

        Time stamps, chords and the like are removed from the lyrics; without lyrics the song is an
        instrumental. A KhalaWarning reports either.

        Args:
            prefix: codes [k, T0] of a song to continue, k at least the coarse codebooks. They stay
                as they are; what follows is composed behind them, and refining sees the whole.

        Raises:
            KhalaError: if the request cannot be served.
        """
        return new_take(self.parts, self.source, self._prepared(request), prefix)

    def resume(self, take: Take, *, same: bool = True) -> Take:
        """Return a take that was read from a file, checked and ready for `finish`. Loads no model.

        On the backend it was started on, the result is the very song it would have become.

        Args:
            same: refuse a take of another model instead of warning about it.

        Raises:
            KhalaError: if another model made the take, or its codes do not fit this model.
        """
        fresh = carry_over(self.parts, self.source, take, take.request, take.codebooks, same=same)
        fresh.metadata["timings"] = dict(take.metadata["timings"])
        return fresh

    def refine_again(self, take: Take, request: Request) -> Take:
        """Return a take with the coarse codes of `take` and its detail yet to be made.

        Raises:
            KhalaError: if the codes do not fit this model.
        """
        coarse = self.config.tokens.num_coarse
        return carry_over(self.parts, self.source, take, request, coarse, same=False)

    def finish(
        self,
        take: Take,
        on_progress: Progress | None = None,
        on_take: OnTake | None = None,
        *,
        codebooks: int | None = None,
        on_sound: OnSound | None = None,
    ) -> Song:
        """Make the song of a take from `begin`, `resume` or `refine_again`; see `finish_many`."""
        songs = self.finish_many(
            [take], on_progress, on_take, codebooks=codebooks, on_sound=on_sound
        )
        return next(songs)

    def finish_many(
        self,
        takes: Sequence[Take],
        on_progress: Progress | None = None,
        on_take: OnTake | None = None,
        *,
        codebooks: int | None = None,
        on_sound: OnSound | None = None,
    ) -> Iterator[Song]:
        """Make the songs of takes and yield them in this order.

        Takes that are not composed yet must have the same request but for the seed. They are
        composed together, which costs hardly more than one, and each equals the song of its seed
        alone. Then each is refined, rendered and yielded. If only some fail, they are left out
        with a KhalaWarning.

        Args:
            on_take: called with each state of a take that is worth keeping.
            codebooks: refine up to this codebook only: drafts, which another call can finish.
            on_sound: called with each rendered piece [n, C] and the samples of its song.

        Raises:
            KhalaError: at once if `codebooks` is out of range, if takes to be composed have
                different requests, or if the songs need more memory than the machine has.
        """
        self.check_draft(codebooks)
        takes = list(takes)
        if not takes:
            return iter(())
        plan = self._plan_of(takes)
        return self._finish(takes, plan, on_progress, on_take or _ignore, codebooks, on_sound)

    def _finish(
        self,
        takes: list[Take],
        plan: Plan,
        on_progress: Progress | None,
        on_take: OnTake,
        codebooks: int | None,
        on_sound: OnSound | None,
    ) -> Iterator[Song]:
        # No plan is followed while the caller has a song: the caller may start another one
        # meanwhile, or never come back.
        with self.parts.following(plan):
            # 1. Compose: the backbone writes the coarse codebooks of all songs.
            self._compose(takes, plan, on_progress, on_take)
            composed = [take for take in takes if take.codebooks]
            count = len(composed)
            # 2. Refine: superres fills the other codebooks, song by song.
            for number, take in enumerate(composed):
                timings = take.metadata["timings"]
                last = max(codebooks or take.num_codebooks, take.codebooks)
                with timed(timings, "refine", on_progress, number, count) as progress:
                    self._refine(take, last, progress, on_take)
                # Each song has its own length: no buffer of this one fits the next.
                mx.clear_cache()
            self.parts.stage_done("superres")
        # 3. Render: the codec turns codes into sound.
        for number, take in enumerate(composed):
            timings = take.metadata["timings"]
            with (
                self.parts.following(plan),
                timed(timings, "render", on_progress, number, count) as progress,
            ):
                waveform = self._render(take.codes, plan.chunk_frames, progress, on_sound)
                if number + 1 == count:
                    self.parts.stage_done("codec")
            if np.abs(waveform).max() < SILENCE:
                warnings.warn("The song is silent.", KhalaWarning, stacklevel=2)
            yield Song(waveform, self.config.codec.sample_rate, take.codes, take.metadata, take)

    def compose_takes(
        self,
        takes: Sequence[Take],
        on_progress: Progress | None = None,
        on_take: OnTake | None = None,
    ) -> None:
        """Compose those of some takes that have no codes yet; see `finish_many`.

        `nats_per_token` can judge each take when `on_take` is called with it: the backbone is
        still loaded then.

        Raises:
            KhalaError: if that needs more memory than the machine has, or requests differ.
        """
        plan = self._plan_of(takes, judged=True)
        with self.parts.following(plan):
            self._compose(takes, plan, on_progress, on_take or _ignore)

    def nats_per_token(self, take: Take) -> float:
        """Return the backbone's mean nats per coarse token of what it composed for a take."""
        coarse = take.codes[: self.config.tokens.num_coarse]
        nats = self.backbone.nats_per_token(np.array(take.prompts[0]), coarse)
        return float(nats[take.prefix.shape[1] * len(coarse) :].mean())

    # The stages, on plain arrays

    def prompt_ids(
        self,
        tags: str = "",
        description: str = "",
        genre: str = "",
        lyrics: str = "",
        instrumental: bool = False,
        language: str = "",
        minutes: int = 1,
        text_mode: str = "same_as_backbone_no_description",
        truncate_lyrics: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of the backbone's and the superres prompt, int64 [P] each.

        Raises:
            KhalaError: if the prompt is malformed, or too long and not `truncate_lyrics`.
        """
        asked = Prompt(tags, description, genre, lyrics, instrumental, language, minutes, text_mode)
        return prompt_ids(self.tokenizer, self.config, asked, truncate=truncate_lyrics)

    def compose(
        self,
        ids: np.ndarray,
        *,
        max_frames: int,
        min_frames: int = 0,
        temperature: float = 1.0,
        top_k: int = 50,
        seed: int = 0,
        reachable_only: bool = True,
        kv_bits: int | None = None,
        on_progress: StageProgress | None = None,
    ) -> np.ndarray:
        """Return the coarse codes, int [2, T] in 0..1023, of the backbone prompt `ids` [P].

        More frames than fit the trained window are cut to those that do, with a KhalaWarning.
        """
        sampling = Sampling(temperature, top_k, reachable_only, kv_bits)
        return self.compose_many(
            ids,
            sampling,
            seeds=[seed],
            max_frames=max_frames,
            min_frames=min_frames,
            on_progress=on_progress,
        )[0]

    def compose_many(
        self,
        ids: np.ndarray,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        seeds: Sequence[int],
        max_frames: int,
        min_frames: int = 0,
        on_progress: StageProgress | None = None,
    ) -> list[np.ndarray]:
        """Return coarse codes, int [2, T], for each seed, reading the weights once for all.

        Each equals what `compose` gives for its seed alone (in float32; 16-bit and quantized
        weights round differently in a batch). If only some fail, theirs are [2, 0], with a
        KhalaWarning. More frames than fit the trained window are cut to those that do.

        Raises:
            KhalaError: for ids, seeds or lengths out of range, or if no song can be made.
        """
        seeds, ids = check_seeds(seeds), token_ids.check_ids(ids)
        check_whole("max_frames", max_frames, 1)
        check_whole("min_frames", min_frames, 0, max_frames)
        room = backbone_room(self.config, len(ids))
        if max_frames > room > 0:
            warn_window(self.config, max_frames, room)
            max_frames, min_frames = room, min(min_frames, room)
        return self.backbone.compose_many(
            ids,
            sampling,
            keys=[stage_key(seed, 0) for seed in seeds],
            max_frames=max_frames,
            min_frames=min_frames,
            on_progress=on_progress,
        )

    def refine(
        self,
        ids: np.ndarray,
        coarse: np.ndarray,
        *,
        top_k: int = 10,
        seed: int = 0,
        refined: np.ndarray | None = None,
        codebooks: int | None = None,
        kept: np.ndarray | None = None,
        expected: bool = False,
        on_progress: StageProgress | None = None,
    ) -> np.ndarray:
        """Return all codes, int [K, T], from the superres prompt `ids` [P] and coarse codes [2, T].

        Args:
            refined: codes [n, T] of codebooks that are made already, to continue behind.
            codebooks: stop at this many codebooks.
            kept: codes [k, T0] that stay as they are.
            expected: choose codes by expectation instead of drawing; from the coarse codes only.

        Raises:
            KhalaError: for codes or ids out of range, or a prompt that leaves no room.
        """
        key = stage_key(seed, 1)
        detail = Detail(top_k, expected)
        # Before the model is loaded.
        ids = token_ids.check_ids(ids)
        begun = token_ids.join_codes(self.config.tokens, coarse, refined)
        return self.superres.refine(
            ids,
            coarse,
            detail,
            key=key,
            refined=refined,
            codebooks=codebooks,
            kept=kept,
            expected=self._expected(begun.shape[1]) if expected else None,
            on_progress=on_progress,
        )

    def render(
        self,
        codes: np.ndarray,
        *,
        draft: bool = False,
        chunk_frames: int | None = None,
        on_progress: StageProgress | None = None,
    ) -> np.ndarray:
        """Return the sound of codes [K, T] (fewer codebooks if `draft`), float32 [2048 * T, 2]."""
        self._check_codes(codes, draft)
        return self._render(codes, chunk_frames, on_progress, None)

    def render_stream(
        self, codes: np.ndarray, *, draft: bool = False, chunk_frames: int | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the pieces of `render`, float32 [n, C] each, so that playing can start early."""
        self._check_codes(codes, draft)
        return self.codec.decode_stream(codes, chunk_frames=chunk_frames)

    # Planning: from the config alone, nothing is loaded

    def preview(
        self,
        request: Request,
        songs: int = 1,
        prefix_frames: int = 0,
        *,
        judged: bool = False,
        draft: int | None = None,
        finished: int = 0,
    ) -> dict[str, Any]:
        """Return what making a song would take: prompts, lengths, memory and least time.

        Args:
            songs: how many seeds at once.
            prefix_frames: frames of a continuation prefix.
            judged: whether the backbone reads each song once more to judge it.
            draft: the codebooks that songs are refined to, if not to all.
            finished: how many of the drafts are finished then.

        Raises:
            KhalaError: if the request cannot be served; a prompt that is too long is reported.
        """
        request = self._prepared(request)
        check_request(self.config, request)
        found = preview(self.tokenizer, self.config, request)
        lengths = found["backbone_prompt_tokens"], found["superres_prompt_tokens"]
        most, least = song_budget(self.config, request, lengths, prefix_frames)
        rate = self.config.codec.frame_rate
        job = Job(
            *lengths,
            frames=most,
            songs=songs,
            kv_bits=request.kv_bits,
            begun=prefix_frames,
            judged=judged,
            expected=request.refine_expected,
            draft=draft,
            finished=finished,
        )
        return {
            **found,
            **too_much_to_sing(request, most / rate, found.get("does_not_fit", [])),
            "max_seconds": round(most / rate, 1),
            "min_seconds": round(least / rate, 1),
            "max_frames": most,
            "max_tokens": most * self.config.tokens.num_coarse,
            "seed": request.seed,
            "memory": self.plan(job).summary(),
        }

    def plan(self, job: Job) -> Plan:
        """Return how a job of these sizes is made to fit the machine."""
        machine, parts = self.machine, self.parts
        # Another machine may compute in what this one's CPU backend is slow at.
        elsewhere = mx.default_device() == mx.cpu and not machine.on_cpu
        dtype = self.config.dtype if elsewhere else parts.dtype
        setting = Setting(dtype, machine.on_cpu, job.kv_bits, parts.adapters.extent)
        return make_plan(self.config, setting, machine, job, keep_loaded=parts.keep_loaded)

    def check_draft(self, codebooks: int | None) -> None:
        """Raise KhalaError if a draft cannot have this many codebooks; None stands for all."""
        if codebooks is None:
            return
        least, most = self.config.tokens.num_coarse, self.config.tokens.num_codebooks
        check_whole("draft codebooks", codebooks, least, most)

    # Inside

    def _prepared(self, request: Request) -> Request:
        """Return the request as it is made, with a KhalaWarning for each note on it."""
        request, notes = prepared(request, self.parts.scope)
        for note in notes:
            warnings.warn(note, KhalaWarning, stacklevel=3)
        return request

    def _plan_of(self, takes: Sequence[Take], *, judged: bool = False) -> Plan:
        """Return how these takes are made to fit, or raise KhalaError."""
        _check_alike(takes)
        frames = max(take.codes.shape[1] if take.codebooks else take.budget[0] for take in takes)
        backbone, superres = (max(len(take.prompts[part]) for take in takes) for part in range(2))
        plan = self.plan(
            Job(
                backbone,
                superres,
                frames,
                songs=max(1, sum(not take.codebooks for take in takes)),
                kv_bits=takes[0].request.kv_bits,
                begun=min(take.prefix.shape[1] for take in takes),
                judged=judged,
                expected=any(take.request.refine_expected for take in takes),
            )
        )
        plan.check()
        return plan

    def _compose(
        self, takes: Sequence[Take], plan: Plan, on_progress: Progress | None, on_take: OnTake
    ) -> None:
        """Compose as many takes at a time as the memory holds; failed ones stay without codes."""
        new = [take for take in takes if not take.codebooks]
        at_once = plan.songs_at_once
        batches = [new[first : first + at_once] for first in range(0, len(new), at_once)]
        failures: list[tuple[int, NoSongError]] = []
        for number, batch in enumerate(batches):
            timings: dict[str, float] = {}
            try:
                with timed(timings, "compose", on_progress, number, len(batches)) as progress:
                    composed = self._compose_batch(batch, progress)
            except NoSongError as error:
                failures.append((len(batch), error))
                continue
            for take, coarse in zip(batch, composed, strict=True):
                if coarse.size:
                    prefix = take.prefix[: len(coarse)]
                    codes = np.hstack([prefix, coarse]) if prefix.size else coarse
                    take.set_codes(codes, self.config.codec.frame_rate)
                    take.metadata["timings"]["compose"] = round(timings["compose"] / len(batch), 3)
                    on_take(take)
        self.parts.stage_done("backbone")
        if failures and not any(take.codebooks for take in takes):
            raise failures[0][1]
        for count, why in failures:
            warnings.warn(f"{count} of the songs left out: {why}", KhalaWarning, stacklevel=2)

    def _compose_batch(self, batch: list[Take], progress: StageProgress) -> list[np.ndarray]:
        """Return coarse codes [2, T] behind the prefix, for takes of one request."""
        first, layout = batch[0], self.config.tokens
        prefix, (most, least) = first.prefix[: layout.num_coarse], first.budget
        prompt, begun = np.array(first.prompts[0]), prefix.shape[1]
        if begun:
            prompt = np.concatenate([prompt, token_ids.interleave(layout, prefix)])
        return self.compose_many(
            prompt,
            sampling_of(first.request),
            seeds=[take.request.seed for take in batch],
            max_frames=most - begun,
            min_frames=max(0, least - begun),
            on_progress=progress,
        )

    def _refine(self, take: Take, last: int, report: StageProgress, on_take: OnTake) -> None:
        """Refine a take up to codebook `last`, and keep it every so often."""
        request, coarse = take.request, self.config.tokens.num_coarse
        expected = None
        if request.refine_expected and take.codebooks < last:
            # A take does not hold what its codebooks leave over, so all are made again, with the
            # same result.
            take.codes = take.codes[:coarse]
            expected = self._expected(take.codes.shape[1])
        begun = take.codebooks
        while take.codebooks < last:
            before, codebooks = take.codebooks - begun, min(last, take.codebooks + KEEP_EVERY)
            take.codes = self.superres.refine(
                np.array(take.prompts[1]),
                take.codes[:coarse],
                detail_of(request),
                key=stage_key(request.detail_seed, 1),
                refined=take.codes[coarse:],
                codebooks=codebooks,
                kept=take.prefix,
                expected=expected,
                on_progress=_part_of(report, before, codebooks - take.codebooks, last - begun),
            )
            on_take(take)

    def _expected(self, frames: int) -> Expected:
        """Return what chooses the codes of a song of this many frames by expectation."""
        return Expected(self.parts.codec_codebooks(), frames, self.config.tokens.num_coarse)

    def _render(
        self,
        codes: np.ndarray,
        chunk_frames: int | None,
        on_progress: StageProgress | None,
        on_sound: OnSound | None,
    ) -> np.ndarray:
        if on_sound:
            piece = round(HEARD_SECONDS * self.config.codec.frame_rate)
            chunk_frames = max(1, min(chunk_frames or piece, piece))
        return self.codec.decode(
            codes, chunk_frames=chunk_frames, on_progress=on_progress, on_block=on_sound
        )

    def _check_codes(self, codes: np.ndarray, draft: bool) -> None:
        layout = self.config.tokens
        token_ids.check_codes(
            codes, codebooks=layout.num_codebooks, size=layout.codebook_size, fewer=draft
        )


def check_seeds(seeds: Iterable[int]) -> list[int]:
    """Return seeds as a list of Python ints.

    Raises:
        KhalaError: if there are none, or one is out of range.
    """
    if not isinstance(seeds, Iterable):
        raise KhalaError(f"seeds must be a list, got {shown(seeds)}.")
    found = list(seeds)
    if not found:
        raise KhalaError("At least one seed is needed.")
    for seed in found:
        stage_key(seed, 0)
    return [int(seed) for seed in found]


def _ignore(take: Take) -> None:
    """Keep no states of a take."""


def _check_alike(takes: Sequence[Take]) -> None:
    """Raise KhalaError if takes to be composed together differ in more than the seed."""
    new = [take for take in takes if not take.codebooks]
    for take in new[1:]:
        first = new[0]
        requests = [replace(each.request, seed=0) for each in (first, take)]
        same = requests[0] == requests[1] and first.prompts == take.prompts
        if not (same and first.budget == take.budget and np.array_equal(first.prefix, take.prefix)):
            raise KhalaError(
                "Takes to be composed together must have the same request but for the seed. Finish "
                "the others in a call of their own."
            )


def _part_of(report: StageProgress, before: int, steps: int, total: int) -> StageProgress:
    """Return progress of `steps` steps, each of which may be several, as part of `total` steps."""

    def partial(done: int, of: int) -> None:
        report(before * of // steps + done, total * of // steps)

    return partial
