"""What every command shares: progress, warnings, one-line errors, and a prompt Ctrl-C."""

from __future__ import annotations

import errno
import functools
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from khala_mlx.cli import keyboard as keys
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.performance.blas import load as load_blas
from khala_mlx.storage.atomic import discard_unfinished
from khala_mlx.text import clock_time, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# Columns of the widest table.
_WIDEST = 1000
_UNINDENTED = re.compile(r"\n(?!    )")

P = ParamSpec("P")
R = TypeVar("R")


# What Ctrl-C says beyond that it stopped; the last one counts.
_hints: list[str] = []


def when_stopped(hint: str) -> None:
    """Let Ctrl-C say how to continue from now on; nothing where all is written."""
    _hints[:] = [hint] if hint else []


class OneLineErrors(click.Group):
    """A group whose usage errors are one line too, without the usage that click puts before."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As click's, for the console script: always ends in SystemExit."""
        kwargs["standalone_mode"] = False
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A name that this terminal cannot show must not fail a song that is written.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _complain(error.format_message())
            sys.exit(error.exit_code)
        except (click.Abort, BrokenPipeError):
            # Whoever read our output is gone; the flush at exit must not complain either.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
            sys.exit(1)
        # --help and --version end with a code, a command with its result.
        sys.exit(code if isinstance(code, int) else 0)


def command(work: Callable[P, R]) -> Callable[P, R]:
    """Run a command in a worker thread; turn errors into one line and exit code 1.

    The main thread only waits, so that Ctrl-C is answered at once even inside a long evaluation.
    One thread owns all of MLX's work, because its streams belong to the thread that made them.
    """

    @functools.wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        outcome: list[R] = []
        failure: list[BaseException] = []
        context = click.get_current_context()

        def target() -> None:
            try:
                # Before the first import of mlx.
                load_blas()
                with context.scope(cleanup=False):
                    outcome.append(work(*args, **kwargs))
            except BaseException as error:
                failure.append(error)
            finally:
                _stop_bar()
                _close_streams()
                # Not Thread.join: a Ctrl-C inside it makes Python take the thread for ended.
                done.set()

        done = threading.Event()
        with warnings.catch_warnings():
            warnings.simplefilter("always", KhalaWarning)
            warnings.showwarning = _show_warning
            _hints.clear()
            threading.Thread(target=target, daemon=True).start()
            try:
                with _terminate_like_interrupt():
                    _wait_for(done)
            except KeyboardInterrupt:
                discard_unfinished()
                _stop_bar()
                keys.restore()
                hint = f" {_hints[-1]}" if _hints else ""
                click.echo(f"\nStopped; nothing half-written was left behind.{hint}", err=True)
                sys.stdout.flush()
                # The worker may be deep inside an evaluation, which nothing but this ends.
                os._exit(1)
        if failure:
            _fail(failure[0])
        return outcome[0]

    return run


# The innermost says whether the work continues in spite of Ctrl-C.
_interrupts: list[Callable[[], bool]] = []


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which nobody may answer with continuing."""


@contextmanager
def on_interrupt(answer: Callable[[], bool]) -> Iterator[None]:
    """Let `answer` say, when Ctrl-C is pressed, whether the work continues."""
    _interrupts.append(answer)
    try:
        yield
    finally:
        _interrupts.remove(answer)


def _wait_for(done: threading.Event) -> None:
    while not done.is_set():
        try:
            done.wait(0.1)
        except _Terminated:
            raise
        except KeyboardInterrupt:
            if not _interrupts or not _interrupts[-1]():
                raise


def _close_streams() -> None:
    # MLX aborts the process at exit if a thread that is gone has left its streams open.
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].clear_streams()


@contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(error: BaseException) -> None:
    if isinstance(error, (click.ClickException, click.exceptions.Exit, click.Abort)):
        raise error
    if os.environ.get("KHALA_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, KhalaError):
        message = str(error)
    elif isinstance(error, MemoryError):
        message = "There is not enough memory for this."
    elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        message = f"A file's name cannot be so long: {shown(error.filename)}"
    else:
        detail = " ".join(str(error).split())
        kind = type(error).__name__
        message = f"Unexpected {kind}: {detail} (KHALA_DEBUG=1 shows where; please report it)."
    _complain(message)
    sys.exit(1)


@functools.cache
def _console() -> Console:
    """Return what draws on standard error; it reads no markup."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def _say(label: str, style: str, message: str) -> None:
    from rich.text import Text

    # Not wrapped: one error is one line, whatever the width.
    _console().print(Text.assemble((f"{label}: ", style), message), soft_wrap=True)


