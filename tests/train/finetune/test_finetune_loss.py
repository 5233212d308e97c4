"""The chunked loss and layers made twice, against the plain ones; and what memory they save."""

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from khala_mlx import token_ids as tokens
from khala_mlx.config import BackboneConfig, TokenLayout
from khala_mlx.model.backbone import Backbone
from khala_mlx.train.backbone import audio_loss
from khala_mlx.train.data.sequences import padded
from khala_mlx.train.finetune import loss as audio_nats
from khala_mlx.train.finetune.lora import add_lora
from khala_mlx.train.finetune.loss import hidden_states, summed_nats, targets_of
from khala_mlx.train.settings import LoraTraining

LAYOUT = TokenLayout.tiny()


def song(prompt: int, frames: int, whole: bool, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    audio = tokens.interleave(LAYOUT, rng.integers(0, LAYOUT.codebook_size, (2, frames)))
    end = [LAYOUT.end_of_song] if whole else []
    return np.concatenate([rng.integers(0, 250, prompt), audio, end])


ROWS = padded([song(7, 20, True), song(12, 30, False, 1)])


def adapted(**settings: Any) -> Backbone:
    """A tiny backbone with adapters on its last two layers that do something."""
    mx.random.seed(0)
    model = Backbone(dataclasses.replace(BackboneConfig.tiny(), num_layers=3), LAYOUT)
    add_lora(model, LoraTraining(rank=4, layers=2, **settings))
    values = [
        (name, mx.random.normal(array.shape) * 0.1)
        for name, array in tree_flatten(model.trainable_parameters())
        if name.endswith("lora_b")
    ]
    model.load_weights(values, strict=False)
    return model


def taken(model: Backbone, loss: Callable[[], mx.array]) -> tuple[float, dict[str, mx.array]]:
    before = model.trainable_parameters()
    value, gradients = nn.value_and_grad(model, loss)()
    mx.eval(value, gradients)
    model.update(before)
    return value.item(), dict(tree_flatten(gradients))


def chunked(
    model: Backbone, *, checkpointed: bool = False, whole: bool = True, seed: int = 5
) -> tuple[float, dict[str, mx.array]]:
    targets = targets_of(ROWS, LAYOUT, whole_vocabulary=whole)
    count = sum(each.count for each in targets)

    def loss() -> mx.array:
        inputs = mx.array(ROWS[:, :-1])
        hidden = hidden_states(model, inputs, checkpointed=checkpointed, seed=seed)
        return summed_nats(model, hidden, targets) / count

    return taken(model, loss)


def furthest(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> float:
    assert set(ours) == set(theirs)
    assert max(mx.abs(array).max().item() for array in theirs.values()) > 1e-2
    return max(mx.abs(ours[name] - theirs[name]).max().item() for name in theirs)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_in_chunks_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, dora: bool
) -> None:
    model = adapted(dora=dora)
    value, gradients = taken(model, lambda: audio_loss(model, LAYOUT, mx.array(ROWS)))
    for rows in (1000, 7):
        monkeypatch.setattr(audio_nats, "LOGIT_BYTES", 4 * LAYOUT.backbone_vocab * rows)
        ours, in_chunks = chunked(model)
        assert ours == pytest.approx(value, abs=1e-5)
        assert furthest(in_chunks, gradients) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.3}, {"dora": True}], ids=str)
