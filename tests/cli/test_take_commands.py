import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from khala_mlx.cli import main
from khala_mlx.song.take import Take

SHORT = ["--seconds", "0.1", "--min-seconds", "0.1"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def whole(tiny_folder: Path) -> bytes:
    """The sound that every way must lead to; made in a folder of its own."""
    generate(tiny_folder, "-o", "whole/a.wav")
    return Path("whole/a.wav").read_bytes()


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def generate(model: Path, *arguments: Any) -> Result:
    result = run("generate", "-m", model, *SHORT, "--tags", "pop", "--seed", 3, *arguments)
    assert result.exit_code == 0, result.stderr
    return result


def names() -> list[str]:
    return sorted(p.name for p in Path().iterdir() if p.is_file())


def failed(result: Result, sentence: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert sentence in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def stopped_after(layers: int, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """Leave a.take.safetensors as a run that dies after this many codebooks leaves it."""
    from khala_mlx.model.superres import SuperRes
    from khala_mlx.pipeline.khala import Khala

    with monkeypatch.context() as patch:
        owner, method = {0: (Khala, "compose_many"), 8: (Khala, "_render")}.get(
            layers, (SuperRes, "refine")
        )

        def die(*_: Any, **__: Any) -> None:
            shutil.copy("a.take.safetensors", "kept")
            raise SystemExit(9)

        patch.setattr(owner, method, die)
        run("generate", "-m", model, *SHORT, "--tags", "pop", "--seed", 3, "-o", "a.wav")
    Path("kept").rename("a.take.safetensors")


@pytest.mark.parametrize("layers", [0, 2, 8])
def test_a_song_is_gone_on_with_from_anywhere(
    tiny_folder: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    stopped_after(layers, monkeypatch, tiny_folder)
    assert Take.load("a.take.safetensors").codebooks == layers
    result = run("generate", "--resume", "a.take.safetensors")
    assert result.exit_code == 0, result.stderr
    assert Path("a.wav").read_bytes() == whole
    assert names() == ["a.json", "a.take.safetensors", "a.wav"]
    again = run("generate", "--resume", "a.take.safetensors", "--json")
    assert json.loads(again.stdout) == {"file": "a.wav", "finished": "already"}
    assert again.stderr == ""
    again = run("generate", "--resume", "a.take.safetensors", "--fade", "1")
    assert "`khala render` with another --output writes it with --fade." in again.stderr
    assert Path("a.wav").read_bytes() == whole


def test_what_was_said_of_the_sound_is_kept(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(tiny_folder, "-o", "a.flac", "--bit-depth", "24", "--draft")
    assert run("generate", "--resume", "a.take.safetensors").exit_code == 0
    assert soundfile.info("a.flac").subtype == "PCM_24"
    assert run("render", "a.take.safetensors", "-o", "b.wav", "--bit-depth", "16").exit_code == 0
    assert soundfile.info("b.wav").subtype == "PCM_16"


def test_a_draft_and_the_song_after_it(tiny_folder: Path, whole: bytes) -> None:
    told = json.loads(generate(tiny_folder, "-o", "a.wav", "--draft", "4", "--json").stdout)
    assert told["file"] == "a.draft-4.wav"
    assert told["codebooks"] == "4 of 8"
    assert names() == ["a.draft-4.wav", "a.take.safetensors"]
    assert Path("a.draft-4.wav").read_bytes() != whole
    further = run("generate", "--resume", "a.take.safetensors", "--draft", "6", "--json")
    assert json.loads(further.stdout)["file"] == "a.draft-6.wav"
    again = run("render", "a.take.safetensors")
    failed(again, "a.draft-6.wav exists already")
    assert run(*told["finish"].split()[1:]).exit_code == 0
    assert Path("a.wav").read_bytes() == whole
    failed(
        run("generate", "-m", tiny_folder, "--draft", "1", "-o", "b.wav"),
        "draft codebooks must be a whole number from 2 to 8",
    )
    assert "b.take.safetensors" not in names()


def test_refine_makes_another_song_of_the_same_notes(tiny_folder: Path, whole: bytes) -> None:
    generate(tiny_folder, "-o", "a.wav")
    assert run("refine", "a.take.safetensors", "--seed", 8).exit_code == 0
    assert run("refine", "a.take.safetensors", "--seed", 3, "-o", "c.wav").exit_code == 0
    assert run("refine", "a.take.safetensors", "--refine-top-k", 1, "-o", "d.wav").exit_code == 0
    assert np.array_equal(soundfile.read("c.wav")[0], soundfile.read("whole/a.wav")[0])
    first, other = Take.load("a.take.safetensors"), Take.load("song.take.safetensors")
    assert np.array_equal(first.codes[:2], other.codes[:2])
    assert not np.array_equal(first.codes, other.codes)
    assert Take.load("d.take.safetensors").request.refine_top_k == 1
    # The sidecar makes it again, from nothing.
    like = run("generate", "-m", tiny_folder, "--like", "song.json", "-o", "b.wav")
    assert like.exit_code == 0
    assert Path("b.wav").read_bytes() == Path("song.wav").read_bytes()


def test_render_makes_the_sound_again(tiny_folder: Path, whole: bytes) -> None:
    generate(tiny_folder, "-o", "a.wav")
    failed(run("render", "a.take.safetensors"), "a.wav exists already")
    Path("a.wav").unlink()
    assert run("render", "a.take.safetensors").exit_code == 0
    assert Path("a.wav").read_bytes() == whole
    assert run("render", "a.take.safetensors", "-o", "b.ogg").exit_code == 0
    assert soundfile.info("b.ogg").format == "OGG"


def test_nothing_of_others_is_written_over(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(2, monkeypatch, tiny_folder)
    Path("a.json").write_text("{}")
    failed(run("generate", "--resume", "a.take.safetensors"), "a.json belongs to another song")
    Path("a.json").unlink()
    Path("a.wav").write_text("mine")
    failed(run("generate", "--resume", "a.take.safetensors"), "a.wav exists already")
    assert Path("a.wav").read_text() == "mine"
    run("generate", "-m", tiny_folder, *SHORT, "-o", "b.wav")
    failed(run("generate", "--resume", "a.take.safetensors", "-o", "b.wav"), "exists already")


def test_a_take_leads_neither_elsewhere_nor_to_the_hub(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(2, monkeypatch, tiny_folder)
    take = Take.load("a.take.safetensors")
    take.source = "someone/model"
    take.save(Path("b.take.safetensors"))
    failed(run("generate", "--resume", "b.take.safetensors"), "Name it with --model")
    with monkeypatch.context() as patch:
        patch.setenv("KHALA_GENERATE_MODEL", str(tiny_folder))
        assert run("generate", "--resume", "b.take.safetensors").exit_code == 0
    take.source = "~nobody-of-that-name"
    take.save(Path("e.take.safetensors"))
    failed(run("generate", "--resume", "e.take.safetensors"), "Name it with --model")
    failed(run("render", "e.take.safetensors", "-m", take.source), "its user does not exist")
    take.options["suffix"] = "/../../x.wav"
    take.save(Path("c.take.safetensors"))
    result = run("generate", "--resume", "c.take.safetensors", "-m", tiny_folder)
    assert result.exit_code == 0, result.stderr
    assert Path("c.wav").exists()
    take.options = {"suffix": ".wav", "bit_depth": "99"}
    take.save(Path("d.take.safetensors"))
    failed(run("generate", "--resume", "d.take.safetensors"), "bit-depth", code=2)
    assert not Path("../x.wav").exists()


def test_wrong_uses_of_takes(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_after(0, monkeypatch, tiny_folder)
    take = "a.take.safetensors"
    failed(run("generate", "--resume", take, "--tags", "x"), "Leave out --tags", code=2)
    failed(run("generate", "--resume", "absent"), "absent cannot be read")
    failed(run("refine", take), "has no codes yet")
    failed(run("render", take), "has no codes yet")
    failed(run("generate", "--resume", take, "-m", "demo"), "has 8 codebooks")


def test_an_error_before_anything_is_composed_leaves_nothing(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from khala_mlx.model.backbone import Backbone

    monkeypatch.setattr(Backbone, "compose_many", lambda *_, **__: 1 / 0)
    failed(run("generate", "-m", tiny_folder, *SHORT), "ZeroDivisionError")
    assert names() == []


def test_a_draft_that_another_model_rendered_stays_that_of_its_own(
    tiny_folder: Path, whole: bytes, tmp_path: Path
) -> None:
    from tiny_model import write_tiny_model

    other = write_tiny_model(tmp_path / "other", seed=1)
    generate(tiny_folder, "-o", "a.wav", "--draft", "4")
    for output in ("a.wav", "b.wav"):
        Path("a.draft-4.wav").unlink(missing_ok=True)
        heard = run("render", "a.take.safetensors", "-m", other, "-o", output)
        assert heard.exit_code == 0, heard.stderr
        assert "started by another model" in heard.stderr
    for name in "ab":
        failed(run("generate", "--resume", f"{name}.take.safetensors", "-m", other), "another")
        assert run("generate", "--resume", f"{name}.take.safetensors").exit_code == 0
        assert np.array_equal(
            Take.load(f"{name}.take.safetensors").codes, Take.load("whole/a.take.safetensors").codes
        )
    assert Path("a.wav").read_bytes() == whole
    # A song is by the model that wrote its codes.
    run("render", "a.take.safetensors", "-m", other, "-o", "c.wav")
    told = json.loads(Path("c.json").read_text())["model"]
    assert told == json.loads(Path("whole/a.json").read_text())["model"]


def test_a_default_of_drafting_does_not_keep_a_song_from_being_finished(
    tiny_folder: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KHALA_GENERATE_DRAFT", "4")
    generate(tiny_folder, "-o", "a.wav")
    assert names() == ["a.draft-4.wav", "a.take.safetensors"]
    assert run("generate", "--resume", "a.take.safetensors").exit_code == 0
    assert Path("a.wav").read_bytes() == whole


def test_what_is_told_to_type_can_be_typed_whatever_the_name(tiny_folder: Path) -> None:
    told = json.loads(generate(tiny_folder, "-o", "my 'song.wav", "--draft", "4", "--json").stdout)
    assert run(*shlex.split(told["finish"])[1:]).exit_code == 0
    assert Path("my 'song.wav").is_file()


@pytest.mark.parametrize("option", [["-o", "a\udcff.wav"], ["--title", "\udcff"]])
def test_what_is_no_text_is_refused_before_any_work(tiny_folder: Path, option: list[str]) -> None:
    result = run("generate", "-m", tiny_folder, *SHORT, *option)
    assert result.exit_code != 0
    assert "is not valid text" in result.stderr
    assert names() == []


def test_once_all_is_written_there_is_nothing_to_go_on_with(tiny_folder: Path) -> None:
    from khala_mlx.cli import terminal

    generate(tiny_folder, "-o", "a.wav", "--draft", "4")
    assert terminal._hints == ["Resume with `khala generate --resume a.take.safetensors`."]
    run("generate", "--resume", "a.take.safetensors")
    assert terminal._hints == []


def test_a_suffix_in_capitals_is_kept(tiny_folder: Path) -> None:
    generate(tiny_folder, "-o", "a.FLAC", "--draft", "4")
    assert run("generate", "--resume", "a.take.safetensors").exit_code == 0
    assert "a.FLAC" in names()