def _complain(message: str) -> None:
    # One line, whatever a file's name contains.
    _say("Error", "bold red", " ".join(message.split()))


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, KhalaWarning):
        _say("Warning", "yellow", str(message))


def _can_draw() -> bool:
    """Return whether a line of standard error can be drawn over."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """Shows (stage, done, total): a bar on a terminal, plain lines elsewhere, with the time left.

    The caller may know the seconds left of the stage and of all stages; the name of the latter is
    `whole`.
    """

    # A plain log gets a line for each tenth of a stage.
    _TENTHS = 10

    def __init__(self, whole: str = "song") -> None:
        self._stage, self._whole = "", whole
        self._began, self._first = 0.0, 0
        self._tenths = -1

    def __call__(
        self, stage: str, done: int, total: int, left: tuple[float, float] | None = None
    ) -> None:
        if stage != self._stage:
            self._stage, self._began, self._tenths = stage, time.monotonic(), -1
            self._first = done
            _stop_bar()
        timing = self._timing(done, total, left)
        if _can_draw():
            self._draw(done, total, timing)
        elif (tenths := done * self._TENTHS // max(total, 1)) != self._tenths:
            self._tenths = tenths
            # Stages that count bytes: nobody reads nine digits.
            scale, unit = (10**6, " MB") if total >= 10**6 else (1, "")
            shown = f"{stage}: {done // scale}/{total // scale}{unit}"
            click.echo(f"{shown}, {timing}" if timing else shown, err=True)

    def _timing(self, done: int, total: int, left: tuple[float, float] | None) -> str:
        """Return the time taken, or an estimate of the time left."""
        elapsed = time.monotonic() - self._began
        if done >= total:
            return f"{clock_time(elapsed)} taken"
        if left is not None:
            stage, whole = map(clock_time, left)
            return f"{stage} left" if left[0] == left[1] else f"{stage} left, {self._whole} {whole}"
        # Steps of an earlier process say nothing of this one's rate.
        new = done - self._first
        return f"{clock_time(elapsed / new * (total - done))} left" if new > 0 else ""

    def _draw(self, done: int, total: int, timing: str) -> None:
        if not _bars:
            _bars.append(_new_bar(self._stage, total))
        bar = _bars[-1]
        bar.update(bar.task_ids[0], completed=done, total=max(total, 1), timing=timing)
        bar.refresh()
        if done >= total:
            _stop_bar()


# The bar that is drawn now, if any.
_bars: list[Bar] = []


def _new_bar(stage: str, total: int) -> Bar:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[timing]}"),
        console=_console(),
        auto_refresh=False,
    )
    bar.add_task(stage, total=max(total, 1), timing="")
    bar.start()
    return bar


def _stop_bar() -> None:
    """End the line of a bar, and show the cursor again."""
    while _bars:
        _bars.pop().stop()


class Line:
    """One line on standard error, drawn over on a terminal; elsewhere only what is said."""

    def __init__(self) -> None:
        self._shown = _can_draw()

    def draw(self, text: str) -> None:
        """Show text that the next one replaces."""
        if self._shown:
            self._write(text)

    def say(self, text: str) -> None:
        """Show text that stays."""
        text = " ".join(text.split())
        if self._shown:
            self._write("")
        click.echo(text, err=True)

    def _write(self, text: str) -> None:
        # A line wider than the window would scroll; \x1b[K clears what a longer line left.
        width = _console().width
        click.echo("\r" + text[: max(1, width - 1)] + "\x1b[K", nl=False, err=True)


def report(data: dict[str, Any], as_json: bool) -> None:
    """Print a result: aligned `name  value` lines, or one JSON object."""
    if as_json:
        text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False)
        # A lone surrogate cannot be printed, its JSON escape can.
        click.echo(_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
    else:
        width = max(len(name) for name in data)
        lines = (f"{name:<{width}}  {_harmless(str(value))}" for name, value in data.items())
        click.echo("\n".join(lines))
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    """`value` with null where JSON has no number."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _harmless(text: str) -> str:
    """Text of a stranger's file: it cannot steer the terminal, nor pass for another line."""
    text = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
    return _UNINDENTED.sub("\n    ", text)


def report_table(rows: list[dict[str, Any]]) -> None:
    """Print rows that have the same names as a table, numbers to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in rows[0].items():
        justify: Any = "right" if isinstance(value, (int, float)) else "left"
        table.add_column(Text(name), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_harmless(str(value))) for value in row.values()))
    # A table wider than the window is wrapped by the terminal, not cut.
    console = Console(width=_WIDEST, highlight=False)
    with console.capture() as captured:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
    sys.stdout.flush()
