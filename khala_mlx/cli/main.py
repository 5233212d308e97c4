"""The `khala` command. Thin: parse, construct, call, save; heavy imports wait inside commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from khala_mlx.cli.commands.batch import batch
from khala_mlx.cli.commands.bench import bench
from khala_mlx.cli.commands.generate import generate
from khala_mlx.cli.commands.machine import doctor
from khala_mlx.cli.commands.models import models
from khala_mlx.cli.commands.play import play
from khala_mlx.cli.commands.takes import refine, render
from khala_mlx.cli.commands.train import train
from khala_mlx.cli.examples_of import add_examples
from khala_mlx.cli.options import FILE, finish_options, json_option, model_option
from khala_mlx.cli.settings import read_settings
from khala_mlx.cli.terminal import OneLineErrors, Progress, command, report

LICENCE_NOTE = (
    "The released Khala weights are under CC BY-NC 4.0: no commercial use; name their authors."
)


class _WithSettings(OneLineErrors):
    """Takes defaults from the user's settings file."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """As click's, with the file's defaults."""
        return super().make_context(*args, **{"default_map": read_settings(self), **extra})


@click.group(
    cls=_WithSettings,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "KHALA"},
)
@click.version_option(package_name="khala-mlx")
def main() -> None:
    """Whole songs from tags and lyrics, on your own machine.

    \b
    khala convert CHECKPOINTS khala-model     turn the released weights into a model folder
    khala generate -m khala-model --tags "slow rock" --lyrics-file words.txt
    """


for each in (generate, refine, render, play, batch, models, train, bench, doctor):
    main.add_command(each)


@main.command()
@click.argument("source")
@click.argument("destination", type=FILE, metavar="DEST")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
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
    type=click.Choice(["4", "6", "8", "mxfp4", "mxfp8", "mixed"]),
    help="Pack the language models to so many bits; mixed gives each matrix its own, by measuring.",
)
@click.option(
    "--bits",
    type=click.FloatRange(3, 8, min_open=True),
    help="Bits of a weight on average, with --quantize mixed.  [default: 4]",
)
@click.option(
    "--quantize-part",
    "quantize_parts",
    multiple=True,
    metavar="PART=BITS",
    help="Pack embedding, head, body or superres otherwise, as head=8 or superres=none.",
)
@click.option(
    "--group-size", type=click.Choice(["32", "64", "128"]), default="64", show_default=True
)
@click.option(
    "--tokenizer",
    metavar="FILE",
    help="Llama 3.1's tokenizer.json, its folder or its Hub repository, if not beside SOURCE.",
)
@click.option(
    "--fc1-bias",
    type=click.Choice(["double", "single"]),
    default=None,
    help="How often the fc1 bias counts; the released weights need it double.  [default: double]",
)
@json_option
@command
def convert(
    source: str,
    destination: Path,
    dtype: str,
    codec_dtype: str,
    quantize: str | None,
    bits: float | None,
    quantize_parts: tuple[str, ...],
    group_size: str,
    tokenizer: str | None,
    fc1_bias: str | None,
    as_json: bool,
) -> None:
    """Turn checkpoints into a model folder.

    SOURCE is a folder in upstream's or the PyTorch-MPS port's layout, a converted model folder (to
    change dtype or packing), or a Hub repository. For --quantize mixed it is a converted model
    folder that is not packed: the model is run to measure what each matrix can bear.
    """
    from khala_mlx.convert import convert as run

    if quantize != "mixed" and bits is not None:
        raise click.UsageError("--bits is for --quantize mixed.")
    if quantize == "mixed" and quantize_parts:
        raise click.UsageError("--quantize mixed chooses for every part: leave --quantize-part.")
    click.echo(LICENCE_NOTE, err=True)
    layers = None
    if quantize == "mixed":
        quantize, layers = None, _measured(source, destination, bits or 4, int(group_size), dtype)
    told = run(
        source,
        destination,
        dtype=dtype,
        codec_dtype=codec_dtype,
        quantize=quantize,
        quantize_parts=_parts(quantize_parts),
        quantize_layers=layers,
        group_size=int(group_size),
        tokenizer=tokenizer,
        fc1_bias=fc1_bias,
        on_progress=Progress(),
    )
    report(told if as_json else _summary(told), as_json)


