"""Several songs of one request: composed together, drafted, compared, the best of them finished."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from khala_mlx.cli.eta import Eta
from khala_mlx.cli.session import Output, write_song, write_sound
from khala_mlx.cli.terminal import Progress, report, report_table, when_stopped
from khala_mlx.pipeline.khala import Khala, OnTake
from khala_mlx.pipeline.timing import Progress as OnProgress
from khala_mlx.quality.ranking import Measures, clipping, ranked, repetition, silence
from khala_mlx.quality.transcribe import coverage, recogniser
from khala_mlx.song.song import Song, take_path
from khala_mlx.song.take import Take
from khala_mlx.storage.atomic import provisional

_SEEDS = 2**64


def save_candidates(khala: Khala, take: Take, outputs: list[Output], draft: int, best: int) -> None:
    """Compose a candidate for each output, draft and rank them, and finish the `best` of them."""
    takes = _takes(take, outputs)
    eta, shown = Eta(khala, takes, draft, best=best), Progress("all")

    def progress(stage: str, done: int, total: int) -> None:
        shown(stage, done, total, eta(stage, done, total))

    measures = _drafted(khala, takes, outputs, draft, progress)
    made = [number for number, each in enumerate(measures) if each is not None]
    order = [made[place] for place in ranked([m for m in measures if m is not None])]
    chosen = order[:best]
    songs = khala.finish_many(
        [takes[number] for number in chosen], progress, _keeper(takes, outputs)
    )
    for number, song in zip(chosen, songs, strict=True):
        write_song(song, outputs[number])
    rows = [
        _row(number, takes[number], measure, outputs[number].draft_path(draft).name)
        for number in order
        if (measure := measures[number])
    ]
    files = [str(outputs[number].path) for number in chosen]
    if outputs[0].as_json:
        report({"candidates": rows, "files": files}, as_json=True)
    else:
        report_table(rows)
        report({"finished": ", ".join(files) or "none"}, as_json=False)


def _takes(take: Take, outputs: list[Output]) -> list[Take]:
    """Return takes of one request with consecutive seeds, one for each output."""
    request = take.request
    takes = []
    for number, output in enumerate(outputs):
        seed = (request.seed + number) % _SEEDS
        takes.append(take.with_request(replace(request, seed=seed)))
        takes[-1].options = output.file.recorded(output.path.suffix)
    return takes


def _keeper(takes: list[Take], outputs: list[Output]) -> OnTake:
    """Return what saves each take in its own file."""

    def keep(take: Take) -> None:
        output = outputs[takes.index(take)]
        take.save(take_path(output.path), overwrite=True)
        when_stopped(f"Each candidate has its take. Finish one with `{output.resume_command}`.")

    return keep


def _drafted(
    khala: Khala, takes: list[Take], outputs: list[Output], draft: int, progress: OnProgress
) -> list[Measures | None]:
    """Compose, draft and measure each take; None for those that could not be composed."""
    keep, nats = _keeper(takes, outputs), dict[Take, float]()
    measures: list[Measures | None] = [None] * len(takes)
    paths = [take_path(output.path) for output in outputs]
    with ExitStack() as stack:
        settle = []
        for take, path in zip(takes, paths, strict=True):
            take.save(path)
            settle.append(stack.enter_context(provisional(path)))

        def composed(take: Take) -> None:
            # Here, while the backbone is still loaded.
            nats[take] = khala.nats_per_token(take)
            keep(take)
            settle[takes.index(take)]()

        khala.compose_takes(takes, progress, composed)
        made = [take for take in takes if take.codebooks]
        for take, path in zip(takes, paths, strict=True):
            if not take.codebooks:
                path.unlink()
        songs = khala.finish_many(made, progress, keep, codebooks=draft)
        for take, song in zip(made, songs, strict=True):
            number = takes.index(take)
            write_sound(outputs[number].draft_path(draft), song, outputs[number].file)
            measures[number] = _measured(song, take, nats[take])
    return measures


def _measured(song: Song, take: Take, nats: float) -> Measures:
    transcribe, lyrics = recogniser(), take.request.lyrics
    heard = None
    if transcribe is not None and lyrics and not take.request.instrumental:
        heard = coverage(lyrics, transcribe(song.waveform, song.sample_rate))
    return Measures(
        nats_per_token=nats,
        silence=silence(song.waveform, song.sample_rate),
        repetition=repetition(song.codes[0, take.prefix.shape[1] :]),
        clipping=clipping(song.waveform),
        coverage=heard,
    )


def _row(number: int, take: Take, measures: Measures, draft: str) -> dict[str, Any]:
    heard = {} if measures.coverage is None else {"words": round(measures.coverage, 2)}
    return {
        "candidate": number + 1,
        "seed": take.request.seed,
        "seconds": round(take.metadata["seconds"], 1),
        "nats_per_token": round(measures.nats_per_token, 3),
        "silence": round(measures.silence, 3),
        "repetition": round(measures.repetition, 3),
        "clipping": round(measures.clipping, 5),
        **heard,
        "faults": ", ".join(measures.faults) or "none",
        "draft": draft,
    }
