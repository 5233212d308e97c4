"""`python -m corpus write OUT`: songs as files, for the training commands and for listening."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
import soundfile

from . import EXTRA_STYLE, SPLITS, STYLES, Song, song
from .songs import whole_frames as rounded_up


@click.group()
def main() -> None:
    """A procedural corpus of short sung songs."""


@main.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True)
@click.option(
    "--start", type=click.IntRange(min=0), default=0, show_default=True, help="First seed."
)
@click.option("--count", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--seconds",
    type=float,
    default=(6.0,),
    multiple=True,
    show_default=True,
    help="Length of a song; several take turns.",
)
@click.option("--whole-frames", is_flag=True, help="Round lengths up to frames of the codec.")
@click.option("--note-seconds", type=float, default=0.5, show_default=True, help="Shortest note.")
@click.option("--style", type=click.Choice((*STYLES, EXTRA_STYLE)), help="All songs in one style.")
def write(
    out: Path,
    split: str,
    start: int,
    count: int,
    seconds: tuple[float, ...],
    whole_frames: bool,
    note_seconds: float,
    style: str | None,
) -> None:
    """Write song_*.wav with .caption.txt and .lyrics.txt, and metadata.jsonl."""
    table = out / "metadata.jsonl"
    if table.exists():
        raise click.ClickException(f"{table} is there already; choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, seed in enumerate(range(start, start + count)):
        length = seconds[number % len(seconds)]
        length = rounded_up(length) if whole_frames else length
        try:
            made = song(seed, split, seconds=length, style=style, note_seconds=note_seconds)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        rows.append({"seed": seed, "split": split, **_save(made, out / f"song_{seed:06d}")})
    # Written last: a folder without it is unfinished.
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    click.echo(f"{count} songs in {out}")


def _save(made: Song, stem: Path) -> dict[str, object]:
    """Write the three files of a song; returns its row of the table."""
    soundfile.write(f"{stem}.wav", made.waveform, made.sample_rate, subtype="PCM_16")
    Path(f"{stem}.caption.txt").write_text(made.tags + "\n", encoding="utf-8")
    Path(f"{stem}.lyrics.txt").write_text(made.lyrics + "\n", encoding="utf-8")
    row = asdict(made)
    del row["waveform"]
    return {"file": f"{stem.name}.wav", **row}


if __name__ == "__main__":
    main()
