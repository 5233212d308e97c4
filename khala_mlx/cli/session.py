"""What the commands that make songs share: opening the model, keeping the take, saving files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from khala_mlx.audio.files import check_output, write_audio
from khala_mlx.audio.mastering import fade_part
from khala_mlx.audio.player import Live
from khala_mlx.cli.eta import Eta
from khala_mlx.cli.options import FileArgs, ModelArgs, given, is_folder, left_to_default
from khala_mlx.cli.playback import play_in_terminal
from khala_mlx.cli.terminal import Progress, report, when_stopped
from khala_mlx.errors import KhalaError
from khala_mlx.performance.machine import Machine, mac_with, parse_memory, this_machine
from khala_mlx.pipeline.khala import Khala, OnSound
from khala_mlx.song.record import Record, sidecar_path
from khala_mlx.song.song import Song, check_free, take_path
from khala_mlx.song.take import Take
from khala_mlx.storage.atomic import check_destination, provisional
from khala_mlx.text import resuming

# Called as (stage, done, total, seconds left of the stage and of the song).
TimedProgress = Callable[[str, int, int, tuple[float, float]], None]


@dataclass(frozen=True)
class Output:
    """Where a song goes, how its file is written, and what the user sees and hears meanwhile.

    Attributes:
        path: song.wav; song.json and song.take.safetensors are beside it.
        resumed: the take beside it is the song's own and is replaced.
        named: the user chose the name; otherwise another free one will do.
        model: for the command that resumes the song.
    """

    path: Path
    file: FileArgs
    model: ModelArgs
    play: bool = False
    as_json: bool = False
    resumed: bool = False
    named: bool = True

    def check(self, take: Take | None = None) -> bool:
        """Return whether the song is still to be written; `take` is the one in `path`'s place.

        Raises:
            KhalaError: if the format is not supported, or other files are in the song's place.
        """
        check_output(self.path, self.file.mastering.bit_depth)
        if take is None:
            check_free(self.path)
            return True
        sidecar = sidecar_path(self.path)
        if sidecar.exists() and not _is_of(take, sidecar):
            raise KhalaError(f"{sidecar} belongs to another song. Choose another --output.")
        if not self.path.exists():
            check_destination(self.path)
            return True
        if take.whole and sidecar.exists():
            return False
        raise KhalaError(f"{self.path} exists already. Remove it or choose another --output.")

    @property
    def resume_command(self) -> str:
        """The command that resumes the song's take."""
        return " ".join([resuming(take_path(self.path)), *self.model.flags])

    def draft_path(self, codebooks: int) -> Path:
        """song.wav -> song.draft-8.wav"""
        return self.path.with_name(f"{self.path.stem}.draft-{codebooks}{self.path.suffix}")

    def candidates(self, count: int) -> list[Output]:
        """song.wav -> song.1.wav, song.2.wav, ..."""
        name = f"{self.path.stem}.{{}}{self.path.suffix}"
        return [
            replace(self, path=self.path.with_name(name.format(number)))
            for number in range(1, count + 1)
        ]


def free_name(suffix: str = ".wav", candidates: int = 0) -> Path:
    """Return song.wav, or the first of song-2.wav, song-3.wav, ... whose files are all free."""
    number, path = 1, Path(f"song{suffix}")
    while any(
        each.exists()
        for song in (path, *(path.with_stem(f"{path.stem}.{n + 1}") for n in range(candidates)))
        for each in (song, sidecar_path(song), take_path(song))
    ):
        number += 1
        path = Path(f"song-{number}{suffix}")
    return path


def open_model(
    model: ModelArgs, take: Take | None = None, *, memory: str | None = None, dry_run: bool = False
) -> Khala:
    """Open the model of --model, or the one that a take names, with its adapters.

    A take from elsewhere cannot make this download anything: it only leads to local folders.

    Args:
        memory: plan for a machine with this memory, such as "16GB".
        dry_run: the machine may have more memory than this one, since nothing is made.
    """
    source = model.model
    if take is not None and not given("model") and take.source:
        if take.source == "demo" or is_folder(take.source):
            source = take.source
        elif left_to_default("model"):
            raise KhalaError("The take's model is not where it was. Name it with --model.")
    machine = _machine(memory, dry_run) if memory else None
    khala = Khala.from_pretrained(source, keep_loaded=False, machine=machine)
    load_adapters(khala, model.adapters, model.adapter_scales)
    return khala


def load_adapters(khala: Khala, paths: Sequence[Path], scales: Sequence[float]) -> None:
    """Use the adapters of --adapter, in any format that the converter reads."""
    if not paths and not scales:
        return
    from khala_mlx.convert import read_adapter

    khala.load_adapters([read_adapter(path) for path in paths], scales or None)


