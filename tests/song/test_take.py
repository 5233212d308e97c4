import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from khala_mlx import Khala, KhalaError, Song
from khala_mlx.errors import KhalaWarning
from khala_mlx.prompt.request import Request
from khala_mlx.song.take import Take, song_path

# Random codecs are loud.
pytestmark = pytest.mark.filterwarnings("ignore:.*exceed full scale")

REQUEST = Request(tags="pop", lyrics="la la", seconds=0.1, min_seconds=0.1, seed=5)


@pytest.fixture(scope="module")
def states(tiny: Khala, tmp_path_factory: pytest.TempPathFactory) -> tuple[Song, list[Path]]:
    """A song, and every state of its take that was worth keeping, as files."""
    folder, paths = tmp_path_factory.mktemp("states"), []

    def keep(take: Take) -> None:
        paths.append(folder / f"{len(paths)}.take.safetensors")
        take.save(paths[-1])

    begun = tiny.begin(REQUEST)
    keep(begun)
    song = tiny.finish(begun, on_take=keep)
    return song, paths


def test_a_take_is_kept_from_the_start_to_the_end(states: tuple[Song, list[Path]]) -> None:
    song, paths = states
    takes = [Take.load(path) for path in paths]
    assert [take.codebooks for take in takes] == [0, 2, 8]
    assert [take.whole for take in takes] == [False, False, True]
    for take in takes:
        assert take.request == REQUEST
        assert np.array_equal(take.codes, song.codes[: take.codebooks]) or not take.codebooks
        assert take.metadata["model"]["config_sha256"] == song.metadata["model"]["config_sha256"]
        assert take.prompts == takes[0].prompts
        assert take.prompts[0]


def test_every_state_becomes_the_same_song(tiny: Khala, states: tuple[Song, list[Path]]) -> None:
    song, paths = states
    for path in paths:
        again = tiny.finish(tiny.resume(Take.load(path)))
        assert np.array_equal(again.codes, song.codes)
        assert np.array_equal(again.waveform, song.waveform)


def test_a_draft_is_finished_to_the_same_song(tiny: Khala, states: tuple[Song, list[Path]]) -> None:
    """Stopped at a layer where nothing is kept otherwise."""
    take = tiny.begin(REQUEST)
    draft = tiny.finish(take, codebooks=5)
    assert draft.codes.shape[0] == 5
    assert len(draft.waveform) == len(states[0].waveform)
    assert not np.array_equal(draft.waveform, states[0].waveform)
    assert np.array_equal(tiny.finish(take).waveform, states[0].waveform)
    for layers in (1, 9):
        with pytest.raises(KhalaError, match="draft codebooks must be a whole number from 2 to 8"):
            tiny.finish(tiny.begin(REQUEST), codebooks=layers)


def test_progress_of_a_resumed_take_counts_what_is_left(tiny: Khala) -> None:
    take = tiny.begin(REQUEST)
    tiny.finish(take, codebooks=5)
    seen: list[tuple[str, int, int]] = []
    tiny.finish(take, on_progress=lambda *a: seen.append(a))
    assert [s for s in seen if s[0] == "refine"] == [("refine", n, 3) for n in (1, 2, 3)]


def test_timings_add_up(tiny: Khala) -> None:
    take = tiny.begin(REQUEST)
    tiny.finish(take, codebooks=5)
    before = dict(take.metadata["timings"])
    tiny.finish(take)
    after = take.metadata["timings"]
    assert after["compose"] == before["compose"]
    assert after["refine"] > before["refine"]


def test_another_detail_of_the_same_song(tiny: Khala, states: tuple[Song, list[Path]]) -> None:
    song, paths = states
    request = Request(**{**REQUEST.to_dict(), "refine_seed": 6})
    other = tiny.finish(tiny.refine_again(Take.load(paths[-1]), request))
    assert np.array_equal(other.codes[:2], song.codes[:2])
    assert not np.array_equal(other.codes[2:], song.codes[2:])
    assert np.array_equal(tiny.finish(tiny.begin(request)).codes, other.codes)


def edited(path: Path, target: Path, **changes: Any) -> Path:
    """A copy of a take with other metadata."""
    take = Take.load(path)
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            take.metadata[part][key] = value
        else:
            setattr(take, part, value)
    take.save(target)
    return target


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__config_sha256": "0" * 64}, "started by another model"),
        ({"model__weights_fingerprint": "0" * 64}, "started by another model"),
        ({"model__adapters": [{"sha256": "1"}]}, "with other adapters"),
        ({"prompts": ([1, 2], [1])}, "another prompt"),
        ({"num_codebooks": 9}, "9 codebooks, but the model has 8"),
        ({"codes": np.full((2, 3), 99)}, "0..15"),
        ({"codes": np.zeros((1, 3))}, "shape"),
        ({"prefix": np.full((2, 3), 16)}, "0..15"),
        ({"request__minutes": 11}, "minutes"),
        ({"request__top_k": 0}, "top_k"),
        ({"request__seed": -1}, "seed"),
    ],
)
def test_takes_of_something_else_are_refused(
    tiny: Khala,
    states: tuple[Song, list[Path]],
    tmp_path: Path,
    changes: dict[str, Any],
    sentence: str,
) -> None:
    path = edited(states[1][1], tmp_path / "x.take.safetensors", **changes)
    with pytest.raises(KhalaError, match=sentence):
        tiny.resume(Take.load(path))


