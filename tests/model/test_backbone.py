from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tolerances import CLOSE
from upstream_rules import compose_one, write_tokens

from khala_mlx import Khala, KhalaError
from khala_mlx import token_ids as tokens
from khala_mlx.config import BackboneConfig, TokenLayout
from khala_mlx.errors import KhalaWarning
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.cache import make_cache, spread
from khala_mlx.model.sampling import Sampling

KEY = mx.random.key(0)


@pytest.fixture(scope="module")
def forward(oracle: Path) -> dict[str, Any]:
    return mx.load(str(oracle / "goldens" / "backbone_forward.safetensors"))


@pytest.fixture(scope="module")
def greedy(oracle: Path) -> dict[str, Any]:
    return mx.load(str(oracle / "goldens" / "backbone_greedy.safetensors"))


def distance(ours: Any, golden: Any) -> float:
    return float(np.abs(np.array(ours, np.float64) - np.array(golden, np.float64)).max())


@pytest.mark.parametrize("case", ["bs", "bs1"])
def test_embeddings_equal(reference: tuple[str, Khala], oracle: Path, case: str) -> None:
    golden = mx.load(str(oracle / "goldens" / "embedding.safetensors"))
    ids = golden[f"{case}.ids"].reshape(2, 10)
    assert distance(reference[1].backbone.embed(ids), golden[f"{case}.out"]) == 0


def test_hidden_states(reference: tuple[str, Khala], forward: dict[str, Any]) -> None:
    variant, khala = reference
    model, ids = khala.backbone, mx.array(forward["ids"])
    assert distance(model.hidden(ids), forward[f"{variant}.hidden"]) <= CLOSE
    stream = model.embed(ids)
    for number, layer in enumerate(model.layers):
        stream = layer(stream, None, True)
        assert distance(stream, forward[f"{variant}.layer{number}"]) <= CLOSE


def test_logits(reference: tuple[str, Khala], forward: dict[str, Any]) -> None:
    variant, khala = reference
    logits = khala.backbone(np.array(forward["ids"]))[0]
    rows = np.array(forward[f"{variant}.logits.window_rows"])
    assert logits.shape == (40, 130304)
    assert distance(logits[rows, 128000:], forward[f"{variant}.logits.window"]) <= 2e-4
    live = np.array(forward["live_text_ids"])
    assert distance(logits[-1, live], forward[f"{variant}.logits_last_text"]) <= 2e-4
    best = np.argsort(-logits, axis=1)[:, 0]
    assert np.array_equal(best, np.array(forward[f"{variant}.logits.top8_ids"])[:, 0])


@pytest.mark.parametrize(("case", "limit"), [("audio", 64), ("text", 24), ("eos_natural", 64)])
@pytest.mark.parametrize("reachable_only", [False, True])
def test_greedy_tokens_equal(
    reference: tuple[str, Khala],
    greedy: dict[str, Any],
    case: str,
    limit: int,
    reachable_only: bool,
) -> None:
    if case == "text" and reachable_only:
        case, limit = "audio", 63  # an odd limit; the text continuation is unreachable by design
    variant, khala = reference
    prompt = greedy.get(f"{case}.{variant}.prompt", greedy.get(f"{case}.prompt"))
    written = write_tokens(
        khala.backbone,
        np.array(prompt),
        max_tokens=limit,
        top_k=1,
        key=KEY,
        reachable_only=reachable_only,
    )
    assert np.array_equal(written, np.array(greedy[f"{case}.{variant}.tokens"])[:limit])


def test_compose_is_the_greedy_tokens(reference: tuple[str, Khala], greedy: dict[str, Any]) -> None:
    variant, khala = reference
    for whole in (False, True):
        coarse = khala.compose(
            np.array(greedy["audio.prompt"]), max_frames=32, top_k=1, reachable_only=not whole
        )
        ids = tokens.interleave(khala.config.tokens, coarse)
        assert np.array_equal(ids, np.array(greedy[f"audio.{variant}.tokens"]))


def test_an_unreachable_token_is_an_error(
    reference: tuple[str, Khala], greedy: dict[str, Any]
) -> None:
    with pytest.raises(KhalaError, match="not a code of codebook"):
        reference[1].compose(
            np.array(greedy["text.prompt"]), max_frames=12, top_k=1, reachable_only=False
        )


