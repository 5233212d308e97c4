"""Khala: the one place that orders the stages and decides what is loaded when."""

from __future__ import annotations

import hashlib
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar

import mlx.core as mx
import numpy as np

from khala_mlx import tokens
from khala_mlx.adapter import Adapter
from khala_mlx.audio import SILENCE
from khala_mlx.backbone import Backbone
from khala_mlx.codec import Codec
from khala_mlx.config import DTYPES, KhalaConfig
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.lengths import backbone_room, frame_budget, warn_window
from khala_mlx.lora import Adapters
from khala_mlx.prompt import Prompt, prompt_ids, prompt_texts
from khala_mlx.sampling import check_sampling, stage_key
from khala_mlx.song import SIDECAR_VERSION, Request, Song
from khala_mlx.superres import SuperRes
from khala_mlx.tokenizer import Tokenizer
from khala_mlx.weights import find_model, load_part, working_dtype

Progress = Callable[[str, int, int], None]
Loaded = TypeVar("Loaded", Backbone, SuperRes, Codec)


class Khala:
    """Tokenizer, backbone, superres and codec of one model folder, each loaded when first used."""

    def __init__(
        self,
        folder: Path,
        config: KhalaConfig,
        tokenizer: Tokenizer,
        *,
        dtype: str | None = None,
        keep_loaded: bool = True,
    ) -> None:
        self.folder = folder
        self.config = config
        self.tokenizer = tokenizer
        self.dtype = dtype or working_dtype(config)
        self.keep_loaded = keep_loaded
        self._parts: dict[str, Any] = {}
        self._adapters = Adapters()

    @classmethod
    def from_pretrained(
        cls, source: str | Path = "demo", *, dtype: str | None = None, keep_loaded: bool = True
    ) -> Self:
        """Open a model.

        Args:
            source: "demo" (the model in the box), a model folder, or a Hub repository that holds
                one.
            dtype: what the language models compute in, "bfloat16", "float16" or "float32"; by
                default what they are stored in, on the CPU backend float32, since 16-bit
                matrices are slower there by orders of magnitude. There, for the same reason, a
                quantised model that takes at most 1 GiB in float32 is unpacked, whatever the
                dtype. The codec is float32.
            keep_loaded: keep every stage in memory for the next song. Without it `generate` frees
                each stage when it is done, so that the largest, not the sum, has to fit.

        Raises:
            KhalaError: if there is no such model or it is damaged.
        """
        if dtype not in (None, *DTYPES):
            raise KhalaError(f"dtype has to be one of {', '.join(DTYPES)}, got {dtype!r}.")
        folder = find_model(source)
        config = KhalaConfig.load(folder / "config.json")
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        tokenizer.check(config.tokens)
        return cls(folder, config, tokenizer, dtype=dtype, keep_loaded=keep_loaded)

    @property
    def backbone(self) -> Backbone:
        """The backbone, loaded when first asked for, with the adapters of `load_adapters` on it."""
        model = self._part("backbone", lambda c: Backbone(c.backbone, c.tokens))
        self._adapters.enter(model)
        return model

    @property
    def superres(self) -> SuperRes:
        """The superres, loaded when first asked for."""
        return self._part("superres", lambda c: SuperRes(c.superres, c.tokens))

    @property
    def codec(self) -> Codec:
        """The codec, loaded when first asked for."""
        return self._part("codec", lambda c: Codec(c.codec))

    def load_adapters(
        self, adapters: Sequence[str | Path | Adapter], scales: Sequence[float] | None = None
    ) -> None:
        """Put these adapters, and no others, on the backbone; none takes all off.

        The base is neither loaded again nor changed: without adapters, or with scales of 0, it
        gives what it gave before, bit by bit.

        Args:
            adapters: folders made by `khala train lora` (or mlx-lm), or what
                `khala_mlx.convert.read_adapter` makes of other formats.
            scales: how strongly each works, 1 as trained.

        Raises:
            KhalaError: if one cannot be read, or fits neither the layers nor the weights; what was
                on the backbone before then stays.
        """
        self._adapters.choose(self.config, adapters, scales)

    @property
    def adapters(self) -> list[dict[str, Any]]:
        """Name, sha256 and scale of each adapter of `load_adapters`."""
        return self._adapters.told()

    def release(self, part: str) -> None:
        """Free the memory of "backbone", "superres" or "codec"; it is loaded again when needed."""
        if part == "backbone":
            self._adapters.leave()
        self._parts.pop(part, None)
        mx.clear_cache()

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
        """Token ids of the backbone's and the superres prompt, int64 [P] each.

        Raises:
            PromptError: if the prompt is malformed, or too long and not `truncate_lyrics`.
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
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Coarse codes, int [2, T] in 0..codebook_size-1, behind the backbone prompt `ids`.

        More frames than fit the trained window are cut to those that do, with a KhalaWarning.
        See Backbone.generate_many for the other arguments and errors.
        """
        return self.compose_many(
            ids,
            seeds=[seed],
            max_frames=max_frames,
            min_frames=min_frames,
            temperature=temperature,
            top_k=top_k,
            reachable_only=reachable_only,
            kv_bits=kv_bits,
            on_progress=on_progress,
        )[0]

    def compose_many(
        self,
        ids: np.ndarray,
        *,
        seeds: Sequence[int],
        max_frames: int,
        min_frames: int = 0,
        temperature: float = 1.0,
        top_k: int = 50,
        reachable_only: bool = True,
        kv_bits: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[np.ndarray]:
        """Coarse codes, int [2, T], for each seed, from one prompt and one reading of the weights.

        Each equals what `compose` gives for its seed alone (in float32; 16-bit and packed weights
        round differently in a batch). Where only some fail, theirs are [2, 0] and a KhalaWarning
        tells why. More frames than fit the trained window are cut to those that do, with a
        KhalaWarning. See Backbone.generate_many for the other arguments and errors.
        """
        _check_seeds(seeds)
        room = backbone_room(self.config, len(ids))
        if max_frames > room > 0:
            warn_window(self.config, max_frames, room)
            max_frames, min_frames = room, min(min_frames, room)
        return self.backbone.compose_many(
            np.asarray(ids),
            keys=[stage_key(seed, 0) for seed in seeds],
            max_frames=max_frames,
            min_frames=min_frames,
            temperature=temperature,
            top_k=top_k,
            reachable_only=reachable_only,
            kv_bits=kv_bits,
            on_progress=on_progress,
        )

    def refine(
        self,
        ids: np.ndarray,
        coarse: np.ndarray,
        *,
        top_k: int = 10,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """All codes, int [K, T], from the superres prompt `ids` and coarse codes [2, T]."""
        key = stage_key(seed, 1)
        # Before the model is loaded.
        self._check_codes(coarse, self.config.tokens.num_coarse)
        return self.superres.refine(
            np.asarray(ids), coarse, top_k=top_k, key=key, on_progress=on_progress
        )

    def render(
        self, codes: np.ndarray, *, on_progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """Sound of codes [K, T]: float32 [hop * T, channels]."""
        self._check_codes(codes, self.config.tokens.num_codebooks)
        return self.codec.decode(codes, on_progress=on_progress)

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
        on_progress: Progress | None = None,
    ) -> Song:
        """Make a song: prompt, compose, refine, render.

        Args:
            minutes: what the prompt tells the model, 1..10.
            seconds: caps the length; by default `minutes` and 0.8 more.
            min_seconds: the song cannot end before.
            seed: the same seed gives the same song on the same backend; drawn when None.
            on_progress: called as (stage, done, total), stage "compose", "refine" or "render".

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
        )
        return self.fulfil(request, on_progress)

    def plan(self, request: Request) -> dict[str, Any]:
        """What `fulfil` would do with a request: prompts, their lengths, frames. Loads nothing."""
        bb_ids, sr_ids = self._request_ids(request)
        most, least = frame_budget(self.config, request, len(bb_ids), len(sr_ids))
        backbone_text, superres_text = prompt_texts(self.config, request.prompt)
        rate = self.config.codec.frame_rate
        return {
            "backbone_prompt": backbone_text,
            "superres_prompt": superres_text,
            "backbone_prompt_tokens": len(bb_ids),
            "superres_prompt_tokens": len(sr_ids),
            "max_seconds": round(most / rate, 1),
            "min_seconds": round(least / rate, 1),
            "max_frames": most,
            "max_tokens": most * self.config.tokens.num_coarse,
            "seed": request.seed,
        }

    def fulfil(self, request: Request, on_progress: Progress | None = None) -> Song:
        """Make the song of a recorded request; see `generate`."""
        return next(self.fulfil_many(request, [request.seed], on_progress))

    def fulfil_many(
        self, request: Request, seeds: Sequence[int], on_progress: Progress | None = None
    ) -> Iterator[Song]:
        """Songs of one request, for each of `seeds` (not the request's own) in this order.

        Each equals the song of its seed alone. They are composed together, which costs hardly
        more than one, then refined in turn; each is given as soon as it is rendered. Where only
        some fail, they are left out and a KhalaWarning tells why.

        Raises:
            KhalaError: at once, before any model is loaded, if the request cannot be served.
        """
        check_sampling(request.top_k, request.temperature)
        check_sampling(request.refine_top_k)
        _check_seeds(seeds)
        ids = self._request_ids(request)
        budget = frame_budget(self.config, request, len(ids[0]), len(ids[1]))
        return self._songs(request, list(seeds), ids, budget, on_progress)

    def _songs(
        self,
        request: Request,
        seeds: list[int],
        ids: tuple[np.ndarray, np.ndarray],
        budget: tuple[int, int],
        on_progress: Progress | None,
    ) -> Iterator[Song]:
        shared: dict[str, float] = {}
        with _timed(shared, "compose", on_progress) as progress:
            composed = self.compose_many(
                ids[0],
                seeds=seeds,
                max_frames=budget[0],
                min_frames=budget[1],
                temperature=request.temperature,
                top_k=request.top_k,
                reachable_only=request.reachable_only,
                on_progress=progress,
            )
        self._done_with("backbone")
        made = [(seed, coarse) for seed, coarse in zip(seeds, composed, strict=True) if coarse.size]
        timings = [{"compose": round(shared["compose"] / len(seeds), 3)} for _ in made]
        refined = []
        for part, (seed, coarse) in enumerate(made):
            with _timed(timings[part], "refine", on_progress, part, len(made)) as progress:
                top_k = request.refine_top_k
                refined.append(
                    self.refine(ids[1], coarse, top_k=top_k, seed=seed, on_progress=progress)
                )
        self._done_with("superres")
        for part, ((seed, _), codes) in enumerate(zip(made, refined, strict=True)):
            with _timed(timings[part], "render", on_progress, part, len(made)) as progress:
                waveform = self.render(codes, on_progress=progress)
            if part + 1 == len(made):
                self._done_with("codec")
            if np.abs(waveform).max() < SILENCE:
                warnings.warn("The song is silent.", KhalaWarning, stacklevel=2)
            own = replace(request, seed=seed)
            metadata = self._metadata(own, codes, (len(ids[0]), len(ids[1])), timings[part])
            yield Song(waveform, self.config.codec.sample_rate, codes, metadata)

    def _request_ids(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        return prompt_ids(
            self.tokenizer, self.config, request.prompt, truncate=request.truncate_lyrics
        )

    def _check_codes(self, codes: np.ndarray, layers: int) -> None:
        tokens.check_codes(codes, layers=layers, codebook_size=self.config.tokens.codebook_size)

    def _part(self, name: str, build: Callable[[KhalaConfig], Loaded]) -> Loaded:
        if name not in self._parts:
            dtype = mx.float32 if name == "codec" else getattr(mx, self.dtype)
            model = build(self.config)
            self._parts[name] = load_part(model, self.folder, name, self.config, dtype)
        part: Loaded = self._parts[name]
        return part

    def _done_with(self, part: str) -> None:
        if not self.keep_loaded:
            self.release(part)
        mx.clear_cache()

    def _metadata(
        self,
        request: Request,
        codes: np.ndarray,
        prompts: tuple[int, int],
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        config = self.config
        return {
            "format_version": SIDECAR_VERSION,
            "generator": f"khala-mlx {version('khala-mlx')}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "ai_generated": True,
            "model": {
                "name": self.folder.resolve().name,
                "config_sha256": self.identity,
                "dtype": self.dtype,
                "fc1_bias": config.fc1_bias,
                "quantized": bool(config.quantization),
                "licence": config.licence,
                "source": dict(config.source),
                "adapters": self.adapters,
            },
            "request": request.to_dict(),
            "prompt_tokens": {"backbone": prompts[0], "superres": prompts[1]},
            "num_coarse": config.tokens.num_coarse,
            "frames": int(codes.shape[1]),
            "seconds": round(codes.shape[1] / config.codec.frame_rate, 3),
            "backend": {"device": str(mx.default_device()), "mlx": version("mlx")},
            "timings": seconds,
        }

    @property
    def identity(self) -> str:
        """sha256 of config.json, which names the checksums of what the weights came from."""
        return hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds:
        raise KhalaError("At least one seed is needed.")
    for seed in seeds:
        stage_key(seed, 0)


@contextmanager
def _timed(
    seconds: dict[str, float], stage: str, on_progress: Progress | None, part: int = 0, of: int = 1
) -> Iterator[Callable[[int, int], None]]:
    """Time a stage, or one part of several alike, and name it in progress reports."""

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(stage, part * total + done, of * total)

    began = time.perf_counter()
    yield report
    seconds[stage] = round(time.perf_counter() - began, 3)
