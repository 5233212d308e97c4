import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khala_mlx.cli import main
from khala_mlx.cli.settings import read_settings, settings_path

SHORT = ["--seconds", "0.1", "--min-seconds", "0.1"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KHALA_CONFIG", str(tmp_path / "config.toml"))


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def plan(*arguments: Any) -> Any:
    result = run("generate", "--dry-run", "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_defaults_of_the_file(tiny_folder: Path) -> None:
    Path("config.toml").write_text(
        f'[generate]\nmodel = "{tiny_folder}"\nseed = 41\nmin-seconds = 0.3\nnormalize = false\n'
    )
    assert plan()["seed"] == 41
    assert plan("--seed", 5)["seed"] == 5


def test_defaults_of_the_environment(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHALA_MODEL", str(tiny_folder))
    monkeypatch.setenv("KHALA_GENERATE_SEED", "42")
    Path("config.toml").write_text("[generate]\nseed = 41\n")
    assert plan()["seed"] == 42


def test_what_a_song_recorded_goes_before_the_defaults(tiny_folder: Path) -> None:
    assert run("generate", "-m", tiny_folder, *SHORT, "--top-k", 7, "-o", "a.wav").exit_code == 0
    Path("config.toml").write_text("[generate]\ntop-k = 3\n")
    assert run("generate", "-m", tiny_folder, "--like", "a.json", "-o", "b.wav").exit_code == 0
    assert json.loads(Path("b.json").read_text())["request"]["top_k"] == 7


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[generate]\ntag = 'a'", "option 'tag' does not exist. Did you mean 'tags'?"),
        ("[genrate]\ntags = 'a'", "command 'genrate' does not exist. Did you mean 'generate'?"),
        ("generate = 3", "'generate' must be a table"),
        ("[generate", "not a TOML"),
        ("[generate]\ntags = ['a']", "one value"),
        ("[generate]\nminutes = 'two'", "--minutes"),
        ("[models.list]\njason = true", "Did you mean 'json'?"),
        ("[generate]\nadapter = [['a']]", "[generate]: adapter must be one value"),
        ("[generate]\nadapter = [true]", "adapter is not a switch"),
        ("[generate]\nlyrics-file = true", "lyrics-file is not a switch"),
        ("[generate]\nseed = true", "seed is not a switch"),
    ],
)
def test_wrong_files(text: str, sentence: str) -> None:
    Path("config.toml").write_text(text)
    result = run("generate", "--dry-run")
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_one_of_several_needs_no_list(tiny_folder: Path) -> None:
    Path("config.toml").write_text("[generate]\nadapter = 'nowhere'\nadapter-scale = 0.5\n")
    assert "no adapter nowhere" in run("generate", "-m", tiny_folder, "--dry-run").stderr


def test_folders_of_users_who_are_not_here(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KHALA_CONFIG", "~nobody-of-this-name/config.toml")
    result = run("generate", "--dry-run")
    assert (result.exit_code, "KHALA_CONFIG" in result.stderr) == (2, True)
    monkeypatch.delenv("KHALA_CONFIG")
    monkeypatch.setenv("KHALA_MODELS", "~nobody-of-this-name/models")
    assert "KHALA_MODELS" in run("models", "list").stderr
    monkeypatch.delenv("KHALA_MODELS")
    # What songs took is nothing that one fails for.
    monkeypatch.setenv("KHALA_CACHE", "~nobody-of-this-name")
    monkeypatch.setenv("KHALA_MODELS", "models")
    assert run("generate", "-m", tiny_folder, *SHORT, "-o", "a.wav").exit_code == 0


def test_a_file_that_cannot_be_read() -> None:
    Path("config.toml").mkdir()
    assert "cannot be read" in run("generate", "--dry-run").stderr


TEXT = st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
CONTENT = st.binary(max_size=200) | TEXT


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(content=CONTENT)
def test_files_of_anything(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "any.toml").write_bytes(content)
    try:
        read_settings(main, tmp_path / "any.toml")
    except click.UsageError as error:
        told = error.format_message()
    else:
        told = "fine"
    assert told


def test_the_platforms_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KHALA_CONFIG")
    assert settings_path().name == "config.toml"
    assert settings_path().parent.name.lower() == "khala"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    environment = {**os.environ, "_KHALA_COMPLETE": f"{shell}_source"}
    code = "from khala_mlx.cli import main; main(prog_name='khala')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "_KHALA_COMPLETE" in done.stdout


def test_every_example_of_the_help_is_valid() -> None:
    import shlex

    from khala_mlx.cli.main import EXAMPLES

    Path("words.txt").write_text("la")
    for name, text in EXAMPLES.items():
        assert text.splitlines()[0] in run(name, "--help").stdout
        for line in text.splitlines():
            words = shlex.split(line)
            assert words[:2] == ["khala", name]
            command = main.commands[name]
            command.make_context(name, words[2:], resilient_parsing=False)
