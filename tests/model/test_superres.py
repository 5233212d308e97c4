import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tolerances import CLOSE
from upstream_rules import use_draws

from khala_mlx import Khala, KhalaError
from khala_mlx import token_ids as tokens
from khala_mlx.config import SuperResConfig, TokenLayout
from khala_mlx.errors import KhalaWarning
from khala_mlx.model.sampling import Detail, sample_by_race
from khala_mlx.model.superres import SuperRes

KEY = mx.random.key(0)


@pytest.fixture(scope="module")
def golden(oracle: Path) -> dict[str, Any]:
    return mx.load(str(oracle / "goldens" / "superres.safetensors"))


@pytest.fixture(scope="module")
def coarse(golden: dict[str, Any]) -> np.ndarray:
    return np.array(golden["audio_q01"]).T - np.array([[128256], [129280]])


@pytest.mark.parametrize("case", ["c2", "c5", "c63"])
def test_embeddings(reference: tuple[str, Khala], oracle: Path, case: str) -> None:
    golden = mx.load(str(oracle / "goldens" / "embedding.safetensors"))
    ids, model = golden[f"{case}.ids"], reference[1].superres
    summed = sum(model.embed(ids[..., column]) for column in range(ids.shape[-1]))
    assert np.abs(np.array(summed) - np.array(golden[f"{case}.out"])).max() <= 1e-6


@pytest.mark.parametrize("step", [2, 3, 33, 63])
def test_hidden_states(reference: tuple[str, Khala], golden: dict[str, Any], step: int) -> None:
    variant, khala = reference
    name = f"{variant}.unpadded.step{step}"
    hidden = khala.superres.hidden(np.array(golden[f"{name}.input_ids"]))
    assert np.abs(hidden - np.array(golden[f"{name}.hidden"])).max() <= CLOSE


def test_greedy_codes_equal(
    reference: tuple[str, Khala], golden: dict[str, Any], coarse: np.ndarray
) -> None:
    variant, khala = reference
    codes = khala.refine(np.array(golden["text_ids"]), coarse, top_k=1)
    for padding in ("unpadded", "pad30"):
        assert np.array_equal(codes, np.array(golden[f"{variant}.{padding}.codes"])[:, 0])


def test_window_logits(
    reference: tuple[str, Khala], golden: dict[str, Any], coarse: np.ndarray
) -> None:
    variant, khala = reference
    model, layout = khala.superres, khala.config.tokens
    codes = np.array(golden[f"{variant}.unpadded.codes"])[:, 0]
    for layer in (2, 63):
        rows = golden[f"{variant}.unpadded.step{layer}.input_ids"]
        start, stop = tokens.window(layout, layer)
        hidden = model.hidden(rows)[0, 9:]
        logits = np.array(hidden @ model.lm_head.weight[start:stop].T)
        expected = np.array(golden[f"{variant}.unpadded.step{layer}.window_logits"])[0]
        assert np.abs(logits - expected).max() <= 2e-4
        assert np.array_equal(logits.argmax(-1), codes[layer])


# Upstream's sampled run was made with the single bias.
@pytest.mark.parametrize("reference", ["single"], indirect=True)
def test_sampled_codes_equal_with_upstreams_draws(
    reference: tuple[str, Khala],
    golden: dict[str, Any],
    coarse: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, khala = reference
    draws = np.array(golden["topk10.exp_draws"])
    use_draws(monkeypatch, KEY, {number: each[0] for number, each in enumerate(draws, start=2)})
    codes = khala.superres.refine(np.array(golden["text_ids"]), coarse, Detail(top_k=10), key=KEY)
    assert np.array_equal(codes, np.array(golden["topk10.codes"])[:, 0])


def test_refine_agrees_with_whole_forward_passes(tiny: Khala) -> None:
    """The running sum, the marker and the skipped last rows change nothing."""
    model, layout = tiny.superres, tiny.config.tokens
    prompt, frames = np.arange(7), 11
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (2, frames))
    refined = model.refine(prompt, codes, Detail(top_k=1), key=KEY)
    starts = np.array([tokens.window(layout, layer)[0] for layer in range(8)])[:, None]
    for layer in range(2, 8):
        rows = np.full((1, 7 + frames, layer), -1)
        rows[0, :7, 0] = [*prompt[:-1], tokens.marker(layout, layer)]
        rows[0, 7:] = (refined[:layer] + starts[:layer]).T
        hidden = mx.array(model.hidden(rows)[0, 7:])
        logits = hidden @ model.lm_head.weight[slice(*tokens.window(layout, layer))].T
        assert np.array_equal(np.array(mx.argmax(logits, -1)), refined[layer])


