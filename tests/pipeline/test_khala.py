import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import fake_sounddevice
import mlx.core as mx
import numpy as np
import pytest
import soundfile
from takes import begin_all
from tiny_model import write_tiny_model

from khala_mlx import Khala, KhalaError, Song
from khala_mlx.config import KhalaConfig
from khala_mlx.errors import AudioError, KhalaWarning
from khala_mlx.model.sampling import Sampling
from khala_mlx.prompt.request import Request
from khala_mlx.song.record import Record

# Random codecs are loud.
pytestmark = pytest.mark.filterwarnings("ignore:.*exceed full scale")


def test_end_to_end_equals_upstream(
    reference: tuple[str, Khala], oracle: Path, tmp_path: Path
) -> None:
    """From the words to the file and back, greedily, against upstream's own run."""
    variant, khala = reference
    golden = mx.load(str(oracle / "goldens" / "end_to_end.safetensors"))
    asked = json.loads((oracle / "prompts_small.json").read_text())["e2e"]["input"]
    bb_ids, sr_ids = khala.prompt_ids(
        description=asked["description"],
        genre=asked["genre"],
        lyrics=asked["lyrics"],
        minutes=asked["duration"],
    )
    assert np.array_equal(bb_ids, np.array(golden["backbone_prompt_ids"]))
    assert np.array_equal(sr_ids, np.array(golden["superres_prompt_ids"]))
    coarse = khala.compose(bb_ids, max_frames=12, top_k=1)
    codes = khala.refine(sr_ids, coarse, top_k=1)
    assert np.array_equal(codes, np.array(golden[f"{variant}.codes"])[:, 0])
    wave = khala.render(codes)
    assert wave.shape == (12 * 2048, 2)
    assert np.abs(wave - np.array(golden[f"{variant}.wave"])).max() <= 1e-4
    assert np.array_equal(
        khala.codec.encode(wave), np.array(golden[f"{variant}.reencoded_codes"])[:, 0]
    )

    with warnings.catch_warnings():
        # Five minutes in the prompt and half a second of song, on purpose.
        warnings.simplefilter("ignore", KhalaWarning)
        song = khala.generate(
            description=asked["description"],
            genre=asked["genre"],
            lyrics=asked["lyrics"],
            minutes=5,
            seconds=12 / khala.config.codec.frame_rate,
            top_k=1,
            refine_top_k=1,
            seed=0,
        )
    assert np.array_equal(song.codes, codes)
    song.save(tmp_path / "song.wav", normalize=False)
    saved, rate = soundfile.read(tmp_path / "song.wav")
    assert rate == 44100
    assert np.abs(saved - np.clip(wave, -1, 1)).max() < 1e-4


@pytest.fixture(scope="module")
def song(tiny: Khala) -> Song:
    return tiny.generate(tags="pop", lyrics="la la", seconds=0.2, min_seconds=0.2, seed=5)


def test_generate_gives_a_song(tiny: Khala, song: Song) -> None:
    frames = song.codes.shape[1]
    assert song.codes.shape == (8, 69)
    assert song.waveform.shape == (frames * 128, 2)
    assert song.waveform.dtype == np.float32
    assert song.duration == pytest.approx(0.2, abs=0.003)
    assert song.metadata["request"]["seed"] == 5
    assert set(song.metadata["timings"]) == {"compose", "refine", "render"}
    json.dumps(song.metadata)


def test_the_stages_alone_make_the_same_song(tiny: Khala, song: Song) -> None:
    bb_ids, sr_ids = tiny.prompt_ids(tags="pop", lyrics="la la")
    coarse = tiny.compose(bb_ids, max_frames=69, min_frames=69, seed=5)
    codes = tiny.refine(sr_ids, coarse, seed=5)
    assert np.array_equal(codes, song.codes)
    assert np.array_equal(tiny.render(codes), song.waveform)


def test_the_sidecar_makes_the_song_again(tiny: Khala, song: Song, tmp_path: Path) -> None:
    song.save(tmp_path / "song.flac")
    again = tiny.finish(tiny.begin(Record.read(tmp_path / "song.json").request))
    assert np.array_equal(again.waveform, song.waveform)


