"""Composition: from a random generator to a score of chords, sung notes and rests. No sound.

Time is counted in ticks of 2048 samples, the codec's hop, so that equal bars become equal codes.
A sung note takes one slot of 16 or 18 ticks (0.74 or 0.84 s) in every style and tempo: slow songs
have one beat to the slot, fast songs two. The first slot belongs to the band, then each line of
lyrics takes one slot a syllable and one slot of rest, so the text alone says when each is sung.
Syllables are drawn freely; they do not name the pitch, which follows the chords.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

SAMPLE_RATE = 44_100
TICK = 2048  # samples; the hop of the codec

STYLES = ("techno", "waltz", "ballad", "reggae")
EXTRA_STYLE = "chiptune"  # never in the demo's training
TEMPOS = ("slow", "fast")
MOODS = ("happy", "sad")
SPLITS = ("train", "valid", "test")
SYLLABLES = ("do", "re", "mi", "fa", "sol", "la", "ti")

_SLOTS = (16, 18)  # ticks
# Relative keys share their notes: 8 chords and 9 sung pitches in the whole corpus.
_TONICS = {"happy": {"C": 0, "G": 7}, "sad": {"A": 9, "E": 4}}
_SCALES = {"happy": (0, 2, 4, 5, 7, 9, 11), "sad": (0, 2, 3, 5, 7, 8, 10)}
_PROGRESSIONS = {"happy": ((1, 5, 6, 4), (1, 4, 5, 1)), "sad": ((1, 6, 3, 7), (1, 4, 6, 5))}
_MODES = {"happy": "major", "sad": "minor"}
_VOICE_RANGE = (48, 60)  # MIDI; 131 to 262 Hz, low enough for harmonics to show the formants
_LEAP = 5  # semitones between neighbouring sung notes
_LINE = (2, 4)  # syllables in a line


@dataclass(frozen=True)
class SungNote:
    """One syllable: start and length in ticks, pitch as a MIDI number."""

    text: str
    start: float
    ticks: float
    midi: int


@dataclass(frozen=True)
class Score:
    """Everything the voice and the band need; times in ticks, chords as pitch classes."""

    style: str
    tempo: str
    mood: str
    key: str
    samples: int
    beat: int
    beats_per_bar: int
    slot: float
    chord_ticks: int
    chords: tuple[tuple[int, ...], ...]
    notes: tuple[SungNote, ...]
    lines: tuple[tuple[str, ...], ...]
    rests: tuple[float, ...]

    @property
    def bpm(self) -> float:
        """Beats a minute."""
        return 60 * SAMPLE_RATE / (self.beat * TICK)

    @property
    def ticks(self) -> float:
        """Length of the song in ticks; the last one may be a part."""
        return self.samples / TICK

    def chord_at(self, tick: float) -> tuple[int, ...]:
        """Root, third and fifth (pitch classes) that sound at `tick`."""
        return self.chords[int(tick // self.chord_ticks) % len(self.chords)]


def split_of(syllables: Sequence[str]) -> str:
    """The one split a sequence of syllables may be sung in: 80 % train, 10 % valid, 10 % test."""
    return {0: "test", 1: "valid"}.get(crc32(" ".join(syllables).encode()) % 10, "train")


def compose(
    rng: np.random.Generator, split: str, seconds: float, style: str | None, note_seconds: float
) -> Score:
    """Draw a score whose lyrics belong to `split`; `style` replaces the drawn one."""
    drawn = _pick(rng, STYLES)
    style = style or drawn
    tempo, mood = _pick(rng, TEMPOS), _pick(rng, MOODS)
    tonic = _pick(rng, tuple(_TONICS[mood]))
    slot = _SLOTS[rng.integers(len(_SLOTS))]
    beats_per_bar = 3 if style == "waltz" else 4
    chords = _chords(rng, mood, _TONICS[mood][tonic])
    chord_ticks = (3 if beats_per_bar == 3 else 2) * slot
    note_slot = _note_slot(slot, note_seconds)
    samples = round(seconds * SAMPLE_RATE)
    lengths = _line_lengths(rng, int(samples / TICK / note_slot))
    lines = _lyrics(rng, lengths, split)
    starts, rests = _layout(lengths, note_slot, samples / TICK)
    draft = Score(
        style=style,
        tempo=tempo,
        mood=mood,
        key=f"{tonic} {_MODES[mood]}",
        samples=samples,
        beat=slot if tempo == "slow" else slot // 2,
        beats_per_bar=beats_per_bar,
        slot=note_slot,
        chord_ticks=chord_ticks,
        chords=chords,
        notes=(),
        lines=lines,
        rests=rests,
    )
    return _with_melody(rng, draft, starts)


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[rng.integers(len(names))]


def _note_slot(slot: int, note_seconds: float) -> float:
    # Halved or doubled until it is the shortest that holds the note: stays on the beat grid.
    ticks = slot / 4
    while ticks * TICK / SAMPLE_RATE < note_seconds:
        ticks *= 2
    return ticks


def _chords(rng: np.random.Generator, mood: str, tonic: int) -> tuple[tuple[int, ...], ...]:
    scale = _SCALES[mood]
    degrees = _PROGRESSIONS[mood][rng.integers(len(_PROGRESSIONS[mood]))]
    thirds = (0, 2, 4)
    return tuple(
        tuple((tonic + scale[(degree - 1 + third) % 7]) % 12 for third in thirds)
        for degree in degrees
    )


def _line_lengths(rng: np.random.Generator, slots: int) -> tuple[int, ...]:
    """Syllables in each line, such that intro, lines and rests fit into `slots`."""
    lengths: list[int] = []
    free = slots - 1
    while free > 0:
        lengths.append(min(free, int(rng.integers(_LINE[0], _LINE[1] + 1))))
        free -= lengths[-1] + 1
    return tuple(lengths)


def _lyrics(
    rng: np.random.Generator, lengths: tuple[int, ...], split: str
) -> tuple[tuple[str, ...], ...]:
    # Refused until the sequence belongs to the split: about 10 tries for valid and test.
    while True:
        words = [SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=sum(lengths))]
        if split_of(words) == split:
            break
    stops = np.cumsum(lengths)
    return tuple(
        tuple(words[stop - n : stop]) for stop, n in zip(stops.tolist(), lengths, strict=True)
    )


def _layout(
    lengths: tuple[int, ...], slot: float, ticks: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Starts (ticks) of the sung notes, and of the whole slots that are left to the lead."""
    starts: list[float] = []
    rests, at = [0.0], slot
    for length in lengths:
        starts += [at + i * slot for i in range(length)]
        at += length * slot
        rests.append(at)
        at += slot
    rests += np.arange(at, ticks, slot).tolist()
    return tuple(starts), tuple(rest for rest in rests if rest + slot <= ticks)


def _with_melody(rng: np.random.Generator, score: Score, starts: tuple[float, ...]) -> Score:
    """The score with sung notes: chord tones, each within a small leap of the one before."""
    words = [word for line in score.lines for word in line]
    notes: list[SungNote] = []
    midi = sum(_VOICE_RANGE) // 2
    for word, start in zip(words, starts, strict=True):
        tones = _reachable(score.chord_at(start), midi)
        midi = tones[rng.integers(len(tones))]
        notes.append(SungNote(word, start, score.slot, midi))
    return replace(score, notes=tuple(notes))


def _reachable(chord: tuple[int, ...], midi: int) -> list[int]:
    low, high = _VOICE_RANGE
    near = range(max(low, midi - _LEAP), min(high, midi + _LEAP) + 1)
    return [tone for tone in near if tone % 12 in chord]
