"""The demo's corpus: repeatable, split, level, and true to its labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

_DEMO = Path(__file__).parents[2] / "examples" / "train_demo"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(_DEMO))
    yield
    sys.path.remove(str(_DEMO))


@pytest.fixture(scope="module")
def songs(_importable: None) -> list:
    """48 songs over all splits, 4 of them in the style kept for fine-tuning."""
    import corpus

    some = [corpus.song(seed, split) for split in corpus.SPLITS for seed in range(14)]
    return some + [corpus.song(seed, "train", style=corpus.EXTRA_STYLE) for seed in range(6)]


def _all_styles() -> tuple[str, ...]:
    import corpus

    return (*corpus.STYLES, corpus.EXTRA_STYLE)


def test_same_seed_makes_the_same_song() -> None:
    import corpus
    from corpus.instruments import note
    from corpus.voice import syllable

    first = corpus.song(3, "train")
    note.cache_clear()
    syllable.cache_clear()
    again = corpus.song(3, "train")
    assert first.waveform.tobytes() == again.waveform.tobytes()
    assert (first.tags, first.lyrics, first.syllables) == (
        again.tags,
        again.lyrics,
        again.syllables,
    )


def test_splits_never_share_lyrics_or_sound(songs: list) -> None:
    import corpus

    for index, split in enumerate(corpus.SPLITS):
        for song in songs[14 * index : 14 * (index + 1)]:
            assert corpus.split_of([s.text for s in song.syllables]) == split
    sounds = {song.waveform.tobytes() for song in songs}
    assert len(sounds) == len(songs)


def test_each_split_gets_its_share_of_lyrics() -> None:
    import corpus

    rng = np.random.default_rng(0)
    words = np.array(corpus.SYLLABLES)
    drawn = [corpus.split_of(words[rng.integers(7, size=5)].tolist()) for _ in range(2_000)]
    assert drawn.count("test") == pytest.approx(200, abs=60)
    assert drawn.count("valid") == pytest.approx(200, abs=60)


def test_tags_are_the_closed_vocabulary(songs: list) -> None:
    import corpus

    assert len(corpus.TAGS) == 8
    seen = {tag for song in songs[:42] for tag in song.tags.split(", ")}
    assert seen == set(corpus.TAGS)
    assert {song.style for song in songs[42:]} == {corpus.EXTRA_STYLE}
    for song in songs:
        assert song.tags == f"{song.style}, {song.tempo}, {song.mood}"
        assert song.key.endswith("major" if song.mood == "happy" else "minor")
        assert song.bpm < 85 if song.tempo == "slow" else song.bpm > 140


def test_lyrics_are_the_sung_syllables_in_lines(songs: list) -> None:
    import corpus

    for song in songs:
        assert song.lyrics.split() == [s.text for s in song.syllables]
        assert set(song.lyrics.split()) <= set(corpus.SYLLABLES)
        assert 4 <= len(song.syllables) <= 8
        assert all(1 <= len(line.split()) <= 4 for line in song.lyrics.split("\n"))


@pytest.mark.parametrize("seconds", [3.0, 6.0, 12.5])
def test_length_is_as_asked_and_syllables_fit(seconds: float) -> None:
    import corpus

    song = corpus.song(1, "valid", seconds=seconds)
    assert song.waveform.shape == (round(seconds * 44_100), 2)
    assert song.waveform.dtype == np.float32
    last = song.syllables[-1]
    assert last.onset + last.seconds <= seconds


def test_notes_follow_the_asked_length() -> None:
    import corpus

    quick = corpus.song(1, "train", note_seconds=0.3)
    calm = corpus.song(1, "train")
    assert all(0.3 <= s.seconds < 0.5 for s in quick.syllables)
    assert all(0.5 <= s.seconds <= 0.9 for s in calm.syllables)
    assert len(quick.syllables) > len(calm.syllables)


@pytest.mark.parametrize("note_seconds", [0.3, 0.5, 0.9, 2.0])
def test_shortest_song_of_every_split_has_two_syllables(note_seconds: float) -> None:
    import corpus

    for split in corpus.SPLITS:
        for seed in range(3):
            song = corpus.song(seed, split, seconds=6 * note_seconds, note_seconds=note_seconds)
            assert len(song.syllables) >= 2


def test_voice_sounds_in_its_notes_only() -> None:
    from corpus.score import compose
    from corpus.voice import sing

    score = compose(np.random.default_rng(5), "train", 6.0, None, 0.5)
    voice, marks = sing(score), np.zeros(score.samples, bool)
    for note in score.notes:
        start, stop = round(note.start * 2048), round((note.start + note.ticks) * 2048)
        marks[start:stop] = True
        vowel = voice[start + 9_000 : stop - 9_000]
        assert np.sqrt(np.mean(vowel**2)) == pytest.approx(1, abs=0.25)
        assert np.abs(voice[start : start + 2_205]).max() > 0.05
    assert not voice[~marks].any()


def test_sung_pitches_belong_to_the_chords() -> None:
    from corpus.score import compose

    for seed in range(20):
        score = compose(np.random.default_rng(seed), "train", 6.0, None, 0.5)
        assert all(n.midi % 12 in score.chord_at(n.start) for n in score.notes)
        assert all(48 <= n.midi <= 60 for n in score.notes)


def test_every_syllable_differs_from_the_others() -> None:
    import corpus
    from corpus.voice import syllable

    spectra = [np.abs(np.fft.rfft(syllable(text, 52, 32_768)))[:4_000] for text in corpus.SYLLABLES]
    spectra = [s / np.linalg.norm(s) for s in spectra]
    likeness = np.array(spectra) @ np.array(spectra).T - np.eye(7)
    assert likeness.max() < 0.97


def test_levels_are_consistent_and_clean(songs: list) -> None:
    from corpus.mix import loudness

    levels = [loudness(song.waveform) for song in songs]
    assert max(levels) - min(levels) < 1
    for song in songs:
        peak = 20 * np.log10(np.abs(song.waveform).max())
        assert -7 < peak <= -3
        assert np.abs(song.waveform.mean(axis=0)).max() < 1e-3
        assert np.abs(song.waveform[[0, -1]]).max() < 0.02


def test_loudness_of_the_standards_sine() -> None:
    from corpus.mix import loudness

    time = np.arange(44_100) / 44_100
    sine = np.stack([np.sin(2 * np.pi * 997 * time), np.zeros(44_100)], axis=1)
    assert loudness(sine) == pytest.approx(-3.01, abs=0.1)


@pytest.mark.parametrize("index", range(5))
def test_voice_stands_over_the_band(index: int) -> None:
    from corpus.band import play
    from corpus.mix import mix
    from corpus.score import compose
    from corpus.voice import sing

    score = compose(np.random.default_rng(index), "test", 6.0, _all_styles()[index], 0.5)
    voice, band = sing(score), play(score)
    mixed = mix(voice, band).sum(axis=1)
    parts = np.stack([voice, band.sum(axis=1)], axis=1)
    gains = np.linalg.lstsq(parts, mixed, rcond=None)[0]
    rms = np.sqrt(np.mean((parts * gains)[voice != 0] ** 2, axis=0))
    assert 4 <= 20 * np.log10(rms[0] / rms[1]) <= 6


def test_energy_is_low_and_mostly_in_the_middle(songs: list) -> None:
    for song in songs:
        middle, side = song.waveform.sum(axis=1), np.diff(song.waveform, axis=1)[:, 0]
        power = np.abs(np.fft.rfft(middle)) ** 2
        above = power[int(6_000 * len(middle) / 44_100) :].sum() / power.sum()
        assert above < 1e-4
        assert 0 < np.sum(side**2) < 0.1 * np.sum(middle**2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"seed": 2**32},
        {"split": "all"},
        {"style": "polka"},
        {"seconds": 1.0},
        {"note_seconds": 0.1},
        {"note_seconds": 1.1},
    ],
)
def test_wrong_arguments_are_refused(wrong: dict) -> None:
    import corpus

    arguments = {"seed": 0, "split": "train"} | wrong
    with pytest.raises(ValueError, match=r"choose|must"):
        corpus.song(**arguments)


def test_command_writes_songs_with_their_labels(tmp_path: Path) -> None:
    import corpus
    from corpus.__main__ import main

    arguments = ["write", str(tmp_path / "out"), "--split", "test", "--start", "7", "--count", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["song_000007.wav", "song_000008.wav"]
    song = corpus.song(8, "test")
    wave, rate = soundfile.read(tmp_path / "out/song_000008.wav", dtype="float32")
    assert rate == 44_100
    np.testing.assert_allclose(wave, song.waveform, atol=1 / 32_000)
    assert (tmp_path / "out/song_000008.caption.txt").read_text() == song.tags + "\n"
    assert (tmp_path / "out/song_000008.lyrics.txt").read_text() == song.lyrics + "\n"
    assert rows[1]["syllables"][0]["text"] == song.syllables[0].text
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert "choose another folder" in again.output
