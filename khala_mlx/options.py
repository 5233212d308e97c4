"""Options that several commands share; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

FILE = click.Path(path_type=Path)
# The names of the options of `finish_options`, which are those of finish.Finish.
FINISH = ("normalize", "loudness", "fade", "bit_depth")

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, shown in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_option = click.option(
    "--model",
    "-m",
    default="demo",
    show_default="the model in the box",
    help="Model folder, Hub repository, or demo.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
finish_options = together(
    click.option(
        "--bit-depth",
        type=click.Choice(["16", "24", "float"]),
        default="16",
        show_default=True,
        help="Of wav and flac.",
    ),
    click.option(
        "--normalize/--no-normalize",
        default=True,
        show_default=True,
        help="Turn a song that would clip down to -1 dBFS.",
    ),
    click.option(
        "--loudness",
        type=float,
        metavar="LUFS",
        help="Bring the song to, say, -14 LUFS, as far as a true peak of -1 dBTP allows.",
    ),
    click.option("--fade", type=float, default=0.0, metavar="SECONDS", help="Fade the end out."),
)
tag_options = together(
    click.option("--title", default="", help="For the file's tags.  [default: the prompt]"),
    click.option("--artist", default="", help="For the file's tags."),
)