def test_low_memory_frees_each_stage(tiny_folder: Path, song: Song) -> None:
    khala = Khala.from_pretrained(tiny_folder, keep_loaded=False)
    again = khala.generate(tags="pop", lyrics="la la", seconds=0.2, min_seconds=0.2, seed=5)
    assert np.array_equal(again.waveform, song.waveform)
    assert khala.parts._loaded == {}


@pytest.mark.filterwarnings("ignore:.*do not fit the window")
@pytest.mark.extended
def test_a_packed_cache_is_asked_for_recorded_and_planned(tmp_path: Path) -> None:
    config = KhalaConfig.tiny()
    config = dataclasses.replace(
        config, backbone=dataclasses.replace(config.backbone, head_dim=64, context=4096)
    )
    khala = Khala.from_pretrained(write_tiny_model(tmp_path / "wide", config))
    asked = {"tags": "pop", "seconds": 1.0, "min_seconds": 1.0, "seed": 5}
    song = khala.generate(**asked, kv_bits=8)
    most = song.codes.shape[1]
    ids = khala.prompt_ids(tags="pop", instrumental=True)[0]
    coarse = khala.compose(ids, max_frames=most, min_frames=most, seed=5, kv_bits=8)
    assert np.array_equal(song.codes[:2], coarse)
    request = Request.from_record(song.metadata, "here")
    assert request.kv_bits == 8
    assert np.array_equal(khala.finish(khala.begin(request)).codes, song.codes)
    long = dataclasses.replace(request, seconds=8.0)
    plain = dataclasses.replace(long, kv_bits=None)
    peaks = [
        khala.preview(each, songs=8)["memory"]["stages"]["compose"]["peak_bytes"]
        for each in (long, plain)
    ]
    assert peaks[0] < 0.6 * peaks[1]


def test_songs_of_many_seeds_equal_each_alone(tiny_folder: Path, song: Song) -> None:
    khala = Khala.from_pretrained(tiny_folder, keep_loaded=False)
    seen: list[tuple[str, int, int]] = []
    request = Request(tags="pop", lyrics="la la", seconds=0.2, min_seconds=0.2, seed=99)
    songs = khala.finish_many(begin_all(khala, request, [4, 5]), lambda *a: seen.append(a))
    first, second = songs
    assert khala.parts._loaded == {}
    assert np.array_equal(second.waveform, song.waveform)
    assert [s.metadata["request"]["seed"] for s in (first, second)] == [4, 5]
    assert not np.array_equal(first.codes, second.codes)
    assert set(first.metadata["timings"]) == {"compose", "refine", "render"}
    refined = [(done, total) for stage, done, total in seen if stage == "refine"]
    assert refined == [(n, 12) for n in range(1, 13)]
    again = khala.finish(khala.begin(Request.from_dict(second.metadata["request"])))
    assert np.array_equal(again.waveform, song.waveform)


def test_songs_that_fail_are_left_out(tiny: Khala) -> None:
    seeds = range(60)
    with pytest.warns(KhalaWarning, match=r"Song \d+: The model ended"):
        songs = list(tiny.finish_many(begin_all(tiny, Request(tags="x", seconds=0.2), seeds)))
    assert 0 < len(songs) < 60
    lengths = {s.codes.shape[1] for s in songs}
    assert len(lengths) > 1


@pytest.fixture
def one_at_a_time(tiny_folder: Path) -> Khala:
    """A model that composes songs one after the other, for want of memory."""
    khala = Khala.from_pretrained(tiny_folder)
    plan_of = khala._plan_of
    khala._plan_of = lambda *args, **named: dataclasses.replace(  # type: ignore[method-assign]
        plan_of(*args, **named), songs_at_once=1
    )
    return khala


