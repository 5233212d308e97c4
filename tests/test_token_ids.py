import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from khala_mlx import token_ids as tokens
from khala_mlx.config import TokenLayout
from khala_mlx.errors import KhalaError

RELEASED, TINY = TokenLayout(), TokenLayout.tiny()
layouts = st.sampled_from([RELEASED, TINY])


@st.composite
def coarse_codes(draw: st.DrawFn) -> tuple[TokenLayout, np.ndarray]:
    layout = draw(layouts)
    frames = draw(st.integers(1, 30))
    elements = st.integers(0, layout.codebook_size - 1)
    return layout, draw(arrays(np.int64, (layout.num_coarse, frames), elements=elements))


@given(coarse_codes(), st.integers(0, 1))
def test_interleaving_round_trips_and_drops_a_dangling_token(
    case: tuple[TokenLayout, np.ndarray], dangling: int
) -> None:
    layout, coarse = case
    ids = tokens.interleave(layout, coarse)
    extra = np.full(dangling, tokens.window(layout, 0)[0])
    assert np.array_equal(tokens.deinterleave(layout, np.concatenate([ids, extra])), coarse)


@given(layouts, st.data())
def test_windows_tile_the_audio_range(layout: TokenLayout, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, layout.num_codebooks - 2))
    start, stop = tokens.window(layout, layer)
    assert stop - start == layout.codebook_size
    assert tokens.window(layout, layer + 1)[0] == stop
    assert tokens.window(layout, 0)[0] == layout.audio_start
    assert 0 <= tokens.marker(layout, layer) < layout.audio_start


def test_released_ids() -> None:
    assert tokens.window(RELEASED, 1) == (129280, 130304)
    assert tokens.window(RELEASED, 63) == (192768, 193792)
    assert tokens.marker(RELEASED, 2) == 128253
    assert tokens.interleave(RELEASED, np.array([[5], [7]])).tolist() == [128261, 129287]


@pytest.mark.parametrize("layer", [-1, 64])
def test_layers_outside_are_refused(layer: int) -> None:
    with pytest.raises(KhalaError, match="outside"):
        tokens.window(RELEASED, layer)


@given(coarse_codes(), st.data())
def test_a_token_outside_its_window_is_named(
    case: tuple[TokenLayout, np.ndarray], data: st.DataObject
) -> None:
    layout, coarse = case
    ids = tokens.interleave(layout, coarse)
    place = data.draw(st.integers(0, len(ids) - 1))
    ids[place] = layout.end_of_song
    with pytest.raises(KhalaError, match=rf"token {layout.end_of_song} at frame {place // 2},"):
        tokens.deinterleave(layout, ids)


@pytest.mark.parametrize(
    ("codes", "sentence"),
    [
        (np.zeros((3, 4), int), "shape"),
        (np.zeros((2, 4)), "integers"),
        (np.zeros((2, 0), int), "at least one frame"),
        (np.full((2, 4), 1024), "0..1023"),
        (np.full((2, 4), -1), "0..1023"),
        ([1, 2], "shape"),
    ],
)
def test_bad_codes_are_refused(codes: np.ndarray, sentence: str) -> None:
    with pytest.raises(KhalaError, match=sentence):
        tokens.check_codes(codes, codebooks=2, size=1024)


def test_lists_and_small_integers_are_codes() -> None:
    ids = tokens.interleave(RELEASED, np.array([[5], [7]], dtype=np.uint8))
    assert ids.tolist() == [128261, 129287]
    assert tokens.check_codes([[1], [2]], codebooks=3, size=4, fewer=True).shape == (2, 1)
    with pytest.raises(KhalaError, match=r"\[1..3, T\]"):
        tokens.check_codes([[1]] * 4, codebooks=3, size=4, fewer=True)
