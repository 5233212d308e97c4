"""The `khala train` commands; heavy imports wait inside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from khala_mlx.cli.commands.evaluate import evaluate
from khala_mlx.cli.commands.finetune import export, fuse, lora
from khala_mlx.cli.options import group
from khala_mlx.cli.terminal import Progress, command, report

FOLDER = click.Path(path_type=Path)


@click.group()
def train() -> None:
    """Train the three models, one after the other: codec, backbone, superres."""


for each in (lora, evaluate, fuse, export):
    train.add_command(each)


@dataclass(frozen=True)
class RunArgs:
    """A training run: its data, its folder, and the file with its settings."""

    data: Path
    out: Path
    config: Path | None
    resume: bool
    as_json: bool


run_options = group(
    "run",
    RunArgs,
    click.option(
        "--data", type=FOLDER, required=True, help="Folder with subfolders train and valid."
    ),
    click.option("--out", type=FOLDER, required=True, help="Folder of the run."),
    click.option("--config", type=FOLDER, help="JSON file of settings; missing ones are defaults."),
    click.option("--resume", is_flag=True, help="Resume from the last checkpoint in OUT."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
)


@train.command()
@run_options
@command
def codec(run: RunArgs) -> None:
    """Train the codec on the sound files below DATA/train and DATA/valid."""
    from khala_mlx.train.codec import train_codec
    from khala_mlx.train.settings import CodecTraining

    _run(train_codec, CodecTraining, run)


@train.command()
@run_options
@command
def backbone(run: RunArgs) -> None:
    """Train the backbone on prepared songs and DATA/tokenizer.json."""
    from khala_mlx.train.backbone import train_backbone
    from khala_mlx.train.settings import BackboneTraining

    _run(train_backbone, BackboneTraining, run)


@train.command()
@run_options
@command
def superres(run: RunArgs) -> None:
    """Train superres on prepared songs, starting from a backbone (`backbone` in the settings)."""
    from khala_mlx.train.settings import SuperResTraining
    from khala_mlx.train.superres import train_superres

    _run(train_superres, SuperResTraining, run)


@train.command()
@click.argument("songs", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--model", help="Model with the codec and tokenizer to use.")
@click.option("--codec", "run", type=FOLDER, help="Codec run to use instead, with --tokenizer.")
@click.option("--tokenizer", type=FOLDER, help="tokenizer.json that goes with --codec.")
@click.option(
    "--max-prompt",
    type=click.IntRange(1),
    help="With --codec: maximum prompt length in tokens of the models to train.",
)
@click.option(
    "--valid-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the songs to hold out.  [default: 0.1, none of fewer than 5 songs]",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the draw of held-out songs."
)
@click.option(
    "--max-minutes",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Leave out longer files.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@command
def prepare(
    songs: Path, out: Path, model: str | None, run: Path | None, tokenizer: Path | None,
    max_prompt: int | None, valid_share: float | None, seed: int, max_minutes: float,
    as_json: bool,
) -> None:  # fmt: skip
    """Encode the songs in the folder SONGS for training, into OUT.

    Captions and lyrics are in song.caption.txt and song.lyrics.txt beside song.wav, or in
    metadata.jsonl (or .csv) in SONGS. If SONGS has the subfolders train and valid, they decide
    which songs are held out. OUT/report.json lists what was left out and why.
    """
    from khala_mlx.train.data.prepare import prepare as encode
    from khala_mlx.train.data.prepare import tools_of

    if (model is None) == (run is None) or (run is None) != (tokenizer is None):
        raise click.UsageError("Give either --model, or --codec with --tokenizer.")
    if model is not None and max_prompt is not None:
        raise click.UsageError("--max-prompt goes with --codec; a model knows its own.")
    tools = tools_of(out, model, run, tokenizer, max_prompt)
    told = encode(
        songs,
        out,
        tools,
        valid_share=valid_share,
        seed=seed,
        max_minutes=max_minutes,
        on_progress=Progress(),
    )
    report(told if as_json else _prepared(told), as_json)


@train.command()
@click.argument("destination", type=FOLDER, metavar="DEST")
@click.option("--codec", type=FOLDER, required=True, help="Folder of the finished codec run.")
@click.option("--backbone", type=FOLDER, required=True, help="Folder of the finished backbone run.")
@click.option("--superres", type=FOLDER, required=True, help="Folder of the finished superres run.")
@click.option(
    "--tokenizer", type=FOLDER, required=True, help="tokenizer.json that they were trained with."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Dtype of the language models.",
)
@click.option(
    "--codec-dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Dtype the codec is stored in; it computes in float32.",
)
@click.option(
    "--quantize",
    type=click.Choice(["8", "6", "4"]),
    help="Bits per weight of the language models.",
)
@click.option(
    "--group-size", type=click.Choice(["32", "64", "128"]), default="64", show_default=True
)
@click.option("--licence", default="Apache-2.0", show_default=True, help="Licence of the weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@command
def pack(
    destination: Path,
    codec: Path,
    backbone: Path,
    superres: Path,
    tokenizer: Path,
    dtype: str,
    codec_dtype: str,
    quantize: str | None,
    group_size: str,
    licence: str,
    as_json: bool,
) -> None:
    """Put three finished runs into the model folder DEST, for `khala generate --model DEST`."""
    from khala_mlx.convert import pack as run

    told = run(
        destination,
        codec=codec,
        backbone=backbone,
        superres=superres,
        tokenizer=tokenizer,
        dtype=dtype,
        codec_dtype=codec_dtype,
        quantize=int(quantize) if quantize else None,
        group_size=int(group_size),
        licence=licence,
        on_progress=Progress(),
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


def _run(work: Callable[..., dict[str, float]], settings: Any, run: RunArgs) -> None:
    figures = work(
        settings.from_file(run.config),
        run.data,
        run.out,
        resume=run.resume,
        on_progress=partial(Progress(), "train"),
    )
    rounded = {name: round(value, 4) for name, value in figures.items()}
    report({"folder": str(run.out), **rounded}, run.as_json)
