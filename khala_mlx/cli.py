"""The `khala` command. Thin: parse, construct, call, save; heavy imports wait inside commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from khala_mlx.options import (
    FILE,
    FINISH,
    finish_options,
    json_option,
    model_option,
    tag_options,
)
from khala_mlx.terminal import OneLineErrors, Progress, command, report
from khala_mlx.train.commands import train

LICENCE_NOTE = (
    "The released Khala weights are under CC BY-NC 4.0: no commercial use; name their authors."
)
TEXT_MODES = click.Choice(["same_as_backbone", "same_as_backbone_no_description", "separate"])


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="khala-mlx")
def main() -> None:
    """Whole songs from tags and lyrics, on your own machine.

    \b
    khala convert CHECKPOINTS khala-model     turn the released weights into a model folder
    khala generate -m khala-model --tags "slow rock" --lyrics-file words.txt
    """


main.add_command(train)


@main.command()
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
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=50, show_default=True, help="1 is greedy.")
@click.option("--refine-top-k", type=int, default=10, show_default=True)
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
@click.option("--like", type=FILE, help="Take all that is not given here from a song or song.json.")
@model_option
@click.option(
    "--adapter", "adapters", type=FILE, multiple=True, help="What a model was taught; repeatable."
)
@click.option(
    "--adapter-scale",
    "adapter_scales",
    type=float,
    multiple=True,
    help="How strongly each adapter works.  [default: 1]",
)
@click.option("--output", "-o", type=FILE, help="wav, flac, ogg or mp3.  [default: song.wav]")
@tag_options
@finish_options
@click.option("--play", is_flag=True, help="Play the song when it is written.")
@click.option("--dry-run", is_flag=True, help="Show the prompt and what fits; load nothing.")
@json_option
@command
def generate(**options: Any) -> None:
    """Make a song from tags and lyrics."""
    from khala_mlx.audio import check_output
    from khala_mlx.finish import Finish
    from khala_mlx.pipeline import Khala
    from khala_mlx.song import check_free, warn_other_adapters, warn_other_model

    output = options["output"] or _free_name()
    finish = {name: options[name] for name in FINISH}
    check_output(output, Finish(**finish).bit_depth)
    check_free(output)
    request = _request(options)
    khala = Khala.from_pretrained(options["model"], keep_loaded=False)
    _load_adapters(khala, options["adapters"], options["adapter_scales"])
    if options["like"]:
        warn_other_model(options["like"], khala.identity)
        warn_other_adapters(options["like"], khala.adapters)
    if options["dry_run"]:
        report(khala.plan(request), options["as_json"])
        return
    song = khala.fulfil(request, Progress())
    song.save(output, **finish, title=options["title"], artist=options["artist"])
    taken = sum(song.metadata["timings"].values())
    report(
        {
            "file": str(output),
            "seconds": round(song.duration, 2),
            "seed": request.seed,
            "taken_seconds": round(taken, 1),
            "licence": khala.config.licence,
        },
        options["as_json"],
    )
    if options["play"]:
        song.play()


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
    type=click.Choice(["4", "6", "8"]),
    help="Pack the language models to so many bits.",
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
    group_size: str,
    tokenizer: str | None,
    fc1_bias: str | None,
    as_json: bool,
) -> None:
    """Turn checkpoints into a model folder.

    SOURCE is a folder in upstream's or the PyTorch-MPS port's layout, a converted model folder (to
    change dtype or packing), or a Hub repository.
    """
    from khala_mlx.convert import convert as run

    click.echo(LICENCE_NOTE, err=True)
    told = run(
        source,
        destination,
        dtype=dtype,
        codec_dtype=codec_dtype,
        quantize=int(quantize) if quantize else None,
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
    from khala_mlx.audio import check_codes_name, read_audio, save_codes
    from khala_mlx.pipeline import Khala

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
    from khala_mlx.audio import check_output, load_codes, write_audio
    from khala_mlx.files import check_destination
    from khala_mlx.finish import Finish
    from khala_mlx.pipeline import Khala

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
@json_option
@command
def info(path: Path, as_json: bool) -> None:
    """Tell what a song, a codes file or a model folder holds."""
    from khala_mlx.info import describe

    report(describe(path), as_json)


@main.command()
@click.argument("path", type=FILE, metavar="FILE")
@command
def play(path: Path) -> None:
    """Play a sound file."""
    from khala_mlx.audio import play_file

    play_file(path)


def _summary(told: dict[str, Any]) -> dict[str, Any]:
    """The lines of a conversion; the rest of the report is for --json."""
    packed = told["quantization"]
    lines = {
        "folder": told["destination"],
        "size": f"{told['bytes'] / 1e9:.2f} GB",
        "layout": told["layout"],
        "dtype": told["dtype"] if not packed else f"{told['dtype']}, {packed['bits']} bit",
        "fc1_bias": told["fc1_bias"],
    }
    for name, part in told["parts"].items():
        lines[name] = f"{part['tensors']} tensors, {part['parameters'] / 1e6:.1f} M parameters"
    for name, unused in told["unused"].items():
        if unused:
            lines[f"unused in {name}"] = len(unused)
    return lines


def _request(options: dict[str, Any]) -> Any:
    """The request of the options, over that of --like where an option was not given."""
    import dataclasses
    import secrets

    from khala_mlx.song import Request

    if options["lyrics_file"] is not None:
        if options["lyrics"]:
            raise click.UsageError("--lyrics and --lyrics-file exclude each other.")
        options["lyrics"] = _read_lyrics(options["lyrics_file"])
    base = Request.from_sidecar(options["like"]) if options["like"] else Request()
    names = {field.name for field in dataclasses.fields(Request)}
    given = {
        name: value
        for name, value in options.items()
        if name in names and (options["like"] is None or _given(name))
    }
    if given.get("seed", 0) is None:
        given["seed"] = secrets.randbelow(2**32)
    return dataclasses.replace(base, **given)


def _load_adapters(khala: Any, paths: tuple[Path, ...], scales: tuple[float, ...]) -> None:
    if not paths and not scales:
        return
    from khala_mlx.convert import read_adapter

    khala.load_adapters([read_adapter(path) for path in paths], scales or None)


def _given(name: str) -> bool:
    ctx = click.get_current_context()
    default = ParameterSource.DEFAULT
    if name == "lyrics" and ctx.get_parameter_source("lyrics_file") != default:
        return True
    return ctx.get_parameter_source(name) != default


def _read_lyrics(file: Any) -> str:
    from khala_mlx.errors import PromptError

    try:
        text: str = file.read()
    except UnicodeDecodeError as error:
        raise PromptError(f"{file.name} is no UTF-8 text.") from error
    return text


def _free_name() -> Path:
    """song.wav, or the first of song-2.wav, song-3.wav, ... that is free."""
    from khala_mlx.song import sidecar_path, take_path

    number, path = 1, Path("song.wav")
    while any(p.exists() for p in (path, sidecar_path(path), take_path(path))):
        number += 1
        path = Path(f"song-{number}.wav")
    return path


def _stage(name: str) -> Any:
    progress = Progress()
    return lambda done, total: progress(name, done, total)