@pytest.fixture(scope="module")
def narrow() -> SuperRes:
    """A model trained on 40 rows."""
    mx.random.seed(0)
    config = replace(SuperResConfig.tiny(), context=40, max_prompt=30)
    model = SuperRes(config, TokenLayout.tiny())
    mx.eval(model.parameters())
    return model


def test_long_songs_go_in_windows_over_fixed_codes(
    narrow: SuperRes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for 32 frames: windows at 0, 24 and, moved inwards, 43, each refined as if alone."""
    layout, prompt, frames = narrow.layout, np.arange(8), 75
    rng = np.random.default_rng(0)
    coarse, drawn = rng.integers(0, 16, (2, frames)), rng.exponential(size=(8, frames, 4))
    use_draws(monkeypatch, KEY, dict(enumerate(drawn)))
    seen: list[tuple[int, int]] = []
    with pytest.warns(KhalaWarning, match="75 frames, .* room for 32 .* in 3 overlapping"):
        codes = narrow.refine(
            prompt,
            coarse,
            Detail(top_k=4),
            key=KEY,
            on_progress=lambda *a: seen.append(a),
        )
    assert seen == [(n, 18) for n in range(1, 19)]
    assert np.array_equal(codes[:2], coarse)
    starts = np.array([tokens.window(layout, layer)[0] for layer in range(8)])[:, None]
    done = 0
    for first in (0, 24, 43):
        for layer in range(2, 8):
            rows = np.full((1, 8 + 32, layer), -1)
            rows[0, :8, 0] = [*prompt[:-1], tokens.marker(layout, layer)]
            # Inside the overlap these are the codes of the window before.
            rows[0, 8:] = (codes[:layer, first : first + 32] + starts[:layer]).T
            hidden = mx.array(narrow.hidden(rows)[0, 8:])
            logits = hidden @ narrow.lm_head.weight[slice(*tokens.window(layout, layer))].T
            wanted = sample_by_race(logits, mx.array(drawn[layer, first : first + 32]), 4)
            assert np.array_equal(wanted[done - first :], codes[layer, done : first + 32])
        done = first + 32
    assert done == frames


def test_a_song_of_the_whole_window_goes_at_once(narrow: SuperRes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert narrow.refine(np.arange(8), np.zeros((2, 32), int), key=KEY).shape == (8, 32)


def test_same_seed_same_detail(tiny: Khala) -> None:
    coarse = np.zeros((2, 9), int)
    made = [tiny.refine(np.arange(5), coarse, seed=s) for s in (1, 1, 2)]
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    assert np.array_equal(made[0][:2], coarse)


def test_progress_counts_layers(tiny: Khala) -> None:
    seen: list[tuple[int, int]] = []
    tiny.refine(np.arange(5), np.zeros((2, 3), int), on_progress=lambda *a: seen.append(a))
    assert seen == [(n, 6) for n in range(1, 7)]


def test_more_candidates_than_codes(tiny: Khala) -> None:
    assert tiny.refine(np.arange(5), np.zeros((2, 3), int), top_k=10**6).shape == (8, 3)


@pytest.mark.parametrize(
    ("prompt", "coarse", "arguments", "sentence"),
    [
        (np.arange(5), np.zeros((3, 4), int), {}, "shape"),
        (np.arange(5), np.full((2, 4), 16), {}, "0..15"),
        (np.arange(380) % 9, np.zeros((2, 9), int), {}, "room for 4 frames"),
        (np.arange(0), np.zeros((2, 3), int), {}, "at least one token"),
        (np.array([999]), np.zeros((2, 3), int), {}, "Token ids"),
        (np.arange(5), np.zeros((2, 3), int), {"top_k": 0}, "top_k"),
        (np.arange(5), np.zeros((2, 3), int), {"seed": -2}, "seed"),
    ],
)
def test_bad_arguments_are_refused(
    tiny: Khala, prompt: np.ndarray, coarse: np.ndarray, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(KhalaError, match=sentence):
        tiny.refine(prompt, coarse, **arguments)


def test_hidden_checks_its_rows(tiny: Khala) -> None:
    with pytest.raises(KhalaError, match=r"\[B, S, C\]"):
        tiny.superres.hidden(np.zeros((1, 3), int))


@pytest.mark.parametrize("context", [384, 40])
def test_refining_in_parts_gives_the_same(tiny: Khala, context: int) -> None:
    """Also where the song is longer than the window, so that windows follow each other."""
    config = replace(tiny.config.superres, context=context, max_prompt=20)
    model = SuperRes(config, tiny.config.tokens)
    model.update(tiny.superres.parameters())
    prompt, coarse = np.arange(7), np.random.default_rng(0).integers(0, 16, (2, 90))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KhalaWarning)
        whole = model.refine(prompt, coarse, key=KEY)
        codes = coarse
        for layers in (3, 6, 8):
            codes = model.refine(prompt, coarse, refined=codes[2:], codebooks=layers, key=KEY)
            assert np.array_equal(codes, whole[:layers])


@pytest.mark.parametrize(("context", "layers", "frames"), [(384, 8, 20), (40, 8, 60), (384, 4, 20)])
def test_kept_codes_stay_and_are_seen(tiny: Khala, context: int, layers: int, frames: int) -> None:
    config = replace(tiny.config.superres, context=context, max_prompt=20)
    model = SuperRes(config, tiny.config.tokens)
    model.update(tiny.superres.parameters())
    prompt, rng = np.arange(7), np.random.default_rng(0)
    kept, coarse = rng.integers(0, 16, (layers, frames)), rng.integers(0, 16, (2, 90))
    coarse[:, :frames] = kept[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KhalaWarning)
        free = model.refine(prompt, coarse, key=KEY)
        codes = model.refine(prompt, coarse, kept=kept, key=KEY)
        parts = model.refine(prompt, coarse, kept=kept, codebooks=5, key=KEY)
        parts = model.refine(prompt, coarse, kept=kept, refined=parts[2:], key=KEY)
    assert np.array_equal(codes[:layers, :frames], kept)
    assert not np.array_equal(codes[2:, frames:], free[2:, frames:])
    assert np.array_equal(parts, codes)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"codebooks": 1}, "codebooks must be a whole number from 2 to 8"),
        ({"codebooks": 9}, "codebooks must be"),
        ({"codebooks": 3.0}, "codebooks must be"),
        ({"refined": np.zeros((2, 3), int)}, "refined codes have 3 frames"),
        ({"refined": np.zeros((7, 4), int)}, "shape"),
        ({"refined": np.zeros((2, 4), int), "codebooks": 3}, "from 4 to 8"),
        ({"kept": np.ones((2, 2), int)}, "codes to keep differ"),
        ({"kept": np.zeros((2, 5), int)}, "codes to keep differ"),
    ],
)
def test_what_cannot_be_gone_on_with(tiny: Khala, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KhalaError, match=sentence):
        tiny.refine(np.arange(5), np.zeros((2, 4), int), **arguments)


@pytest.mark.parametrize("broken", [0.0, float("nan")])
def test_numbers_that_are_none_are_an_error(narrow: SuperRes, broken: float) -> None:
    kept = narrow.norm.weight
    narrow.norm.weight = mx.full(kept.shape, broken)
    try:
        with pytest.raises(KhalaError, match="Superres made no usable numbers"):
            narrow.refine(np.arange(8), np.zeros((2, 5), int), key=KEY)
    finally:
        narrow.norm.weight = kept