def _machine(memory: str, dry_run: bool) -> Machine:
    """Return this machine with less memory, or the Mac that a dry run asks about."""
    here, mac = this_machine(), mac_with(parse_memory(memory))
    if dry_run and here.on_cpu:
        return mac
    # Only a dry run may have more than there is.
    return replace(here, memory=mac.memory if dry_run else min(here.memory, mac.memory))


def claim(take: Take, output: Output) -> Output:
    """Write the take of a new song, which reserves its name; return where the song goes.

    Raises:
        KhalaError: if the user's name was taken meanwhile; a default name moves on.
    """
    take.options = output.file.recorded(output.path.suffix)
    while True:
        try:
            take.save(take_path(output.path))
        except KhalaError:
            if output.named or not take_path(output.path).exists():
                raise
            output = replace(output, path=free_name(output.path.suffix))
        else:
            return output


def save_song(khala: Khala, take: Take, output: Output) -> None:
    """Finish a take, write the song's three files and report them."""
    output = output if output.resumed else claim(take, output)
    with _played(khala, output) as on_sound:
        song = finish(khala, take, output, on_sound=on_sound)
        write_song(song, output)
    report(
        {
            "file": str(output.path),
            "seconds": round(song.duration, 2),
            "seed": take.request.seed,
            "taken_seconds": round(sum(song.metadata["timings"].values()), 1),
            "licence": khala.config.licence,
        },
        output.as_json,
    )


def save_draft(khala: Khala, take: Take, output: Output, codebooks: int) -> None:
    """Refine a take to some codebooks and write their sound; the take stays unfinished."""
    codebooks = max(codebooks, take.codebooks)
    check_destination(output.draft_path(codebooks))
    output = output if output.resumed else claim(take, output)
    sound = output.draft_path(codebooks)
    with _played(khala, output) as on_sound:
        song = finish(khala, take, output, codebooks, on_sound=on_sound)
        write_sound(sound, song, output.file)
    report(
        {
            "file": str(sound),
            "seconds": round(song.duration, 2),
            "seed": take.request.seed,
            "codebooks": f"{take.codebooks} of {take.num_codebooks}",
            "finish": output.resume_command,
        },
        output.as_json,
    )


def finish(
    khala: Khala,
    take: Take,
    output: Output,
    codebooks: int | None = None,
    *,
    on_sound: OnSound | None = None,
    progress: TimedProgress | None = None,
) -> Song:
    """Make the song of a take, and keep the take in its file, which exists, while it grows."""
    eta, shown = Eta(khala, [take], codebooks), progress or _progress(played=on_sound is not None)

    def on_progress(stage: str, done: int, total: int) -> None:
        shown(stage, done, total, eta(stage, done, total))

    path = take_path(output.path)
    take.options = output.file.recorded(output.path.suffix)

    def keep(take: Take) -> None:
        take.save(path, overwrite=True)
        when_stopped(f"Resume with `{output.resume_command}`.")

    make = partial(khala.finish, take, on_progress, codebooks=codebooks, on_sound=on_sound)
    if output.resumed:
        keep(take)
        return make(on_take=keep)
    # Until there is something worth keeping, an error or Ctrl-C removes the file again.
    with provisional(path) as settle:

        def keep_for_good(take: Take) -> None:
            keep(take)
            settle()

        return make(on_take=keep_for_good)


def write_song(song: Song, output: Output) -> None:
    """Write the three files of a song whose take is beside them already."""
    file = output.file
    song.save(
        output.path,
        normalize=file.normalize,
        bit_depth=file.bit_depth,
        loudness=file.loudness,
        fade=file.fade,
        title=file.title,
        artist=file.artist,
        finishing=True,
    )
    when_stopped("")


def write_sound(path: Path, song: Song, file: FileArgs) -> None:
    """Write the sound of a song alone, without record and take."""
    waveform, _ = file.mastering.apply(song.waveform, song.sample_rate)
    write_audio(path, waveform, song.sample_rate, bit_depth=file.bit_depth)


@contextmanager
def _played(khala: Khala, output: Output) -> Iterator[OnSound | None]:
    """With --play yield what plays a song while it is rendered; wait for the end of the sound."""
    if not output.play:
        yield None
        return
    # The loudness of the song is not known before its end: it is played as rendered.
    fade = partial(
        fade_part, sample_rate=khala.config.codec.sample_rate, seconds=output.file.mastering.fade
    )
    live = Live(khala.config.codec.sample_rate, fade, play_in_terminal)
    try:
        yield live
    except BaseException:
        live.stop()
        raise
    live.finish()


def _progress(*, played: bool) -> TimedProgress:
    """Return what shows the stages; a played song's position takes the place of the last."""
    progress = Progress()

    def show(stage: str, done: int, total: int, left: tuple[float, float]) -> None:
        if not (played and stage == "render"):
            progress(stage, done, total, left)

    return show


def _is_of(take: Take, sidecar: Path) -> bool:
    try:
        return Record.read(sidecar).request == take.request
    except KhalaError:
        return False
