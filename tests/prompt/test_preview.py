import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from khala_mlx import Khala, KhalaError
from khala_mlx.cli import main
from khala_mlx.prompt.cleaning import changes, clean_lyrics
from khala_mlx.prompt.preview import preview, syllables
from khala_mlx.prompt.request import Request


def told(tiny: Khala, **asked: Any) -> dict[str, Any]:
    return preview(tiny.tokenizer, tiny.config, Request(**asked))


def test_changes_are_what_cleaning_does() -> None:
    assert changes("plain [Verse 1]\nwords") == []
    assert changes("你，好——\u200b x\u200b\r\ny ") == [
        ("\u200b", "", 2),
        ("——", "-", 1),
        ("，", ",", 1),
        ("\r\n", "\n", 1),
        (" ", "", 1),
    ]


@given(st.text(st.sampled_from("ab \n\r\t，。—\u200b\u3000＾^е|…★")))
def test_nothing_is_changed_unsaid(text: str) -> None:
    if not changes(text):
        assert clean_lyrics(text).strip("\n") == text.strip("\n")
    for was, now, times in changes(text):
        assert was != now
        assert times > 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("[Verse 1]\nmake the sky", 3),
        ("little apple", 4),
        ("hmm", 1),
        ("我爱你", 3),
        ("사랑해 baby", 5),
        ("Широка страна", 5),
        ("do re\nmi", 3),
    ],
)
def test_syllables(text: str, count: int) -> None:
    assert syllables(text) == count


def test_sections_and_their_times(tiny: Khala) -> None:
    lyrics = "hum\n[Verse 1]\nla la la la\nla la\n\n[Chorus]\n" + "la " * 22 + "\n[Outro]"
    found = told(tiny, lyrics=lyrics, truncate_lyrics=True)
    assert found["sections"] == [
        "(no mark): 1 lines, about 0:00",
        "Verse 1: 2 lines, about 0:02",
        "Chorus: 1 lines, about 0:10",
        "Outro: 0 lines, about 0:00",
    ]
    assert found["singing_time"] == "about 0:13 (0:09 to 0:19) for 29 syllables"


def test_instrumentals_have_nothing_to_sing(tiny: Khala) -> None:
    found = told(tiny, tags="pop", instrumental=True)
    assert not {"sections", "singing_time", "cleaning"} & set(found)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"lyrics": "la <|eot_id|>"}, "'<|eot_id|>' looks like a control token"),
        ({"tags": "pop <|eom_id|>"}, "tags: '<|eom_id|>' looks like a control token"),
        ({"lyrics": "see https://x.org/a"}, "'https://x.org/a' looks like a link"),
        ({"lyrics": "# Title\nla"}, "looks like markdown"),
        ({"lyrics": "Chorus:\nla"}, "'Chorus:' section marks are written [Chorus]"),
        ({"lyrics": "(Verse 2)\nla"}, "'(Verse 2)' section marks"),
        ({"lyrics": "la\ufffdla"}, "U+FFFD � (1 times) stands for a character"),
        ({"lyrics": "la\u200dla"}, "U+200D (1 times) is invisible"),
        ({"tags": "p\u200bop"}, "tags: U+200B (1 times) is invisible"),
        (
            {"lyrics": "la 🎵🎵"},
            "U+1F3B5 🎵 (2 times) takes 3 tokens or more, so the model hardly knows it",
        ),
    ],
)
def test_doubts(tiny: Khala, asked: dict[str, Any], sentence: str) -> None:
    assert any(sentence in each for each in told(tiny, **asked)["suspicious"])


def test_plain_prompts_raise_no_doubt(tiny: Khala) -> None:
    lyrics = "[Verse 1]\nIf the sky (oh) forgets,\n- don't é"
    assert told(tiny, tags="pop, 120 bpm", lyrics=lyrics)["suspicious"] == []


@pytest.mark.filterwarnings("ignore:.*do not fit the window")
def test_what_does_not_fit_is_told_instead_of_refused(tiny: Khala) -> None:
    lyrics = "\n".join(f"line {number}" for number in range(60))
    plan = tiny.preview(Request(lyrics=lyrics, seconds=0.5))
    assert "tokens where the backbone allows 256; with --truncate-lyrics" in plan["does_not_fit"][0]
    assert "line" in plan["does_not_fit"][0].rsplit("after", 1)[1]
    assert "the lyrics take about" in plan["does_not_fit"][-1]
    assert "does_not_fit" not in tiny.preview(Request(tags="pop", seconds=0.5))
    for wrong in ({"top_k": 0}, {"seed": -1}, {"refine_seed": -1}, {"minutes": 11}):
        with pytest.raises(KhalaError):
            tiny.preview(Request(**wrong))


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_dry_run_loads_nothing_even_where_a_song_goes_on(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "model", ignore=shutil.ignore_patterns("*.safetensors"))
    rng = np.random.default_rng(0)
    soundfile.write("x.wav", 0.1 * rng.normal(size=(6400, 2)), 44100)
    asked = ["generate", "-m", "model", "--dry-run", "--lyrics", "do，re", "--seconds", 0.3]
    short = json.loads(run(*asked, "--json"))
    plan = json.loads(run(*asked, "--continue", "x.wav", "--candidates", 4, "--json"))
    # Fifty frames are there, and five seconds more do not fit: up to the end.
    assert (short["min_seconds"], plan["min_seconds"]) == (0.0, 0.3)
    peaks = [each["memory"]["stages"]["compose"]["peak_bytes"] for each in (short, plan)]
    assert peaks[1] > peaks[0]
    lines = run(*asked)
    assert "\n    U+FF0C ， becomes ',', 1 times" in lines
    assert "suspicious" in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "x.wav"]