def test_songs_that_fail_are_left_out_also_one_at_a_time(one_at_a_time: Khala) -> None:
    asked = Request(tags="pop", seconds=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seeds = range(40)
        coarse = one_at_a_time.compose_many(
            one_at_a_time.prompt_ids(tags="pop")[0], seeds=seeds, max_frames=11
        )
    ended = next(seed for seed in seeds if not coarse[seed].size)
    sung = next(seed for seed in seeds if coarse[seed].size)
    with pytest.warns(KhalaWarning, match="1 of the songs left out: The model ended"):
        songs = list(one_at_a_time.finish_many(begin_all(one_at_a_time, asked, [ended, sung])))
    assert [song.metadata["request"]["seed"] for song in songs] == [sung]
    with pytest.raises(KhalaError, match="ended the song before its first frame"):
        list(one_at_a_time.finish_many(begin_all(one_at_a_time, asked, [ended])))


def test_songs_are_made_while_others_wait(tiny_folder: Path) -> None:
    khala = Khala.from_pretrained(tiny_folder, keep_loaded=False)
    asked = Request(tags="pop", seconds=0.2, min_seconds=0.2)
    alone = [khala.finish(khala.begin(dataclasses.replace(asked, seed=seed))) for seed in (1, 2)]
    limit = mx.set_cache_limit(1 << 28)
    try:
        first, second = (khala.finish_many(begin_all(khala, asked, [1, 2])) for _ in range(2))
        songs = [next(first), next(second), khala.finish(khala.begin(asked)), next(first)]
        # The second is given up with one song to come.
        assert khala.parts._plan is None
        assert mx.set_cache_limit(1 << 28) == 1 << 28
        assert list(first) == []
    finally:
        mx.set_cache_limit(limit)
    for song, other in zip((songs[0], songs[1], songs[3]), (*alone[:1] * 2, alone[1]), strict=True):
        assert np.array_equal(song.codes, other.codes)
        assert np.array_equal(song.waveform, other.waveform)


def test_numbers_of_numpy_are_numbers(tiny: Khala) -> None:
    bb_ids, sr_ids = tiny.prompt_ids(tags="pop", minutes=np.int64(1))
    plain = tiny.compose(bb_ids, max_frames=5, min_frames=5, top_k=4, temperature=0.5, seed=3)
    given = tiny.compose(
        bb_ids.tolist(),
        max_frames=np.uint8(5),
        min_frames=np.int32(5),
        top_k=np.int64(4),
        temperature=np.float32(0.5),
        seed=np.uint32(3),
    )
    assert np.array_equal(plain, given)
    many = tiny.compose_many(bb_ids, sampling=Sampling(0.5, 4), seeds=np.array([3]), max_frames=5,
                             min_frames=5)  # fmt: skip
    again = tiny.compose_many(bb_ids, sampling=Sampling(0.5, 4), seeds=iter([3]), max_frames=5,
                              min_frames=5)  # fmt: skip
    assert np.array_equal(many, again)
    assert np.array_equal(many[0], plain)
    codes = tiny.refine(sr_ids, plain, seed=3, top_k=2, codebooks=4)
    given = tiny.refine(
        sr_ids.tolist(), plain.tolist(), seed=np.int64(3), top_k=np.int8(2), codebooks=np.int64(4),
        refined=codes[2:3].astype(np.uint64), kept=plain[:, :2].tolist(),
    )  # fmt: skip
    assert np.array_equal(codes, given)
    song = tiny.generate(tags="pop", seconds=np.float32(0.2), min_seconds=0.2, seed=np.int64(1))
    take = tiny.begin(Request(tags="pop", seconds=1.0), prefix=song.codes.astype(np.uint64))
    assert take.prefix.dtype.kind == "i"


@pytest.mark.parametrize(
    "ids", [None, 5, np.int64(5), "abc", [], [[1], [1, 2]], [[1, 2]], [1.0]], ids=repr
)
def test_what_is_no_prompt_is_refused(tiny: Khala, ids: Any) -> None:
    coarse = np.zeros((2, 3), int)
    for stage in (
        lambda: tiny.compose(ids, max_frames=3),
        lambda: tiny.compose_many(ids, seeds=[1], max_frames=3),
        lambda: tiny.refine(ids, coarse),
    ):
        with pytest.raises(KhalaError, match="Token ids must be|at least one token"):
            stage()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_frames": "3"},
        {"max_frames": None},
        {"max_frames": np.array([3, 4])},
        {"max_frames": 10**6, "min_frames": "x"},
        {"temperature": 10**400},
        {"temperature": True},
        {"seed": np.bool_(True)},
    ],
    ids=str,
)
def test_what_is_no_number_is_refused(tiny: Khala, changes: dict[str, Any]) -> None:
    ids = tiny.prompt_ids(tags="pop")[0]
    with pytest.raises(KhalaError):
        tiny.compose(ids, **{"max_frames": 3, **changes})


