import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import write_tiny_tokenizer

from khala_mlx.config import KhalaConfig, SpecialTokens, TokenLayout
from khala_mlx.errors import KhalaWarning, PromptError
from khala_mlx.prompt.cleaning import clean_lyrics
from khala_mlx.prompt.prompt import (
    TEXT_MODES,
    Prompt,
    build_ids,
    build_texts,
    clamp,
    prompt_ids,
    prompt_texts,
)
from khala_mlx.prompt.tokenizer import Tokenizer, prompt_specials

LAYOUT = TokenLayout()
RELEASED = KhalaConfig()
TINY = KhalaConfig.tiny()
NAMES = [*prompt_specials(LAYOUT), "<|end_of_text|>", "\n", "\r\n", "——", "＜｜eot_id｜＞"]
TEXTS = st.lists(st.text(max_size=12) | st.sampled_from(NAMES), max_size=6).map("".join)
VALID = TEXTS.filter(lambda text: all(c >= " " or c in "\t\n\r" for c in text)).filter(
    lambda text: not any("\x7f" <= c <= "\x9f" for c in text)
)


@pytest.fixture(
    scope="session", params=["bundled", pytest.param("further", marks=pytest.mark.oracle)]
)
def reference(request: pytest.FixtureRequest) -> list[Path]:
    """Folders of reference sets; KHALA_ORACLE is one or holds some."""
    if request.param == "bundled":
        return [request.getfixturevalue("oracle")]
    if "KHALA_ORACLE" not in os.environ:
        pytest.skip("KHALA_ORACLE is not set")
    found = Path(os.environ["KHALA_ORACLE"]).glob("**/prompts_small.json")
    return sorted(path.parent for path in found)


def goldens(folders: list[Path], kind: str) -> list[tuple[Path, dict[str, Any]]]:
    """Each case once per file, with the file's folder; both files hold the same inputs."""
    return [
        (folder, case)
        for folder in folders
        for name in ("prompts.json", "prompts_small.json")
        for case in json.loads((folder / name).read_text()).get(kind, [])
    ]


def from_upstream(values: dict[str, Any]) -> Prompt:
    """Upstream's arguments as a Prompt; `compose` alone always sends the language."""
    return Prompt(
        tags=values["tags"],
        description=values["description"],
        genre=values["genre"],
        lyrics=values["lyrics"],
        language=values["language"],
        minutes=values["duration"],
        text_mode=values.get("superres_text_mode", "different"),
    )


@pytest.fixture(scope="session")
def small(oracle: Path) -> Tokenizer:
    return Tokenizer.from_file(oracle / "tokenizer_small" / "tokenizer.json")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(write_tiny_tokenizer(tmp_path_factory.mktemp("tiny") / "t.json"))


# --- cleaning ---------------------------------------------------------------------------------


def test_cleaning_matches_the_reference(reference: list[Path]) -> None:
    for _, case in goldens(reference, "clean_lyrics"):
        assert clean_lyrics(case["input"]) == case["output"].replace("\r\n", "\n")


def test_cleaning_is_what_the_published_interface_applies(reference: list[Path]) -> None:
    for _, case in goldens(reference, "api_requests"):
        if case["request"].get("mode") != "instrumental":
            lyrics = case["request"].get("lyrics", "")
            assert clean_lyrics(lyrics) == case["worker_params"]["lyrics"]
    for _, case in goldens(reference, "prepare"):
        if case["lyrics_cleaned_first"]:
            lyrics = case["input"]["lyrics"]
            assert clean_lyrics(case["raw_lyrics"]) == lyrics.replace("\r\n", "\n")


@settings(max_examples=300)
@given(st.text(st.characters(), max_size=30) | TEXTS)
@example("\r\r\n")
@example("—\u200b—")
@example("â\ufeff\x80\x99")
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    # Upstream makes ^ of a full-width ＾, and ' of ^.
    text = text.replace("＾", "")
    once = clean_lyrics(text)
    assert clean_lyrics(once) == once
    assert "\r\n" not in once
    assert "<|" not in once


