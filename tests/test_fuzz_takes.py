"""Malformed takes, codes, sidecars and lyrics: one sentence, and nothing written elsewhere.

KHALA_FUZZ multiplies the number of examples, which is kept small for CI.
"""

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from khala_mlx import Khala
from khala_mlx.cli import main
from khala_mlx.prompt.request import Request

EXAMPLES = int(os.environ.get("KHALA_FUZZ", "1"))
# Codes 2: options of a take or sidecar that the command line refuses as it would typed ones.
ENDS = (0, 1, 2)

fuzzed = settings(
    max_examples=12 * EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# What a file may hold where something else is meant.
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.sampled_from(
        ["../../x.wav", "/etc/passwd", "a\0b", "\n", "demo", "someone/model", ".", "~"]
    ),
    st.lists(st.integers(-2, 2), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").write_text("untouched")
    monkeypatch.chdir(tmp_path / "inside")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def good(tiny: Khala, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The metadata of a take of the tiny model, and its codes."""
    path = tmp_path_factory.mktemp("good") / "a.take.safetensors"
    take = tiny.begin(Request(tags="pop", lyrics="la", seconds=0.02, min_seconds=0.02, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.finish(take)
    take.save(path)
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return {"text": json.loads(file.metadata()["khala"]), "codes": file.get_tensor("codes")}


def run(*arguments: Any) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(main, [str(a) for a in arguments])


def ends_well(result: Result, folder: Path) -> None:
    """A result or one line of error; what lies around is as before; then everything is removed."""
    assert result.exit_code in ENDS, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == (result.exit_code != 0), result.stderr
    assert "Traceback" not in result.stderr
    assert "Unexpected" not in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["inside", "outside"]
    assert (folder / "outside").read_text() == "untouched"
    for path in (folder / "inside").iterdir():
        assert path.suffix in (".wav", ".flac", ".ogg", ".mp3", ".json", ".safetensors", ".npz")
        assert not path.name.startswith(".")
        path.unlink()


def put(data: Any, path: list[str], value: Any) -> Any:
    """A copy of nested dicts with `value` at `path`."""
    made = copy.deepcopy(data)
    inner = made
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return made


def paths(data: dict[str, Any]) -> list[list[str]]:
    """Every place in nested dicts."""
    found = []
    for name, value in data.items():
        found.append([name])
        if isinstance(value, dict):
            found += [[name, *rest] for rest in paths(value)]
    return found


COMMANDS = (
    ["generate", "--resume"],
    ["render"],
    ["refine"],
    ["generate", "--seconds", "0.05", "--continue"],
    ["info"],
)


@fuzzed
@given(data=st.data())
def test_takes_that_tell_something_odd(
    good: dict[str, Any], tiny_folder: Path, tmp_path: Path, data: st.DataObject
) -> None:
    places = paths(good["text"])
    # Asking for minutes of song is not a malformed input, only slow.
    places = [p for p in places if p[-1] not in ("seconds", "min_seconds", "minutes")]
    text = put(good["text"], data.draw(st.sampled_from(places)), data.draw(odd))
    layers = data.draw(st.sampled_from([0, 2, 5, 8]))
    if isinstance(text.get("refined_layers"), int):
        text["refined_layers"] = layers
    codes = good["codes"] if layers else good["codes"][:, :0]
    write({"codes": codes}, text)
    command = data.draw(st.sampled_from(COMMANDS))
    model = [] if command == ["info"] else ["-m", tiny_folder]
    ends_well(run(*command, "a.take.safetensors", *model), tmp_path)


@fuzzed
@given(data=st.data())
def test_takes_with_odd_codes(
    good: dict[str, Any], tiny_folder: Path, tmp_path: Path, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from([np.int32, np.int64, np.uint8, np.float32, np.bool_]))
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    codes = np.full(shape, data.draw(st.sampled_from([0, 1, 15, 16, 200])), dtype)
    arrays = {data.draw(st.sampled_from(["codes", "kept", "x"])): codes}
    if data.draw(st.booleans()):
        arrays.setdefault("codes", good["codes"])
    text = {**good["text"], "refined_layers": data.draw(st.integers(0, 9))}
    write(arrays, text)
    command = data.draw(st.sampled_from(COMMANDS))
    model = [] if command == ["info"] else ["-m", tiny_folder]
    ends_well(run(*command, "a.take.safetensors", *model), tmp_path)


@fuzzed
@given(
    cut=st.integers(0, 4000), flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)))
)
def test_damaged_takes(
    good: dict[str, Any],
    tiny_folder: Path,
    tmp_path: Path,
    cut: int,
    flips: list[tuple[int, int]],
) -> None:
    whole = bytearray(save({"codes": good["codes"]}, {"khala": json.dumps(good["text"])}))
    for place, bits in flips:
        whole[place % len(whole)] ^= bits
    Path("a.take.safetensors").write_bytes(whole[: len(whole) - cut % 200] if cut % 3 else whole)
    ends_well(run("render", "a.take.safetensors", "-m", tiny_folder), tmp_path)


@fuzzed
@given(data=st.data())
def test_odd_sidecars(
    good: dict[str, Any], tiny_folder: Path, tmp_path: Path, data: st.DataObject
) -> None:
    sidecar = {name: good["text"][name] for name in ("request", "model", "backend", "timings")}
    places = [p for p in paths(sidecar) if p[-1] not in ("seconds", "min_seconds", "minutes")]
    sidecar = put(sidecar, data.draw(st.sampled_from(places)), data.draw(odd))
    sidecar["continued"] = data.draw(odd)
    Path("a.json").write_text(json.dumps(sidecar))
    like = ["--like", "a.json", "--seconds", 0.02, "--min-seconds", 0, "-o", "b.wav"]
    ends_well(run("generate", "-m", tiny_folder, *like), tmp_path)


@pytest.mark.parametrize("odd", [True, 3, "x", [3], [{"name": "\x1b[2J", "scale": {}}]])
def test_odd_adapters_in_sidecars(
    good: dict[str, Any], tiny_folder: Path, tmp_path: Path, odd: Any
) -> None:
    sidecar = put({n: good["text"][n] for n in ("request", "model")}, ["model", "adapters"], odd)
    Path("a.json").write_text(json.dumps(sidecar))
    result = run("generate", "-m", tiny_folder, "--like", "a.json", "-o", "b.wav")
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.stderr
    ends_well(result, tmp_path)


@fuzzed
@given(st.one_of(st.binary(max_size=300), st.text(max_size=100).map(str.encode)))
def test_sidecars_and_codes_that_are_none(
    tiny_folder: Path, tmp_path: Path, content: bytes
) -> None:
    for name, command in (
        ("a.json", ["generate", "--seconds", 0.02, "--like", "a.json"]),
        ("a.npz", ["decode", "a.npz", "b.wav"]),
        ("a.wav", ["generate", "--seconds", 0.05, "--continue", "a.wav"]),
        ("a.safetensors", ["generate", "--resume", "a.safetensors"]),
    ):
        Path(name).write_bytes(content)
        ends_well(run(*command, "-m", tiny_folder), tmp_path)


@fuzzed
@given(data=st.data())
def test_odd_codes(tiny_folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
    dtype = data.draw(st.sampled_from([np.int64, np.uint64, np.float64, np.complex64, "U3", "O"]))
    codes = np.full(shape, data.draw(st.sampled_from([0, 7, 2**31, 2**62])), dtype)
    np.savez("a.npz", **{data.draw(st.sampled_from(["codes", "../codes", "x"])): codes})
    ends_well(run("decode", "a.npz", "b.wav", "-m", tiny_folder), tmp_path)


@fuzzed
@given(lyrics=st.text(max_size=60), tags=st.text(max_size=20))
@pytest.mark.extended
def test_any_lyrics(tiny_folder: Path, tmp_path: Path, lyrics: str, tags: str) -> None:
    for extra in ([], ["--dry-run"]):
        asked = ["--lyrics", lyrics, f"--tags={tags}", "--seconds", 0.02, *extra]
        ends_well(run("generate", "-m", tiny_folder, *asked), tmp_path)


def write(arrays: dict[str, np.ndarray], text: Any) -> None:
    content = save(arrays, {"khala": json.dumps(text)})
    Path("a.take.safetensors").write_bytes(content)
