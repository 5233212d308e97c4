"""Options that several commands share, and the typed groups in which commands receive them."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from khala_mlx.errors import KhalaError
from khala_mlx.text import is_text

if TYPE_CHECKING:
    from khala_mlx.audio.mastering import Mastering

FILE = click.Path(path_type=Path)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Text(click.types.StringParamType):
    """Text that can be written into a file; arguments may have bytes that are not text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        if not is_text(str(text)):
            self.fail("it is not valid text.", param, ctx)
        return text


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
            self.fail(f"{value!r} is not a time such as 1:12 or 72.5.", param, ctx)
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        return hours * 3600 + minutes * 60 + seconds


def together(*options: Decorator) -> Decorator:
    """Return several options as one decorator, shown in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def group(name: str, kind: Callable[..., Any], *options: Decorator) -> Decorator:
    """Return options that reach the command as one argument `name`, made by kind(**options)."""

    @together(*options)
    def collect(**values: Any) -> Any:
        return kind(**values)

    own = {str(each.name) for each in vars(collect)["__click_params__"]}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def grouped(**values: Any) -> Any:
            try:
                value = collect(**{each: values.pop(each) for each in own})
            except KhalaError as error:
                raise click.ClickException(str(error)) from error
            return function(**values, **{name: value})

        return together(*options)(grouped)

    return decorate


@dataclass(frozen=True)
class ModelArgs:
    """Which model, with which adapters."""

    model: str
    adapters: tuple[Path, ...] = ()
    adapter_scales: tuple[float, ...] = ()

    @property
    def flags(self) -> list[str]:
        """The options of a command line that names the same; the demo and folders need none."""
        words = []
        if not (self.model == "demo" or is_folder(self.model)):
            words += ["--model", shlex.quote(self.model)]
        for path in self.adapters:
            words += ["--adapter", shlex.quote(str(path))]
        for scale in self.adapter_scales:
            words += ["--adapter-scale", str(scale)]
        return words


@dataclass(frozen=True)
class FileArgs:
    """How the file of a song is written; a take records it, so that finishing needs no options."""

    normalize: bool
    loudness: float | None
    fade: float
    bit_depth: str
    title: str = ""
    artist: str = ""

    @property
    def mastering(self) -> Mastering:
        """Return what is done to the sound.

        Raises:
            KhalaError: if a value is out of range.
        """
        from khala_mlx.audio.mastering import Mastering

        return Mastering(self.normalize, self.loudness, self.fade, self.bit_depth)

    def recorded(self, suffix: str) -> dict[str, Any]:
        """Return what a take records of a file with this suffix."""
        from khala_mlx.audio.tags import clean

        names = {"title": clean(self.title), "artist": clean(self.artist)}
        return {**asdict(self), **names, "suffix": suffix}

    def with_recorded(self, values: dict[str, Any]) -> FileArgs:
        """Return these with what a take recorded, unless this command line set it.

        Raises:
            click.UsageError: if the option cannot have a recorded value.
        """
        context = click.get_current_context()
        names = {field.name for field in fields(self)}
        found = {
            str(each.name): each.type_cast_value(context, values[each.name])
            for each in context.command.params
            if each.name in names and each.name in values and not given(each.name)
        }
        return replace(self, **found)

    def given_flags(self) -> list[str]:
        """Return the flags of this group that the command line set."""
        return sorted(flag(field.name) for field in fields(self) if given(field.name))


model_option = click.option(
    "--model",
    "-m",
    envvar="KHALA_MODEL",
    default="demo",
    show_default="the bundled demo model",
    help="Model folder, Hub repository, or demo.",
)
model_options = group(
    "model",
    ModelArgs,
    model_option,
    click.option(
        "--adapter",
        "adapters",
        type=FILE,
        multiple=True,
        help="LoRA adapter folder. Repeatable.",
    ),
    click.option(
        "--adapter-scale",
        "adapter_scales",
        type=float,
        multiple=True,
        help="Strength of each adapter.  [default: 1]",
    ),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_mastering_options = (
    click.option(
        "--bit-depth",
        type=click.Choice(["16", "24", "float"]),
        default="16",
        show_default=True,
        help="Bit depth of wav and flac files.",
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
        help="Loudness to reach, such as -14, limited by a true peak of -1 dBTP.",
    ),
    click.option("--fade", type=float, default=0.0, metavar="SECONDS", help="Fade out the end."),
)
mastering_options = group("file", FileArgs, *_mastering_options)
file_options = group(
    "file",
    FileArgs,
    click.option(
        "--title", type=Text(), default="", help="Title in the file's tags.  [default: the prompt]"
    ),
    click.option("--artist", type=Text(), default="", help="Artist in the file's tags."),
    *_mastering_options,
)
output_option = click.option(
    "--output", "-o", type=FILE, help="wav, flac, ogg or mp3 file.  [default: song.wav]"
)
play_option = click.option(
    "--play",
    is_flag=True,
    help="Play the song while it is rendered, with --fade but before --loudness.",
)


def given(name: str) -> bool:
    """Return whether the command line set the option, rather than a default of any kind.

    What a song recorded goes before the defaults of the settings file and the environment.
    """
    source = click.get_current_context().get_parameter_source(name)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.PROMPT)


def left_to_default(name: str) -> bool:
    """Return whether neither the command line nor the user's own defaults set the option."""
    source = click.get_current_context().get_parameter_source(name)
    return source in (None, ParameterSource.DEFAULT)


def flag(name: str) -> str:
    """Return how the option `name` is written on the command line."""
    parameters = click.get_current_context().command.params
    return max(next(p.opts for p in parameters if p.name == name), key=len)


def is_folder(name: str) -> bool:
    """Return whether `name` is an existing folder; ~ is the user's home."""
    try:
        return Path(name).expanduser().is_dir()
    except RuntimeError:
        # ~nobody
        return False
