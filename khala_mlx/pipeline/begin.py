"""Requests become takes that can be made: checked, measured, described. No model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx import token_ids as tokens
from khala_mlx.model.cache import check_kv_bits
from khala_mlx.model.sampling import check_sampling, stage_key
from khala_mlx.pipeline.parts import Stages, check_seeds
from khala_mlx.pipeline.plan import Job
from khala_mlx.prompt.duration import budget_behind, frame_budget
from khala_mlx.prompt.preview import preview, too_much_to_sing
from khala_mlx.prompt.prompt import prompt_ids
from khala_mlx.prompt.request import Request
from khala_mlx.song.song import SIDECAR_VERSION
from khala_mlx.song.take import Take, check_same_song, no_codes


class Intake(Stages):
    """What a model folder makes of requests, and of takes that were begun."""

    def plan(
        self,
        request: Request,
        songs: int = 1,
        begun: int = 0,
        *,
        judged: bool = False,
        draft: int | None = None,
        finished: int = 0,
    ) -> dict[str, Any]:
        """What `fulfil` would do with a request: prompts, lengths, memory and least time.

        Loads nothing. The adapters of `load_adapters` count.

        Args:
            songs: how many seeds at once.
            begun: frames of a beginning that is taken over.
            judged: whether the backbone reads each song once more to judge it.
            draft: the layers that the songs are refined to, if not to all.
            finished: how many of them are finished then.

        Raises:
            KhalaError: if the request cannot be served; a prompt that is too long is only told.
        """
        self._check_request(request)
        told = preview(self.tokenizer, self.config, request)
        lengths = told["backbone_prompt_tokens"], told["superres_prompt_tokens"]
        most, least = self._budget(request, lengths, begun)
        rate = self.config.codec.frame_rate
        job = Job(
            *lengths,
            frames=most,
            songs=songs,
            kv_bits=request.kv_bits,
            begun=begun,
            judged=judged,
            expected=request.refine_expected,
            draft=draft,
            finished=finished,
        )
        return {
            **told,
            **too_much_to_sing(request, most / rate, told.get("does_not_fit", [])),
            "max_seconds": round(most / rate, 1),
            "min_seconds": round(least / rate, 1),
            "max_frames": most,
            "max_tokens": most * self.config.tokens.num_coarse,
            "seed": request.seed,
            "memory": self.envelope(job).told(),
        }

    def begin(self, request: Request, kept: np.ndarray | None = None) -> Take:
        """The take of a song of which nothing is composed yet. Loads nothing.

        Args:
            kept: codes [k, T0] of a beginning that is taken over, the coarse layers at least;
                they stay, what follows is composed behind them, and refining sees the whole.

        Raises:
            KhalaError: if the request cannot be served.
        """
        kept = None if kept is None else tokens.plain_array(kept, "Codes have")
        if kept is not None and kept.size:
            layout = self.config.tokens
            coarse, refined = np.split(np.atleast_1d(kept), [layout.num_coarse])
            kept = tokens.check_begun(layout, coarse, refined)
        self._check_request(request)
        backbone_ids, superres_ids = self._request_ids(request)
        lengths = len(backbone_ids), len(superres_ids)
        begun = 0 if kept is None else kept.shape[1]
        return Take(
            self._metadata(request, lengths),
            kept=no_codes() if kept is None else kept,
            prompts=(backbone_ids.tolist(), superres_ids.tolist()),
            budget=self._budget(request, lengths, begun),
            num_codebooks=self.config.tokens.num_codebooks,
            source=self.source,
        )

    def begin_many(
        self, request: Request, seeds: Sequence[int], kept: np.ndarray | None = None
    ) -> list[Take]:
        """`begin` for each of `seeds` (not the request's own)."""
        seeds = check_seeds(seeds)
        take = self.begin(request, kept)
        return [take.with_request(replace(request, seed=seed)) for seed in seeds]

    def adopt(self, take: Take, *, same: bool = True) -> Take:
        """A take that was read from a file, checked and ready for `make`. Loads nothing.

        On the backend it was begun on, going on gives the very song that it would have become.

        Args:
            same: refuse a take that another model began, instead of only saying so.

        Raises:
            KhalaError: if another model began it, or its codes are none of this model's.
        """
        fresh = self._taken_over(take, take.request, take.layers, same=same)
        fresh.metadata["timings"] = dict(take.metadata["timings"])
        return fresh

    def redo(self, take: Take, request: Request) -> Take:
        """What a take's backbone composed, its detail to be made anew as `request` says.

        Raises:
            KhalaError: if the codes are none of this model's.
        """
        return self._taken_over(take, request, self.config.tokens.num_coarse, same=False)

    def _taken_over(self, take: Take, request: Request, layers: int, *, same: bool) -> Take:
        """A fresh take of `request` with the first layers of `take`."""
        fresh = self.begin(request, take.kept)
        check_same_song(take, fresh, strict=same)
        if take.layers:
            layout = self.config.tokens
            coarse, refined = np.split(take.codes[:layers], [layout.num_coarse])
            codes = tokens.check_begun(layout, coarse, refined)
            fresh.set_codes(codes, self.config.codec.frame_rate)
        fresh.options = take.options
        if "continued" in take.metadata:
            fresh.metadata["continued"] = take.metadata["continued"]
        return fresh

    def _check_request(self, request: Request) -> None:
        check_sampling(request.top_k, request.temperature)
        check_sampling(request.refine_top_k)
        check_kv_bits(request.kv_bits, self.config.backbone.head_dim)
        stage_key(request.seed, 0)
        stage_key(request.detail_seed, 1)

    def _budget(self, request: Request, lengths: tuple[int, int], begun: int) -> tuple[int, int]:
        """(most, least) frames behind prompts of these lengths, `begun` of which are there."""
        budget = frame_budget(self.config, request, *lengths)
        return budget_behind(self.config, budget, begun) if begun else budget

    def _request_ids(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        return prompt_ids(
            self.tokenizer, self.config, request.prompt, truncate=request.truncate_lyrics
        )

    def _metadata(self, request: Request, prompts: tuple[int, int]) -> dict[str, Any]:
        config = self.config
        return {
            "format_version": SIDECAR_VERSION,
            "generator": f"khala-mlx {version('khala-mlx')}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "ai_generated": True,
            "model": {
                "name": self.folder.resolve().name,
                "config_sha256": self.identity,
                "weights_fingerprint": self.fingerprint,
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
            "frames": 0,
            "seconds": 0.0,
            "backend": {"device": str(mx.default_device()), "mlx": version("mlx")},
            "timings": {},
        }