def test_layers_made_twice_give_equal_gradients(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    once, twice = chunked(model), chunked(model, checkpointed=True)
    assert once[0] == twice[0]
    assert furthest(twice[1], once[1]) < 1e-6
    # Dropout leaves out something, and something else with another seed.
    assert (chunked(model, seed=6)[0] != once[0]) == bool(settings.get("dropout"))


def test_reachable_targets_are_predicted_from_what_generation_chooses_from() -> None:
    model = adapted()
    model.eval()
    ids = song(7, 20, True)
    logits = mx.array(model(ids[None, :-1])[0])
    nats = []
    for position in range(7, len(ids)):
        start, stop = tokens.window(LAYOUT, (position - 7) % 2)
        candidates = mx.array([LAYOUT.end_of_song, *range(start, stop)])
        chosen = logits[position - 1][candidates]
        nats.append((mx.logsumexp(chosen) - logits[position - 1, int(ids[position])]).item())
    targets = targets_of(padded([ids]), LAYOUT, whole_vocabulary=False)
    assert sum(each.count for each in targets) == 41
    hidden = model.hidden(mx.array(padded([ids])[:, :-1]))
    assert summed_nats(model, hidden, targets).item() == pytest.approx(sum(nats), rel=1e-5)


def test_a_packed_head_and_packed_layers_are_trained_on() -> None:
    mx.random.seed(0)
    model = Backbone(BackboneConfig.tiny(), LAYOUT)
    nn.quantize(model, 32, 4)
    add_lora(model, LoraTraining(rank=4))
    assert isinstance(model.layers[0].mlp.up_proj.linear, nn.QuantizedLinear)
    _, gradients = chunked(model, checkpointed=True, whole=False)
    assert max(mx.abs(array).max().item() for array in gradients.values()) > 1e-2


def wide_model(layers: int, heads: int = 2) -> Backbone:
    """Layers of 128 with a vocabulary that would fill memory if all of it was projected."""
    layout = dataclasses.replace(LAYOUT, audio_start=20000)
    config = BackboneConfig(
        vocab_size=layout.backbone_vocab, context=4096, max_prompt=256, num_layers=layers,
        hidden_size=128, num_heads=heads, num_kv_heads=1, head_dim=64, intermediate_size=352,
    )  # fmt: skip
    mx.random.seed(0)
    model = Backbone(config, layout)
    add_lora(model, LoraTraining(rank=8))
    return model


@pytest.fixture(scope="module")
def wide() -> Backbone:
    return wide_model(4)


def peak(model: Backbone, length: int, **how: Any) -> tuple[int, dict[str, mx.array]]:
    """Bytes taken at most beside the model, and the gradients."""
    rows = np.random.default_rng(0).integers(0, 32, (1, length + 1)) + 20000
    targets = targets_of(rows, model.layout, whole_vocabulary=how.pop("whole", False))

    def loss() -> mx.array:
        hidden = hidden_states(model, mx.array(rows[:, :-1]), seed=0, **how)
        return summed_nats(model, hidden, targets) / length

    before = model.trainable_parameters()
    mx.clear_cache()
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    _, gradients = nn.value_and_grad(model, loss)()
    mx.eval(gradients)
    taken = mx.get_peak_memory() - base
    model.update(before)
    return taken, dict(tree_flatten(gradients))


def test_layers_made_twice_save_memory() -> None:
    model = wide_model(4, heads=1)
    kept, gradients = peak(model, 1024, checkpointed=False)
    made_again, same = peak(model, 1024, checkpointed=True)
    assert all(mx.array_equal(same[name], gradients[name]) for name in gradients)
    print(f"{kept / 1e6:.0f} MB, made twice {made_again / 1e6:.0f} MB")
    assert made_again < 0.65 * kept


def test_a_layer_made_twice_costs_little_more_than_its_input() -> None:
    """With mx.checkpoint it costs 19 times its input: the second passes do not wait their turn."""
    taken = [peak(wide_model(layers), 1024, checkpointed=True)[0] for layers in (2, 6)]
    assert taken[1] - taken[0] < 4 * 2.5 * (4 * 1024 * 128)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.extended
def test_logits_of_all_positions_never_exist(wide: Backbone, whole: bool) -> None:
    everything = 4 * 768 * wide.config.vocab_size
    found = []
    for chunk in (2**23, 2**20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(audio_nats, "LOGIT_BYTES", chunk)
            found.append(peak(wide, 768, checkpointed=True, whole=whole)[0])
    taken, small = found
    print(f"{taken / 1e6:.0f} MB, in small chunks {small / 1e6:.0f}, all logits {everything / 1e6}")
    assert small < everything
    assert small < taken or not whole
