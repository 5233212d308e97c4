"""Playback in the terminal: single keys and a line that shows the position."""

from __future__ import annotations

import os
import sys
from typing import TextIO

import click

from khala_mlx.audio.player import Player, Track, play
from khala_mlx.cli.keyboard import single_keys
from khala_mlx.text import clock_time

HELP = "space pauses, ←/→ jump 5 s, ↓/↑ 30 s, home restarts, q quits"


def play_in_terminal(track: Track) -> None:
    """`play` with the terminal's keys and a position line."""
    line = PositionLine()
    try:
        with single_keys() as keys:
            play(track, line, keys)
    finally:
        line.close()


class PositionLine:
    """Draws the position on a terminal; says nothing where the stream is none."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._drawn = False

    def __call__(self, player: Player) -> None:
        if not self._stream.isatty():
            return
        if not self._drawn:
            click.echo(HELP, file=self._stream)
            self._drawn = True
        # A pseudo-terminal without a size says 0.
        columns = os.get_terminal_size(self._stream.fileno()).columns or 80
        line = position_line(player, columns - 1)
        # \x1b[K clears what a longer line left; a line wider than the window would scroll.
        click.echo("\r" + line + "\x1b[K", nl=False, file=self._stream)

    def close(self) -> None:
        """End the line."""
        if self._drawn:
            click.echo("", file=self._stream)


def position_line(player: Player, columns: int) -> str:
    """`▶ 1:05 / 2:10 ━━━━━━━───────` in at most `columns` columns."""
    track = player.track
    rate = track.sample_rate
    mark = "‖" if player.paused else "▶"
    if track.ready < len(track) and player.position >= track.ready:
        mark = "…"
    text = f"{mark} {clock_time(player.position / rate)} / {clock_time(len(track) / rate)}"
    width = min(40, columns - len(text) - 1)
    if width >= 4:
        heard = width * player.position // max(1, len(track))
        ready = width * track.ready // max(1, len(track))
        text += " " + "━" * heard + "─" * (ready - heard) + " " * (width - ready)
    return text[: max(1, columns)]
