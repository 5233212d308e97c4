import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from takes import begin_all

from khala_mlx import Khala, KhalaError
from khala_mlx.cli import main
from khala_mlx.cli.options import ClockTime
from khala_mlx.errors import KhalaWarning
from khala_mlx.prompt.request import Request
from khala_mlx.song.continuation import Continuation, Prefix, continued_request
from khala_mlx.song.take import Take

pytestmark = pytest.mark.filterwarnings("ignore:.*exceed full scale")

SHORT = ["--seconds", "0.1", "--min-seconds", "0.1"]
FRAMES = 35


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def made(*arguments: Any) -> Take:
    """The take of `khala generate ... -o b.wav`."""
    result = run("generate", *arguments, "-o", "b.wav")
    assert result.exit_code == 0, result.stderr
    return Take.load("b.take.safetensors")


@pytest.fixture
def first(tiny_folder: Path) -> Take:
    asked = ["--tags", "pop", "--lyrics", "la", "--seed", 3]
    result = run("generate", "-m", tiny_folder, *SHORT, *asked, "-o", "a.wav")
    assert result.exit_code == 0, result.stderr
    return Take.load("a.take.safetensors")


@pytest.mark.parametrize("until", [None, "0.05", "0:00.02"])
def test_a_song_goes_on_from_a_take(first: Take, until: str | None) -> None:
    place = ["--from", until] if until else []
    take = made("--continue", "a.take.safetensors", *place, "--seconds", 0.15, "--seed", 4)
    begun = {None: FRAMES, "0.05": 17, "0:00.02": 6}[until]
    assert take.whole
    assert np.array_equal(take.codes[:, :begun], first.codes[:, :begun])
    assert take.codes.shape[1] > FRAMES
    assert not np.array_equal(take.codes[:, begun:FRAMES], first.codes[:, begun:FRAMES]) or (
        begun == FRAMES
    )
    assert (take.request.tags, take.request.lyrics, take.request.seed) == ("pop", "la", 4)
    told = json.loads(Path("b.json").read_text())["continued"]
    assert (told["file"], told["frames"]) == ("a.take.safetensors", begun)


def test_what_follows_depends_on_words_and_seed(tiny_folder: Path, first: Take) -> None:
    goes_on = ["--continue", "a.take.safetensors", "--from", 0.05, "--seconds", 0.1, "--seed", 4]
    take = made(*goes_on)
    for extra in (["--lyrics", "do"], ["--seed", 5]):
        for path in Path().glob("b.*"):
            path.unlink()
        other = made(*goes_on, *extra)
        assert np.array_equal(other.codes[:, :17], take.codes[:, :17])
        assert not np.array_equal(other.codes, take.codes)


def prefix_of(khala: Khala, path: str, until: float | None = None) -> Prefix:
    opened = Continuation.open(Path(path), until)
    return opened.prefix(khala.config.codec, khala.codec.encode)


def test_no_seed_draws_another_than_the_takes(first: Take) -> None:
    take = made("--continue", "a.take.safetensors", "--seconds", 0.12)
    assert take.request.seed != 3


