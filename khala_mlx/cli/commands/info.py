"""`khala info`."""

from __future__ import annotations

from pathlib import Path

import click

from khala_mlx.cli.options import FILE, json_option
from khala_mlx.cli.terminal import command, report


@click.command()
@click.argument("path", type=FILE, metavar="FILE-OR-MODEL")
@click.option(
    "--plot",
    type=FILE,
    metavar="PNG",
    help="Draw the waveform, a mel spectrogram and the tokens (png, svg, pdf).",
)
@json_option
@command
def info(path: Path, plot: Path | None, as_json: bool) -> None:
    """Show information about a song, take, codes file or model folder."""
    from khala_mlx.song.info import describe, picture

    told = describe(path)
    if plot:
        picture(path, plot)
        told["plot"] = str(plot)
    report(told, as_json)
