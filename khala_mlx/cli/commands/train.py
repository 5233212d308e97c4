"""The `khala train` commands; heavy imports wait inside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from khala_mlx.cli.commands.evaluate import evaluate
from khala_mlx.cli.commands.finetune import export, fuse, lora
from khala_mlx.cli.terminal import Progress, command, report

FOLDER = click.Path(path_type=Path)


@click.group()
def train() -> None:
    """Train the three models, one after the other: codec, backbone, superres."""


for each in (lora, evaluate, fuse, export):
    train.add_command(each)


def _options(work: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--resume", is_flag=True, help="Go on from the last checkpoint in OUT."),
        click.option("--config", type=FOLDER, help="Settings as JSON; the rest is default."),
        click.option("--out", type=FOLDER, required=True, help="Folder of the run."),
        click.option("--data", type=FOLDER, required=True, help="Folder with train and valid."),
    ):
        work = option(work)
    return work


@train.command()
@_options
@command
def codec(**options: Any) -> None:
    """Train the codec on the sound files below DATA/train and DATA/valid."""
    from khala_mlx.train.codec import train_codec
    from khala_mlx.train.settings import CodecTraining

    _run(train_codec, CodecTraining, options)


@train.command()
@_options
@command
def backbone(**options: Any) -> None:
    """Train the backbone on prepared songs and DATA/tokenizer.json."""
    from khala_mlx.train.backbone import train_backbone
    from khala_mlx.train.settings import BackboneTraining

    _run(train_backbone, BackboneTraining, options)


@train.command()
@_options
@command
def superres(**options: Any) -> None:
    """Train superres on prepared songs, started from a backbone (`backbone` in the settings)."""
    from khala_mlx.train.settings import SuperResTraining
    from khala_mlx.train.superres import train_superres

    _run(train_superres, SuperResTraining, options)


@train.command()
@click.argument("songs", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--model", help="Model whose codec and tokenizer are used.")
@click.option("--codec", "run", type=FOLDER, help="A codec run instead, with --tokenizer.")
@click.option("--tokenizer", type=FOLDER, help="tokenizer.json that goes with --codec.")
@click.option(
    "--max-prompt",
    type=click.IntRange(1),
    help="With --codec: the most tokens that the models to train will take of a prompt.",
)
@click.option(
    "--valid-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the songs to hold out.  [default: 0.1, none of fewer than 5 songs]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is held out.")
@click.option(
    "--max-minutes",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Longer files are left out.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@command
def prepare(
    songs: Path, out: Path, model: str | None, run: Path | None, tokenizer: Path | None,
    max_prompt: int | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Encode the songs in the folder SONGS for training, into OUT.

    Beside song.wav (or flac, mp3, ogg, m4a) lie song.caption.txt and song.lyrics.txt, or a
    metadata.jsonl in SONGS tells both. Subfolders train and valid, where there are both, say which
    songs are held out; else they are drawn. OUT/report.json tells what was left out and why.
    """
    from khala_mlx.train.data.prepare import prepare as encode
    from khala_mlx.train.data.prepare import tools_of

    if (model is None) == (run is None) or (run is None) != (tokenizer is None):
        raise click.UsageError("Give either --model, or --codec with --tokenizer.")
    if model is not None and max_prompt is not None:
        raise click.UsageError("--max-prompt goes with --codec; a model knows its own.")
    tools = tools_of(out, model, run, tokenizer, max_prompt)
    told = encode(songs, out, tools, on_progress=Progress(), **options)
    report(told if as_json else _prepared(told), as_json)


@train.command()
@click.argument("destination", type=FOLDER, metavar="DEST")
@click.option("--codec", type=FOLDER, required=True, help="Folder of the finished codec run.")
@click.option("--backbone", type=FOLDER, required=True, help="The same of the backbone.")
@click.option("--superres", type=FOLDER, required=True, help="The same of superres.")
@click.option(
    "--tokenizer", type=FOLDER, required=True, help="tokenizer.json that they were trained with."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the language models.",
)
@click.option(
    "--codec-dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="What the codec is stored in; it computes in float32.",
)
@click.option(
    "--quantize",
    type=click.Choice(["8", "6", "4"]),
    help="Pack the language models to so many bits.",
)
@click.option(
    "--group-size", type=click.Choice(["32", "64", "128"]), default="64", show_default=True
)
@click.option("--licence", default="Apache-2.0", show_default=True, help="Of the weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@command
def pack(
    destination: Path, quantize: str | None, group_size: str, as_json: bool, **options: Any
) -> None:
    """Put three finished runs into the model folder DEST, for `khala generate --model DEST`."""
    from khala_mlx.convert import pack as run

    told = run(
        destination,
        quantize=int(quantize) if quantize else None,
        group_size=int(group_size),
        on_progress=Progress(),
        **options,
    )
    lines = {"folder": told["destination"], "size": f"{told['bytes'] / 1e6:.1f} MB"}
    for name, part in told["parts"].items():
        lines[name] = f"{part['parameters'] / 1e6:.2f} M parameters"
    report(told if as_json else lines, as_json)


def _prepared(told: dict[str, Any]) -> dict[str, Any]:
    lines = {"folder": told["folder"]}
    for split in ("train", "valid"):
        lines[split] = f"{told[split]['songs']} songs, {told[split]['minutes']} minutes"
    lines["encoded"] = f"{told['encoded']} songs now, {told['songs'] - told['encoded']} earlier"
    for name in ("skipped", "remarks"):
        lines[name] = _first(told[name], told["folder"])
    return lines


def _first(entries: list[dict[str, str]], folder: str, most: int = 20) -> str:
    """How many there are and the first of them, each on a line."""
    shown = [f"  {each['file']}: {each['detail']}" for each in entries[:most]]
    if len(entries) > most:
        shown.append(f"  ... and {len(entries) - most} more, see {folder}/report.json")
    return "\n".join([str(len(entries)), *shown])


def _run(work: Callable[..., dict[str, float]], settings: Any, options: dict[str, Any]) -> None:
    progress = Progress()
    figures = work(
        settings.from_file(options["config"]),
        options["data"],
        options["out"],
        resume=options["resume"],
        on_progress=lambda done, total: progress("train", done, total),
    )
    rounded = {name: round(value, 4) for name, value in figures.items()}
    report({"folder": str(options["out"]), **rounded}, options["as_json"])