def test_what_is_no_list_or_array_is_refused(tiny: Khala, tmp_path: Path) -> None:
    ids, ragged = tiny.prompt_ids(tags="pop")[1], [[1], [1, 2]]
    for wrong in (
        lambda: tiny.compose_many(ids, seeds=5, max_frames=3),  # type: ignore[arg-type]
        lambda: tiny.refine(ids, ragged),  # type: ignore[arg-type]
        lambda: tiny.refine(ids, np.zeros((2, 3), int), refined=5),  # type: ignore[arg-type]
        lambda: tiny.refine(ids, np.zeros((2, 3), int), kept=5),  # type: ignore[arg-type]
        lambda: tiny.render(ragged),  # type: ignore[arg-type]
        lambda: tiny.codec.encode(ragged),  # type: ignore[arg-type]
        lambda: tiny.codec.encode(np.full((9, 2), 1e300)),
        lambda: tiny.backbone(ragged),
        lambda: tiny.begin(Request(), prefix=5),  # type: ignore[arg-type]
        lambda: tiny.load_adapters("my-sound"),
        lambda: tiny.load_adapters([], scales=0.5),  # type: ignore[arg-type]
        lambda: Khala.from_pretrained(5),  # type: ignore[arg-type]
        lambda: Khala.from_pretrained(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(KhalaError, match="must be|must contain|NaN or infinite"):
            wrong()


def test_takes_of_different_requests_are_not_composed_together(tiny: Khala) -> None:
    asked = Request(tags="x", seconds=0.2, min_seconds=0.2, seed=1)
    for other in ({"tags": "y"}, {"temperature": 0.5}, {"seconds": 0.3}):
        takes = [tiny.begin(each) for each in (asked, dataclasses.replace(asked, **other))]  # type: ignore[arg-type]
        with pytest.raises(KhalaError, match="the same request but for the seed"):
            tiny.finish_many(takes)
        with pytest.raises(KhalaError, match="the same request but for the seed"):
            tiny.compose_takes(takes)
    # One that is composed already may be of any.
    tiny.compose_takes(takes[:1])
    assert len(list(tiny.finish_many(iter(takes)))) == 2


def test_a_song_is_saved_with_numbers_of_numpy_and_nothing_odd(song: Song, tmp_path: Path) -> None:
    song.save(tmp_path / "a.wav", fade=np.float32(0.1), loudness=np.float32(-14), title="x")  # type: ignore[arg-type]
    told = json.loads((tmp_path / "a.json").read_text())["output"]
    assert told["fade_seconds"] == pytest.approx(0.1)
    for odd in ({"fade": "1"}, {"fade": None}, {"loudness": "x"}, {"loudness": True}):
        with pytest.raises(KhalaError, match="must be a number"):
            song.save(tmp_path / "b.wav", **odd)  # type: ignore[arg-type]
    wave, codes = song.waveform, song.codes
    for own in (
        Song(wave.tolist(), 44100, codes),  # type: ignore[arg-type]
        Song(wave, 44100.5, codes),  # type: ignore[arg-type]
        Song(wave, 0, codes),
        Song(wave, 44100, codes[0]),
        Song(wave, 44100, None),  # type: ignore[arg-type]
    ):
        with pytest.raises(KhalaError, match="must be|must be"):
            own.save(tmp_path / "b.wav")
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.wav", "a.json", "a.take.safetensors"
    }  # fmt: skip


def test_sound_can_be_heard_while_it_is_rendered(tiny: Khala, song: Song) -> None:
    pieces = list(tiny.render_stream(song.codes, chunk_frames=16))
    assert len(pieces) == 5
    assert np.abs(np.concatenate(pieces) - song.waveform).max() <= 1e-5
    with pytest.raises(KhalaError, match="Codes must"):
        tiny.render_stream(song.codes[:3])


def test_progress_names_the_stages_in_order(tiny: Khala) -> None:
    seen: list[tuple[str, int, int]] = []
    tiny.generate(seconds=0.05, min_seconds=0.05, seed=1, on_progress=lambda *a: seen.append(a))
    assert [s for i, (s, *_) in enumerate(seen) if i == 0 or seen[i - 1][0] != s] == [
        "compose",
        "refine",
        "render",
    ]
    assert all(0 < done <= total for _, done, total in seen)


def test_no_seed_draws_one(tiny: Khala) -> None:
    seeds = {
        tiny.generate(seconds=0.02, min_seconds=0.02).metadata["request"]["seed"] for _ in range(2)
    }
    assert len(seeds) == 2


def test_misspelt_arguments_are_errors(tiny: Khala) -> None:
    with pytest.raises(TypeError, match="temprature"):
        tiny.generate(temprature=1.0)  # type: ignore[call-arg]


def test_a_silent_song_is_told(tiny_folder: Path) -> None:
    khala = Khala.from_pretrained(tiny_folder)
    last = khala.codec.decoder.conv_out
    last.update({"weight": mx.zeros_like(last.weight), "bias": mx.full(last.bias.shape, 1e-7)})
    with pytest.warns(KhalaWarning, match="silent"):
        khala.generate(seconds=0.02, min_seconds=0.02, seed=1)


def test_wrong_codes_are_refused_by_every_stage(tiny: Khala) -> None:
    for codes in (np.zeros((7, 3), int), np.full((8, 3), 16), np.zeros((8, 3))):
        with pytest.raises(KhalaError, match="Codes must"):
            tiny.render(codes)


def test_saving_writes_three_files(song: Song, tmp_path: Path) -> None:
    assert song.save(tmp_path / "x.wav") == tmp_path / "x.wav"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.take.safetensors", "x.wav"]
    take, metadata = mx.load(str(tmp_path / "x.take.safetensors"), return_metadata=True)
    assert np.array_equal(np.array(take["codes"]), song.codes)
    assert np.array_equal(np.array(take["coarse"]), song.codes[:2])
    assert json.loads(metadata["khala"])["refined_layers"] == 8
    for name in ("x.wav", "x.flac"):
        with pytest.raises(KhalaError, match="exists already"):
            song.save(tmp_path / name)
    song.save(tmp_path / "x.wav", overwrite=True)


def test_a_failed_save_leaves_nothing(
    song: Song, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise soundfile.LibsndfileError(2, "Error : disk: ")

    monkeypatch.setattr(soundfile.SoundFile, "write", fail)
    with pytest.raises(AudioError):
        song.save(tmp_path / "x.wav")
    assert list(tmp_path.iterdir()) == []


def test_songs_of_ones_own_can_be_saved(tmp_path: Path) -> None:
    wave = np.full((256, 2), 0.1, np.float32)
    Song(wave, 44100, np.zeros((8, 2), int)).save(tmp_path / "own.wav")
    assert soundfile.info(tmp_path / "own.wav").frames == 256


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"request": 3}',
        '{"request": {"seed": "x"}}',
        '{"request": {"a": 1}}',
        "[" * 99999,
    ],
)
def test_wrong_sidecars_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "song.json").write_text(text)
    with pytest.raises(KhalaError, match=r"song\.json"):
        _ = Record.read(tmp_path / "song.json").request


def test_older_sidecars_get_defaults(tmp_path: Path) -> None:
    (tmp_path / "song.json").write_text('{"request": {"tags": "pop", "seed": 3}}')
    assert Record.read(tmp_path / "song.json").request == Request(tags="pop", seed=3)
    with pytest.raises(KhalaError, match="cannot be read"):
        _ = Record.read(tmp_path / "absent.json").request


def test_playing_a_song(song: Song, monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_sounddevice.install(monkeypatch)
    song.play()
    assert device.format == (44100, 2)
    assert len(device.heard) >= len(song.waveform)


def test_requests_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request().seed = 3  # type: ignore[misc]
