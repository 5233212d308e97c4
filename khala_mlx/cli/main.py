"""The `khala` command. Its sub-commands import heavy modules when they run."""

from __future__ import annotations

from typing import Any

import click

from khala_mlx.cli.commands.batch import batch
from khala_mlx.cli.commands.codec import decode, encode
from khala_mlx.cli.commands.convert import convert
from khala_mlx.cli.commands.generate import generate
from khala_mlx.cli.commands.info import info
from khala_mlx.cli.commands.machine import bench, doctor
from khala_mlx.cli.commands.models import models
from khala_mlx.cli.commands.takes import play, refine, render
from khala_mlx.cli.commands.train import train
from khala_mlx.cli.settings import read_settings
from khala_mlx.cli.terminal import OneLineErrors

# The help of these commands ends with examples.
EXAMPLES = {
    "generate": """\
khala generate --tags "waltz, slow, happy" --lyrics-file words.txt --minutes 2
khala generate --instrumental --tags "slow rock" --loudness -14 --fade 4 -o song.mp3
khala generate --like song.mp3 --seed 8 --play""",
    "refine": "khala refine song.take.safetensors --seed 5 -o other.wav",
    "render": "khala render song.take.safetensors -o song.flac --bit-depth 24",
    "play": """\
khala play song.mp3
khala play song.take.safetensors""",
    "info": """\
khala info song.mp3
khala info song.wav --plot song.png""",
    "convert": """\
khala convert checkpoints khala-model --tokenizer tokenizer.json
khala convert khala-model khala-8bit --quantize 8""",
    "encode": "khala encode song.wav codes.npz",
    "decode": "khala decode codes.npz song.wav",
    "doctor": "khala doctor --json",
}


class _WithSettings(OneLineErrors):
    """A group that takes defaults from the user's settings file."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Make click's context, with the defaults of the settings file."""
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


for each in (
    generate, refine, render, play, info, batch, encode, decode, convert, models, train, bench,
    doctor,
):  # fmt: skip
    if example := EXAMPLES.get(str(each.name)):
        each.epilog = f"\b\nExamples:\n{example}"
    main.add_command(each)
