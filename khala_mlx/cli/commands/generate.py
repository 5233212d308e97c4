"""`khala generate`: a song, a draft of one, or the rest of a song that was begun."""

from __future__ import annotations

import dataclasses
import secrets
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from khala_mlx.cli.options import (
    FILE,
    OF_THE_FILE,
    ClockTime,
    adapter_options,
    finish_options,
    flag,
    given,
    json_option,
    model_option,
    output_option,
    play_option,
    recorded,
    tag_options,
)
from khala_mlx.cli.terminal import Progress, command, report

TEXT_MODES = click.Choice(["same_as_backbone", "same_as_backbone_no_description", "separate"])
# Layers of a draft: after six steps of 62 the ear has most of what it judges a song by.
DRAFT_LAYERS = 8
# What may be said along with --resume; all else is in the take.
_WITH_RESUME = {"resume", "model", "adapters", "adapter_scales", "output", "play", "as_json"}
_WITH_RESUME |= {"draft", "memory", *OF_THE_FILE}


@click.command()
@click.option("--tags", default="", help='For example "pop, female vocal, 120 bpm".')
@click.option("--description", default="", help="A sentence; it takes the place of the tags.")
@click.option("--genre", default="", help="Used where there are neither tags nor description.")
@click.option("--lyrics", default="", help="The words, with section marks such as [Verse 1].")
@click.option(
    "--lyrics-file", type=click.File(encoding="utf-8-sig"), help="Words from a file, - for stdin."
)
@click.option("--instrumental", is_flag=True, help="No voice.")
@click.option("--language", default="", help="Only read by the text mode `separate`.")
@click.option(
    "--minutes",
    type=int,
    default=1,
    show_default=True,
    help="What the prompt tells the model, 1-10.",
)
@click.option(
    "--seconds", type=float, help="Longest song.  [default: --minutes and 0.8 minutes more]"
)
@click.option("--min-seconds", type=float, default=0.0, help="The song cannot end before.")
@click.option("--seed", type=int, help="The same seed gives the same song.  [default: drawn]")
@click.option("--refine-seed", type=int, help="Another detail of the same song.  [default: --seed]")
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=50, show_default=True, help="1 is greedy.")
@click.option("--refine-top-k", type=int, default=10, show_default=True)
@click.option(
    "--refine-expected",
    is_flag=True,
    help="Choose the detail by expectation instead of drawing it.",
)
@click.option(
    "--text-mode", type=TEXT_MODES, default="same_as_backbone_no_description", show_default=True
)
@click.option(
    "--truncate-lyrics", is_flag=True, help="Cut a prompt that is too long instead of refusing it."
)
@click.option(
    "--reachable-only/--whole-vocabulary",
    default=True,
    show_default=True,
    help="Draw from the tokens that can follow, or from all as upstream does.",
)
@click.option(
    "--kv-bits",
    type=int,
    help="Pack the key-value cache of a long song to 8 or 4 bits; it is another song then.",
)
@click.option("--like", type=FILE, help="Take all that is not given here from a song or song.json.")
@click.option(
    "--continue",
    "beginning",
    type=FILE,
    metavar="TAKE-OR-AUDIO",
    help="Begin with this song, a take or any sound file, and compose what follows.",
)
@click.option(
    "--from",
    "until",
    type=ClockTime(),
    metavar="TIME",
    help="Keep it only up to here, such as 1:12, and compose the rest anew.",
)
@click.option("--resume", type=FILE, metavar="TAKE", help="Go on with a take where it stopped.")
@click.option(
    "--draft",
    type=int,
    is_flag=False,
    flag_value=DRAFT_LAYERS,
    metavar="[LAYERS]",
    help=f"Stop at so many layers ({DRAFT_LAYERS}) and let hear them; --resume finishes the song.",
)
@click.option(
    "--candidates",
    type=click.IntRange(2, 64),
    help="Compose so many songs of one request at once, draft and compare them.",
)
@click.option(
    "--best",
    type=click.IntRange(0, 64),
    default=1,
    show_default=True,
    help="Of the candidates, finish so many.",
)
@model_option
@adapter_options
@output_option
@tag_options
@finish_options
@play_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show prompt, doubts, memory and least time; load nothing.",
)
@click.option(
    "--memory", metavar="SIZE", help="Use no more than a Mac with, say, 16GB; or dry-run for one."
)
@json_option
@command
def generate(**options: Any) -> None:
    """Make a song from tags and lyrics."""
    if options["until"] is not None and not options["beginning"]:
        raise click.UsageError("--from says up to where --continue keeps a song: give both.")
    if options["resume"]:
        _resume(options)
    else:
        _generate(options)


