"""`khala play`: a file, or a take while it is rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from khala_mlx.cli.options import FILE, adapter_options, model_option
from khala_mlx.cli.terminal import command


@click.command()
@click.argument("path", type=FILE, metavar="FILE-OR-TAKE")
@model_option
@adapter_options
@command
def play(path: Path, **options: Any) -> None:
    """Play a sound file, or a take as far as it is refined; the keys are shown."""
    from khala_mlx.audio.files import read_sound
    from khala_mlx.audio.player import Track
    from khala_mlx.cli.playback import play_in_terminal

    if path.suffix == ".safetensors":
        _play_take(path, options)
    else:
        play_in_terminal(Track.whole(*read_sound(path)))


def _play_take(path: Path, options: dict[str, Any]) -> None:
    from khala_mlx.audio.player import Track, heard_while_made
    from khala_mlx.cli.playback import play_in_terminal
    from khala_mlx.cli.session import open_model
    from khala_mlx.errors import KhalaError
    from khala_mlx.song.take import Take
    from khala_mlx.text import resuming

    take = Take.load(path)
    if not take.layers:
        raise KhalaError(f"{path} holds no codes yet: go on with `{resuming(path)}`.")
    khala = open_model(options, take)
    codes = khala.adopt(take, same=False).codes
    codec = khala.config.codec
    track = Track(codes.shape[1] * codec.hop, codec.channels, codec.sample_rate)
    with heard_while_made(track, play_in_terminal) as listened:
        for block in khala.codec.decode_stream(codes):
            track.add(block)
            if not listened():
                break