@main.command()
@click.argument("sound", type=FILE)
@click.argument("codes", type=FILE)
@model_option
@json_option
@command
def encode(sound: Path, codes: Path, model: str, as_json: bool) -> None:
    """Turn a sound file into codes (codes.npz)."""
    from khala_mlx.audio.files import check_codes_name, read_audio, save_codes
    from khala_mlx.pipeline.khala import Khala

    check_codes_name(codes)
    khala = Khala.from_pretrained(model)
    config = khala.config.codec
    waveform = read_audio(sound, config.sample_rate, config.channels)
    encoded = khala.codec.encode(waveform, on_progress=_stage("encode"))
    save_codes(codes, encoded)
    report(
        {
            "file": str(codes),
            "layers": encoded.shape[0],
            "frames": encoded.shape[1],
            "samples": len(waveform),
            "seconds": round(len(waveform) / config.sample_rate, 3),
        },
        as_json,
    )


@main.command()
@click.argument("codes", type=FILE)
@click.argument("sound", type=FILE)
@model_option
@finish_options
@json_option
@command
def decode(codes: Path, sound: Path, model: str, as_json: bool, **options: Any) -> None:
    """Turn codes (codes.npz) into a sound file."""
    from khala_mlx.audio.files import check_output, load_codes, write_audio
    from khala_mlx.audio.mastering import Finish
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.storage.atomic import check_destination

    finish = Finish(**options)
    check_output(sound, finish.bit_depth)
    check_destination(sound)
    khala = Khala.from_pretrained(model)
    waveform = khala.render(load_codes(codes), on_progress=_stage("decode"))
    rate = khala.config.codec.sample_rate
    waveform, levels = finish.apply(waveform, rate)
    write_audio(sound, waveform, rate, bit_depth=finish.bit_depth)
    report({"file": str(sound), "seconds": round(len(waveform) / rate, 3), **levels}, as_json)


@main.command()
@click.argument("path", type=FILE, metavar="FILE-OR-MODEL")
@click.option(
    "--plot",
    type=FILE,
    metavar="PNG",
    help="Draw the waveform, a mel spectrogram and the tokens (png, svg, pdf).",
)
@json_option
@command
def info(path: Path, plot: Path | None, as_json: bool) -> None:
    """Tell what a song, a take, a codes file or a model folder holds."""
    from khala_mlx.song.info import describe, picture

    told = describe(path)
    if plot:
        picture(path, plot)
        told["plot"] = str(plot)
    report(told, as_json)


def _measured(source: str, destination: Path, bits: float, group_size: int, dtype: str) -> Any:
    """The mixed packing of a model folder; refused at once where nothing could be written."""
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.quality.sensitivity import mixed
    from khala_mlx.storage.atomic import check_destination

    check_destination(destination)
    khala = Khala.from_pretrained(source, keep_loaded=False)
    progress = _stage("measure")
    return mixed(khala, bits, group_size=group_size, dtype=dtype, on_progress=progress)


def _parts(asked: tuple[str, ...]) -> dict[str, str]:
    """ "head=8" and the like as a mapping."""
    pairs = [each.partition("=") for each in asked]
    if wrong := [each for each, (_, equals, _) in zip(asked, pairs, strict=True) if not equals]:
        raise click.UsageError(f"--quantize-part is given as in head=8, not {wrong[0]}.")
    return {part: how for part, _, how in pairs}


add_examples(main)


def _summary(told: dict[str, Any]) -> dict[str, Any]:
    """The lines of a conversion; the rest of the report is for --json."""
    packed = told["quantization"]
    lines = {
        "folder": told["destination"],
        "size": f"{told['bytes'] / 1e9:.2f} GB",
        "layout": told["layout"],
        "dtype": told["dtype"] if not packed else f"{told['dtype']}, {_packing(packed)}",
        "fc1_bias": told["fc1_bias"],
    }
    for name, part in told["parts"].items():
        lines[name] = f"{part['tensors']} tensors, {part['parameters'] / 1e6:.1f} M parameters"
    for name, unused in told["unused"].items():
        if unused:
            lines[f"unused in {name}"] = len(unused)
    return lines


def _packing(packed: dict[str, Any]) -> str:
    several = f", mostly, of {packed['mixed']} packings" if "mixed" in packed else ""
    return f"{packed['bits']} bit{several}"


def _stage(name: str) -> Any:
    progress = Progress()
    return lambda done, total: progress(name, done, total)