def test_line_ends() -> None:
    assert clean_lyrics("a\r\nb\r\r\nc\rd\r\n") == "a\nb\nc\rd"


def test_characters_that_upstream_leaves_alone() -> None:
    text = "｛｜｝ ça 👩\u200d🚀 می\u200cخواهم ЖЯ ß – ok".replace("–", "-")
    assert clean_lyrics(text) == text


# --- texts and ids ----------------------------------------------------------------------------


def test_texts_match_the_reference(reference: list[Path]) -> None:
    for _, case in goldens(reference, "prepare"):
        texts = build_texts(from_upstream(case["input"]), LAYOUT)
        assert texts == (case["backbone_text"], case["superres_text"])
    for _, case in goldens(reference, "compose"):
        assert build_texts(from_upstream(case["input"]), LAYOUT)[0] == case["text"]
    for folder in reference:
        case = json.loads((folder / "prompts.json").read_text())["e2e"]
        texts = build_texts(from_upstream(case["input"]), LAYOUT)
        assert texts == (case["backbone_text"], case["superres_text"])


def id_cases(folder: Path) -> list[tuple[Prompt, dict[str, Any]]]:
    data = json.loads((folder / "prompts_small.json").read_text())
    cases = [(from_upstream(case["input"]), case) for case in [*data["prepare"], data["e2e"]]]
    return cases + [(from_upstream(case["worker_params"]), case) for case in data["api_requests"]]


def expected_ids(case: dict[str, Any]) -> list[list[int]]:
    """[backbone, superres]; a sentence stands where both are the same."""
    both = [case["backbone_ids"], case["superres_ids"]]
    return [ids if isinstance(ids, list) else case["backbone_ids"] for ids in both]


def test_ids_match_the_reference(reference: list[Path]) -> None:
    compared = 0
    for folder in reference:
        tokenizer = Tokenizer.from_file(folder / "tokenizer_small" / "tokenizer.json")
        for prompt, case in id_cases(folder):
            if "<|" in prompt.lyrics + prompt.metadata:
                continue
            ours = build_ids(prompt, LAYOUT, tokenizer)
            limits = (RELEASED.backbone.max_prompt, RELEASED.superres.max_prompt)
            cut = [clamp(ids, limit).tolist() for ids, limit in zip(ours, limits, strict=True)]
            assert cut == expected_ids(case)
            compared += 1
    assert compared >= 49 * len(reference)


def test_typed_specials_of_the_reference_stay_text(reference: list[Path]) -> None:
    for folder in reference:
        tokenizer = Tokenizer.from_file(folder / "tokenizer_small" / "tokenizer.json")
        controls = {tokenizer.special(name) for name in prompt_specials(LAYOUT)}
        typed = [(p, case) for p, case in id_cases(folder) if "<|" in p.lyrics + p.metadata]
        for prompt, case in typed:
            ids = build_ids(prompt, LAYOUT, tokenizer)[0].tolist()
            # begin, two separators, lyrics, newline, separator, minutes, end, audio, and lines.
            assert len([id for id in ids if id in controls]) == 9 + prompt.lyrics.count("\n")
            assert tokenizer.decode(ids) == case["backbone_text"]
            assert ids != case["backbone_ids"]
        assert typed


def test_published_defaults_reach_the_reference_ids(oracle: Path, small: Tokenizer) -> None:
    """prompt_ids cleans like the published interface, which the api cases went through."""
    for case in json.loads((oracle / "prompts_small.json").read_text())["api_requests"]:
        sent, worker = case["request"], case["worker_params"]
        song = sent.get("mode") != "instrumental"
        prompt = Prompt(
            tags=worker["tags"], description=worker["description"],
            lyrics=sent.get("lyrics", "") if song else "", instrumental=not song,
            minutes=worker["duration"],
        )  # fmt: skip
        ids = prompt_ids(small, RELEASED, prompt)
        assert [part.tolist() for part in ids] == expected_ids(case)
        assert all(part.dtype == np.int64 and part.ndim == 1 for part in ids)


