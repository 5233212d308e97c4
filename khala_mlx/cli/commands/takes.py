"""`khala refine` and `khala render`: the later stages anew, from a take."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import Any

import click

from khala_mlx.cli.options import (
    FILE,
    adapter_options,
    finish_options,
    json_option,
    model_option,
    output_option,
    play_option,
    recorded,
    tag_options,
)
from khala_mlx.cli.terminal import command


def _options_of_takes(work: Any) -> Any:
    for option in (
        json_option,
        play_option,
        finish_options,
        tag_options,
        output_option,
        adapter_options,
        model_option,
        click.argument("path", type=FILE, metavar="TAKE"),
    ):
        work = option(work)
    return work


@click.command()
@_options_of_takes
@click.option("--seed", type=int, help="The seed of the detail.  [default: drawn]")
@click.option("--refine-top-k", type=int, help="[default: as in the take]")
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
    **options: Any,
) -> None:
    """Keep what TAKE's backbone composed and make the detail anew, as a song of its own."""
    from khala_mlx.audio.files import check_output
    from khala_mlx.cli.session import finish_of, free_name, open_model, write_song
    from khala_mlx.errors import KhalaError
    from khala_mlx.song.song import check_free
    from khala_mlx.song.take import Take
    from khala_mlx.text import resuming

    take = Take.load(path)
    options = recorded(take.options, options)
    output = options["output"] or free_name(take.suffix)
    check_output(output, finish_of(options).bit_depth)
    check_free(output)
    if not take.layers:
        raise KhalaError(f"{path} holds no codes yet: go on with `{resuming(path)}`.")
    khala = open_model(options, take)
    seed = secrets.randbelow(2**32) if seed is None else seed
    asked: dict[str, Any] = {"refine_top_k": refine_top_k, "refine_expected": refine_expected}
    changes = {name: value for name, value in asked.items() if value is not None}
    request = dataclasses.replace(take.request, refine_seed=seed, **changes)
    write_song(khala, khala.redo(take, request), output, options)


@click.command()
@_options_of_takes
@command
def render(path: Path, **options: Any) -> None:
    """Make the sound of TAKE, as far as it is refined."""
    from khala_mlx.audio.files import check_output
    from khala_mlx.cli.session import (
        check_unfinished,
        finish_of,
        open_model,
        write_draft,
        write_song,
    )
    from khala_mlx.errors import KhalaError
    from khala_mlx.song.song import check_free, take_path
    from khala_mlx.song.take import Take, song_path
    from khala_mlx.text import resuming

    take = Take.load(path)
    options = recorded(take.options, options)
    output = options["output"] or song_path(path, take.suffix)
    check_output(output, finish_of(options).bit_depth)
    own = take_path(output).absolute() == path.absolute()
    if not take.layers:
        raise KhalaError(f"{path} holds no codes yet: go on with `{resuming(path)}`.")
    if not own:
        check_free(output)
    elif not check_unfinished(take, output):
        raise KhalaError(f"{output} exists already; remove it or choose another --output.")
    khala = open_model(options, take)
    adopted = khala.adopt(take, same=False)
    adopted.credit(take)
    take = adopted
    if take.whole:
        write_song(khala, take, output, options, resumed=own)
    else:
        write_draft(khala, take, output, {**options, "draft": take.layers}, resumed=own)
