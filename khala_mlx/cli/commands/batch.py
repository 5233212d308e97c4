"""`khala batch`: the songs of a list, one after the other; restartable, stopped gently by Ctrl-C.

Under `mlx.launch` the processes share the list.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from khala_mlx.cli.options import (
    FILE,
    FileArgs,
    ModelArgs,
    json_option,
    mastering_options,
    model_options,
)
from khala_mlx.cli.terminal import Line, command, on_interrupt, report

if TYPE_CHECKING:
    from khala_mlx.distributed import Processes
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.prompt.request import Request
    from khala_mlx.song.song_list import Entry, State


@click.command()
@click.argument("path", type=FILE, metavar="LIST")
@click.option("--out", type=FILE, default=".", help="Folder of the songs.  [default: here]")
@click.option(
    "--format", "suffix", type=click.Choice(["wav", "flac", "ogg", "mp3"]), default="wav",
    show_default=True, help="Format of songs whose line has no output.",
)  # fmt: skip
@model_options
@mastering_options
@json_option
@command
def batch(
    path: Path, out: Path, suffix: str, model: ModelArgs, file: FileArgs, as_json: bool
) -> None:
    """Make the songs of LIST, a .jsonl or .csv file with the options of `generate` as fields.

    A song that fails is reported and skipped. The same command again makes what is missing and
    resumes unfinished songs. Ctrl-C finishes the current song, a second Ctrl-C stops at once.
    Several machines share a list: mlx.launch --hostfile macs.json -- khala batch LIST.

    \b
    {"tags": "waltz", "lyrics": "do re mi", "seed": 1, "output": "first.mp3", "title": "First"}
    {"tags": "slow rock", "minutes": 2, "instrumental": true}
    """
    from khala_mlx.cli.session import open_model
    from khala_mlx.distributed import Processes
    from khala_mlx.song.song_list import read_list

    entries = read_list(path, f".{suffix}")
    # Refuse wrong values before the first song.
    _ = file.mastering
    processes = Processes.launched()
    processes.agree(repr(entries), "list of songs")
    khala = open_model(model)
    own = _own(khala, processes, entries, out)
    results: list[dict[str, Any]] = []
    stopping: list[bool] = []

    def stop_gently() -> bool:
        stopping.append(True)
        if len(stopping) > 1:
            return False
        click.echo("\nFinishing the current song; Ctrl-C again stops at once.", err=True)
        return True

    with keep_awake(), on_interrupt(stop_gently):
        line = _Progress(len(entries), len(own))
        for number, entry in own:
            if stopping:
                break
            line.begin(number, entry.output)
            results.append(_made(khala, entry, out / entry.output, model, file, line))
            line.end(results[-1])
    # Who is done first waits here for the others.
    every = [each for part in processes.gathered(results) for each in part]
    if processes.leads:
        _summarise(sorted(every, key=lambda each: each["line"]), len(entries), as_json)


def _own(
    khala: Khala, processes: Processes, entries: list[Entry], out: Path
) -> list[tuple[int, Entry]]:
    """Return this process's entries, with their number in the list.

    Raises:
        KhalaError: if the processes do not have the same model.
    """
    from khala_mlx.song.song_list import owners

    if processes.size > 1:
        parts = khala.parts
        model = parts.identity, parts.fingerprint, parts.dtype, khala.adapters
        processes.agree(repr(model), "model")
    ranks = owners(processes.gathered([_state(out / entry.output) for entry in entries]))
    numbered = zip(ranks, enumerate(entries, 1), strict=True)
    return [each for rank, each in numbered if rank == processes.rank]


def _state(output: Path) -> State:
    """Return how much of an output's song is on this machine."""
    from khala_mlx.song.song import take_path
    from khala_mlx.song.song_list import State
    from khala_mlx.storage.atomic import is_there

    if is_there(output):
        return State.THERE
    return State.BEGUN if is_there(take_path(output)) else State.ABSENT


