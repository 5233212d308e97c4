"""One song of the corpus: the sound and the truth about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .band import play
from .mix import mix
from .score import EXTRA_STYLE, SAMPLE_RATE, SPLITS, STYLES, TICK, Score, compose
from .voice import sing

_MIN_NOTES = 6  # shortest notes in a song: the band's slot and two syllables, if slots are doubled
_NOTE_SECONDS = (0.3, 2.0)  # consonants alone take 0.2 s


@dataclass(frozen=True)
class Syllable:
    """A sung syllable: onset of its consonant and length in seconds, pitch as a MIDI number."""

    text: str
    onset: float
    seconds: float
    midi: int


@dataclass(frozen=True)
class Song:
    """A song: waveform float32 [L, 2] with peaks below -3 dBFS, prompt and ground truth."""

    waveform: np.ndarray
    sample_rate: int
    tags: str
    style: str
    tempo: str
    mood: str
    lyrics: str
    syllables: tuple[Syllable, ...]
    bpm: float
    key: str


def whole_frames(seconds: float) -> float:
    """`seconds` rounded up to whole frames of the codec (2048 samples)."""
    return math.ceil(seconds * SAMPLE_RATE / TICK) * TICK / SAMPLE_RATE


def song(
    seed: int,
    split: str,
    *,
    seconds: float = 6.0,
    style: str | None = None,
    note_seconds: float = 0.5,
) -> Song:
    """The song of `seed` in `split` ("train", "valid" or "test"); equal arguments, equal song.

    `style` is drawn from the four trained ones unless named; `note_seconds` is the shortest note
    sung. No lyrics are ever shared between splits, whatever the seeds.
    """
    _check(seed, split, seconds, style, note_seconds)
    rng = np.random.default_rng(np.random.SeedSequence([SPLITS.index(split), seed]))
    score = compose(rng, split, seconds, style, note_seconds)
    return Song(
        waveform=mix(sing(score), play(score)),
        sample_rate=SAMPLE_RATE,
        tags=f"{score.style}, {score.tempo}, {score.mood}",
        style=score.style,
        tempo=score.tempo,
        mood=score.mood,
        lyrics="\n".join(" ".join(line) for line in score.lines),
        syllables=_truth(score),
        bpm=score.bpm,
        key=score.key,
    )


def _truth(score: Score) -> tuple[Syllable, ...]:
    tick = TICK / SAMPLE_RATE
    return tuple(
        Syllable(note.text, note.start * tick, note.ticks * tick, note.midi) for note in score.notes
    )


def _check(seed: int, split: str, seconds: float, style: str | None, note_seconds: float) -> None:
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    # SeedSequence cuts larger numbers into words, which could run into other seeds.
    if not 0 <= seed < 2**32:
        raise ValueError(f"A seed must lie in 0..2**32 - 1, got {seed}.")
    if style is not None and style not in (*STYLES, EXTRA_STYLE):
        names = ", ".join((*STYLES, EXTRA_STYLE))
        raise ValueError(f"There is no style {style!r}; choose one of {names}.")
    if not _NOTE_SECONDS[0] <= note_seconds <= _NOTE_SECONDS[1]:
        low, high = _NOTE_SECONDS
        raise ValueError(f"The shortest note must last {low}..{high} s, got {note_seconds}.")
    # With a single syllable some split could be left without any lyrics.
    if not seconds >= _MIN_NOTES * note_seconds:
        need = _MIN_NOTES * note_seconds
        raise ValueError(
            f"With notes of {note_seconds} s a song must last {need:g} s or more, got {seconds}."
        )
