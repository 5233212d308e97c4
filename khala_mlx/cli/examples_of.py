"""Examples that the help of each command ends with."""

from __future__ import annotations

import click

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


def add_examples(group: click.Group) -> None:
    """Let the help of the commands of a group end with their examples."""
    for name, text in EXAMPLES.items():
        if name in group.commands:
            group.commands[name].epilog = f"\b\nExamples:\n{text}"
