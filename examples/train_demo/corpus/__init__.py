"""A seeded, endless, procedural corpus of short songs for the demo model.

`song(seed, split)` (songs.py) composes (score.py), sings (voice.py), plays (band.py,
styles.py, instruments.py) and mixes (mix.py) one song. It needs NumPy only and knows nothing of the
models.
"""

from .score import EXTRA_STYLE, MOODS, SAMPLE_RATE, SPLITS, STYLES, SYLLABLES, TEMPOS, split_of
from .songs import Song, Syllable, song, whole_frames

TAGS: tuple[str, ...] = (*STYLES, *TEMPOS, *MOODS)
"""The 8 tags of the demo's training; `EXTRA_STYLE` is kept for fine-tuning."""

__all__ = [
    "EXTRA_STYLE",
    "MOODS",
    "SAMPLE_RATE",
    "SPLITS",
    "STYLES",
    "SYLLABLES",
    "TAGS",
    "TEMPOS",
    "Song",
    "Syllable",
    "song",
    "split_of",
    "whole_frames",
]
