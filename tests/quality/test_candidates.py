import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from khala_mlx import Khala
from khala_mlx.cli import main
from khala_mlx.model.superres import SuperRes
from khala_mlx.quality import ranking as candidates
from khala_mlx.quality import transcribe as words
from khala_mlx.quality.ranking import Measures, ranked
from khala_mlx.song.take import Take

pytestmark = pytest.mark.filterwarnings("ignore:.*exceed full scale")

RATE = 44100
SHORT = ["--seconds", "0.1", "--min-seconds", "0.1", "--seed", "3"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_silence_is_a_share_of_quarter_seconds() -> None:
    loud = np.full((RATE, 2), 0.1, np.float32)
    quiet = np.full((RATE, 2), 0.002, np.float32)
    assert candidates.silence(loud, RATE) == 0
    assert candidates.silence(quiet, RATE) == 1
    assert candidates.silence(np.concatenate([loud, quiet]), RATE) == 0.5
    assert candidates.silence(quiet[:100], RATE) == 1


def test_repetition_is_a_share_of_patterns() -> None:
    assert candidates.repetition(np.arange(100)) == 0
    assert candidates.repetition(np.zeros(100, int)) == pytest.approx(1 - 1 / 97)
    assert candidates.repetition(np.tile(np.arange(10), 10)) == pytest.approx(1 - 10 / 97)
    assert candidates.repetition(np.zeros(3, int)) == 0


def test_clipping_is_a_share_of_samples() -> None:
    assert candidates.clipping(np.array([[1.0, -1.0], [1.1, -1.1]])) == 0.5


def test_the_order_goes_by_faults_then_words_then_nats_per_token() -> None:
    fine = Measures(2.0, 0.0, 0.1, 0.0)
    calm = Measures(1.5, 0.0, 0.1, 0.0)
    silent = Measures(0.1, 0.9, 0.1, 0.0)
    broken = Measures(0.1, 0.9, 0.9, 0.1)
    assert ranked([broken, fine, silent, calm]) == [3, 1, 2, 0]
    assert broken.faults == ["silence", "repetition", "clipping"]
    heard = [Measures(s, 0.0, 0.0, 0.0, c) for s, c in ((1.0, 0.5), (2.0, 0.9), (1.5, 0.92))]
    assert ranked(heard) == [2, 1, 0]
    assert ranked([fine, fine]) == [0, 1]
    assert ranked([]) == []


def test_nats_per_token_is_that_of_whole_forward_passes(tiny: Khala) -> None:
    layout, ids = tiny.config.tokens, np.arange(20)
    coarse = np.random.default_rng(0).integers(0, layout.codebook_size, (2, 9))
    nats = tiny.backbone.nats_per_token(ids, coarse)
    from khala_mlx import token_ids as tokens

    written = tokens.interleave(layout, coarse)
    logits = tiny.backbone(np.concatenate([ids, written])[None])[0].astype(np.float64)
    for place, token in enumerate(written):
        start, stop = tokens.window(layout, place % 2)
        row = logits[len(ids) - 1 + place]
        can_follow = np.append(row[start:stop], row[layout.end_of_song])
        expected = np.log(np.exp(can_follow).sum()) - row[token]
        assert nats[place] == pytest.approx(expected, abs=1e-4)


def test_the_nats_per_token_of_a_song_leaves_its_beginning_out(tiny: Khala) -> None:
    from khala_mlx.prompt.request import Request

    kept = np.zeros((8, 5), int)
    take = tiny.begin(Request(seconds=0.03), kept)
    tiny.compose_takes([take])
    nats = tiny.backbone.nats_per_token(np.array(take.prompts[0]), take.codes[:2])
    assert tiny.nats_per_token(take) == pytest.approx(nats[10:].mean())


def test_candidates_are_drafted_ranked_and_finished(tiny_folder: Path) -> None:
    asked = ["--tags", "pop", "--lyrics", "la", *SHORT]
    options = ["--candidates", 3, "--best", 2, "--draft", 4, "-o", "a.wav", "--json"]
    result = run("generate", "-m", tiny_folder, *asked, *options)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    rows, files = told["candidates"], told["files"]
    assert sorted(row["seed"] for row in rows) == [3, 4, 5]
    assert [row["nats_per_token"] for row in rows] == sorted(row["nats_per_token"] for row in rows)
    assert len(files) == 2
    best, second, last = (row["candidate"] for row in rows)
    assert files == [f"a.{best}.wav", f"a.{second}.wav"]
    every = {f"a.{n}.{kind}" for n in (1, 2, 3) for kind in ("draft-4.wav", "take.safetensors")}
    assert set(names()) == every | {f"a.{n}.{k}" for n in (best, second) for k in ("json", "wav")}
    # Each is the song of its own seed, and the last can still be finished.
    assert run("generate", "--resume", f"a.{last}.take.safetensors").exit_code == 0
    for number, seed in ((1, 3), (2, 4), (3, 5)):
        run("generate", "-m", tiny_folder, *asked, "--seed", seed, "-o", f"b{number}.wav")
        assert Path(f"a.{number}.wav").read_bytes() == Path(f"b{number}.wav").read_bytes()


def test_the_table(tiny_folder: Path) -> None:
    result = run("generate", "-m", tiny_folder, *SHORT, "--candidates", 2, "--best", 0)
    assert result.exit_code == 0, result.stderr
    head, *rows = result.stdout.splitlines()
    assert head.split()[:6] == [
        "candidate", "seed", "seconds", "nats_per_token", "silence", "repetition"
    ]  # fmt: skip
    assert len(rows) == 3
    assert rows[-1].split() == ["finished", "none"]
    assert not list(Path().glob("*.json"))
    # The same command again has names of its own.
    again = run("generate", "-m", tiny_folder, *SHORT, "--candidates", 2, "--best", 0)
    assert again.exit_code == 0, again.stderr
    assert {"song.2.take.safetensors", "song-2.2.take.safetensors"} < set(names())


def test_stopped_candidates_tell_how_to_go_on(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from khala_mlx.cli import terminal

    def stop(*_: Any, **__: Any) -> None:
        raise SystemExit(9)

    monkeypatch.setattr(SuperRes, "refine", stop)
    run("generate", "-m", tiny_folder, *SHORT, "--candidates", 2)
    (hint,) = terminal._hints
    assert "Finish one with `khala generate --resume song.2.take.safetensors`" in hint


def test_a_kept_beginning_has_candidates_too(tiny_folder: Path) -> None:
    run("generate", "-m", tiny_folder, *SHORT, "-o", "a.wav")
    begun = Take.load("a.take.safetensors").codes[:, :17]
    goes_on = ["--continue", "a.take.safetensors", "--from", 0.05, "--seconds", 0.1]
    result = run("generate", *goes_on, "--candidates", 2, "-o", "b.wav")
    assert result.exit_code == 0, result.stderr
    for number in (1, 2):
        assert np.array_equal(Take.load(f"b.{number}.take.safetensors").codes[:, :17], begun[:8])


def test_songs_the_model_broke_off_are_left_out(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from khala_mlx.pipeline.khala import Khala

    compose = Khala.compose_many

    def second_fails(self: Khala, *arguments: Any, **options: Any) -> list[np.ndarray]:
        songs = compose(self, *arguments, **options)
        songs[1] = np.empty((2, 0), int)
        return songs

    monkeypatch.setattr(Khala, "compose_many", second_fails)
    result = run("generate", "-m", tiny_folder, *SHORT, "--candidates", 3, "--best", 3, "--json")
    assert result.exit_code == 0, result.stderr
    assert {row["candidate"] for row in json.loads(result.stdout)["candidates"]} == {1, 3}
    assert not list(Path().glob("song.2.*"))


def test_wrong_numbers_of_candidates(tiny_folder: Path) -> None:
    Path("a.2.draft-8.wav").write_text("mine")
    for arguments, sentence, code in (
        (["--candidates", 1], "2<=x<=64", 2),
        (["--best", 2], "--best needs --candidates", 2),
        (["--candidates", 2, "--best", 3], "--best cannot be more", 2),
        (["--candidates", 2], "a.2.draft-8.wav exists already", 1),
        # Told before anything is composed.
        (
            ["--candidates", 2, "--draft", 9],
            "codebooks must be a whole number from 2 to 8, got 9",
            1,
        ),
        (["--candidates", 2, "--play"], "--play is for one song", 2),
        (
            ["--candidates", 2, "--draft", 0],
            "codebooks must be a whole number from 2 to 8, got 0",
            1,
        ),
    ):
        result = run("generate", "-m", tiny_folder, *arguments, "-o", "a.wav")
        assert (result.exit_code, sentence in result.stderr) == (code, True), result.stderr
    assert names() == ["a.2.draft-8.wav"]


def test_words_are_found_in_any_script() -> None:
    assert words.sung_words("[Verse 1]\nIf the SKY, don’t\n") == ["if", "the", "sky", "don't"]
    assert words.sung_words("我爱你 love") == ["我", "爱", "你", "love"]
    assert words.coverage("do re mi fa", "do MI, fa la") == 0.75
    assert words.coverage("do re", "re do") == 0.5
    assert words.coverage("[Intro]", "la") is None
    assert words.coverage("la", "") == 0


def test_a_recogniser_is_used_where_it_is_installed(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[np.ndarray] = []

    def transcribe(audio: np.ndarray, *, path_or_hf_repo: str) -> dict[str, Any]:
        heard.append(audio)
        return {"text": " La la do." if len(heard) == 2 else "something else"}

    module = types.ModuleType("mlx_whisper")
    module.transcribe = transcribe  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    assert words.recogniser() is None
    monkeypatch.setitem(sys.modules, "mlx_whisper", module)
    asked = [*SHORT, "--lyrics", "la la\nre", "--candidates", 2, "--json"]
    result = run("generate", "-m", tiny_folder, *asked)
    assert result.exit_code == 0, result.stderr
    found = {row["candidate"]: row["words"] for row in json.loads(result.stdout)["candidates"]}
    assert found == {1: 0.0, 2: 0.67}
    assert heard[0].dtype == np.float32
    assert len(heard[0]) == pytest.approx(0.1 * 16000, rel=0.05)
