"""Takes from requests: prompts, lengths, and the record of how the song is made. Loads no model."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx import token_ids
from khala_mlx.config import KhalaConfig
from khala_mlx.model.cache import check_kv_bits
from khala_mlx.model.sampling import Detail, Sampling, stage_key
from khala_mlx.pipeline.parts import Parts
from khala_mlx.prompt.duration import budget_behind, frame_budget
from khala_mlx.prompt.lyrics import has_voice, parse_lyrics
from khala_mlx.prompt.prompt import prompt_ids
from khala_mlx.prompt.request import Request
from khala_mlx.prompt.scope import Scope
from khala_mlx.song.record import RECORD_VERSION
from khala_mlx.song.take import Take, check_same_song, no_codes


def sampling_of(request: Request) -> Sampling:
    """Return how the backbone draws: the request's fields of the same names."""
    return Sampling(**{field.name: getattr(request, field.name) for field in fields(Sampling)})


def detail_of(request: Request) -> Detail:
    """Return how superres chooses codes: the request's fields of the same names, with refine_."""
    return Detail(**{each.name: getattr(request, f"refine_{each.name}") for each in fields(Detail)})


def prepared(request: Request, scope: Scope | None = None) -> tuple[Request, list[str]]:
    """Return a request without what is not words, and notes on what the user should know.

    Lyrics that are empty or only say [Instrumental] make it an instrumental, as in training.
    """
    lyrics, notes = parse_lyrics(request.lyrics), []
    if lyrics.note:
        notes.append(lyrics.note)
    voice = has_voice(lyrics.text, instrumental=request.instrumental)
    if not voice and not request.instrumental:
        if not lyrics.text.strip():
            notes.append(
                "There are no lyrics, so the song is an instrumental. For a voice give --lyrics or "
                "--lyrics-file; --instrumental says that none is wanted."
            )
        request = replace(request, instrumental=True, lyrics="")
    else:
        request = replace(request, lyrics=lyrics.text)
    if not request.prompt.metadata:
        notes.append(
            "There are no tags, description or genre, so the model chooses the style. Say what the "
            "song is like with --tags."
        )
    if scope and (outside := scope.outside(request)):
        notes.append(
            f"This model does not know {', '.join(outside)}, and will sing noise there. It knows "
            f"{scope.summary}.\nReal songs need the released weights: "
            "`khala models download liujiafeng/Shao-MusicGeneration-v1.0`, see "
            "docs/install.md."
        )
    return request, notes


def check_request(config: KhalaConfig, request: Request) -> None:
    """Raise KhalaError if a value of the request is out of range."""
    check_kv_bits(sampling_of(request).kv_bits, config.backbone.head_dim)
    detail_of(request)
    stage_key(request.seed, 0)
    stage_key(request.detail_seed, 1)


def song_budget(
    config: KhalaConfig, request: Request, lengths: tuple[int, int], prefix_frames: int
) -> tuple[int, int]:
    """Return (most, least) frames behind prompts of these lengths in tokens, prefix included."""
    budget = frame_budget(config, request, *lengths)
    return budget_behind(config, budget, prefix_frames) if prefix_frames else budget


def new_take(parts: Parts, source: str, request: Request, prefix: np.ndarray | None) -> Take:
    """Return the take of a song that is not composed yet; see Khala.begin."""
    config = parts.config
    prefix = no_codes() if prefix is None else token_ids.plain_array(prefix, "Codes")
    if prefix.size:
        coarse, refined = np.split(np.atleast_1d(prefix), [config.tokens.num_coarse])
        prefix = token_ids.join_codes(config.tokens, coarse, refined)
    check_request(config, request)
    backbone, superres = prompt_ids(
        parts.tokenizer, config, request.prompt, truncate=request.truncate_lyrics
    )
    lengths = len(backbone), len(superres)
    return Take(
        _metadata(parts, request, lengths),
        prefix=prefix if prefix.size else no_codes(),
        prompts=(backbone.tolist(), superres.tolist()),
        budget=song_budget(config, request, lengths, prefix.shape[1]),
        num_codebooks=config.tokens.num_codebooks,
        source=source,
    )


def carry_over(
    parts: Parts, source: str, take: Take, request: Request, codebooks: int, *, same: bool
) -> Take:
    """Return a fresh take of `request` with the first codebooks of `take`.

    Args:
        same: refuse a take of another model instead of warning about it.
    """
    fresh = new_take(parts, source, request, take.prefix)
    check_same_song(take, fresh, strict=same)
    if take.codebooks:
        coarse, refined = np.split(take.codes[:codebooks], [parts.config.tokens.num_coarse])
        codes = token_ids.join_codes(parts.config.tokens, coarse, refined)
        fresh.set_codes(codes, parts.config.codec.frame_rate)
    fresh.options = take.options
    if "continued" in take.metadata:
        fresh.metadata["continued"] = take.metadata["continued"]
    return fresh


def _metadata(parts: Parts, request: Request, prompts: tuple[int, int]) -> dict[str, Any]:
    config = parts.config
    return {
        "format_version": RECORD_VERSION,
        "generator": f"khala-mlx {version('khala-mlx')}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "ai_generated": True,
        "model": {
            "name": parts.folder.resolve().name,
            "config_sha256": parts.identity,
            "weights_fingerprint": parts.fingerprint,
            "dtype": parts.dtype,
            "fc1_bias": config.fc1_bias,
            "quantized": bool(config.quantization),
            "licence": config.licence,
            "source": dict(config.source),
            "adapters": parts.adapters.summary(),
        },
        "request": request.to_dict(),
        "prompt_tokens": {"backbone": prompts[0], "superres": prompts[1]},
        "num_coarse": config.tokens.num_coarse,
        "frames": 0,
        "seconds": 0.0,
        "backend": {"device": str(mx.default_device()), "mlx": version("mlx")},
        "timings": {},
    }