def _generate(options: dict[str, Any]) -> None:
    from khala_mlx.audio.files import check_output
    from khala_mlx.cli.commands.candidates import (
        candidate_paths,
        check_candidates,
        write_candidates,
    )
    from khala_mlx.cli.session import finish_of, free_name, open_model, write_draft, write_song
    from khala_mlx.song.record import read_request
    from khala_mlx.song.song import (
        check_free,
        warn_continued,
        warn_other_adapters,
        warn_other_model,
    )

    def songs(path: Path) -> list[Path]:
        count = options["candidates"]
        return [path, *candidate_paths(path, count)] if count else [path]

    output = options["output"] or free_name(songs=songs)
    check_output(output, finish_of(options).bit_depth)
    check_free(output)
    if options["candidates"]:
        if given("play"):
            raise click.UsageError(
                "--play is for one song: leave it out, and listen to the drafts of --candidates "
                "with `khala play`."
            )
        if given("best") and options["best"] > options["candidates"]:
            raise click.UsageError("--best cannot be more than --candidates.")
        if options["draft"] is None:
            options["draft"] = DRAFT_LAYERS
        check_candidates(output, options)
    elif given("best"):
        raise click.UsageError("--best says how many of the --candidates are finished: give both.")
    if options["lyrics_file"] is not None:
        if options["lyrics"]:
            raise click.UsageError("--lyrics and --lyrics-file exclude each other.")
        options["lyrics"] = _read_lyrics(options["lyrics_file"])
    base = read_request(options["like"]) if options["like"] else None
    khala = open_model(options, _take_of(options["beginning"]))
    khala.check_draft(options["draft"])
    _limit(khala, options)
    if options["like"]:
        warn_other_model(options["like"], khala.identity)
        warn_other_adapters(options["like"], khala.adapters)
    if options["dry_run"]:
        _show_plan(khala, options, base)
        return
    kept = None
    if options["beginning"]:
        kept, request = _continued(khala, options, base)
    else:
        request = _request(options, base)
    take = khala.begin(request, kept.codes if kept else None)
    if kept:
        take.metadata["continued"] = kept.told
    if options["like"]:
        warn_continued(options["like"], kept.told if kept else None)
    if options["candidates"]:
        write = write_candidates
    else:
        write = write_song if options["draft"] is None else write_draft
    write(khala, take, output, options)


def _take_of(beginning: Path | None) -> Any:
    """The take that names the model, where the song goes on from one."""
    from khala_mlx.song.take import Take

    if beginning is None or beginning.suffix != ".safetensors":
        return None
    return Take.load(beginning)


def _continued(khala: Any, options: dict[str, Any], base: Any) -> tuple[Any, Any]:
    """The beginning of --continue, and the request of what follows it."""
    from khala_mlx.song.continuation import read_beginning

    progress = Progress()
    beginning = read_beginning(
        khala,
        options["beginning"],
        options["until"],
        lambda done, total: progress("encode", done, total),
    )
    khala.release("codec")
    return beginning, _longer_request(
        khala, options, base or beginning.request, beginning.told["seconds"]
    )


def _longer_request(khala: Any, options: dict[str, Any], base: Any, seconds: float) -> Any:
    """The request of a song whose first `seconds` are there, of which `base` was asked."""
    from khala_mlx.prompt.request import Request
    from khala_mlx.song.continuation import longer
    from khala_mlx.song.song import continued

    if options["like"] and continued(options["like"]):
        # Of a song that went on from a beginning itself: that one is made again.
        return _request(options, base)
    if base == Request():
        # A sound that tells nothing of itself: the user's own defaults count then.
        base = _request(options, None)
    if not given("seed"):
        options["seed"] = secrets.randbelow(2**32)
    return _request(options, longer(base, seconds, khala.config.tokens.max_minutes), {"seed"})


