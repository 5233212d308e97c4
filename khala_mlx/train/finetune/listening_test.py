"""A page of blind pairs: the same prompts and seeds, sung by a model with and without adapters."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from khala_mlx.audio import loudness
from khala_mlx.audio.files import CEILING_DBFS, write_audio
from khala_mlx.errors import KhalaError
from khala_mlx.storage.atomic import appears_whole, check_destination

# What music services of the quieter kind play at; low enough that few songs reach full scale.
LOUDNESS = -16.0
PAGE = "index.html"


@dataclass(frozen=True)
class Trial:
    """One pair: what was asked for, and both sounds [L, C]."""

    prompt: Mapping[str, Any]
    base: np.ndarray
    adapted: np.ndarray


def check_page(folder: Path) -> None:
    """Refuse, before any song is made, a page that could not be written.

    Raises:
        KhalaError: if pyloudnorm is missing or `folder` exists.
    """
    check_destination(folder)
    try:
        import pyloudnorm  # noqa: F401
    except ImportError as error:
        raise KhalaError(
            "Pairs that are equally loud need pyloudnorm, which is missing here: "
            "`pip install 'khala-mlx[listen]'`."
        ) from error


def write_page(
    folder: Path, trials: Iterable[Trial], sample_rate: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Write `folder`, which appears whole: index.html and two .flac files for each trial.

    Which of A and B has the adapters is drawn by `seed`; the page reveals it on request.

    Returns:
        For each trial the loudness of both sounds in LUFS, None where one of them has none.

    Raises:
        KhalaError: if the folder exists or cannot be written.
    """
    rng, letters, sections, told = np.random.default_rng(seed), [], [], []
    with appears_whole(folder, folder=True) as inside:
        for number, trial in enumerate(trials, 1):
            (base, adapted), level = matched([trial.base, trial.adapted], sample_rate)
            first = bool(rng.integers(2))
            letters.append("A" if first else "B")
            pair = (adapted, base) if first else (base, adapted)
            for letter, wave in zip("AB", pair, strict=True):
                write_audio(inside / _sound(number, letter), wave, sample_rate)
            sections.append(_section(number, trial.prompt))
            told.append({"pair": number, "lufs": level and round(level, 2)})
        page = Template(
            (files("khala_mlx.train.finetune") / "listening_test.html").read_text("utf-8")
        )
        text = page.substitute(
            trials="\n".join(sections),
            loudness=f"equally loud ({LOUDNESS:g} LUFS, less where that would clip)",
            key=base64.b64encode(json.dumps(letters).encode()).decode(),
        )
        (inside / PAGE).write_text(text, encoding="utf-8")
    return told


def matched(waves: Sequence[np.ndarray], sample_rate: int) -> tuple[list[np.ndarray], float | None]:
    """Sounds [L, C] at one loudness by pyloudnorm, LOUDNESS or what keeps all from clipping.

    Where one is silent or too short to have a loudness they stay as they are, and it is None.
    """
    found = [_measured(wave, sample_rate) for wave in waves]
    gains = [LOUDNESS - each for each in found if each is not None]
    if len(gains) < len(waves):
        return list(waves), None
    peaks = [loudness.true_peak(w, sample_rate) + g for w, g in zip(waves, gains, strict=True)]
    spare = min(0.0, CEILING_DBFS - max(peaks))
    scaled = [w * np.float32(10 ** ((g + spare) / 20)) for w, g in zip(waves, gains, strict=True)]
    return scaled, LOUDNESS + spare


def _measured(wave: np.ndarray, sample_rate: int) -> float | None:
    """LUFS of samples [L, C]; None if they are silent or shorter than a block of the meter."""
    import pyloudnorm

    meter = pyloudnorm.Meter(sample_rate)
    if len(wave) < meter.block_size * sample_rate:
        return None
    found = float(meter.integrated_loudness(wave.astype(np.float64)))
    return found if math.isfinite(found) else None


def _sound(number: int, letter: str) -> str:
    return f"{number:02d}{letter.lower()}.flac"


def _section(number: int, prompt: Mapping[str, Any]) -> str:
    words = escape(str(prompt.get("tags", "")))
    lyrics = escape(str(prompt.get("lyrics", ""))) or "instrumental"
    takes = "\n".join(
        f'<div class="take"><label><input type="radio" name="pair-{number}" value="{letter}"> '
        f'{letter}</label><audio controls preload="none" src="{_sound(number, letter)}"></audio>'
        "</div>"
        for letter in "AB"
    )
    neither = f'<label><input type="radio" name="pair-{number}" value="neither"> neither</label>'
    return f"<section><h2>{number}. {words}</h2><pre>{lyrics}</pre>\n{takes}\n{neither}</section>"