class Scripted(Backbone):
    """A tiny backbone that writes what a script says."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(BackboneConfig.tiny(), TokenLayout.tiny())
        self.script, self.turn = script, 0

    def _read_prompt(self, *_: Any) -> Any:
        return mx.ones((1, 1, self.config.hidden_size)), []

    def hidden(self, ids: mx.array, cache: Any = None) -> mx.array:
        return mx.ones((*ids.shape, self.config.hidden_size))

    def choices(self, reachable_only: bool) -> Any:
        every = mx.arange(self.config.vocab_size)

        def project(hidden: mx.array) -> mx.array:
            token = self.script[min(self.turn, len(self.script) - 1)]
            self.turn += 1
            return (every == token).astype(mx.float32)[None]

        return [(project, every)]


END = TokenLayout.tiny().end_of_song
Q0, Q1 = 300, 316


@pytest.mark.parametrize(
    ("script", "frames"),
    [([Q0, Q1, END], 1), ([Q0, Q1, Q0, END], 1), ([Q0, Q1, Q0, Q1, END], 2), ([Q0, Q1] * 9, 9)],
)
def test_the_end_stops_the_song_and_a_dangling_token_is_dropped(
    script: list[int], frames: int
) -> None:
    coarse = compose_one(
        Scripted(script), np.array([1, 2]), max_frames=9, top_k=1, key=KEY, reachable_only=False
    )
    assert coarse.tolist() == [[0] * frames, [0] * frames]


@pytest.mark.parametrize("script", [[END], [Q0, END]])
def test_an_empty_song_is_an_error(script: list[int]) -> None:
    with pytest.raises(KhalaError, match="before its first frame"):
        compose_one(
            Scripted(script), np.array([1]), max_frames=4, top_k=1, key=KEY, reachable_only=False
        )


def test_min_frames_keeps_the_end_out_of_reach(tiny: Khala) -> None:
    prompt = np.arange(5)
    model = tiny.backbone
    bias = mx.zeros_like(model.lm_head.weight)
    bias[END] = 100.0 * mx.sign(model.hidden(mx.array(prompt[None]))[0, -1])
    kept = model.lm_head.weight
    model.lm_head.weight = kept + bias
    try:
        least = compose_one(model, prompt, max_frames=20, min_frames=7, top_k=1, key=KEY)
    finally:
        model.lm_head.weight = kept
    assert least.shape[1] >= 7


def test_sampled_codes_stay_in_their_windows(tiny: Khala) -> None:
    coarse = tiny.compose(np.arange(9), max_frames=40, min_frames=40, temperature=3.0, top_k=17)
    assert coarse.shape == (2, 40)
    assert coarse.min() >= 0
    assert coarse.max() < 16


def test_same_seed_same_song(tiny: Khala) -> None:
    songs = [tiny.compose(np.arange(9), max_frames=20, min_frames=20, seed=s) for s in (3, 3, 4)]
    assert np.array_equal(songs[0], songs[1])
    assert not np.array_equal(songs[0], songs[2])


def test_a_longer_limit_only_adds(tiny: Khala) -> None:
    short = tiny.compose(np.arange(9), max_frames=5, min_frames=5, seed=1)
    longer = tiny.compose(np.arange(9), max_frames=12, min_frames=12, seed=1)
    assert np.array_equal(longer[:, :5], short)


@pytest.mark.parametrize(
    ("prompt", "arguments", "sentence"),
    [
        (np.arange(9), {"max_frames": 0}, "max_frames must be a whole number at least 1"),
        (np.arange(9), {"max_frames": 4, "min_frames": 5}, "min_frames"),
        (np.arange(9), {"max_frames": 2.5}, "whole number"),
        (np.arange(9), {"max_frames": 4, "top_k": 0}, "top_k"),
        (np.arange(9), {"max_frames": 4, "temperature": 0.0}, "temperature"),
        (np.arange(9), {"max_frames": 4, "seed": -1}, "seed"),
        (np.zeros(511, int), {"max_frames": 4}, "room for 0 frames"),
        (np.array([332]), {"max_frames": 4}, "Token ids must lie"),
        (np.array([0.5]), {"max_frames": 4}, "integers"),
        (np.array([], int), {"max_frames": 4}, "Token ids"),
    ],
)
def test_bad_arguments_are_refused(
    tiny: Khala, prompt: np.ndarray, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(KhalaError, match=sentence):
        tiny.compose(prompt, **arguments)


def test_too_many_frames_are_cut_with_a_warning(tiny: Khala) -> None:
    with pytest.warns(UserWarning, match="the longest is 0:00"):
        coarse = tiny.compose(np.zeros(500, int), max_frames=100, min_frames=50)
    assert coarse.shape[1] == 6


def test_progress_counts_frames(tiny: Khala) -> None:
    seen: list[tuple[int, int]] = []
    tiny.compose(np.arange(9), max_frames=6, min_frames=6, on_progress=lambda *a: seen.append(a))
    # Looked at every 16 tokens, that is 8 frames.
    assert seen == [(6, 6)]
    seen.clear()
    tiny.compose(np.arange(9), max_frames=20, min_frames=20, on_progress=lambda *a: seen.append(a))
    assert seen == [(8, 20), (16, 20), (20, 20)]


def test_long_songs_return_freed_buffers(tiny: Khala) -> None:
    assert tiny.compose(np.arange(5), max_frames=200, min_frames=200).shape == (2, 200)


PROMPT = np.arange(9)


@pytest.fixture(scope="module")
def alone(tiny: Khala) -> list[np.ndarray]:
    """Songs of many lengths: the tiny model ends a song with each token about once in 17."""
    return [compose_or_empty(tiny, seed) for seed in range(12)]


def compose_or_empty(tiny: Khala, seed: int) -> np.ndarray:
    try:
        return tiny.compose(PROMPT, max_frames=50, seed=seed)
    except KhalaError:
        return np.empty((2, 0), int)


def test_songs_of_a_batch_equal_the_songs_of_their_seeds_alone(
    tiny: Khala, alone: list[np.ndarray]
) -> None:
    lengths = {song.shape[1] for song in alone}
    assert len(lengths) > 4
    with pytest.warns(KhalaWarning, match=r"Song \d+: The model ended the song before its first"):
        songs = tiny.compose_many(PROMPT, seeds=range(12), max_frames=50)
    for song, expected in zip(songs, alone, strict=True):
        assert np.array_equal(song, expected)
    # Whatever else is in the batch, and in which order.
    longest = max(range(12), key=lambda seed: alone[seed].shape[1])
    shortest = min((s for s in range(12) if alone[s].size), key=lambda s: alone[s].shape[1])
    pair = tiny.compose_many(PROMPT, seeds=[longest, shortest], max_frames=50)
    assert np.array_equal(pair[0], alone[longest])
    assert np.array_equal(pair[1], alone[shortest])


def test_a_batch_reads_the_prompt_once_and_drops_songs_that_ended(
    tiny: Khala, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    body = Backbone.body

    def spied(self: Backbone, x: mx.array, **rest: Any) -> mx.array:
        shapes.append(tuple(x.shape[:2]))
        return body(self, x, **rest)

    monkeypatch.setattr(Backbone, "body", spied)
    with pytest.warns(KhalaWarning):
        tiny.compose_many(PROMPT, seeds=range(12), max_frames=50)
    assert shapes[0] == (1, 9)
    assert shapes[1] == (12, 1)
    rows = [rows for rows, length in shapes[1:]]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 12
    assert all(length == 1 for _, length in shapes[1:])


def test_a_batch_in_which_every_song_fails_is_an_error(tiny: Khala) -> None:
    sampling = Sampling(reachable_only=False, top_k=1)
    with pytest.raises(KhalaError, match="not a code of codebook"):
        tiny.compose_many(np.array([5]), sampling, seeds=[1, 2], max_frames=8, min_frames=8)


def test_a_batch_needs_seeds(tiny: Khala) -> None:
    with pytest.raises(KhalaError, match="At least one seed"):
        tiny.compose_many(PROMPT, seeds=[], max_frames=5)
    with pytest.raises(KhalaError, match="seed must be"):
        tiny.compose_many(PROMPT, seeds=[1, -1], max_frames=5)


@pytest.fixture(scope="module")
def wide() -> Backbone:
    """Heads of 64 dimensions, as the released model has."""
    mx.random.seed(1)
    layout = TokenLayout.tiny()
    sizes = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    config = replace(BackboneConfig.tiny(), **sizes)
    model = Backbone(config, layout)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_a_packed_cache_stays_close(wide: Backbone, kv_bits: int) -> None:
    prompt = mx.array(np.arange(40)[None])
    whole = wide.hidden(prompt)
    plain, packed = make_cache(2, 39), make_cache(2, 60, kv_bits=kv_bits, head_dim=64)
    wide.hidden(prompt[:, :39], plain)
    size = plain[0].nbytes
    spread(plain, packed, 2)
    hidden = wide.hidden(mx.concatenate([prompt[:, 39:]] * 2), packed)
    assert hidden.shape == (2, 1, 128)
    error = mx.abs(hidden[:, 0] - whole[:, -1]).max().item()
    assert 0 < error < {8: 0.01, 4: 0.2}[kv_bits]
    # Two rows of 60 tokens against one of 39; 32 bits against kv_bits and two scales for 64.
    assert packed[0].nbytes == size * 2 * 60 / 39 * (kv_bits + 1) / 32


def test_songs_from_a_packed_cache(wide: Backbone) -> None:
    keys = [mx.random.key(seed) for seed in (1, 2)]
    frames, sampling = {"max_frames": 30, "min_frames": 30}, Sampling(kv_bits=8)
    songs = wide.compose_many(np.arange(9), sampling, keys=keys, **frames)
    for key, song in zip(keys, songs, strict=True):
        assert np.array_equal(compose_one(wide, np.arange(9), key=key, kv_bits=8, **frames), song)


def test_a_packing_that_cannot_be_is_refused(tiny: Khala) -> None:
    with pytest.raises(KhalaError, match="kv_bits must be 4 or 8"):
        tiny.compose(PROMPT, max_frames=5, kv_bits=3)
    with pytest.raises(KhalaError, match="heads of 32 dimensions or a multiple"):
        tiny.compose(PROMPT, max_frames=5, kv_bits=8)


@pytest.mark.parametrize("broken", [0.0, float("nan")])
def test_numbers_that_are_none_are_an_error(wide: Backbone, broken: float) -> None:
    """Zeros are what a GPU without memory gives, NaN what weights that overflow give."""
    kept = wide.norm.weight
    wide.norm.weight = mx.full(kept.shape, broken)
    try:
        with pytest.raises(KhalaError, match="backbone made no usable numbers"):
            compose_one(wide, PROMPT, max_frames=4, key=KEY)
    finally:
        wide.norm.weight = kept
