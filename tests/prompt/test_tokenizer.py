import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import write_tiny_tokenizer
from tokenizers import Tokenizer as Backend

from khala_mlx.config import SpecialTokens, TokenLayout
from khala_mlx.errors import KhalaError, PromptError
from khala_mlx.prompt.tokenizer import Tokenizer, prompt_specials

TINY = TokenLayout.tiny()
# Words that a tokenizer made by `hostile` knows as special tokens and as words of its vocabulary.
HOSTILE = ("AUDIO", "aa", "\N{DIGIT SEVEN}\N{DIGIT SEVEN}\N{DIGIT SEVEN}", "|>")
SPECIAL_NAMES = [*prompt_specials(TokenLayout()), "<|end_of_text|>", *HOSTILE]
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TEXTS = st.lists(PLAIN | st.sampled_from(SPECIAL_NAMES), max_size=8).map("".join)


@pytest.fixture(scope="session")
def small_path(oracle: Path) -> Path:
    return oracle / "tokenizer_small" / "tokenizer.json"


@pytest.fixture(scope="session")
def small(small_path: Path) -> Tokenizer:
    return Tokenizer.from_file(small_path)


@pytest.fixture(scope="session")
def hostile(small_path: Path) -> Tokenizer:
    """Specials that are reachable as whole words, since the model ignores merges for them."""
    return Tokenizer(Backend.from_str(renamed(small_path, dict(enumerate(HOSTILE, 128020)))))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(write_tiny_tokenizer(tmp_path_factory.mktemp("tiny") / "t.json"))


@pytest.fixture(scope="session")
def parsing(small_path: Path) -> Tokenizer:
    """The package's own switch is off, so only our check stands."""
    tokenizer = Tokenizer.from_file(small_path)
    tokenizer._backend.encode_special_tokens = False
    return tokenizer


def renamed(path: Path, names: dict[int, str]) -> str:
    data = json.loads(path.read_text())
    for token in data["added_tokens"]:
        if token["id"] in names:
            data["model"]["vocab"].pop(token["content"])
            token["content"] = names[token["id"]]
            data["model"]["vocab"][token["content"]] = token["id"]
    return json.dumps(data)


def change(path: Path, folder: Path, **changes: object) -> Path:
    data = {**json.loads(path.read_text()), **changes}
    changed = folder / "changed.json"
    changed.write_text(json.dumps(data))
    return changed


def test_every_reference_text_without_typed_specials(oracle: Path, small: Tokenizer) -> None:
    cases = json.loads((oracle / "prompts_small.json").read_text())["tokenize"]
    for case in cases:
        if "<|" not in case["text"]:
            assert small.encode(case["text"]) == case["ids"]
    # Upstream turns this text into the control token.
    assert small.special("<|eot_id|>") not in small.encode("<|eot_id|>x")


def test_special_ids_of_the_reference(oracle: Path, small: Tokenizer) -> None:
    specials = json.loads((oracle / "prompts_small.json").read_text())["specials"]
    assert {name: small.special(name) for name in specials} == specials
    assert small.vocab_size == 128256
    small.check(TokenLayout())


@pytest.mark.parametrize("name", ["small", "hostile", "parsing", "tiny"])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_text_is_never_a_control_token(name: str, text: str, cached: dict[str, Tokenizer]) -> None:
    tokenizer = cached[name]
    ids = tokenizer.encode(text)
    assert not set(ids) & tokenizer._control
    assert tokenizer.decode(ids) == text


@pytest.fixture(scope="session")
def cached(
    small: Tokenizer, hostile: Tokenizer, parsing: Tokenizer, tiny: Tokenizer
) -> dict[str, Tokenizer]:
    return {"small": small, "hostile": hostile, "parsing": parsing, "tiny": tiny}


def test_hostile_words_would_be_control_tokens_if_they_were_not_cut(hostile: Tokenizer) -> None:
    assert hostile._backend.encode("AUDIO", add_special_tokens=False).ids == [128020]
    text = "AUDIO" + "\nAUDIO" * 3000
    assert hostile.decode(hostile.encode(text)) == text


