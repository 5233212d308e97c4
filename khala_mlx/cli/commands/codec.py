"""`khala encode` and `khala decode`: sound to codes and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from khala_mlx.cli.options import FILE, FileArgs, json_option, mastering_options, model_option
from khala_mlx.cli.terminal import Progress, command, report


@click.command()
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
    encoded = khala.codec.encode(waveform, on_progress=partial(Progress(), "encode"))
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


@click.command()
@click.argument("codes", type=FILE)
@click.argument("sound", type=FILE)
@model_option
@mastering_options
@json_option
@command
def decode(codes: Path, sound: Path, model: str, file: FileArgs, as_json: bool) -> None:
    """Turn codes (codes.npz) into a sound file."""
    from khala_mlx.audio.files import check_output, load_codes, write_audio
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.storage.atomic import check_destination

    mastering = file.mastering
    check_output(sound, mastering.bit_depth)
    check_destination(sound)
    khala = Khala.from_pretrained(model)
    waveform = khala.render(load_codes(codes), on_progress=partial(Progress(), "decode"))
    rate = khala.config.codec.sample_rate
    waveform, levels = mastering.apply(waveform, rate)
    write_audio(sound, waveform, rate, bit_depth=mastering.bit_depth)
    report({"file": str(sound), "seconds": round(len(waveform) / rate, 3), **levels}, as_json)
