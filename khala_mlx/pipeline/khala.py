"""Khala: the one place that orders the stages and decides what is loaded when."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from khala_mlx import token_ids as tokens
from khala_mlx.audio.files import SILENCE
from khala_mlx.errors import KhalaError, KhalaWarning, NoSongError
from khala_mlx.model.backbone import check_whole
from khala_mlx.pipeline.begin import Intake
from khala_mlx.pipeline.plan import Job, Plan
from khala_mlx.pipeline.timing import Progress, timed
from khala_mlx.prompt.request import Request
from khala_mlx.song.song import Song
from khala_mlx.song.take import Take

OnTake = Callable[[Take], None]

# Refined layers between two states of a take that are worth keeping.
KEEP_EVERY = 8


class Khala(Intake):
    """Songs, and takes of them, from the three stages of one model folder."""

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
            minutes: what the prompt tells the model, 1..10.
            seconds: caps the length; by default `minutes` and 0.8 more.
            min_seconds: the song cannot end before.
            seed: the same seed gives the same song on the same backend; drawn when None.
            refine_seed: the seed of the detail, by default `seed` too.
            kv_bits: 8 or 4 packs the key-value cache of a long song; it is another song then.
            refine_expected: choose the detail by expectation (expected.py) instead of drawing it;
                seeds do not change it then.
            on_progress: called as (stage, done, total), stage "compose", "refine" or "render".
            on_take: called with each state worth keeping: `Take.save` keeps it, `adopt` and
                `make` go on with it.

        Raises:
            KhalaError: before any model is loaded if the request cannot be served.
        """
        request = Request(
            tags=tags,
            description=description,
            genre=genre,
            lyrics=lyrics,
            instrumental=instrumental,
            language=language,
            minutes=minutes,
            text_mode=text_mode,
            truncate_lyrics=truncate_lyrics,
            seconds=seconds,
            min_seconds=min_seconds,
            seed=secrets.randbelow(2**32) if seed is None else seed,
            temperature=temperature,
            top_k=top_k,
            refine_top_k=refine_top_k,
            reachable_only=reachable_only,
            refine_seed=refine_seed,
            kv_bits=kv_bits,
            refine_expected=refine_expected,
        )
        return self.fulfil(request, on_progress, on_take)

    def fulfil(
        self,
        request: Request,
        on_progress: Progress | None = None,
        on_take: OnTake | None = None,
        kept: np.ndarray | None = None,
    ) -> Song:
        """Make the song of a recorded request; see `generate`, and `begin` for `kept`."""
        return self.make(self.begin(request, kept), on_progress, on_take)

    def fulfil_many(
        self, request: Request, seeds: Sequence[int], on_progress: Progress | None = None
    ) -> Iterator[Song]:
        """Songs of one request, for each of `seeds` (not the request's own) in this order.

        Each equals the song of its seed alone; see `make_many`.

        Raises:
            KhalaError: at once, before any model is loaded, if the request cannot be served.
        """
        return self.make_many(self.begin_many(request, seeds), on_progress)

    def make(
        self,
        take: Take,
        on_progress: Progress | None = None,
        on_take: OnTake | None = None,
        layers: int | None = None,
    ) -> Song:
        """Go on with a take of `begin` or `adopt` until its song is whole; see `make_many`."""
        return next(self.make_many([take], on_progress, on_take, layers))

    def make_many(
        self,
        takes: Sequence[Take],
        on_progress: Progress | None = None,
        on_take: OnTake | None = None,
        layers: int | None = None,
    ) -> Iterator[Song]:
        """Go on with takes until their songs are whole; the songs in this order.

        Those not composed yet are of one request but for the seed and are composed together,
        which costs hardly more than one; then each is refined in turn, and given as soon as it is
        rendered. Where only some fail, they are left out and a KhalaWarning tells why.

        Args:
            on_take: called with each state of a take that is worth keeping.
            layers: refine no further than that: drafts, to be finished by another call.

        Raises:
            KhalaError: at once if `layers` is no number of layers that can be heard, if takes to
                be composed are of different requests, or if the songs need more memory than there
                is however the work is cut.
        """
        self.check_draft(layers)
        takes = list(takes)
        if not takes:
            return iter(())
        _check_alike(takes)
        plan = self._plan_of(takes)
        plan.check()
        return self._songs(takes, plan, on_progress, on_take or (lambda _: None), layers)

    def compose_takes(
        self,
        takes: Sequence[Take],
        on_progress: Progress | None = None,
        on_take: OnTake | None = None,
    ) -> None:
        """Compose those of some takes that have no codes yet; see `make_many`.

        Each may be judged by `surprise` when `on_take` is called with it.

        Raises:
            KhalaError: if that needs more memory than there is, or they are of different requests.
        """
        _check_alike(takes)
        plan = self._plan_of(takes, judged=True)
        plan.check()
        with self._following(plan):
            self._compose_takes(takes, plan, on_progress, on_take or (lambda _: None))

    def _compose_takes(
        self, takes: Sequence[Take], plan: Plan, on_progress: Progress | None, keep: OnTake
    ) -> None:
        """As many at a time as the memory holds; what fails is left without codes."""
        new = [take for take in takes if not take.layers]
        at_once = plan.songs_at_once
        batches = [new[first : first + at_once] for first in range(0, len(new), at_once)]
        failures: list[tuple[int, NoSongError]] = []
        for part, batch in enumerate(batches):
            request, layout = batch[0].request, self.config.tokens
            kept, (most, least) = batch[0].kept[: layout.num_coarse], batch[0].budget
            prompt, begun = np.array(batch[0].prompts[0]), kept.shape[1]
            if begun:
                prompt = np.concatenate([prompt, tokens.interleave(layout, kept)])
            shared: dict[str, float] = {}
            try:
                with timed(shared, "compose", on_progress, part, len(batches)) as progress:
                    composed = self.compose_many(
                        prompt,
                        seeds=[take.request.seed for take in batch],
                        max_frames=most - begun,
                        min_frames=max(0, least - begun),
                        temperature=request.temperature,
                        top_k=request.top_k,
                        reachable_only=request.reachable_only,
                        kv_bits=request.kv_bits,
                        on_progress=progress,
                    )
            except NoSongError as error:
                failures.append((len(batch), error))
                continue
            for take, coarse in zip(batch, composed, strict=True):
                if coarse.size:
                    codes = np.hstack([kept, coarse]) if begun else coarse
                    take.set_codes(codes, self.config.codec.frame_rate)
                    take.metadata["timings"]["compose"] = round(shared["compose"] / len(batch), 3)
                    keep(take)
        self._done_with("backbone")
        if failures and not any(take.layers for take in takes):
            raise failures[0][1]
        for count, why in failures:
            warnings.warn(f"{count} of the songs left out: {why}", KhalaWarning, stacklevel=2)

    def surprise(self, take: Take) -> float:
        """Nats of a coarse token of what a take's backbone composed; see Backbone.surprise."""
        coarse, begun = take.codes[: self.config.tokens.num_coarse], take.kept.shape[1]
        nats = self.backbone.surprise(np.array(take.prompts[0]), coarse)
        return float(nats[begun * len(coarse) :].mean())

    def _songs(
        self,
        takes: list[Take],
        plan: Plan,
        on_progress: Progress | None,
        keep: OnTake,
        layers: int | None,
    ) -> Iterator[Song]:
        # No plan is followed while a song is with the caller, who may ask for others meanwhile,
        # or never come back.
        with self._following(plan):
            self._compose_takes(takes, plan, on_progress, keep)
            made = [take for take in takes if take.layers]
            parts = len(made)
            for part, take in enumerate(made):
                timings = take.metadata["timings"]
                last = max(layers or take.num_codebooks, take.layers)
                with timed(timings, "refine", on_progress, part, parts) as progress:
                    self._refine_take(take, last, progress, keep)
                # Each song has its own length: no buffer of this one fits the next.
                mx.clear_cache()
            self._done_with("superres")
        for part, take in enumerate(made):
            timings = take.metadata["timings"]
            with (
                self._following(plan),
                timed(timings, "render", on_progress, part, parts) as progress,
            ):
                chunk = plan.chunk_frames
                waveform = self.render(
                    take.codes, draft=True, chunk_frames=chunk, on_progress=progress
                )
                if part + 1 == parts:
                    self._done_with("codec")
            if np.abs(waveform).max() < SILENCE:
                warnings.warn("The song is silent.", KhalaWarning, stacklevel=2)
            yield Song(waveform, self.config.codec.sample_rate, take.codes, take.metadata, take)

    def _plan_of(self, takes: Sequence[Take], *, judged: bool = False) -> Plan:
        """How these takes are made to fit."""
        frames = max(take.codes.shape[1] if take.layers else take.budget[0] for take in takes)
        backbone, superres = (max(len(take.prompts[part]) for take in takes) for part in range(2))
        new = sum(not take.layers for take in takes)
        packed, begun = takes[0].request.kv_bits, min(take.kept.shape[1] for take in takes)
        expected = any(take.request.refine_expected for take in takes)
        job = Job(backbone, superres, frames, max(1, new), packed, begun, judged, expected)
        return self.envelope(job)

    def _refine_take(
        self, take: Take, last: int, report: Callable[[int, int], None], keep: OnTake
    ) -> None:
        """Refine a take up to layer `last`, and keep it every so often."""
        request, coarse = take.request, self.config.tokens.num_coarse
        expected = None
        if request.refine_expected and take.layers < last:
            # A take does not hold what its layers leave over: they are made again, all the same.
            take.codes = take.codes[:coarse]
            expected = self.expecting(take.codes.shape[1])
        begun = take.layers
        while take.layers < last:
            before, layers = take.layers - begun, min(last, take.layers + KEEP_EVERY)
            take.codes = self.refine(
                np.array(take.prompts[1]),
                take.codes[:coarse],
                refined=take.codes[coarse:],
                top_k=request.refine_top_k,
                seed=request.detail_seed,
                layers=layers,
                kept=take.kept,
                expected=expected,
                on_progress=_of_more(report, before, layers - take.layers, last - begun),
            )
            keep(take)

    def check_draft(self, layers: int | None) -> None:
        """Refuse a number of layers that a draft cannot have; None stands for all.

        Raises:
            KhalaError: if there are not so many, or too few to be heard.
        """
        least, most = self.config.tokens.num_coarse, self.config.tokens.num_codebooks
        if layers is not None:
            check_whole(layers=layers)
        if layers is not None and not least <= layers <= most:
            raise KhalaError(f"A draft has {least}..{most} layers, got {layers}.")


def _check_alike(takes: Sequence[Take]) -> None:
    """Refuse to compose takes together that differ in more than the seed."""
    new = [take for take in takes if not take.layers]
    for take in new[1:]:
        first = new[0]
        asked, told = (replace(each.request, seed=0) for each in (first, take))
        same = asked == told and first.prompts == take.prompts and first.budget == take.budget
        if not same or not np.array_equal(first.kept, take.kept):
            raise KhalaError(
                "Takes that are composed together have to be of one request but for the seed: make "
                "the others by a call of their own."
            )


def _of_more(
    report: Callable[[int, int], None], before: int, steps: int, total: int
) -> Callable[[int, int], None]:
    """Progress of `steps` steps, each of which may be several, as that of `total` of them."""

    def tell(done: int, of: int) -> None:
        report(before * of // steps + done, total * of // steps)

    return tell
