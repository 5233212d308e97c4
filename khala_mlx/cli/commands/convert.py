"""`khala convert`: checkpoints, or a model folder, to a model folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from khala_mlx.cli.options import FILE, json_option
from khala_mlx.cli.terminal import Progress, command, report

LICENCE_NOTE = (
    "The released Khala weights are under CC BY-NC 4.0: no commercial use; name their authors."
)


@click.command()
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
    help="Bits per weight of the language models; mixed measures how many each matrix needs.",
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
    help="Quantize embedding, head, body or superres otherwise, as head=8 or superres=none.",
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
    change dtype or quantization), or a Hub repository. For --quantize mixed it is a converted model
    folder that is not quantized: the model is run to measure what each matrix can bear.
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


def _measured(source: str, destination: Path, bits: float, group_size: int, dtype: str) -> Any:
    """The mixed quantization of a model folder; refused at once where nothing could be written."""
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.quality.sensitivity import mixed
    from khala_mlx.storage.atomic import check_destination

    check_destination(destination)
    khala = Khala.from_pretrained(source, keep_loaded=False)
    progress = Progress()
    return mixed(
        khala, bits, group_size=group_size, dtype=dtype, on_progress=partial(progress, "measure")
    )


def _parts(asked: tuple[str, ...]) -> dict[str, str]:
    """ "head=8" and the like as a mapping."""
    pairs = [each.partition("=") for each in asked]
    if wrong := [each for each, (_, equals, _) in zip(asked, pairs, strict=True) if not equals]:
        raise click.UsageError(f"--quantize-part is given as in head=8, not {wrong[0]}.")
    return {part: how for part, _, how in pairs}


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
    several = f", mostly, of {packed['mixed']} quantizations" if "mixed" in packed else ""
    return f"{packed['bits']} bit{several}"
