"""Several songs of one request: composed together, drafted, compared, the best of them finished."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from khala_mlx.cli.eta import Outlook
from khala_mlx.cli.session import draft_path, going_on, of_the_file, save_song, write_sound
from khala_mlx.cli.terminal import Progress, report, report_table, when_stopped
from khala_mlx.pipeline.khala import OnTake
from khala_mlx.pipeline.timing import Progress as OnProgress
from khala_mlx.quality.ranking import Measures, clipping, ranked, repetition, silence
from khala_mlx.quality.transcribe import coverage, recogniser
from khala_mlx.song.song import Song, check_free, take_path
from khala_mlx.song.take import Take
from khala_mlx.storage.atomic import check_destination, provisional

_SEEDS = 2**64


def candidate_paths(output: Path, count: int) -> list[Path]:
    """song.wav -> song.1.wav, song.2.wav, ..."""
    return [
        output.with_name(f"{output.stem}.{number}{output.suffix}") for number in range(1, count + 1)
    ]


def check_candidates(output: Path, options: dict[str, Any]) -> None:
    """Refuse, before any work, if a file of a candidate exists already."""
    for path in candidate_paths(output, options["candidates"]):
        check_free(path)
        check_destination(draft_path(path, options["draft"]))


def write_candidates(khala: Any, take: Take, output: Path, options: dict[str, Any]) -> None:
    """Compose --candidates of a fresh take, draft and rank them, and finish the --best of them."""
    paths = candidate_paths(output, options["candidates"])
    takes = _takes(take, len(paths), of_the_file(options, output))
    outlook = Outlook(khala, takes, options["draft"], best=options["best"])
    shown = Progress("all")

    def progress(stage: str, done: int, total: int) -> None:
        shown(stage, done, total, outlook(stage, done, total))

    measures = _drafted(khala, takes, paths, options, progress)
    made = [number for number, each in enumerate(measures) if each is not None]
    order = [made[place] for place in ranked([m for m in measures if m is not None])]
    best = order[: options["best"]]
    songs = khala.make_many(
        [takes[number] for number in best], progress, _keeper(takes, paths, options)
    )
    for number, song in zip(best, songs, strict=True):
        save_song(song, paths[number], options)
    outlook.keep()
    rows = [
        _row(number, takes[number], measures[number], paths[number], options) for number in order
    ]
    files = [str(paths[number]) for number in best]
    if options["as_json"]:
        report({"candidates": rows, "files": files}, as_json=True)
    else:
        report_table(rows)
        report({"finished": ", ".join(files) or "none"}, as_json=False)


def _takes(take: Take, count: int, options: dict[str, Any]) -> list[Take]:
    """As many takes of one request, with seeds that follow each other."""
    request = take.request
    takes = [
        take.with_request(replace(request, seed=(request.seed + number) % _SEEDS))
        for number in range(count)
    ]
    for each in takes:
        each.options = options
    return takes


def _keeper(takes: list[Take], paths: list[Path], options: dict[str, Any]) -> OnTake:
    """What keeps each take in its own file."""

    def keep(take: Take) -> None:
        path = take_path(paths[takes.index(take)])
        take.save(path, overwrite=True)
        when_stopped(f"Each candidate has its take; finish one with `{going_on(path, options)}`.")

    return keep


def _drafted(
    khala: Any, takes: list[Take], paths: list[Path], options: dict[str, Any], progress: OnProgress
) -> list[Measures | None]:
    """Compose, draft and measure each take; None for those that the model broke off."""
    keep, surprise = _keeper(takes, paths, options), dict[Take, float]()
    measures: list[Measures | None] = [None] * len(takes)
    with ExitStack() as stack:
        settle = []
        for take, path in zip(takes, paths, strict=True):
            take.save(take_path(path))
            settle.append(stack.enter_context(provisional(take_path(path))))

        def composed(take: Take) -> None:
            # Here, while the backbone is still loaded.
            surprise[take] = khala.surprise(take)
            keep(take)
            settle[takes.index(take)]()

        khala.compose_takes(takes, progress, composed)
        made = [take for take in takes if take.layers]
        for take, path in zip(takes, paths, strict=True):
            if not take.layers:
                take_path(path).unlink()
        for take, song in zip(
            made, khala.make_many(made, progress, keep, options["draft"]), strict=True
        ):
            number = takes.index(take)
            write_sound(draft_path(paths[number], options["draft"]), song, options)
            measures[number] = _measured(song, surprise[take])
    return measures


def _measured(song: Song, surprise: float) -> Measures:
    assert song.take is not None
    hear, lyrics = recogniser(), song.take.request.lyrics
    heard = None
    if hear is not None and lyrics and not song.take.request.instrumental:
        heard = coverage(lyrics, hear(song.waveform, song.sample_rate))
    begun = song.take.kept.shape[1]
    return Measures(
        surprise=surprise,
        silence=silence(song.waveform, song.sample_rate),
        repetition=repetition(song.codes[0, begun:]),
        clipping=clipping(song.waveform),
        coverage=heard,
    )


def _row(
    number: int, take: Take, measures: Measures | None, path: Path, options: dict[str, Any]
) -> dict[str, Any]:
    assert measures is not None
    heard = {} if measures.coverage is None else {"words": round(measures.coverage, 2)}
    return {
        "candidate": number + 1,
        "seed": take.request.seed,
        "seconds": round(take.metadata["seconds"], 1),
        "surprise": round(measures.surprise, 3),
        "silence": round(measures.silence, 3),
        "repetition": round(measures.repetition, 3),
        "clipping": round(measures.clipping, 5),
        **heard,
        "faults": ", ".join(measures.faults) or "none",
        "draft": draft_path(path, options["draft"]).name,
    }
