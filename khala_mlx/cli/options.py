"""Options that several commands share; imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from khala_mlx.text import is_text

FILE = click.Path(path_type=Path)


class Text(click.types.StringParamType):
    """Text that can be written into a file; arguments may hold bytes that are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        if not is_text(str(text)):
            self.fail("it is no valid text.", param, ctx)
        return text


# The names of the options of `finish_options`, which are those of finish.Finish.
FINISH = ("normalize", "loudness", "fade", "bit_depth")
# What a take records of how its song is to be written, so that finishing it needs no options.
OF_THE_FILE = (*FINISH, "title", "artist")

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
    envvar="KHALA_MODEL",
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
    click.option(
        "--title", type=Text(), default="", help="For the file's tags.  [default: the prompt]"
    ),
    click.option("--artist", type=Text(), default="", help="For the file's tags."),
)
output_option = click.option(
    "--output", "-o", type=FILE, help="wav, flac, ogg or mp3.  [default: song.wav]"
)
play_option = click.option(
    "--play",
    is_flag=True,
    help="Play the song while it is rendered, with --fade but before --loudness.",
)
adapter_options = together(
    click.option(
        "--adapter",
        "adapters",
        type=FILE,
        multiple=True,
        help="What a model was taught; repeatable.",
    ),
    click.option(
        "--adapter-scale",
        "adapter_scales",
        type=float,
        multiple=True,
        help="How strongly each adapter works.  [default: 1]",
    ),
)


class ClockTime(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2
    """Seconds, as 72, 72.5, 1:12 or 1:02:03."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        match = re.fullmatch(
            r"(?:(?:(\d{1,3}):)?(\d{1,3}):)?(\d{1,6}(?:\.\d{1,9})?)", value.strip()
        )
        if match is None:
            self.fail(f"{value!r} is no time such as 1:12 or 72.5.", param, ctx)
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        return hours * 3600 + minutes * 60 + seconds


def given(name: str) -> bool:
    """Whether the option was set for this run, not left to its default or the user's own.

    What a song recorded goes before the defaults of the settings file and the environment.
    """
    source = click.get_current_context().get_parameter_source(name)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.PROMPT)


def left_to_default(name: str) -> bool:
    """Whether neither this run nor the user's own defaults set the option."""
    source = click.get_current_context().get_parameter_source(name)
    return source in (None, ParameterSource.DEFAULT)


def flag(name: str) -> str:
    """How the option `name` is written on the command line."""
    parameters = click.get_current_context().command.params
    return max(next(p.opts for p in parameters if p.name == name), key=len)


def recorded(values: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """`options` with what a take recorded for those of the file that are not set here.

    Raises:
        click.UsageError: if a recorded value is none the option can have.
    """
    context = click.get_current_context()
    found = dict(options)
    for parameter in context.command.params:
        name = parameter.name
        if name in OF_THE_FILE and name in values and not given(name):
            found[name] = parameter.type_cast_value(context, values[name])
    return found
