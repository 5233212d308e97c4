"""`khala train evaluate`: figures on held-out songs, and pairs to listen to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

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


@click.command()
@model_option
@click.option("--adapter", "adapters", type=FOLDER, multiple=True, help="Can be repeated.")
@scale_option
@data_option
@click.option("--forget", type=FOLDER, help="Another one, of songs whose loss should not rise.")
@cut_option
@vocabulary_option
@click.option("--listen", type=FOLDER, help="Sing pairs for a blind test into this new folder.")
@click.option("--pairs", type=POSITIVE, default=6, show_default=True, help="How many at most.")
@click.option(
    "--seconds", type=click.FloatRange(1), default=30.0, show_default=True, help="Of each at most."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@json_option
@command
def evaluate(
    model: str, adapters: tuple[Path, ...], scales: tuple[float, ...], as_json: bool, **options: Any
) -> None:
    """What held-out songs cost the model, without the adapters and with them.

    Nats per audio token, with intervals of 95 % from a bootstrap over artists, or over songs where
    no artists are known.
    """
    from khala_mlx.convert import read_adapter
    from khala_mlx.errors import KhalaError
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.train.data.prepared import read_prepared
    from khala_mlx.train.finetune.listening_test import check_page

    if options["listen"]:
        if not adapters:
            raise KhalaError("Pairs to listen to need an --adapter.")
        check_page(options["listen"])
    khala, progress = Khala.from_pretrained(model), Progress()
    chosen = [read_adapter(path) for path in adapters]
    # Whatever does not fit is refused before any work.
    khala.load_adapters(chosen, scales or None)
    folders = {"": options["data"], "forget_": options["forget"]}
    prepared = {
        prefix: read_prepared(
            khala.parts.folder, khala.config, folder, "valid", max_seconds=options["max_seconds"]
        )
        for prefix, folder in folders.items()
        if folder
    }
    figures = _figures(khala, prepared, chosen, scales, options, progress)
    if options["listen"]:
        figures["listen"] = _sing(khala, prepared[""].songs, chosen, scales, options, progress)
    report(figures if as_json else _lines(figures), as_json)


def _figures(
    khala: Any,
    prepared: dict[str, Any],
    adapters: Sequence[Any],
    scales: Sequence[float],
    options: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Name by name as in --json; those of the set to forget begin with forget_."""
    from khala_mlx.train.finetune.evaluate import artists_of, compare, song_nats

    def nats(stage: str) -> dict[str, Any]:
        return {
            prefix: song_nats(
                khala.backbone,
                each.examples,
                whole_vocabulary=not options["reachable_only"],
                on_progress=partial(progress, f"{prefix}{stage}"),
            )
            for prefix, each in prepared.items()
        }

    khala.load_adapters([])
    base, adapted = nats("base"), {}
    if adapters:
        khala.load_adapters(adapters, scales or None)
        adapted = nats("adapter")
    told: dict[str, Any] = {}
    for prefix, each in prepared.items():
        groups = artists_of(each)
        told[f"{prefix}songs"] = len(groups)
        told[f"{prefix}artists"] = len(set(groups))
        told[f"{prefix}tokens"] = int(base[prefix].tokens.sum())
        for name, found in compare(
            base[prefix], adapted.get(prefix), groups, options["seed"]
        ).items():
            told[f"{prefix}{name}"] = found.value
            told |= {f"{prefix}{name}_low": found.low, f"{prefix}{name}_high": found.high}
    return told


def _sing(
    khala: Any,
    songs: Sequence[Any],
    adapters: Sequence[Any],
    scales: Sequence[float],
    options: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Sing some of the songs' prompts without and with the adapters, a stage at a time."""
    import numpy as np

    from khala_mlx.prompt.duration import frame_budget
    from khala_mlx.prompt.request import Request
    from khala_mlx.train.finetune.listening_test import PAGE, Trial, write_page

    rate, seed = khala.config.codec.frame_rate, options["seed"]
    order = np.random.default_rng(seed).permutation(len(songs))[: options["pairs"]]
    asked = [_asked(songs[index], rate, options["seconds"]) for index in order]
    requests = [Request(**each, seed=seed + number) for number, each in enumerate(asked)]
    prompts = [
        khala.prompt_ids(
            **{name: each[name] for name in ("tags", "lyrics", "instrumental", "minutes")}
        )
        for each in asked
    ]
    total, coarse = 2 * len(requests), []
    for chosen in ([], adapters):
        khala.load_adapters(chosen, (scales or None) if chosen else None)
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
    pairs = write_page(options["listen"], trials, khala.config.codec.sample_rate, seed)
    return {"page": str(options["listen"] / PAGE), "pairs": pairs}


def _asked(song: Any, rate: float, seconds: float) -> dict[str, Any]:
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
