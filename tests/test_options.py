"""Every option of a song passes the command line, Khala.generate, dataclasses and record."""

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from khala_mlx import Khala, Request
from khala_mlx.cli import main
from khala_mlx.cli.commands.generate import generate
from khala_mlx.model.sampling import Detail, Sampling
from khala_mlx.pipeline.begin import detail_of, sampling_of

NAMES = {field.name for field in fields(Request)}
# A value other than the default for each field, and how the command line says it.
OTHER: dict[str, tuple[Any, list[str]]] = {
    "tags": ("pop", ["--tags", "pop"]),
    "description": ("a song", ["--description", "a song"]),
    "genre": ("rock", ["--genre", "rock"]),
    "lyrics": ("la la", ["--lyrics", "la la"]),
    "instrumental": (True, ["--instrumental"]),
    "language": ("English", ["--language", "English"]),
    "minutes": (2, ["--minutes", "2"]),
    "text_mode": ("separate", ["--text-mode", "separate"]),
    "truncate_lyrics": (True, ["--truncate-lyrics"]),
    "seconds": (0.1, ["--seconds", "0.1"]),
    "min_seconds": (0.05, ["--min-seconds", "0.05"]),
    "seed": (7, ["--seed", "7"]),
    "temperature": (0.5, ["--temperature", "0.5"]),
    "top_k": (5, ["--top-k", "5"]),
    "refine_top_k": (4, ["--refine-top-k", "4"]),
    "reachable_only": (False, ["--whole-vocabulary"]),
    "refine_seed": (9, ["--refine-seed", "9"]),
    "kv_bits": (8, ["--kv-bits", "8"]),
    "refine_expected": (True, ["--refine-expected"]),
}


def test_no_field_is_forgotten_here() -> None:
    assert set(OTHER) == NAMES
    for name, (value, _) in OTHER.items():
        assert getattr(Request(), name) != value


def test_generate_takes_every_field() -> None:
    parameters = inspect.signature(Khala.generate).parameters
    assert set(parameters) - {"self", "on_progress", "on_take"} == NAMES
    for field in fields(Request):
        if field.name != "seed":
            assert parameters[field.name].default == field.default, field.name


def test_the_command_line_takes_every_field() -> None:
    options = {str(each.name) for each in generate.params}
    assert options >= NAMES


def test_the_dataclasses_take_their_fields_from_the_request() -> None:
    request = Request(**{name: value for name, (value, _) in OTHER.items()})
    sampling, detail = sampling_of(request), detail_of(request)
    for each in fields(Sampling):
        assert getattr(sampling, each.name) == OTHER[each.name][0]
    for each in fields(Detail):
        assert getattr(detail, each.name) == OTHER[f"refine_{each.name}"][0]


@pytest.mark.parametrize("name", sorted(OTHER))
def test_the_record_holds_what_was_asked(
    name: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the command line to the request that a take is made of."""
    monkeypatch.chdir(tmp_path)
    asked: list[Request] = []
    begin = Khala.begin

    def stop(self: Khala, request: Request, prefix: Any = None) -> Any:
        asked.append(request)
        take = begin(self, Request(seconds=0.1), prefix)
        assert take.with_request(request).metadata["request"][name] == OTHER[name][0]
        raise KeyboardInterrupt

    monkeypatch.setattr(Khala, "begin", stop)
    CliRunner().invoke(main, ["generate", "-m", str(tiny_folder), *OTHER[name][1]])
    assert getattr(asked[0], name) == OTHER[name][0]
    assert (
        Request.from_record({"request": json.loads(json.dumps(asked[0].to_dict()))}, "x")
        == (asked[0])
    )
