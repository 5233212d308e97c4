"""Plays the band of a score into stereo."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .instruments import note
from .score import TICK, Score
from .styles import STYLE_PARTS, Part

_BASS = 36  # MIDI; C2
_CHORD = {"happy": 62, "sad": 53}  # lowest tone of a chord: mood shows in the register too
_LEAD = {"happy": 74, "sad": 65}
_FILL = {"happy": "0123", "sad": "20"}  # quick and rising, or slow and falling


def play(score: Score) -> np.ndarray:
    """The band [samples, 2], at no particular level."""
    style = STYLE_PARTS[score.style]
    stereo = np.zeros((2, score.samples), np.float32)
    for part in style.parts:
        for start, symbol, ticks in _steps(part, score):
            for midi in _tones(symbol, score.chord_at(start), _CHORD[score.mood]):
                _add(stereo, part, midi, start, ticks)
    lead = Part(style.lead, "", style.lead_level, pan=-0.4)
    for start, symbol, ticks in _fills(score):
        for midi in _tones(symbol, score.chord_at(start), _LEAD[score.mood]):
            _add(stereo, lead, midi, start, ticks)
    return stereo.T


def _steps(part: Part, score: Score) -> Iterator[tuple[float, str, float]]:
    """Start (ticks), symbol and length (ticks) of every note of a part."""
    pattern, step, ticks = part.pattern, score.beat / part.rate, part.beats * score.beat
    if not pattern:
        pattern, step, ticks = "c", score.chord_ticks, score.chord_ticks
    for index in range(int(np.ceil(_last_beat(score) / step))):
        if (symbol := pattern[index % len(pattern)]) != ".":
            yield _on_tick(index * step), symbol, ticks


def _last_beat(score: Score) -> float:
    # No note starts in the broken beat at the end of a song.
    return score.ticks // score.beat * score.beat


def _fills(score: Score) -> Iterator[tuple[float, str, float]]:
    fill = _FILL[score.mood]
    step = score.slot / len(fill)
    for rest in score.rests:
        for index, symbol in enumerate(fill):
            yield _on_tick(rest + index * step), symbol, step


def _on_tick(ticks: float) -> float:
    # At 9 ticks a beat this makes a light shuffle; the codec meets each sound in one phase only.
    return float(np.ceil(ticks - 0.5))


def _tones(symbol: str, chord: tuple[int, ...], lowest: int) -> list[int]:
    """MIDI numbers that a pattern's symbol stands for."""
    if symbol in "xrf":
        return [_above(chord[2 if symbol == "f" else 0], _BASS)]
    close = sorted(_above(tone, lowest) for tone in chord)
    return close if symbol == "c" else [[*close, close[0] + 12][int(symbol)]]


def _above(pitch_class: int, lowest: int) -> int:
    return lowest + (pitch_class - lowest) % 12


def _add(stereo: np.ndarray, part: Part, midi: int, start: float, ticks: float) -> None:
    first = round(start * TICK)
    if first >= stereo.shape[1]:
        return
    wave = note(part.timbre, midi, round(ticks * TICK))[: stereo.shape[1] - first]
    gain = 10 ** (part.level / 20)
    angle = np.pi / 4 * (1 + part.pan)
    stereo[0, first : first + len(wave)] += np.float32(gain * np.cos(angle)) * wave
    stereo[1, first : first + len(wave)] += np.float32(gain * np.sin(angle)) * wave