def test_a_song_goes_on_from_any_sound(tiny: Khala, tiny_folder: Path) -> None:
    """At another rate, mono, of no whole number of frames."""
    rng = np.random.default_rng(0)
    soundfile.write("x.flac", 0.1 * rng.normal(size=2500), 22050)
    take = made("-m", tiny_folder, "--continue", "x.flac", "--seconds", 0.15, "--tags", "pop")
    beginning = prefix_of(tiny, "x.flac")
    assert beginning.codes.shape == (8, 5000 // 128)
    assert np.array_equal(take.codes[:, : 5000 // 128], beginning.codes)
    assert take.codes.shape[1] > 5000 // 128
    assert take.request.tags == "pop"


def test_a_finished_file_brings_its_prompt_along(tiny: Khala, first: Take) -> None:
    assert Continuation.open(Path("a.wav")).request == first.request


def test_a_killed_continuation_is_resumed(tiny: Khala, first: Take) -> None:
    """From every state of its take, kept codes and the note of where they came from included."""
    beginning = prefix_of(tiny, "a.take.safetensors", 0.05)
    asked = Request(tags="pop", seconds=0.1, seed=4)
    states: list[Path] = []

    def keep(take: Take) -> None:
        states.append(Path(f"{len(states)}.take.safetensors"))
        take.save(states[-1])

    take = tiny.begin(asked, beginning.codes)
    take.metadata["continued"] = beginning.info
    keep(take)
    song = tiny.finish(take, on_take=keep)
    assert len(states) == 3
    for state in states:
        again = tiny.resume(Take.load(state))
        assert again.metadata["continued"] == beginning.info
        assert np.array_equal(tiny.finish(again).waveform, song.waveform)


def test_times_that_were_told_keep_as_many_frames(tiny: Khala, first: Take) -> None:
    for frames in range(1, FRAMES + 1):
        begun = prefix_of(tiny, "a.take.safetensors", (frames + 0.5) / 344.53125)
        again = prefix_of(tiny, "a.take.safetensors", begun.info["seconds"])
        assert again.info == begun.info
        assert begun.info["frames"] == frames


def test_a_draft_is_gone_on_with_too(tiny: Khala, tiny_folder: Path) -> None:
    """Only what it holds stays; the missing layers of its beginning are filled."""
    run("generate", "-m", tiny_folder, *SHORT, "--draft", 4, "-o", "a.wav")
    draft = Take.load("a.take.safetensors")
    take = made("--continue", "a.take.safetensors", "--seconds", 0.12)
    assert np.array_equal(take.codes[:4, :FRAMES], draft.codes)
    assert take.whole


def test_refining_anew_keeps_the_beginning(first: Take) -> None:
    take = made("--continue", "a.take.safetensors", "--from", 0.05, "--seconds", 0.1)
    assert run("refine", "b.take.safetensors", "--seed", 9, "-o", "c.wav").exit_code == 0
    other = Take.load("c.take.safetensors")
    assert np.array_equal(other.codes[:, :17], first.codes[:, :17])
    assert np.array_equal(other.codes[:2], take.codes[:2])
    assert not np.array_equal(other.codes, take.codes)


def test_several_ways_to_go_on(tiny: Khala, first: Take) -> None:
    kept = first.codes[:, :17]
    takes = begin_all(tiny, Request(seconds=0.1), [1, 2], kept)
    songs = list(tiny.finish_many(takes))
    for song, take in zip(songs, takes, strict=True):
        assert np.array_equal(song.codes[:, :17], kept)
        alone = tiny.finish(tiny.begin(take.request, kept))
        assert np.array_equal(alone.codes, song.codes)


def test_the_prompt_asks_for_as_many_minutes_as_the_song_gets() -> None:
    def asked(minutes: int, seconds: float) -> Request:
        return continued_request(Request(minutes=minutes, seconds=9.0, refine_seed=3), seconds, 10)

    assert asked(1, 30.0) == Request(minutes=1)
    assert asked(1, 60.0) == Request(minutes=2)
    assert asked(3, 60.0) == Request(minutes=3)
    assert asked(3, 6000.0) == Request(minutes=10)


def test_what_is_added_lasts_a_while(tiny: Khala) -> None:
    from khala_mlx.config import KhalaConfig
    from khala_mlx.prompt.duration import budget_behind

    config = KhalaConfig()
    assert budget_behind(config, (2326, 0), 1000) == (2326, 1108)
    assert budget_behind(config, (2326, 2000), 1000) == (2326, 2000)
    assert budget_behind(config, (1010, 0), 1000) == (1010, 1010)
    with pytest.raises(KhalaError, match="lasts 0:46 and the song may last 0:46"):
        budget_behind(config, (1000, 0), 1000)


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["--continue", "absent.wav"], "absent.wav cannot be read", 1),
        (["--continue", "absent.safetensors"], "cannot be read", 1),
        (["--continue", "a.take.safetensors", "--from", "0"], "above 0", 1),
        (["--continue", "a.take.safetensors", "--from", "1:00"], "at most 0:00", 1),
        (["--continue", "a.take.safetensors", "--seconds", "0.1"], "Keep less of it", 1),
        (["--continue", "tiny.wav"], "shorter than one frame", 1),
        (["--from", "1"], "--from needs --continue", 2),
        (["--continue", "a.wav", "--from", "1:x"], "not a time such as", 2),
        (["--continue", "a.wav", "--from", "-1"], "not a time such as", 2),
        (["--continue", "a.wav", "--resume", "a.take.safetensors"], "Leave out --continue", 2),
    ],
)
def test_wrong_beginnings(
    tiny_folder: Path, first: Take, arguments: list[str], sentence: str, code: int
) -> None:
    soundfile.write("tiny.wav", np.zeros((100, 2)), 44100)
    result = run("generate", "-m", tiny_folder, *arguments, "-o", "b.wav")
    assert (result.exit_code, "Traceback" in result.stderr) == (code, False)
    assert sentence in result.stderr
    assert not list(Path().glob("b*"))


