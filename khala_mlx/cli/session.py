"""What the commands that make songs share: opening the model, keeping the take, writing files."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.audio import files as audio
from khala_mlx.audio.mastering import Finish, fade_part
from khala_mlx.audio.player import Live
from khala_mlx.audio.tags import clean
from khala_mlx.cli.eta import Outlook
from khala_mlx.cli.options import FINISH, OF_THE_FILE, given, left_to_default
from khala_mlx.cli.playback import play_in_terminal
from khala_mlx.cli.terminal import Progress, report, when_stopped
from khala_mlx.errors import KhalaError
from khala_mlx.song.record import read_request, sidecar_path
from khala_mlx.song.song import Song, take_path
from khala_mlx.song.take import Take
from khala_mlx.storage.atomic import check_destination, provisional
from khala_mlx.text import resuming


def _itself(path: Path) -> list[Path]:
    return [path]


def free_name(suffix: str = ".wav", songs: Callable[[Path], list[Path]] = _itself) -> Path:
    """song.wav, or the first of song-2.wav, song-3.wav, ... whose `songs` are all free."""
    number, path = 1, Path(f"song{suffix}")
    while any(
        each.exists()
        for song in songs(path)
        for each in (song, sidecar_path(song), take_path(song))
    ):
        number += 1
        path = Path(f"song-{number}{suffix}")
    return path


def finish_of(options: dict[str, Any]) -> Finish:
    """What the options ask to be done to the sound."""
    return Finish(**{name: options[name] for name in FINISH})


def open_model(options: dict[str, Any], take: Take | None = None) -> Any:
    """The Khala of --model, or where that is not given the one a take names, with its adapters.

    A take from elsewhere cannot make this fetch anything: it only leads to folders that are here.
    """
    from khala_mlx.pipeline.khala import Khala

    source = options["model"]
    if take is not None and not given("model") and take.source:
        if take.source == "demo" or _is_folder(take.source):
            source = take.source
        elif left_to_default("model"):
            raise KhalaError(
                "The take's model is not here under the name it had then: name it with --model."
            )
    khala = Khala.from_pretrained(source, keep_loaded=False)
    load_adapters(khala, options["adapters"], options["adapter_scales"])
    return khala


def going_on(take: Path, options: dict[str, Any]) -> str:
    """The command that goes on with a take, with what the take alone does not lead to again."""
    words = [resuming(take)]
    if not (options["model"] == "demo" or _is_folder(options["model"])):
        words += ["--model", shlex.quote(options["model"])]
    for path in options["adapters"]:
        words += ["--adapter", shlex.quote(str(path))]
    for scale in options["adapter_scales"]:
        words += ["--adapter-scale", str(scale)]
    return " ".join(words)


def _is_folder(name: str) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except RuntimeError:
        # ~nobody
        return False


def load_adapters(khala: Any, paths: tuple[Path, ...], scales: tuple[float, ...]) -> None:
    """Put the adapters of --adapter on a model."""
    if not paths and not scales:
        return
    from khala_mlx.convert import read_adapter

    khala.load_adapters([read_adapter(path) for path in paths], scales or None)


def check_unfinished(take: Take, output: Path) -> bool:
    """Whether the song of `take` at `output` is still to be written.

    Raises:
        KhalaError: if other files are in its place.
    """
    if sidecar_path(output).exists() and not _is_of(take, sidecar_path(output)):
        raise KhalaError(f"{sidecar_path(output)} is of another song; choose another --output.")
    if not output.exists():
        check_destination(output)
        return True
    if take.whole and sidecar_path(output).exists():
        return False
    raise KhalaError(f"{output} exists already; remove it or choose another --output.")


def write_song(
    khala: Any, take: Take, output: Path, options: dict[str, Any], *, resumed: bool = False
) -> None:
    """Make what a take lacks and write its three files; the take is there from the start on."""
    with _heard(khala, options):
        _write_song(khala, take, output, options, resumed)


def _write_song(
    khala: Any, take: Take, output: Path, options: dict[str, Any], resumed: bool
) -> None:
    song = made(khala, take, output, options, resumed, progress=_progress(options))
    save_song(song, output, options)
    taken = sum(song.metadata["timings"].values())
    report(
        {
            "file": str(output),
            "seconds": round(song.duration, 2),
            "seed": take.request.seed,
            "taken_seconds": round(taken, 1),
            "licence": khala.config.licence,
        },
        options["as_json"],
    )


def write_draft(
    khala: Any, take: Take, output: Path, options: dict[str, Any], *, resumed: bool = False
) -> None:
    """Refine a take to --draft layers and write how that sounds; the take stays unfinished."""
    layers = max(options["draft"], take.layers)
    sound = draft_path(output, layers)
    check_destination(sound)
    with _heard(khala, options):
        _write_draft(khala, take, output, options, resumed, sound, layers)


def _write_draft(
    khala: Any,
    take: Take,
    output: Path,
    options: dict[str, Any],
    resumed: bool,
    sound: Path,
    layers: int,
) -> None:
    song = made(khala, take, output, options, resumed, layers, _progress(options))
    write_sound(sound, song, options)
    report(
        {
            "file": str(sound),
            "seconds": round(song.duration, 2),
            "seed": take.request.seed,
            "layers": f"{take.layers} of {take.num_codebooks}",
            "finish": going_on(take_path(output), options),
        },
        options["as_json"],
    )


@contextmanager
def _heard(khala: Any, options: dict[str, Any]) -> Iterator[None]:
    """With --play let the song be heard while it is rendered, and to its end once it is written."""
    if not options["play"]:
        yield
        return
    rate, fade = khala.config.codec.sample_rate, finish_of(options).fade

    def shape(block: np.ndarray, start: int, samples: int) -> np.ndarray:
        return fade_part(block, start, samples, rate, fade)

    # How loud the song is cannot be known before its end: it is heard as rendered.
    live = khala.on_sound = Live(rate, shape, play_in_terminal)
    try:
        yield
    except BaseException:
        live.stop()
        raise
    finally:
        khala.on_sound = None
    live.finish()


def _progress(options: dict[str, Any]) -> Callable[..., None]:
    """Shows the stages; where a song is heard, its position takes the place of the last."""
    progress = Progress()
    if not options["play"]:
        return progress

    def show(stage: str, done: int, total: int, left: tuple[float, float]) -> None:
        if stage != "render":
            progress(stage, done, total, left)

    return show


def draft_path(output: Path, layers: int) -> Path:
    """song.wav -> song.draft-8.wav"""
    return output.with_name(f"{output.stem}.draft-{layers}{output.suffix}")


def write_sound(path: Path, song: Song, options: dict[str, Any]) -> None:
    """Write the sound of a song alone, without take and sidecar."""
    finish = finish_of(options)
    waveform, _ = finish.apply(song.waveform, song.sample_rate)
    audio.write_audio(path, waveform, song.sample_rate, bit_depth=finish.bit_depth)


def of_the_file(options: dict[str, Any], output: Path) -> dict[str, Any]:
    """What a take records of how its song is to be written."""
    named = {name: clean(options[name]) for name in ("title", "artist")}
    return {name: options[name] for name in OF_THE_FILE} | named | {"suffix": output.suffix}


def save_song(song: Song, output: Path, options: dict[str, Any]) -> None:
    """Write the three files of a song whose take is beside `output` already."""
    song.save(output, **{name: options[name] for name in OF_THE_FILE}, finishing=True)
    when_stopped("")


def made(
    khala: Any,
    take: Take,
    output: Path,
    options: dict[str, Any],
    resumed: bool,
    layers: int | None = None,
    progress: Any = None,
) -> Song:
    """The song of a take, which is kept in its file beside `output` while it grows.

    `progress` is called as (stage, done, total, seconds left of the stage and of the song).
    """
    outlook, shown = Outlook(khala, [take], layers), progress or Progress()

    def tell(stage: str, done: int, total: int) -> None:
        shown(stage, done, total, outlook(stage, done, total))

    path = take_path(output)
    take.options = of_the_file(options, output)

    def keep(take: Take) -> None:
        take.save(path, overwrite=True)
        when_stopped(f"Go on with `{going_on(path, options)}`.")

    if resumed:
        keep(take)
        return _finished(khala.make(take, tell, keep, layers), outlook)
    take.save(path)
    # Until there is something worth keeping, an error or Ctrl-C takes it away again.
    with provisional(path) as settle:

        def keep_for_good(take: Take) -> None:
            keep(take)
            settle()

        return _finished(khala.make(take, tell, keep_for_good, layers), outlook)


def _finished(song: Song, outlook: Outlook) -> Song:
    outlook.keep()
    return song


def _is_of(take: Take, sidecar: Path) -> bool:
    try:
        return read_request(sidecar) == take.request
    except KhalaError:
        return False
