"""Lyrics as people bring them: players' files, subtitles, chord sheets, web pages, encodings."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from khala_mlx import Khala, KhalaError, KhalaWarning, Request, Take
from khala_mlx.cli import main
from khala_mlx.pipeline.begin import prepared
from khala_mlx.prompt.lyrics import decode_text, has_voice, parse_lyrics
from khala_mlx.prompt.scope import Scope


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


CASES = {
    "LRC": (
        "[ti:Song]\n[ar:Somebody]\n[length: 03:12]\n[00:11.50]First line\n[00:14.00]Second line\n",
        "First line\nSecond line",
        "time stamps",
    ),
    "several stamps on a line": (
        "[00:30.00][01:10.00]Chorus line\n[00:50]Verse line",
        "Chorus line\nVerse line\nChorus line",
        "time stamps",
    ),
    "word stamps": (
        "[00:12.00]<00:12.10>Hello <00:12.60>there\n[00:14.00]<00:14.20>you",
        "Hello there\nyou",
        "time stamps",
    ),
    "LRC keeps sections": (
        "[00:01.00][Verse 1]\n[00:02.00]la\n[Chorus]\n[00:03.00]li",
        "[Verse 1]\nla\n[Chorus]\nli",
        "time stamps",
    ),
    "SRT": (
        "1\n00:00:11,500 --> 00:00:14,000\n<i>First</i> line\n\n"
        "2\n00:00:14,000 --> 00:00:16,000\nSecond line\n",
        "First line\nSecond line",
        "subtitle times",
    ),
    "WebVTT": (
        "WEBVTT\n\n00:11.500 --> 00:14.000\nFirst line\n\n00:14.000 --> 00:16.000\nSecond line",
        "First line\nSecond line",
        "subtitle times",
    ),
    "ChordPro": (
        "{title: My Song}\n{artist: Me}\n{soc}\n[Am]Hello [C/G]darkness\n{eoc}\n"
        "[G] my [D7sus4]friend",
        "[Chorus]\nHello darkness\nmy friend",
        "chords",
    ),
    "chords over words": (
        "Am   F   C   G\nHello darkness\nDm G C\nmy old",
        "Hello darkness\nmy old",
        "chords",
    ),
    "Genius": (
        "12 ContributorsTranslationsEspañolMy Song Lyrics[Verse 1]\nHello darkness\n"
        "You might also like\n[Chorus]\nmy friend3Embed",
        "[Verse 1]\nHello darkness\n[Chorus]\nmy friend",
        "web page",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_words_is_removed_and_reported(name: str) -> None:
    text, wanted, why = CASES[name]
    found = parse_lyrics(text)
    assert found.text == wanted
    assert why in found.note
    assert len(found.note.splitlines()) == 1
    again = parse_lyrics(found.text)
    assert (again.text, again.removed) == (found.text, ())


@pytest.mark.parametrize(
    "text",
    [
        "[Verse 1]\nA day in May\nI am here\n\n[Chorus]\nGo, go (go)",
        "[A]\nla la\n[B]\nli li",
        "12 monkeys\nEmbedded in my heart",
        "12:30 on the clock\n{not a directive",
        "do re mi\nfa sol la",
        "Am I wrong\nAm I right",
        "我爱你\nla <3 you",
        "",
    ],
)
def test_words_stay_as_they_are(text: str) -> None:
    assert parse_lyrics(text).text == text
    assert parse_lyrics(text).removed == ()


def test_titles_of_headers_are_offered() -> None:
    lrc, chordpro = parse_lyrics(CASES["LRC"][0]), parse_lyrics(CASES["ChordPro"][0])
    assert (lrc.title, lrc.artist) == ("Song", "Somebody")
    assert (chordpro.title, chordpro.artist) == ("My Song", "Me")


def test_a_typed_backslash_n_is_a_line_break() -> None:
    assert parse_lyrics(r"do re\nmi fa").text == "do re\nmi fa"
    assert parse_lyrics("a\\nb\nc").text == "a\\nb\nc"


@pytest.mark.parametrize("mark", ["\u0085", "\u2028", "\u2029", "\v", "\f", "\r\n"])
def test_line_breaks_of_editors(mark: str) -> None:
    assert parse_lyrics(f"do{mark}re").text == "do\nre"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (r"{\rtf1\ansi Hello}", "x.rtf is RTF"),
        ("<!DOCTYPE html><html><body>la</body></html>", "is HTML"),
        ("la la<br>\nli li<br>", "is HTML"),
    ],
)
def test_other_formats_are_refused_with_how_to_convert(text: str, sentence: str) -> None:
    with pytest.raises(KhalaError, match=sentence) as error:
        parse_lyrics(text, "x.rtf")
    assert "textutil" in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark(encoding: str) -> None:
    assert decode_text("do\nré".encode(encoding), "x.txt") == "do\nré"
    assert decode_text(b"\xfe\xff" + "do".encode("utf-16-be"), "x.txt") == "do"


def test_another_encoding_names_file_line_and_command() -> None:
    with pytest.raises(KhalaError, match=r"x\.txt is not valid UTF-8: byte 0xE9 in line 2.*iconv"):
        decode_text("do\nré".encode("latin-1"), "x.txt")


@pytest.mark.parametrize(
    ("lyrics", "voice"),
    [("", False), ("  \n", False), ("[Instrumental]", False), ("[inst]", False),
     ("instrumental", False), ("(Instrumental)", False), ("[Verse]\nla", True), ("la", True)],
)  # fmt: skip
def test_one_rule_for_no_voice(lyrics: str, voice: bool) -> None:
    assert has_voice(lyrics) == voice
    assert prepared(Request(tags="pop", lyrics=lyrics))[0].instrumental != voice
    assert not has_voice("la la", instrumental=True)


def generate(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)])


def test_a_players_file_on_the_command_line(tiny_folder: Path) -> None:
    Path("song.lrc").write_bytes(CASES["LRC"][0].encode("utf-16"))
    asked = ["-m", tiny_folder, "--tags", "pop", "--seconds", 0.1, "--seed", 1]
    result = generate(*asked, "--lyrics-file", "song.lrc", "-o", "a.mp3")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("Removed from the lyrics") == 1
    info = CliRunner().invoke(main, ["info", "a.mp3"]).stdout
    assert "First line" in info
    assert "00:11" not in info
    assert "Somebody" in info
    plain = generate(*asked, "--lyrics", r"First line\nSecond line", "-o", "b.mp3")
    assert plain.exit_code == 0, plain.stderr
    ours, theirs = (Take.load(f"{name}.take.safetensors") for name in "ab")
    assert ours.prompts == theirs.prompts


def test_a_song_without_lyrics_or_tags_is_made_and_both_are_said(tiny_folder: Path) -> None:
    result = generate("-m", tiny_folder, "--seconds", 0.1, "-o", "a.wav")
    assert result.exit_code == 0, result.stderr
    assert "the song is an instrumental" in result.stderr
    assert "the model chooses the style" in result.stderr
    quiet = generate("-m", tiny_folder, "--tags", "pop", "--instrumental", "--seconds", 0.1)
    assert "instrumental" not in quiet.stderr


def test_in_python_too(tiny: Khala) -> None:
    with pytest.warns(KhalaWarning, match="Removed from the lyrics"):
        take = tiny.begin(Request(tags="pop", lyrics=CASES["LRC"][0], seconds=0.1))
    assert take.request.lyrics == CASES["LRC"][1]


def test_the_demo_says_what_it_does_not_know() -> None:
    scope = Khala.from_pretrained("demo").parts.scope
    assert scope is not None
    assert "waltz" in scope.tags
    asked = Request(tags="pop, female vocal", lyrics="Hello darkness my old friend")
    (note,) = prepared(asked, scope)[1]
    assert len(note.splitlines()) == 2
    for part in ("'pop'", "hello", "waltz", "do re mi", "khala models download"):
        assert part in note
    known = Request(tags="Waltz, slow, happy", lyrics="[Verse]\ndo re mi\nfa SOL la")
    assert prepared(known, scope)[1] == []


def test_the_dry_run_shows_it() -> None:
    result = generate("--dry-run", "--tags", "pop", "--lyrics", "Hello darkness")
    assert result.exit_code == 0, result.stderr
    assert "does not know" in result.stderr


def test_a_damaged_statement_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "knows.json").write_text("[")
    with pytest.raises(KhalaError, match="damaged"):
        Scope.load(tmp_path)
    assert Scope.load(tmp_path / "absent") is None