def test_clamp_matches_the_reference(reference: list[Path]) -> None:
    for _, case in goldens(reference, "clamp_prompt_ids"):
        assert clamp(np.arange(case["n"]), case["max"]).tolist() == case["out"]


@settings(max_examples=150, deadline=None)
@given(
    texts=st.tuples(VALID, VALID, VALID, VALID, VALID),
    instrumental=st.booleans(),
    minutes=st.integers(1, 10),
    mode=st.sampled_from(TEXT_MODES),
)
def test_the_template_stays_whole(
    texts: tuple[str, ...], instrumental: bool, minutes: int, mode: str, small: Tokenizer
) -> None:
    tags, description, genre, lyrics, language = texts
    fields: dict[str, Any] = {
        "tags": tags, "description": description, "genre": genre, "lyrics": lyrics,
        "language": language, "instrumental": instrumental, "minutes": minutes, "text_mode": mode,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KhalaWarning)
        both = prompt_ids(small, RELEASED, Prompt(**fields))
    special = small.special
    lines = clean_lyrics(lyrics).count("\n") + 1
    wanted = [special("<|begin_of_text|>")] + [special("<|eom_id|>")] * 2
    if not instrumental and language.strip().casefold() != "instrumental":
        wanted += [special("<|start_header_id|>")] + [special("<|end_header_id|>")] * lines
        wanted += [special("<|eom_id|>")]
    wanted += [special(f"<|reserved_special_token_{minutes}|>")]
    wanted += [special("<|eot_id|>"), special("<|python_tag|>")]
    for ids, text in zip(both, prompt_texts(RELEASED, Prompt(**fields)), strict=True):
        assert [id for id in ids.tolist() if id >= 128000] == wanted
        assert small.decode(ids.tolist()) == text


def test_names_come_from_the_config(tmp_path: Path) -> None:
    path = write_tiny_tokenizer(tmp_path / "t.json")
    path.write_text(path.read_text().replace("<|eom_id|>", "<next>"))
    layout = replace(TINY.tokens, specials=SpecialTokens(separator="<next>"))
    ids, _ = prompt_ids(Tokenizer.from_file(path), replace(TINY, tokens=layout), Prompt())
    assert ids.tolist() == [256, 261, 261, 259, 260, 261, 264, 262, 263]


def test_an_instrumental_by_either_name(tiny: Tokenizer) -> None:
    wanted = build_texts(Prompt(tags="piano", instrumental=True), LAYOUT)
    for language in ("Instrumental", " instrumental "):
        for mode in ("separate", "same_as_backbone"):
            prompt = Prompt(tags="piano", language=language, text_mode=mode)
            assert build_texts(prompt, LAYOUT)[0] == wanted[0]


# --- refusals and warnings --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tags": None}, "tags must be text, got None"),
        ({"lyrics": ["a"]}, "lyrics must be text"),
        ({"genre": b"pop"}, "genre must be text"),
        ({"instrumental": "yes"}, "instrumental must be True or False"),
        ({"minutes": 0}, "minutes must be 1..10, got 0"),
        ({"minutes": 11}, "minutes must be 1..10, got 11"),
        ({"minutes": 2.0}, "minutes must be a whole number, got 2.0"),
        ({"minutes": "2"}, "minutes must be a whole number"),
        ({"minutes": True}, "minutes must be a whole number"),
        ({"text_mode": "same"}, "same_as_backbone_no_description, same_as_backbone, separate, got"),
        ({"text_mode": None}, "text_mode must be text"),
        ({"lyrics": "a\ud83d"}, "lyrics is not valid text"),
        ({"tags": "\udfff"}, "tags is not valid text"),
        ({"lyrics": "a\x00b"}, r"lyrics holds the control character U\+0000"),
        ({"description": "\x1b[2J"}, r"description holds the control character U\+001B"),
        ({"lyrics": "â\x80\x9c"}, r"U\+0080.*encoding"),
    ],
)
def test_values_that_cannot_be_a_prompt(
    values: dict[str, Any], message: str, tiny: Tokenizer
) -> None:
    with pytest.raises(PromptError, match=message):
        prompt_ids(tiny, TINY, Prompt(**values))
    with pytest.raises(PromptError, match=message):
        prompt_texts(TINY, Prompt(**values))