def _show_plan(khala: Any, options: dict[str, Any], base: Any) -> None:
    """What a dry run prints."""
    from khala_mlx.song.continuation import measure_beginning

    begun = 0
    if options["beginning"]:
        begun, asked = measure_beginning(khala, options["beginning"], options["until"])
        seconds = begun / khala.config.codec.frame_rate
        request = _longer_request(khala, options, base or asked, seconds)
    else:
        request = _request(options, base)
    candidates = options["candidates"]
    plan = khala.plan(
        request,
        candidates or 1,
        begun,
        judged=candidates is not None,
        draft=options["draft"],
        finished=min(options["best"], candidates) if candidates else 0,
    )
    report(plan if options["as_json"] else _plan_lines(plan), options["as_json"])


def _resume(options: dict[str, Any]) -> None:
    from khala_mlx.audio.files import check_output
    from khala_mlx.cli.session import (
        check_unfinished,
        finish_of,
        open_model,
        write_draft,
        write_song,
    )
    from khala_mlx.errors import KhalaWarning
    from khala_mlx.song.song import check_free, take_path
    from khala_mlx.song.take import Take, song_path

    if extra := sorted(name for name in options if given(name) and name not in _WITH_RESUME):
        names = ", ".join(map(flag, extra))
        raise click.UsageError(f"--resume takes everything from the take; leave out {names}.")
    path = options["resume"]
    take = Take.load(path)
    options = recorded(take.options, options)
    output = options["output"] or song_path(path, take.suffix)
    check_output(output, finish_of(options).bit_depth)
    own = take_path(output).absolute() == path.absolute()
    if not own:
        check_free(output)
    elif not check_unfinished(take, output):
        if asked := sorted(name for name in OF_THE_FILE if given(name)):
            warnings.warn(
                f"{output} is finished and stays as it is; `khala render` with another --output "
                f"writes it with {', '.join(map(flag, asked))}.",
                KhalaWarning,
                stacklevel=2,
            )
        report({"file": str(output), "finished": "already"}, options["as_json"])
        return
    khala = open_model(options, take)
    _limit(khala, options)
    # A default of drafting is for new songs: they could never be finished otherwise.
    write = write_draft if given("draft") else write_song
    write(khala, khala.adopt(take), output, options, resumed=own)


def _limit(khala: Any, options: dict[str, Any]) -> None:
    """Plan for --memory: this machine with less of it, or the Mac that a dry run asks about."""
    if not options["memory"]:
        return
    import dataclasses

    from khala_mlx.performance.machine import mac_with, parse_memory

    here, mac = khala.machine, mac_with(parse_memory(options["memory"]))
    if options["dry_run"] and here.on_cpu:
        khala.machine = mac
    else:
        # Only a dry run may have more than there is.
        usable = mac.memory if options["dry_run"] else min(here.memory, mac.memory)
        khala.machine = dataclasses.replace(here, memory=usable)


def _plan_lines(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan with its memory in words, a line each."""
    memory = plan["memory"]
    lines = {name: _listed(value) for name, value in plan.items() if name != "memory"}
    for name, stage in memory["stages"].items():
        least = stage["least_seconds"]
        lines[name] = f"{_gigabytes(stage['peak_bytes'])}, at least {least:.1f} s"
    fits = "fits" if memory["fits"] else "does not fit"
    usable = _gigabytes(memory["usable_bytes"])
    lines["memory"] = f"{_gigabytes(memory['peak_bytes'])} at most, {fits} the usable {usable}"
    return lines


def _listed(value: Any) -> Any:
    """A list as the lines below its name."""
    if not isinstance(value, list):
        return value
    return "".join(f"\n    {each}" for each in value) or "nothing"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _request(options: dict[str, Any], base: Any, always: Iterable[str] = ()) -> Any:
    """The request of the options, over `base`, if there is one, where an option was not given."""
    from khala_mlx.prompt.request import Request

    names = {field.name for field in dataclasses.fields(Request)}
    chosen = {
        name: value
        for name, value in options.items()
        if name in names and (base is None or name in always or _set_here(name))
    }
    if chosen.get("seed", 0) is None:
        chosen["seed"] = secrets.randbelow(2**32)
    return dataclasses.replace(base or Request(), **chosen)


def _set_here(name: str) -> bool:
    return given(name) or (name == "lyrics" and given("lyrics_file"))


def _read_lyrics(file: Any) -> str:
    from khala_mlx.errors import PromptError

    try:
        text: str = file.read()
    except UnicodeDecodeError as error:
        raise PromptError(f"{file.name} is no UTF-8 text.") from error
    return text