def test_a_sound_that_tells_nothing_is_gone_on_with_by_the_users_defaults(
    tiny_folder: Path, first: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    waveform, rate = soundfile.read("a.wav")
    soundfile.write("bare.wav", waveform, rate)
    monkeypatch.setenv("KHALA_GENERATE_TAGS", "waltz")
    monkeypatch.setenv("KHALA_GENERATE_TOP_K", "7")
    asked = ["-m", tiny_folder, "--seconds", 0.15, "--top-k", 5]
    bare = made(*asked, "--continue", "bare.wav").request
    assert (bare.tags, bare.top_k, bare.minutes) == ("waltz", 5, 1)
    Path("b.wav").rename("c.wav")
    for name in ("b.json", "b.take.safetensors"):
        Path(name).unlink()
    # What a song tells of itself goes before them.
    assert made(*asked, "--continue", "a.wav").request.tags == "pop"


def test_the_sidecar_alone_is_not_enough(tiny_folder: Path, first: Take) -> None:
    made("--continue", "a.take.safetensors", "--seconds", 0.12)
    result = run("generate", "-m", tiny_folder, "--like", "b.json", "-o", "c.wav")
    assert "made without --continue: the song will differ" in result.stderr
    again = ["--like", "b.json", "--continue", "a.take.safetensors"]
    assert run("generate", *again, "-o", "d.wav").stderr.count("another") == 0
    assert Path("d.wav").read_bytes() == Path("b.wav").read_bytes()
    other = run("generate", *again, "--from", 0.05, "-o", "e.wav")
    assert (
        "continues 0.102 s of a.take.safetensors, and this song is made with another prefix"
        in other.stderr
    )
    # The record of a song from nothing lends its request alone.
    lent = ["--like", "a.json", "--continue", "b.take.safetensors", "--seconds", 0.2]
    assert run("generate", *lent, "-o", "f.wav").exit_code == 0
    assert Take.load("f.take.safetensors").request.seed != first.request.seed


def test_another_models_beginning_is_told(tiny: Khala, first: Take) -> None:
    first.metadata["model"]["config_sha256"] = "0" * 64
    first.save(Path("x.take.safetensors"))
    with pytest.warns(KhalaWarning, match="made by another model"):
        Continuation.open(Path("x.take.safetensors")).warn_other_model(tiny.parts.identity)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Continuation.open(Path("a.take.safetensors")).warn_other_model(tiny.parts.identity)


def test_times() -> None:
    convert = ClockTime().convert
    assert [convert(t, None, None) for t in ("72", "72.5", "1:12", "1:02:03.5", 3)] == [
        72.0,
        72.5,
        72.0,
        3723.5,
        3.0,
    ]