def test_another_backend_is_told(
    tiny: Khala, states: tuple[Song, list[Path]], tmp_path: Path
) -> None:
    path = edited(states[1][1], tmp_path / "x.take.safetensors", backend__device="Device(gpu, 0)")
    with pytest.warns(KhalaWarning, match="not bit-identical"):
        tiny.resume(Take.load(path))


def test_another_models_take_can_get_a_new_detail(
    tiny: Khala, states: tuple[Song, list[Path]], tmp_path: Path
) -> None:
    path = edited(states[1][2], tmp_path / "x.take.safetensors", model__config_sha256="0" * 64)
    with pytest.warns(KhalaWarning, match="started by another model"):
        assert tiny.refine_again(Take.load(path), REQUEST).codebooks == 2


def test_saving_replaces_only_when_told(states: tuple[Song, list[Path]], tmp_path: Path) -> None:
    take = Take.load(states[1][0])
    take.save(tmp_path / "a")
    with pytest.raises(KhalaError, match="exists already"):
        take.save(tmp_path / "a")
    Take.load(states[1][1]).save(tmp_path / "a", overwrite=True)
    assert Take.load(tmp_path / "a").codebooks == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_takes_without_prompts_or_counts_can_be_read(tmp_path: Path) -> None:
    """As the first version of the package wrote them."""
    text = json.dumps({"request": {"tags": "pop"}, "num_coarse": 2})
    save_file({"codes": np.zeros((8, 3), np.int64)}, tmp_path / "a", {"khala": text})
    take = Take.load(tmp_path / "a")
    assert (take.codebooks, take.whole, take.prompts) == (8, True, ([], []))


def test_names() -> None:
    assert song_path(Path("a/song.take.safetensors")) == Path("a/song.wav")
    assert song_path(Path("b.c.safetensors"), ".mp3") == Path("b.c.mp3")


def save(path: Path, arrays: dict[str, np.ndarray], metadata: Any) -> None:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(arrays, path, {"khala": text})


GOOD: dict[str, Any] = {"request": {}, "refined_layers": 2}
CODES = {"codes": np.zeros((8, 3), np.int32)}


@pytest.mark.parametrize(
    ("arrays", "metadata"),
    [
        ({}, GOOD),
        ({"codes": np.zeros((8, 3), np.float32)}, GOOD),
        ({"codes": np.zeros(8, np.int32)}, GOOD),
        ({"codes": np.full((8, 3), -2)}, GOOD),
        ({"codes": np.full((8, 3), 2**31)}, GOOD),
        ({**CODES, "kept": np.zeros(3, np.int32)}, GOOD),
        (CODES, ""),
        (CODES, "[" * 100_000),
        (CODES, "1" * 5000),
        (CODES, []),
        (CODES, {}),
        (CODES, {**GOOD, "request": 3}),
        (CODES, {**GOOD, "request": {"seed": "x"}}),
        (CODES, {**GOOD, "request": {"unknown": 1}}),
        (CODES, {**GOOD, "refined_layers": 9}),
        (CODES, {**GOOD, "refined_layers": -1}),
        (CODES, {**GOOD, "refined_layers": True}),
        (CODES, {**GOOD, "refined_layers": 0}),
        (CODES, {**GOOD, "prompt_ids": [1]}),
        (CODES, {**GOOD, "prompt_ids": {"backbone": ["x"]}}),
        (CODES, {**GOOD, "timings": {"compose": "x"}}),
        (CODES, {**GOOD, "timings": 3}),
        (CODES, '{"request": {}, "timings": {"compose": NaN}}'),
        (CODES, {**GOOD, "model": 3}),
        (CODES, {**GOOD, "model_given": 3}),
        (CODES, {**GOOD, "options": []}),
        (CODES, {**GOOD, "backend": 3}),
    ],
)
def test_malformed_takes_are_one_sentence(
    tmp_path: Path, arrays: dict[str, np.ndarray], metadata: Any
) -> None:
    save(tmp_path / "a", arrays, metadata)
    with pytest.raises(KhalaError, match=r"a\b.*\.$"):
        Take.load(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b"x" * 7, b"\xff" * 40, b"\x05" + b"\0" * 7 + b"[1,2]"])
def test_files_that_are_no_takes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(KhalaError, match="not a complete safetensors file"):
        Take.load(tmp_path / "a")
    with pytest.raises(KhalaError, match="cannot be read"):
        Take.load(tmp_path / "absent")
    with pytest.raises(KhalaError, match="cannot be read"):
        Take.load(tmp_path)


@pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")
def test_the_example_of_the_docs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the example of docs/takes.md with a tiny model and lengths that fit it."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "takes.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('"khala-model"', repr(str(tiny_folder))).replace(":1550", ":17")
    code = code.replace("codebooks=8", "codebooks=4").replace('rock"', 'rock", seconds=0.1')
    names: dict[str, Any] = {}
    exec(code, names)
    assert np.array_equal(names["again"].waveform, names["song"].waveform)
    assert names["draft"].codes.shape[0] == 4
    prefix = names["prefix"]
    assert np.array_equal(names["longer"].codes[: len(prefix), :17], prefix)