def _made(
    khala: Khala, entry: Entry, path: Path, model: ModelArgs, file: FileArgs, progress: _Progress
) -> dict[str, Any]:
    """Make one entry; return {line, file, state} and an error, or seconds and seed."""
    from khala_mlx.errors import KhalaError

    result = {"line": entry.line, "file": str(path)}
    if entry.error:
        return {**result, "state": "failed", "error": entry.error}
    try:
        return {**result, **_song(khala, entry, path, model, file, progress)}
    # MLX raises RuntimeError when memory is short, which it need not be for the next song.
    except (KhalaError, RuntimeError) as error:
        where = f"line {entry.line}: "
        why = " ".join(str(error).split()).removeprefix(where)
        return {**result, "state": "failed", "error": where + why}


def _song(
    khala: Khala, entry: Entry, path: Path, model: ModelArgs, file: FileArgs, progress: _Progress
) -> dict[str, Any]:
    import secrets

    from khala_mlx.cli.session import Output, claim, finish, write_song
    from khala_mlx.pipeline.begin import prepared
    from khala_mlx.song.song import take_path
    from khala_mlx.song.take import Take
    from khala_mlx.storage.atomic import is_there

    request, _ = prepared(entry.request(secrets.randbelow(2**32)))
    begun, names = is_there(take_path(path)), entry.names
    output = Output(
        path,
        replace(file, title=names.get("title", ""), artist=names.get("artist", "")),
        model,
        resumed=begun,
    )
    if begun:
        take = Take.load(take_path(path))
        _check_same(take.request, entry, request)
        if not output.check(take):
            return {"state": "there already"}
        take = khala.resume(take)
    else:
        output.check()
        take = khala.begin(request)
        claim(take, output)
    song = finish(khala, take, output, progress=progress)
    write_song(song, output)
    return {"state": "made", "seconds": round(song.duration, 2), "seed": take.request.seed}


def _check_same(there: Request, entry: Entry, request: Request) -> None:
    """Refuse to resume a take of another entry; a random seed may be any."""
    from khala_mlx.errors import KhalaError

    wanted = request if "seed" in entry.values else replace(request, seed=there.seed)
    if there != wanted:
        raise KhalaError("Another song has this output. Remove it or name another output.")


class _Progress:
    """One line: which song, which stage, and the time left at the rate so far."""

    def __init__(self, total: int, own: int) -> None:
        self._line, self._total, self._left = Line(), total, own
        self._number, self._name, self._made = 0, "", 0
        self._began = time.monotonic()

    def begin(self, number: int, name: str) -> None:
        self._number, self._name = number, name

    def __call__(self, stage: str, done: int, total: int, left: tuple[float, float]) -> None:
        elapsed = time.monotonic() - self._began
        # Until one song is made, the others are taken to be like the first.
        each = elapsed / self._made if self._made else elapsed + left[1]
        seconds = int(each * self._left if self._made else left[1] + (self._left - 1) * each)
        self._line.draw(
            f"{self._number}/{self._total} {self._name}: {stage} {100 * done // max(total, 1)} %, "
            f"about {seconds // 60}:{seconds % 60:02d} left"
        )

    def end(self, result: dict[str, Any]) -> None:
        self._made += result["state"] == "made"
        self._left -= 1
        text = f"{self._number}/{self._total} {self._name}: {result['state']}"
        self._line.say(text + (f": {result['error']}" if "error" in result else ""))


def _summarise(results: list[dict[str, Any]], total: int, as_json: bool) -> None:
    states = [each["state"] for each in results]
    counts = {
        "made": states.count("made"),
        "there_already": states.count("there already"),
        "failed": states.count("failed"),
        "not_begun": total - len(results),
    }
    report({**counts, "songs": results} if as_json else counts, as_json)
    if counts["failed"] or counts["not_begun"]:
        click.get_current_context().exit(1)


@contextmanager
def keep_awake(
    platform: str = sys.platform, start: Callable[..., Any] = subprocess.Popen
) -> Iterator[None]:
    """Keep a Mac from sleeping while songs are made; elsewhere do nothing."""
    process: Any = None
    if platform == "darwin":
        # -w: caffeinate ends with this process, even if that is killed.
        command = ["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with suppress(OSError):
            process = start(command, **quiet)
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            process.wait()
