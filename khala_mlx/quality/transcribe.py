"""Which of the lyrics are heard in a song, where a recogniser is installed (extra `words`)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from difflib import SequenceMatcher
from importlib.util import find_spec

import numpy as np

# Whisper's own rate, and a model of the Hub that mlx-whisper reads; 1.6 GB.
_RATE = 16000
_MODEL = "mlx-community/whisper-large-v3-turbo"
# Scripts without spaces between words: each character counts as one.
_LONE = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f]|[^\\W_\u3040-\u30ff\u3400-\u4dbf"
    "\u4e00-\u9fff\u0e00-\u0e7f]+(?:'[^\\W_]+)*"
)
_SECTION = re.compile(r"\[[^\[\]\n]*\]")

Recogniser = Callable[[np.ndarray, int], str]


def recogniser() -> Recogniser | None:
    """What turns samples [L, C] and their rate into text; None where none is installed."""
    return _whisper if find_spec("mlx_whisper") is not None else None


def sung_words(lyrics: str) -> list[str]:
    """The words of lyrics in their order, without section marks, case and accents folded."""
    text = unicodedata.normalize("NFKC", _SECTION.sub(" ", lyrics)).casefold()
    return _LONE.findall(text.replace("’", "'"))


def coverage(lyrics: str, heard: str) -> float | None:
    """Share of the lyrics' words that were heard in their order; None if there are none."""
    wanted, found = sung_words(lyrics), sung_words(heard)
    if not wanted:
        return None
    blocks = SequenceMatcher(None, wanted, found, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(wanted)


def _whisper(waveform: np.ndarray, sample_rate: int) -> str:
    import mlx_whisper
    import soxr

    mono = soxr.resample(waveform.mean(axis=1), sample_rate, _RATE).astype(np.float32)
    return str(mlx_whisper.transcribe(mono, path_or_hf_repo=_MODEL)["text"])
