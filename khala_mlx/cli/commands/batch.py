"""`khala batch`: a list of songs, one after the other; restartable, stopped gently by Ctrl-C.

Under `mlx.launch` the processes share the list.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import click

from khala_mlx.cli.options import FILE, adapter_options, finish_options, json_option, model_option
from khala_mlx.cli.terminal import Line, command, on_interrupt, report


@click.command()
@click.argument("path", type=FILE, metavar="LIST")
@click.option("--out", type=FILE, default=".", help="The folder of the songs.  [default: here]")
@click.option(
    "--format", "suffix", type=click.Choice(["wav", "flac", "ogg", "mp3"]), default="wav",
    show_default=True, help="Of songs whose line names no output.",
)  # fmt: skip
@model_option
@adapter_options
@finish_options
@json_option
@command
def batch(path: Path, out: Path, suffix: str, as_json: bool, **options: Any) -> None:
    """Make the songs of LIST, a .jsonl or .csv file with the options of `generate` as fields.

    A song that fails is told and passed over. The same command again makes what is missing and
    goes on with a song that was begun. Ctrl-C finishes the song at hand, twice stops at once.
    Several machines share a list: mlx.launch --hostfile macs.json -- khala batch LIST.

    \b
    {"tags": "waltz", "lyrics": "do re mi", "seed": 1, "output": "first.mp3", "title": "First"}
    {"tags": "slow rock", "minutes": 2, "instrumental": true}
    """
    from khala_mlx.cli.awake import keep_awake
    from khala_mlx.cli.session import finish_of, open_model
    from khala_mlx.distributed import Processes
    from khala_mlx.song.song_list import read_list

    entries = read_list(path, f".{suffix}")
    finish_of(options)
    processes = Processes.launched()
    processes.agree(repr(entries), "list of songs")
    khala = open_model(options)
    own = _own(khala, processes, entries, out)
    told: list[dict[str, Any]] = []
    stopping: list[bool] = []

    def stop_gently() -> bool:
        stopping.append(True)
        if len(stopping) > 1:
            return False
        click.echo("\nThe song at hand is finished first; Ctrl-C again stops at once.", err=True)
        return True

    with keep_awake(), on_interrupt(stop_gently):
        line = _Progress(len(entries), len(own))
        for number, entry in own:
            if stopping:
                break
            line.begin(number, entry.output)
            told.append(_made(khala, entry, out, options, line))
            line.end(told[-1])
    # Who is done first waits here for the others.
    every = [each for part in processes.gathered(told) for each in part]
    if processes.leads:
        _summarise(sorted(every, key=lambda each: each["line"]), len(entries), as_json)


def _own(khala: Any, processes: Any, entries: list[Any], out: Path) -> list[tuple[int, Any]]:
    """The entries this process sees to, with their number in the list.

    Raises:
        KhalaError: if the processes do not have the same model.
    """
    from khala_mlx.song.song_list import owners

    if processes.size > 1:
        model = khala.identity, khala.fingerprint, khala.dtype, khala.adapters
        processes.agree(repr(model), "model")
    ranks = owners(processes.gathered([_state(out / entry.output) for entry in entries]))
    numbered = zip(ranks, enumerate(entries, 1), strict=True)
    return [each for rank, each in numbered if rank == processes.rank]


def _state(output: Path) -> int:
    """How far the song of an output is on this machine."""
    from khala_mlx.song.song import take_path
    from khala_mlx.song.song_list import State
    from khala_mlx.storage.atomic import is_there

    if is_there(output):
        return State.THERE
    return State.BEGUN if is_there(take_path(output)) else State.ABSENT


def _made(khala: Any, entry: Any, out: Path, options: dict[str, Any], progress: Any) -> Any:
    """What became of one entry: {line, file, state} and an error or seconds and seed."""
    from khala_mlx.errors import KhalaError

    result = {"line": entry.line, "file": str(out / entry.output)}
    if entry.error:
        return {**result, "state": "failed", "error": entry.error}
    try:
        return {**result, **_song(khala, entry, out / entry.output, options, progress)}
    # MLX tells with the latter that memory is short, which it need not be for the next song.
    except (KhalaError, RuntimeError) as error:
        where = f"line {entry.line}: "
        why = " ".join(str(error).split()).removeprefix(where)
        return {**result, "state": "failed", "error": where + why}


def _song(
    khala: Any, entry: Any, output: Path, options: dict[str, Any], progress: Any
) -> dict[str, Any]:
    from khala_mlx.audio.files import check_output
    from khala_mlx.cli.session import check_unfinished, finish_of, made, save_song
    from khala_mlx.song.song import check_free, take_path
    from khala_mlx.song.take import Take
    from khala_mlx.storage.atomic import is_there

    request = entry.request(secrets.randbelow(2**32))
    options = {**options, "title": "", "artist": "", **entry.names}
    check_output(output, finish_of(options).bit_depth)
    begun = is_there(take_path(output))
    if begun:
        take = Take.load(take_path(output))
        _require_same(take.request, entry, request)
        if not check_unfinished(take, output):
            return {"state": "there already"}
        take = khala.adopt(take)
    else:
        check_free(output)
        take = khala.begin(request)
    song = made(khala, take, output, options, begun, progress=progress)
    save_song(song, output, options)
    return {"state": "made", "seconds": round(song.duration, 2), "seed": take.request.seed}


def _require_same(there: Any, entry: Any, request: Any) -> None:
    """Refuse to go on with a take that is not of this entry; a drawn seed may be any."""
    import dataclasses

    from khala_mlx.errors import KhalaError

    wanted = request if "seed" in entry.values else dataclasses.replace(request, seed=there.seed)
    if there != wanted:
        raise KhalaError("another song lies at this output; remove it or name another.")


class _Progress:
    """One line: which song, which stage, and how long the rest takes at the pace so far."""

    def __init__(self, total: int, own: int) -> None:
        self._line, self._total, self._left = Line(), total, own
        self._number, self._name, self._made = 0, "", 0
        self._began = time.monotonic()

    def begin(self, number: int, name: str) -> None:
        self._number, self._name = number, name

    def __call__(self, stage: str, done: int, total: int, left: tuple[float, float]) -> None:
        text = f"{self._number}/{self._total} {self._name}: {stage} {100 * done // max(total, 1)} %"
        if self._made:
            pace = (time.monotonic() - self._began) / self._made
            seconds = int(pace * self._left)
        else:
            # Until one is made, the others are taken to be like the first.
            seconds = int(left[1] + (self._left - 1) * (time.monotonic() - self._began + left[1]))
        text += f", about {seconds // 60}:{seconds % 60:02d} left"
        self._line.draw(text)

    def end(self, told: dict[str, Any]) -> None:
        self._made += told["state"] == "made"
        self._left -= 1
        text = f"{self._number}/{self._total} {self._name}: {told['state']}"
        self._line.say(text + (f": {told['error']}" if "error" in told else ""))


def _summarise(told: list[dict[str, Any]], total: int, as_json: bool) -> None:
    states = [each["state"] for each in told]
    counts = {
        "made": states.count("made"),
        "there_already": states.count("there already"),
        "failed": states.count("failed"),
        "not_begun": total - len(told),
    }
    report({**counts, "songs": told} if as_json else counts, as_json)
    if counts["failed"] or counts["not_begun"]:
        click.get_current_context().exit(1)
