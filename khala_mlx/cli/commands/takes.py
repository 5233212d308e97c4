"""`khala refine`, `khala render` and `khala play`: the later stages again, from a take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from khala_mlx.cli.options import (
    FILE,
    FileArgs,
    ModelArgs,
    file_options,
    json_option,
    model_options,
    output_option,
    play_option,
    together,
)
from khala_mlx.cli.terminal import command

_options_of_takes = together(
    click.argument("path", type=FILE, metavar="TAKE"),
    model_options,
    output_option,
    file_options,
    play_option,
    json_option,
)


@click.command()
@_options_of_takes
@click.option("--seed", type=int, help="Seed of the detail.  [default: random]")
@click.option(
    "--refine-top-k",
    type=int,
    help="Sample from the k most likely codes (1 = greedy).  [default: as in the take]",
)
@click.option(
    "--refine-expected/--refine-drawn",
    default=None,
    help="Choose the detail by expectation, or draw it.  [default: as in the take]",
)
@command
def refine(
    path: Path,
    seed: int | None,
    refine_top_k: int | None,
    refine_expected: bool | None,
    model: ModelArgs,
    output: Path | None,
    file: FileArgs,
    play: bool,
    as_json: bool,
) -> None:
    """Keep what TAKE's backbone composed and make new detail, as a song of its own."""
    import secrets

    from khala_mlx.cli.session import Output, free_name, open_model, save_song
    from khala_mlx.song.take import Take

    take = Take.load(path)
    file = file.with_recorded(take.options)
    named = output is not None
    output = output or free_name(take.suffix)
    target = Output(output, file, model, play, as_json, named=named)
    target.check()
    take.check_composed(path)
    khala = open_model(model, take)
    asked: dict[str, Any] = {"refine_top_k": refine_top_k, "refine_expected": refine_expected}
    changes = {name: value for name, value in asked.items() if value is not None}
    seed = secrets.randbelow(2**32) if seed is None else seed
    request = replace(take.request, refine_seed=seed, **changes)
    save_song(khala, khala.refine_again(take, request), target)


@click.command()
@_options_of_takes
@command
def render(
    path: Path,
    model: ModelArgs,
    output: Path | None,
    file: FileArgs,
    play: bool,
    as_json: bool,
) -> None:
    """Make the sound of TAKE, with the codebooks that are refined."""
    from khala_mlx.cli.session import Output, open_model, save_draft, save_song
    from khala_mlx.errors import KhalaError
    from khala_mlx.song.song import take_path
    from khala_mlx.song.take import Take, song_path

    take = Take.load(path)
    file = file.with_recorded(take.options)
    output = output or song_path(path, take.suffix)
    own = take_path(output).absolute() == path.absolute()
    target = Output(output, file, model, play, as_json, resumed=own)
    take.check_composed(path)
    if not target.check(take if own else None):
        raise KhalaError(f"{output} exists already. Remove it or choose another --output.")
    khala = open_model(model, take)
    adopted = khala.resume(take, same=False)
    adopted.credit(take)
    if adopted.whole:
        save_song(khala, adopted, target)
    else:
        save_draft(khala, adopted, target, adopted.codebooks)


@click.command()
@click.argument("path", type=FILE, metavar="FILE-OR-TAKE")
@model_options
@command
def play(path: Path, model: ModelArgs) -> None:
    """Play a sound file, or a take with the codebooks that are refined. Shows the keys."""
    from khala_mlx.audio.files import read_sound
    from khala_mlx.audio.player import Track
    from khala_mlx.cli.playback import play_in_terminal

    if path.suffix == ".safetensors":
        _play_take(path, model)
    else:
        play_in_terminal(Track.whole(*read_sound(path)))


def _play_take(path: Path, model: ModelArgs) -> None:
    from khala_mlx.audio.player import Track, heard_while_made
    from khala_mlx.cli.playback import play_in_terminal
    from khala_mlx.cli.session import open_model
    from khala_mlx.song.take import Take

    take = Take.load(path)
    take.check_composed(path)
    khala = open_model(model, take)
    codes = khala.resume(take, same=False).codes
    codec = khala.config.codec
    track = Track(codes.shape[1] * codec.hop, codec.channels, codec.sample_rate)
    with heard_while_made(track, play_in_terminal) as listened:
        for block in khala.render_stream(codes, draft=True):
            track.add(block)
            if not listened():
                break