def test_a_character_that_is_only_a_special_token_is_refused(small_path: Path) -> None:
    tokenizer = Tokenizer(Backend.from_str(renamed(small_path, {128020: "Q"})))
    with pytest.raises(PromptError, match="'Q'"):
        tokenizer.encode("a Q b")


def test_lone_surrogates_are_refused(tiny: Tokenizer) -> None:
    with pytest.raises(PromptError, match="surrogate"):
        tiny.encode("a\ud800")


def test_limits_in_the_file_do_not_cut_or_pad(small_path: Path, tmp_path: Path) -> None:
    limit = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    path = change(small_path, tmp_path, truncation=limit, padding=fill)
    text = "one two three four five six"
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_missing_special_is_named(tiny: Tokenizer) -> None:
    with pytest.raises(KhalaError, match=r"<\|nothing\|>"):
        tiny.special("<|nothing|>")
    with pytest.raises(KhalaError, match="no special token a"):
        tiny.special("a")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {}}', "\x00", "[" * 9999])
def test_corrupt_file(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(KhalaError, match="not a valid tokenizer"):
        Tokenizer.from_file(path)


def test_unreadable_files(small_path: Path, tmp_path: Path) -> None:
    with pytest.raises(KhalaError, match="No such file"):
        Tokenizer.from_file(tmp_path / "absent.json")
    with pytest.raises(KhalaError, match="cannot be read"):
        Tokenizer.from_file(tmp_path)
    for content in (small_path.read_bytes()[:5000], b"\xff\xfe{}"):
        (tmp_path / "half.json").write_bytes(content)
        with pytest.raises(KhalaError, match="not a valid tokenizer"):
            Tokenizer.from_file(tmp_path / "half.json")


def test_silent_renumbering_is_refused(small_path: Path, tmp_path: Path) -> None:
    data = json.loads(small_path.read_text())
    vocabulary = {t: id for t, id in data["model"]["vocab"].items() if id < 128000}
    path = change(small_path, tmp_path, model={**data["model"], "vocab": vocabulary})
    with pytest.raises(KhalaError, match="id 128000, but it loads as"):
        Tokenizer.from_file(path)


def test_tiny_tokenizer_fits_the_tiny_layout(tiny: Tokenizer) -> None:
    tiny.check(TINY)
    assert tiny.vocab_size == TINY.audio_start
    assert tiny.decode([TINY.end_of_song, TINY.padding]) == (
        "<|end_of_text|><|finetune_right_pad_id|>"
    )


def test_check_lists_every_missing_special(tiny: Tokenizer) -> None:
    layout = TokenLayout.tiny()
    names = SpecialTokens(begin="<s>", audio="<audio>")
    object.__setattr__(layout, "specials", names)
    with pytest.raises(KhalaError, match="no special token <s>, <audio>"):
        tiny.check(layout)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_start": 299, "marker_base": 298}, "highest id 299 is not below audio_start 299"),
        ({"end_of_song": 256}, "begin_of_text.*256, which is the end of the song"),
        ({"padding": 97}, "id 97, which is padding, is the ordinary token"),
        ({"marker_base": 264 + 7}, "special_token_1.*264, which is the marker of layer 7"),
    ],
)
def test_check_finds_colliding_ids(changes: dict[str, int], message: str, tiny: Tokenizer) -> None:
    layout = TokenLayout(**{**vars(TINY), **changes})
    with pytest.raises(KhalaError, match=message):
        tiny.check(layout)


def test_ordinary_added_tokens_do_not_count_as_special(tmp_path: Path) -> None:
    path = write_tiny_tokenizer(tmp_path / "t.json")
    added = json.loads(path.read_text())["added_tokens"]
    for token in added:
        token["special"] = False
    tokenizer = Tokenizer.from_file(change(path, tmp_path, added_tokens=added))
    with pytest.raises(KhalaError, match="no special token"):
        tokenizer.check(TINY)


def test_other_names_for_the_special_tokens(tmp_path: Path) -> None:
    path = write_tiny_tokenizer(tmp_path / "t.json")
    text = path.read_text().replace("<|python_tag|>", "<sing>").replace("<|eom_id|>", "<next>")
    path.write_text(text)
    names = SpecialTokens(audio="<sing>", separator="<next>")
    layout = TokenLayout(**{**vars(TINY), "specials": names})
    Tokenizer.from_file(path).check(layout)