def test_unusual_values_that_are_fine(tiny: Tokenizer) -> None:
    prompt = Prompt(tags="a\tb", lyrics="\ufefftab\there", minutes=np.int64(3))
    ids, _ = prompt_ids(tiny, TINY, prompt)
    assert tiny.decode(ids.tolist()).count("\t") == 2
    assert tiny.special("<|reserved_special_token_3|>") in ids
    # Mojibake that the cleaning repairs is not a reason to refuse.
    assert "don't" in prompt_texts(TINY, Prompt(lyrics="donâ\x80\x99t"))[0]


def test_limits(tiny: Tokenizer) -> None:
    # Nine control tokens and three of tags: 256 for the backbone, 192 for superres.
    ids, _ = prompt_ids(tiny, TINY, Prompt(tags="pop", lyrics="x" * 180))
    assert len(ids) == 192
    with pytest.raises(PromptError, match="takes 193 tokens where superres allows 192: shorten "
                       "the lyrics by about 1 tokens"):  # fmt: skip
        prompt_ids(tiny, TINY, Prompt(tags="pop", lyrics="x" * 181))
    with pytest.raises(PromptError, match="309 tokens where the backbone allows 256: shorten the "
                       "description by about 53 tokens"):  # fmt: skip
        prompt_ids(tiny, TINY, Prompt(description="d" * 300))
    with pytest.raises(PromptError, match=r"256 and 309 .* superres allows 192.* 117 tokens"):
        prompt_ids(tiny, TINY, Prompt(tags="t" * 300))


def test_truncation_keeps_the_first_tokens_and_the_last(tiny: Tokenizer) -> None:
    prompt = Prompt(tags="pop", lyrics="x" * 300)
    whole = build_ids(prompt, TINY.tokens, tiny)[0]
    with pytest.warns(KhalaWarning, match="its end is cut off"):
        backbone, superres = prompt_ids(tiny, TINY, prompt, truncate=True)
    assert backbone.tolist() == [*whole[:255], whole[-1]]
    assert superres.tolist() == [*whole[:191], whole[-1]]


@pytest.mark.parametrize(
    ("values", "left_out"),
    [
        ({"instrumental": True, "lyrics": "la"}, ["lyrics"]),
        ({"language": "Instrumental", "lyrics": "la"}, ["lyrics"]),
        ({"language": "English"}, ["language"]),
        ({"tags": "a", "description": "b", "genre": "c"}, ["tags"]),
        ({"tags": "a", "genre": "c"}, ["genre"]),
    ],
)
def test_what_the_prompt_leaves_out_is_said(
    values: dict[str, Any], left_out: list[str], tiny: Tokenizer
) -> None:
    with pytest.warns(KhalaWarning, match="leaves out " + ".*, ".join(left_out) + r" \("):
        prompt_ids(tiny, TINY, Prompt(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"tags": "a", "lyrics": "la"},
        {"description": "b", "genre": "c"},
        {"tags": "a", "genre": "c", "language": "English", "text_mode": "separate"},
        {"instrumental": True, "language": "instrumental", "lyrics": "  \n"},
    ],
)
def test_no_warning_where_everything_is_used(values: dict[str, Any], tiny: Tokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt_ids(tiny, TINY, Prompt(**values))
