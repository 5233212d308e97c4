"""`khala train evaluate`: figures on held-out songs, and pairs to listen to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from khala_mlx.cli.commands.finetune import (
    FOLDER,
    POSITIVE,
    cut_option,
    data_option,
    json_option,
    model_option,
    scale_option,
    vocabulary_option,
)
from khala_mlx.cli.terminal import Progress, command, report

if TYPE_CHECKING:
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.storage.adapter import Adapter
    from khala_mlx.train.data.dataset import CodedSong
    from khala_mlx.train.data.prepared import Prepared


@click.command()
@model_option
@click.option(
    "--adapter", "adapters", type=FOLDER, multiple=True, help="LoRA adapter folder. Repeatable."
)
@scale_option
@data_option
@click.option(
    "--forget", type=FOLDER, help="Another prepared folder, of songs whose loss should not rise."
)
@cut_option
@vocabulary_option
@click.option("--listen", type=FOLDER, help="Write an A/B page of song pairs into this new folder.")
@click.option(
    "--pairs", type=POSITIVE, default=6, show_default=True, help="Maximum number of pairs."
)
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    default=30.0,
    show_default=True,
    help="Maximum length of each song.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@json_option
@command
def evaluate(
    model: str,
    adapters: tuple[Path, ...],
    scales: tuple[float, ...],
    data: Path,
    forget: Path | None,
    max_seconds: float,
    reachable_only: bool,
    listen: Path | None,
    pairs: int,
    seconds: float,
    seed: int,
    as_json: bool,
) -> None:
    """Measure the loss of held-out songs, without the adapters and with them.

    Nats per audio token, with intervals of 95 % from a bootstrap over artists, or over songs where
    no artists are known.
    """
    import numpy as np

    from khala_mlx.convert import read_adapter
    from khala_mlx.errors import KhalaError
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.train.data.prepared import read_prepared
    from khala_mlx.train.finetune.listening_test import check_page

    if listen:
        if not adapters:
            raise KhalaError("Pairs to listen to need an --adapter.")
        check_page(listen)
    khala, progress = Khala.from_pretrained(model), Progress()
    chosen = [read_adapter(path) for path in adapters]
    # Whatever does not fit is refused before any work.
    khala.load_adapters(chosen, scales or None)
    folders = {"": data, "forget_": forget}
    prepared = {
        prefix: read_prepared(
            khala.parts.folder, khala.config, folder, "valid", max_seconds=max_seconds
        )
        for prefix, folder in folders.items()
        if folder
    }
    loaded = Adapters(chosen, scales or None)
    whole_vocabulary = not reachable_only
    figures = _figures(khala, prepared, loaded, whole_vocabulary, seed, progress)
    if listen:
        songs = prepared[""].songs
        order = np.random.default_rng(seed).permutation(len(songs))[:pairs]
        prompts = [_asked(songs[n], khala.config.codec.frame_rate, seconds) for n in order]
        figures["listen"] = _sing(khala, prompts, loaded, listen, seed, progress)
    report(figures if as_json else _lines(figures), as_json)


@dataclass(frozen=True)
class Adapters:
    """Adapters and their strengths, to be loaded into a model."""

    chosen: Sequence[Adapter]
    scales: Sequence[float] | None

    def load(self, khala: Khala) -> None:
        """Use these adapters, and no others."""
        khala.load_adapters(self.chosen, self.scales if self.chosen else None)


def _figures(
    khala: Khala,
    prepared: dict[str, Prepared],
    adapters: Adapters,
    whole_vocabulary: bool,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Return the figures of --json; those of the other folder start with forget_."""
    from khala_mlx.train.finetune.evaluate import artists_of, compare, song_nats

    def nats(stage: str) -> dict[str, Any]:
        return {
            prefix: song_nats(
                khala.backbone,
                each.examples,
                whole_vocabulary=whole_vocabulary,
                on_progress=partial(progress, f"{prefix}{stage}"),
            )
            for prefix, each in prepared.items()
        }

    khala.load_adapters([])
    base, adapted = nats("base"), {}
    if adapters.chosen:
        adapters.load(khala)
        adapted = nats("adapter")
    told: dict[str, Any] = {}
    for prefix, each in prepared.items():
        groups = artists_of(each)
        told[f"{prefix}songs"] = len(groups)
        told[f"{prefix}artists"] = len(set(groups))
        told[f"{prefix}tokens"] = int(base[prefix].tokens.sum())
        for name, found in compare(base[prefix], adapted.get(prefix), groups, seed).items():
            told[f"{prefix}{name}"] = found.value
            told |= {f"{prefix}{name}_low": found.low, f"{prefix}{name}_high": found.high}
    return told


def _sing(
    khala: Khala,
    asked: Sequence[dict[str, Any]],
    adapters: Adapters,
    page: Path,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Make songs of some prompts without and with the adapters, one stage after the other."""
    from khala_mlx.prompt.duration import frame_budget
    from khala_mlx.prompt.request import Request
    from khala_mlx.train.finetune.listening_test import PAGE, Trial, write_page

    requests = [Request(**each, seed=seed + number) for number, each in enumerate(asked)]
    prompts = [
        khala.prompt_ids(
            **{name: each[name] for name in ("tags", "lyrics", "instrumental", "minutes")}
        )
        for each in asked
    ]
    total, coarse = 2 * len(requests), []
    for loaded in (Adapters([], None), adapters):
        loaded.load(khala)
        for request, (ids, superres_ids) in zip(requests, prompts, strict=True):
            most, least = frame_budget(khala.config, request, len(ids), len(superres_ids))
            coarse.append(khala.compose(ids, max_frames=most, min_frames=least, seed=request.seed))
            progress("compose", len(coarse), total)
    khala.parts.release("backbone")
    codes: list[Any] = []
    for number, take in enumerate(coarse):
        request = requests[number % len(requests)]
        ids = prompts[number % len(requests)][1]
        codes.append(khala.refine(ids, take, seed=request.seed))
        progress("refine", len(codes), total)
    khala.parts.release("superres")
    waves: list[Any] = []
    for each in codes:
        waves.append(khala.render(each))
        progress("render", len(waves), total)
    count = len(requests)
    trials = [Trial(asked[number], waves[number], waves[count + number]) for number in range(count)]
    pairs = write_page(page, trials, khala.config.codec.sample_rate, seed)
    return {"page": str(page / PAGE), "pairs": pairs}


def _asked(song: CodedSong, rate: float, seconds: float) -> dict[str, Any]:
    seconds = min(seconds, song.codes.shape[1] / rate)
    return {
        "tags": song.tags,
        "lyrics": song.lyrics,
        "instrumental": song.about.get("instrumental", False),
        "minutes": song.about.get("minutes", 1),
        "seconds": seconds,
        # A song that ends at once cannot be judged.
        "min_seconds": min(1.0, seconds),
    }


def _lines(told: dict[str, Any]) -> dict[str, Any]:
    """The figures as people read them, an interval behind each."""
    lines = {}
    for name, value in told.items():
        if name == "listen":
            lines[name] = value["page"]
        elif isinstance(value, int):
            lines[name] = str(value)
        elif f"{name}_low" in told:
            lines[name] = _shown(name, value, told[f"{name}_low"], told[f"{name}_high"])
    return lines


def _shown(name: str, value: float, low: float | None, high: float | None) -> str:
    def figure(number: float) -> str:
        return f"{100 * number:+.1f} %" if name.endswith("change") else f"{number:.4f}"

    within = "" if low is None or high is None else f"  ({figure(low)} to {figure(high)})"
    return figure(value) + within
