"""Codes by expectation, alone and through superres, takes and plans."""

import dataclasses
import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_model import write_tiny_model

from khala_mlx import Khala, KhalaError
from khala_mlx.config import SuperResConfig, TokenLayout
from khala_mlx.model.sampling import Detail
from khala_mlx.model.superres import Expected, SuperRes
from khala_mlx.prompt.request import Request
from khala_mlx.song.take import Take

pytestmark = pytest.mark.filterwarnings("ignore:.*exceed full scale")

LAYERS, SIZE, DIM, FRAMES = 8, 16, 6, 5
ASKED = {"tags": "pop", "lyrics": "la la", "seconds": 0.2, "min_seconds": 0.2}


@pytest.fixture
def codebooks() -> mx.array:
    finer = mx.power(0.7, mx.arange(LAYERS))[:, None, None]
    return mx.random.normal((LAYERS, SIZE, DIM), key=mx.random.key(1)) * finer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Khala:
    return Khala.from_pretrained(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def logits(seed: int, frames: int = FRAMES) -> mx.array:
    return 2 * mx.random.normal((frames, SIZE), key=mx.random.key(seed))


def means(scores: mx.array, rows: mx.array) -> np.ndarray:
    weights = np.exp(np.array(scores, dtype=np.float64))
    return weights / weights.sum(-1, keepdims=True) @ np.array(rows, dtype=np.float64)


def test_each_layer_gives_what_those_before_left_over(codebooks: mx.array) -> None:
    expected, owed = Expected(codebooks, FRAMES, 2), np.zeros((FRAMES, DIM))
    for layer in range(2, LAYERS):
        rows = np.array(codebooks[layer], dtype=np.float64)
        chosen = np.array(expected.choose(logits(layer), layer, 0, 0))
        wanted = owed + means(logits(layer), codebooks[layer])
        distances = np.square(wanted[:, None] - rows).sum(-1)
        np.testing.assert_array_equal(chosen, distances.argmin(-1))
        owed = wanted - rows[chosen]


def test_where_there_is_no_doubt_it_is_the_likeliest_code(codebooks: mx.array) -> None:
    expected, sure = Expected(codebooks, FRAMES, 2), np.array([3, 0, 15, 7, 7])
    scores = mx.array(200.0 * np.eye(SIZE)[sure])
    for layer in range(2, LAYERS):
        np.testing.assert_array_equal(np.array(expected.choose(scores, layer, 0, 0)), sure)


def test_the_sum_comes_nearer_to_the_means_than_the_likeliest_codes(codebooks: mx.array) -> None:
    expected, ours, likeliest, wanted = Expected(codebooks, FRAMES, 0), 0.0, 0.0, 0.0
    for layer in range(LAYERS):
        scores = logits(layer)
        ours = ours + codebooks[layer][expected.choose(scores, layer, 0, 0)]
        likeliest = likeliest + codebooks[layer][mx.argmax(scores, axis=-1)]
        wanted = wanted + means(scores, codebooks[layer])
    assert np.square(ours - wanted).sum() < 0.2 * np.square(likeliest - wanted).sum()


def test_nothing_is_owed_for_frames_that_are_known(codebooks: mx.array) -> None:
    """A window of four frames from the third on, whose first two come from the window before."""
    expected = Expected(codebooks, 6, 2)
    expected.choose(logits(1, 4), 2, 0, 0)
    before = np.array(expected._left_over)
    expected.choose(logits(2, 4), 2, 2, 2)
    after = np.array(expected._left_over)
    np.testing.assert_array_equal(after[:4], before[:4])
    assert (before[4:] == 0).all()
    assert np.abs(after[4:]).min() > 0


@pytest.fixture
def model() -> SuperRes:
    mx.random.seed(0)
    small = dataclasses.replace(SuperResConfig.tiny(), context=40, max_prompt=8)
    return SuperRes(small, TokenLayout.tiny())


@pytest.mark.parametrize("frames", [20, pytest.param(75, id="windows")])
@pytest.mark.filterwarnings("ignore:.*overlapping windows")
def test_in_pieces_it_gives_the_same(model: SuperRes, codebooks: mx.array, frames: int) -> None:
    coarse, key = np.random.default_rng(0).integers(0, SIZE, (2, frames)), mx.random.key(0)
    whole = model.refine(np.arange(8), coarse, key=key, expected=Expected(codebooks, frames, 2))
    drawn = model.refine(np.arange(8), coarse, Detail(top_k=1), key=key)
    assert not np.array_equal(whole, drawn)
    expected, codes = Expected(codebooks, frames, 2), coarse
    for first, last in itertools.pairwise((2, 3, 6, 8)):
        codes = model.refine(
            np.arange(8),
            coarse,
            key=mx.random.key(last),
            refined=codes[2:first],
            codebooks=last,
            expected=expected,
        )
    np.testing.assert_array_equal(codes, whole)
    with pytest.raises(KhalaError, match="continue at codebook 8, not at 2"):
        model.refine(np.arange(8), coarse, key=key, expected=expected)


def test_a_song_depends_on_no_seed_of_detail_and_goes_on_from_any_state(
    tiny: Khala, tmp_path: Path
) -> None:
    states = []

    def keep(take: Take) -> None:
        path = tmp_path / f"{len(states)}.take.safetensors"
        take.save(path)
        states.append(path)

    request = Request(**ASKED, seed=5, refine_expected=True)  # type: ignore[arg-type]
    song = tiny.finish(tiny.begin(request), on_take=keep)
    other = tiny.generate(**ASKED, seed=5, refine_expected=True, refine_seed=9)
    np.testing.assert_array_equal(other.codes, song.codes)
    drawn = tiny.generate(**ASKED, seed=5)
    np.testing.assert_array_equal(drawn.codes[:2], song.codes[:2])
    assert not np.array_equal(drawn.codes, song.codes)
    draft = tiny.finish(tiny.begin(request), codebooks=5)
    assert draft.take.codebooks == 5
    np.testing.assert_array_equal(draft.codes, song.codes[:5])
    draft.take.save(tmp_path / "draft.take.safetensors")
    for path in (*states, tmp_path / "draft.take.safetensors"):
        again = tiny.finish(tiny.resume(Take.load(path)))
        np.testing.assert_array_equal(again.codes, song.codes)


def test_codebooks_are_those_of_the_codec(tiny: Khala) -> None:
    tiny.parts.release("codec")
    read = np.array(tiny._expected(3).codebooks)
    np.testing.assert_array_equal(read, np.array(tiny.codec.quantizer.codebooks))
    assert tiny._expected(3).codebooks is tiny.codec.quantizer.codebooks


def test_the_plan_counts_it(tiny: Khala) -> None:
    request = Request(**ASKED)  # type: ignore[arg-type]
    peaks = [
        tiny.preview(dataclasses.replace(request, refine_expected=on))["memory"]["stages"]
        for on in (False, True)
    ]
    sizes = tiny.config.codec
    codebooks = 4 * sizes.num_codebooks * sizes.codebook_size * sizes.latent_dim
    more = peaks[1]["refine"]["peak_bytes"] - peaks[0]["refine"]["peak_bytes"]
    assert codebooks < more < 10 * codebooks


def test_codebooks_are_read_before_they_are_used(tmp_path: Path) -> None:
    """A graph of the GPU must not wait for a file."""
    folder = write_tiny_model(tmp_path / "tiny")
    wanted = np.array(Khala.from_pretrained(folder).codec.quantizer.codebooks)
    expected = Khala.from_pretrained(folder)._expected(FRAMES)
    weights = folder / "codec.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    np.testing.assert_array_equal(np.array(expected.codebooks), wanted)
