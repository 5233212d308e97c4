"""What each style plays: one line a part, written as a pattern over the bar."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """An instrument and its pattern, one character a step of `1 / rate` beats.

    `.` is silence, `c` the whole chord, `0`..`3` one tone of it (3 is the lowest an octave up),
    `r` and `f` root and fifth of the bass, `x` a drum. An empty pattern holds every chord.
    """

    timbre: str
    pattern: str
    level: float  # dB
    beats: float = 1.0  # length of a note
    rate: int = 2
    pan: float = 0.0  # -1 left .. 1 right


@dataclass(frozen=True)
class Style:
    """The parts of a style and the timbre that plays where the voice rests."""

    parts: tuple[Part, ...]
    lead: str
    lead_level: float = -4.0


STYLE_PARTS = {
    "techno": Style(
        parts=(
            Part("kick", "x.x.x.x.", 2),
            Part("hat", ".x.x.x.x", -20, beats=0.5),
            Part("saw bass", ".r.r.r.r", 0, beats=0.5),
            Part("saw stab", "c..c..c.", -9, beats=0.5, pan=0.6),
        ),
        lead="saw lead",
    ),
    "waltz": Style(
        parts=(
            Part("plucked bass", "r.....", 2, beats=1.5),
            Part("accordion", "..c.c.", -6, beats=0.8, pan=-0.6),
        ),
        lead="accordion",
    ),
    "ballad": Style(
        parts=(
            Part("piano", "01232123", -2, beats=1.5, pan=0.6),
            Part("pad", "", -7, pan=-0.6),
            Part("sine bass", "r.......", -4, beats=2),
        ),
        lead="flute",
    ),
    "reggae": Style(
        parts=(
            Part("sine bass", "r..rf.r.", 2, beats=0.7),
            Part("organ", "..c...c.", -4, beats=0.4, pan=0.6),
            Part("kick", "....x...", 0),
            Part("rim", "....x...", -8, beats=0.5),
        ),
        lead="melodica",
    ),
    "chiptune": Style(
        parts=(
            Part("square", "0123012301230123", -3, beats=0.25, rate=4, pan=0.6),
            Part("triangle bass", "r.r.r.r.", 0, beats=0.5),
            Part("snare", "..x...x.", -8, beats=0.5),
        ),
        lead="square",
    ),
}
