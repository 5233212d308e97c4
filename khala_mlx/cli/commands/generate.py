"""`khala generate`: a new song, the continuation of one, or the rest of an unfinished one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from khala_mlx.cli.options import (
    FILE,
    ClockTime,
    FileArgs,
    ModelArgs,
    file_options,
    flag,
    given,
    group,
    json_option,
    model_options,
    output_option,
    play_option,
)
from khala_mlx.cli.terminal import Progress, command, report

if TYPE_CHECKING:
    from khala_mlx.cli.session import Output
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.prompt.lyrics import Lyrics
    from khala_mlx.prompt.request import Request
    from khala_mlx.song.continuation import Continuation, Prefix
    from khala_mlx.song.record import Record
    from khala_mlx.song.take import Take

TEXT_MODES = click.Choice(["same_as_backbone", "same_as_backbone_no_description", "separate"])
# Codebooks of a draft: after six steps of 62 the ear has most of what it judges a song by.
DRAFT_CODEBOOKS = 8
# Options that --resume allows beside those of the model and of the file; the take has the others.
_WITH_RESUME = {"resume", "output", "play", "as_json", "draft", "memory"}


@dataclass(frozen=True)
class GenerateArgs:
    """What the command line asks for; every file that it names is read.

    Attributes:
        request: the request, with the user's defaults for what was not given.
        given: the fields of the request that this command line set.
        like: the record that supplies what was not given.
        source: a take to resume, a song to continue, or None for a new song.
        draft: codebooks to stop at.
        best: how many of the candidates to finish.
        memory: memory to plan for, such as "16GB".
    """

    request: Request
    given: frozenset[str]
    like: Record | None
    source: Take | Continuation | None
    output: Output
    draft: int | None
    candidates: int | None
    best: int
    memory: str | None
    dry_run: bool

    def request_like(self, base: Request | None, always: Iterable[str] = ()) -> Request:
        """Return `base` with what this command line set; without a base, the request as it is."""
        if base is None:
            return self.request
        chosen = {name: getattr(self.request, name) for name in (*self.given, *always)}
        return replace(base, **chosen)


def _request(**values: Any) -> Request:
    from khala_mlx.prompt.request import Request

    return Request(**values)


def _random_seed() -> int:
    # Slow to import, and `khala --help` is not to wait for it.
    import secrets

    return secrets.randbelow(2**32)


request_options = group(
    "request",
    _request,
    click.option("--tags", default="", help='For example "pop, female vocal, 120 bpm".'),
    click.option("--description", default="", help="A sentence, used instead of the tags."),
    click.option("--genre", default="", help="Used if there are no tags and no description."),
    click.option("--lyrics", default="", help="The words, with section marks such as [Verse 1]."),
    click.option("--instrumental", is_flag=True, help="Make a song without voice."),
    click.option("--language", default="", help="Only used by the text mode `separate`."),
    click.option(
        "--minutes",
        type=int,
        default=1,
        show_default=True,
        help="Length that the prompt asks for, 1 to 10 minutes.",
    ),
    click.option(
        "--seconds",
        type=float,
        help="Maximum length in seconds.  [default: --minutes plus 0.8 minutes]",
    ),
    click.option(
        "--min-seconds", type=float, default=0.0, help="Minimum length in seconds.  [default: 0]"
    ),
    click.option(
        "--seed",
        type=int,
        default=_random_seed,
        help="The same seed gives the same song.  [default: random]",
    ),
    click.option("--refine-seed", type=int, help="Seed of the detail alone.  [default: --seed]"),
    click.option(
        "--temperature",
        type=float,
        default=1.0,
        show_default=True,
        help="Below 1 the song is more predictable, above 1 less.",
    ),
    click.option(
        "--top-k",
        type=int,
        default=50,
        show_default=True,
        help="Sample from the k most likely tokens (1 = greedy).",
    ),
    click.option(
        "--refine-top-k",
        type=int,
        default=10,
        show_default=True,
        help="The same for the detail.",
    ),
    click.option(
        "--refine-expected",
        is_flag=True,
        help="Choose the detail by expectation instead of drawing it.",
    ),
    click.option(
        "--text-mode",
        type=TEXT_MODES,
        default="same_as_backbone_no_description",
        show_default=True,
        help="What the prompt of the detail contains.",
    ),
    click.option(
        "--truncate-lyrics", is_flag=True, help="Cut a prompt that is too long, not refuse it."
    ),
    click.option(
        "--reachable-only/--whole-vocabulary",
        default=True,
        show_default=True,
        help="Sample from the tokens that can follow, or from all tokens as upstream does.",
    ),
    click.option(
        "--kv-bits",
        type=int,
        help="Quantize the key-value cache to 8 or 4 bits. This changes the song.",
    ),
)


@click.command()
@request_options
@click.option(
    "--lyrics-file",
    type=click.File("rb"),
    help="Read the lyrics from a file, - for stdin.",
)
@click.option("--like", type=FILE, help="Take what is not given here from a song or its song.json.")
@click.option(
    "--continue",
    "continued",
    type=FILE,
    metavar="TAKE-OR-AUDIO",
    help="Continue this song, a take or any sound file.",
)
@click.option(
    "--from",
    "until",
    type=ClockTime(),
    metavar="TIME",
    help="Keep it only up to this time, such as 1:12, and compose the rest.",
)
@click.option("--resume", type=FILE, metavar="TAKE", help="Resume an unfinished song.")
@click.option(
    "--draft",
    type=int,
    is_flag=False,
    flag_value=DRAFT_CODEBOOKS,
    metavar="[CODEBOOKS]",
    help=f"Stop at {DRAFT_CODEBOOKS} or this many codebooks. --resume finishes the song.",
)
@click.option(
    "--candidates",
    type=click.IntRange(2, 64),
    help="Compose several songs at once, draft and compare them.",
)
@click.option(
    "--best",
    type=click.IntRange(0, 64),
    default=1,
    show_default=True,
    help="How many of the candidates to finish.",
)
@model_options
@output_option
@file_options
@play_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show the prompt, warnings, memory and time estimates without loading the model.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Use no more memory than a Mac with, say, 16GB; with --dry-run plan for one.",
)
@json_option
@command
def generate(
    request: Request,
    lyrics_file: BinaryIO | None,
    like: Path | None,
    continued: Path | None,
    until: float | None,
    resume: Path | None,
    draft: int | None,
    candidates: int | None,
    best: int,
    model: ModelArgs,
    output: Path | None,
    file: FileArgs,
    play: bool,
    dry_run: bool,
    memory: str | None,
    as_json: bool,
) -> None:
    """Make a song from tags and lyrics."""
    from khala_mlx.cli.session import Output, free_name
    from khala_mlx.prompt.request import Request
    from khala_mlx.song.continuation import Continuation
    from khala_mlx.song.record import Record
    from khala_mlx.song.song import take_path
    from khala_mlx.song.take import Take, song_path

    if until is not None and not continued:
        raise click.UsageError("--from needs --continue: it says how much of that song to keep.")
    chosen = {field.name for field in fields(Request) if given(field.name)}
    if lyrics_file is not None:
        if request.lyrics:
            raise click.UsageError("Give either --lyrics or --lyrics-file, not both.")
        lyrics = _read_lyrics(lyrics_file)
        request = replace(request, lyrics=lyrics.text)
        file = replace(file, title=file.title or lyrics.title, artist=file.artist or lyrics.artist)
        chosen.add("lyrics")
    source: Take | Continuation | None = None
    if resume:
        _check_resume()
        source = Take.load(resume)
        file = file.with_recorded(source.options)
        path = output or song_path(resume, source.suffix)
    else:
        path = output or free_name(candidates=candidates or 0)
    own = resume is not None and take_path(path).absolute() == resume.absolute()
    named = output is not None
    target = Output(path, file, model, play, as_json, resumed=own, named=named)
    if not resume:
        target.check()
        draft = _check_candidates(target, candidates, best, draft)
    args = GenerateArgs(
        request,
        frozenset(chosen),
        Record.read(like) if like else None,
        Continuation.open(continued, until) if continued else source,
        target,
        draft,
        candidates,
        best,
        memory,
        dry_run,
    )
    if isinstance(args.source, Take):
        _resume(args, args.source)
    else:
        _generate(args, args.source)


def _generate(args: GenerateArgs, continuation: Continuation | None) -> None:
    """Make a new song, or one that continues another."""
    from khala_mlx.cli.commands.candidates import save_candidates
    from khala_mlx.cli.session import open_model, save_draft, save_song

    khala = open_model(
        args.output.model,
        continuation.take if continuation else None,
        memory=args.memory,
        dry_run=args.dry_run,
    )
    khala.check_draft(args.draft)
    if args.like:
        args.like.warn_differences(khala.parts.identity, khala.adapters)
    frames = 0
    if continuation:
        continuation.warn_other_model(khala.parts.identity)
        frames = continuation.frames(khala.config.codec)
    request = _request_of_song(args, khala, continuation, frames)
    if args.dry_run:
        _show_preview(khala, request, args, frames)
        return
    prefix = _prefix(khala, continuation) if continuation else None
    take = khala.begin(request, prefix.codes if prefix else None)
    if prefix:
        take.metadata["continued"] = prefix.info
    if args.like:
        args.like.warn_other_prefix(prefix.info["codes_sha256"] if prefix else None)
    if args.candidates and args.draft is not None:
        save_candidates(khala, take, args.output.candidates(args.candidates), args.draft, args.best)
    elif args.draft is not None:
        save_draft(khala, take, args.output, args.draft)
    else:
        save_song(khala, take, args.output)


def _resume(args: GenerateArgs, take: Take) -> None:
    """Finish the song of a take, or draft more of it."""
    from khala_mlx.cli.session import open_model, save_draft, save_song
    from khala_mlx.errors import KhalaWarning

    output = args.output
    if not output.check(take if output.resumed else None):
        if flags := output.file.given_flags():
            warnings.warn(
                f"{output.path} is finished and was not changed. `khala render` with another "
                f"--output writes it with {', '.join(flags)}.",
                KhalaWarning,
                stacklevel=2,
            )
        report({"file": str(output.path), "finished": "already"}, output.as_json)
        return
    khala = open_model(output.model, take, memory=args.memory)
    take = khala.resume(take)
    # A default of drafting is for new songs: otherwise they could never be finished.
    if args.draft is not None and given("draft"):
        save_draft(khala, take, output, args.draft)
    else:
        save_song(khala, take, output)


def _check_resume() -> None:
    """Raise UsageError if an option is given that the take decides."""
    context = click.get_current_context()
    allowed = _WITH_RESUME | {
        field.name for kind in (ModelArgs, FileArgs) for field in fields(kind)
    }
    names = [str(each.name) for each in context.command.params]
    if extra := sorted(name for name in names if given(name) and name not in allowed):
        flags = ", ".join(map(flag, extra))
        raise click.UsageError(f"--resume takes everything from the take. Leave out {flags}.")


def _check_candidates(
    output: Output, candidates: int | None, best: int, draft: int | None
) -> int | None:
    """Return the codebooks of a draft; refuse candidates that could not be written."""
    from khala_mlx.song.song import check_free
    from khala_mlx.storage.atomic import check_destination

    if not candidates:
        if given("best"):
            raise click.UsageError("--best needs --candidates: it says how many to finish.")
        return draft
    if given("play"):
        raise click.UsageError(
            "--play is for one song. Leave it out and play the drafts with `khala play`."
        )
    if given("best") and best > candidates:
        raise click.UsageError("--best cannot be more than --candidates.")
    draft = DRAFT_CODEBOOKS if draft is None else draft
    for each in output.candidates(candidates):
        check_free(each.path)
        check_destination(each.draft_path(draft))
    return draft


def _request_of_song(
    args: GenerateArgs, khala: Khala, continuation: Continuation | None, frames: int
) -> Request:
    """Return the request of the song, which continues `frames` of another if there are any."""
    from khala_mlx.prompt.request import Request
    from khala_mlx.song.continuation import continued_request

    base = args.like.request if args.like else None
    if continuation is None or (args.like and args.like.continued):
        # A song that continued another is repeated with its own length and seed.
        return args.request_like(base)
    base = base or continuation.request
    if base == Request():
        # A sound file without a record: the user's own defaults count.
        base = args.request
    seconds = frames / khala.config.codec.frame_rate
    longer = continued_request(base, seconds, khala.config.tokens.max_minutes)
    return args.request_like(longer, always=["seed"])


def _prefix(khala: Khala, continuation: Continuation) -> Prefix:
    """Return the codes to continue; a sound file is encoded for it."""
    progress = Progress()

    def encode(waveform: Any) -> Any:
        return khala.codec.encode(
            waveform, on_progress=lambda done, total: progress("encode", done, total)
        )

    prefix = continuation.prefix(khala.config.codec, encode)
    khala.parts.release("codec")
    return prefix


def _show_preview(khala: Khala, request: Request, args: GenerateArgs, frames: int) -> None:
    """Print what a dry run finds."""
    candidates = args.candidates
    found = khala.preview(
        request,
        candidates or 1,
        frames,
        judged=candidates is not None,
        draft=args.draft,
        finished=min(args.best, candidates) if candidates else 0,
    )
    as_json = args.output.as_json
    report(found if as_json else _preview_lines(found), as_json)


def _preview_lines(found: dict[str, Any]) -> dict[str, Any]:
    """Return a preview with its memory in words, a line each."""
    memory = found["memory"]
    lines = {name: _listed(value) for name, value in found.items() if name != "memory"}
    for name, stage in memory["stages"].items():
        least = stage["least_seconds"]
        lines[name] = f"{_gigabytes(stage['peak_bytes'])}, at least {least:.1f} s"
    fits = "fits" if memory["fits"] else "does not fit"
    usable = _gigabytes(memory["usable_bytes"])
    lines["memory"] = f"{_gigabytes(memory['peak_bytes'])} at most, {fits} the usable {usable}"
    return lines


def _listed(value: Any) -> Any:
    """Return a list as lines below its name."""
    if not isinstance(value, list):
        return value
    return "".join(f"\n    {each}" for each in value) or "nothing"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _read_lyrics(file: BinaryIO) -> Lyrics:
    from khala_mlx.errors import KhalaWarning
    from khala_mlx.prompt.lyrics import decode_text, parse_lyrics

    # Not every standard input has a name.
    name = getattr(file, "name", "stdin")
    lyrics = parse_lyrics(decode_text(file.read(), name), name)
    if lyrics.note:
        warnings.warn(lyrics.note, KhalaWarning, stacklevel=2)
    return lyrics
