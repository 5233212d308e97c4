"""Training of the backbone and of superres, on tiny models."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_tokenizer import write_tiny_tokenizer
from upstream_rules import compose_one

from khala_mlx import KhalaError
from khala_mlx import token_ids as tokens
from khala_mlx.config import BackboneConfig, SuperResConfig, TokenLayout
from khala_mlx.errors import ConfigError
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.superres import SuperRes
from khala_mlx.prompt.tokenizer import Tokenizer
from khala_mlx.train.backbone import audio_loss, train_backbone
from khala_mlx.train.data.dataset import CodedSong, read_coded
from khala_mlx.train.data.sequences import Alike, examples_of, padded
from khala_mlx.train.settings import BackboneTraining, CodecTraining, Schedule, SuperResTraining
from khala_mlx.train.superres import (
    SuperResTask,
    refine_loss,
    start_from_backbone,
    start_from_codebooks,
    train_superres,
)

LAYOUT = TokenLayout.tiny()
QUICK = Schedule(
    steps=12, batch_size=3, learning_rate=3e-3, warmup=2, checkpoint_every=5, validate_every=6
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten random coded songs of 9 or 12 frames, two of them held out."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny_tokenizer(folder / "tokenizer.json")
    (folder / "codes").mkdir()
    rng, lines = np.random.default_rng(0), []
    for number in range(10):
        codes = rng.integers(0, 16, (8, 9 + 3 * (number % 2)))
        np.savez(folder / "codes" / f"s{number}.npz", codes=codes)
        split = "valid" if number < 2 else "train"
        lines.append({"id": f"s{number}", "split": split, "tags": "pop", "lyrics": "do re"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def backbone_settings(**schedule: Any) -> BackboneTraining:
    return BackboneTraining(LAYOUT, BackboneConfig.tiny(), dataclasses.replace(QUICK, **schedule))


def superres_settings(**changes: Any) -> SuperResTraining:
    return dataclasses.replace(SuperResTraining(LAYOUT, SuperResConfig.tiny(), QUICK), **changes)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "backbone"
    train_backbone(backbone_settings(), data, folder)
    return folder


def log(folder: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


class Killed(Exception):
    pass


def kill_at(step: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    return progress


@pytest.mark.parametrize("step", [1, 5, 7, 11])
def test_a_killed_backbone_run_goes_on_exactly(
    data: Path, trained: Path, tmp_path: Path, step: int
) -> None:
    settings, folder = backbone_settings(), tmp_path / "run"
    with pytest.raises(Killed):
        train_backbone(settings, data, folder, on_progress=kill_at(step))
    train_backbone(settings, data, folder, resume=True)
    assert log(folder) == log(trained)
    ours, theirs = (mx.load(str(f / "backbone.safetensors")) for f in (folder, trained))
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_killed_superres_run_goes_on_exactly(data: Path, trained: Path, tmp_path: Path) -> None:
    settings = superres_settings(backbone=str(trained))
    train_superres(settings, data, tmp_path / "whole")
    with pytest.raises(Killed):
        train_superres(settings, data, tmp_path / "cut", on_progress=kill_at(8))
    train_superres(settings, data, tmp_path / "cut", resume=True)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert {"refine_loss", "align_loss"} <= set(log(tmp_path / "whole")[0])
    assert (tmp_path / "whole" / "loss.png").exists()
    by_layer = json.loads((tmp_path / "whole" / "by_layer.json").read_text())
    assert list(by_layer) == [str(layer) for layer in range(2, 8)]
    assert all(0 < nats < 10 for nats in by_layer.values())


def test_a_run_can_start_from_another(data: Path, trained: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(backbone_settings(keep_every=5), start=str(trained))
    train_backbone(settings, data, tmp_path / "more")
    kept = sorted(path.name for path in (tmp_path / "more").glob("weights-*"))
    assert kept[:2] == ["weights-000005.safetensors", "weights-000010.safetensors"]
    first, last = log(trained)[0], log(trained)[-1]
    assert log(tmp_path / "more")[0]["loss"] < (first["loss"] + last["loss"]) / 2


def test_a_run_tells_its_sizes_and_its_token_layout(data: Path, trained: Path) -> None:
    about = json.loads((trained / "config.json").read_text())
    assert about == {"backbone": BackboneConfig.tiny().to_dict(), "tokens": LAYOUT.to_dict()}


def test_the_causal_task_may_see_fewer_songs(data: Path, tmp_path: Path) -> None:
    """The refinement sees the same batch; the first step's causal loss is another."""
    for songs in (0, 1):
        train_superres(superres_settings(align_songs=songs), data, tmp_path / str(songs))
    (every, one) = (log(tmp_path / str(songs))[0] for songs in (0, 1))
    assert one["refine_loss"] == every["refine_loss"]
    assert one["align_loss"] != every["align_loss"]
    with pytest.raises(ConfigError, match="must be 0 or above"):
        superres_settings(align_songs=-1)


def test_full_attention_alone_has_no_causal_loss(data: Path, tmp_path: Path) -> None:
    train_superres(superres_settings(align_weight=0.0), data, tmp_path / "run")
    assert "align_loss" not in log(tmp_path / "run")[0]


@pytest.mark.extended
def test_a_song_is_learnt_and_sung_back(data: Path) -> None:
    song = read_coded(data, "train")[0]
    tokenizer = Tokenizer.from_file(data / "tokenizer.json")
    (example,) = examples_of([song], LAYOUT, tokenizer, lambda *_: 100)
    import mlx.nn as nn
    import mlx.optimizers as optim

    mx.random.seed(0)
    model = Backbone(BackboneConfig.tiny(), LAYOUT)
    rows = mx.array(padded([example.coarse_sequence(LAYOUT)]))
    optimizer = optim.AdamW(3e-3)
    step = nn.value_and_grad(model, lambda rows: audio_loss(model, LAYOUT, rows))
    for _ in range(150):
        loss, gradients = step(rows)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, loss)
    assert loss.item() < 0.05
    sung = compose_one(model, example.backbone_prompt, max_frames=50, top_k=1, key=mx.random.key(0))
    # The end of the song was learnt too.
    assert np.array_equal(sung, song.codes[:2])


def test_prompts_that_generation_would_refuse_are_not_learnt_from(
    data: Path, tmp_path: Path
) -> None:
    short = dataclasses.replace(BackboneConfig.tiny(), max_prompt=9)
    settings = dataclasses.replace(backbone_settings(), backbone=short)
    with pytest.raises(KhalaError, match="max_prompt is 9: prepare the songs again"):
        train_backbone(settings, data, tmp_path / "run")
    small = dataclasses.replace(SuperResConfig.tiny(), max_prompt=8)
    with pytest.raises(KhalaError, match="max_prompt is 8: prepare the songs again"):
        train_superres(superres_settings(superres=small), data, tmp_path / "run")


def test_the_loss_counts_audio_only() -> None:
    model = Backbone(BackboneConfig.tiny(), LAYOUT)
    ids = np.array([5, 6, 7, 300, 316, 301, LAYOUT.end_of_song])
    logits = mx.array(model(ids[None, :-1])[0])
    nats = mx.logsumexp(logits, axis=-1) - logits[mx.arange(6), mx.array(ids[1:])]
    expected = nats[2:].mean().item()
    for rows in (ids[None], padded([ids], 32)):
        assert audio_loss(model, LAYOUT, mx.array(rows)).item() == pytest.approx(expected, abs=1e-5)


def test_the_refine_loss_is_that_of_generations_rows() -> None:
    model, rng = SuperRes(SuperResConfig.tiny(), LAYOUT), np.random.default_rng(0)
    prompt, codes, layer = np.arange(5), rng.integers(0, 16, (8, 7)), 5
    rows = np.full((1, 12, layer), -1)
    rows[0, :5, 0] = [*prompt[:-1], tokens.marker(LAYOUT, layer)]
    starts = np.array([tokens.window(LAYOUT, known)[0] for known in range(layer)])
    rows[0, 5:] = (codes[:layer] + starts[:, None]).T
    hidden = mx.array(model.hidden(rows)[0, 5:])
    logits = hidden @ model.lm_head.weight[slice(*tokens.window(LAYOUT, layer))].T
    nats = mx.logsumexp(logits, axis=-1) - logits[mx.arange(7), mx.array(codes[layer])]
    ours = refine_loss(model, mx.array(prompt[None]), mx.array(codes[None]), [layer])
    assert ours.item() == pytest.approx(nats.mean().item(), abs=1e-5)
    pair = [mx.array(np.stack([array] * 2)) for array in (prompt, codes)]
    one, other, both = (refine_loss(model, *pair, at).item() for at in ([5, 5], [2, 2], [5, 2]))
    assert one == pytest.approx(ours.item(), abs=1e-5)
    assert both == pytest.approx((one + other) / 2, abs=1e-5)


def test_fine_rows_start_as_codebooks() -> None:
    """The sum over layers has the geometry of the latents, and so has the head."""
    model = SuperRes(SuperResConfig.tiny(), LAYOUT)
    scales = mx.array(0.8 ** np.arange(8, dtype=np.float32))[:, None, None]
    codebooks = mx.random.normal((8, 16, 6)) * scales
    coarse = mx.array(model.embed_tokens.weight[: LAYOUT.backbone_vocab])
    start_from_codebooks(model, codebooks, first=2)
    assert mx.array_equal(model.embed_tokens.weight[: LAYOUT.backbone_vocab], coarse).item()
    rows = np.array(model.embed_tokens.weight[LAYOUT.backbone_vocab :])
    fine = np.array(codebooks[2:]).reshape(-1, 6)
    assert np.linalg.matrix_rank(rows, tol=1e-3) == 6
    back = np.linalg.lstsq(rows, fine, rcond=None)[0]
    assert np.allclose(rows @ back, fine, atol=1e-3)
    # The head names the row nearest to a latent: r e - |e|^2 / 2 for one state of the body.
    heads = np.array(model.lm_head.weight[LAYOUT.backbone_vocab :]).reshape(6, 16, -1)
    for layer, (head, books) in enumerate(zip(heads, np.array(codebooks[2:]), strict=True)):
        wanted = books @ books.T - 0.5 * np.square(books).sum(-1)[:, None]
        states = np.linalg.lstsq(head, wanted, rcond=None)[0]
        assert np.allclose(head @ states, wanted, atol=1e-2 * np.abs(wanted).max()), layer
    with pytest.raises(KhalaError, match=r"has \[8, 15\] codebooks"):
        start_from_codebooks(model, codebooks[:, :15], first=2)


def test_codebooks_that_are_zero_leave_rows_that_are_zero() -> None:
    """As of a codec that saw fewer frames than it has codes."""
    model = SuperRes(SuperResConfig.tiny(), LAYOUT)
    codebooks = mx.random.normal((8, 16, 6)) * mx.array([1.0, 1, 1, 1, 0, 0, 0, 0])[:, None, None]
    start_from_codebooks(model, codebooks, first=0)
    for table in (model.embed_tokens, model.lm_head):
        assert mx.isfinite(table.weight).all().item()


def test_superres_starts_as_the_backbone(data: Path, trained: Path) -> None:
    tokenizer = Tokenizer.from_file(data / "tokenizer.json")
    songs = examples_of(read_coded(data, "train"), LAYOUT, tokenizer, lambda *_: 100)
    backbone = Backbone(BackboneConfig.tiny(), LAYOUT)
    backbone.load_weights(str(trained / "backbone.safetensors"))
    task = SuperResTask(superres_settings(backbone=str(trained)), songs, songs)
    rows = mx.array(padded([each.coarse_sequence(LAYOUT) for each in songs]))
    hidden = [m.body(m.embed(rows), causal=True) for m in (task.model, backbone)]
    assert mx.array_equal(*hidden).item()
    table = task.model.embed_tokens.weight
    spread = mx.std(table[LAYOUT.backbone_vocab :]).item()
    assert spread == pytest.approx(mx.std(backbone.embed_tokens.weight).item(), rel=0.05)
    assert len(task.by_layer()) == 6


def test_superres_can_start_from_another_run(data: Path, tmp_path: Path) -> None:
    train_superres(superres_settings(), data, tmp_path / "first")
    tokenizer = Tokenizer.from_file(data / "tokenizer.json")
    songs = examples_of(read_coded(data, "train"), LAYOUT, tokenizer, lambda *_: 100)
    task = SuperResTask(superres_settings(start=str(tmp_path / "first")), songs, songs)
    found = mx.load(str(tmp_path / "first" / "superres.safetensors"))
    ours = dict(tree_flatten(task.model.parameters()))
    assert all(mx.array_equal(ours[name], found[name]).item() for name in found)


def test_a_focus_draws_early_layers_more_often(data: Path) -> None:
    tokenizer = Tokenizer.from_file(data / "tokenizer.json")
    songs = examples_of(read_coded(data, "train"), LAYOUT, tokenizer, lambda *_: 100)
    settings = dataclasses.replace(superres_settings(), layer_focus=1.0)
    task, rng = SuperResTask(settings, songs, songs), np.random.default_rng(0)
    batches = [task.batch(rng, step)["layers"] for step in range(2000)]
    counts = np.bincount(np.concatenate(batches), minlength=8)
    shares = 1 / np.arange(2, 8)
    assert not counts[:2].any()
    assert np.allclose(counts[2:] / counts.sum(), shares / shares.sum(), atol=0.03)


def test_a_backbone_of_other_shape_is_refused(trained: Path) -> None:
    config = dataclasses.replace(SuperResConfig.tiny(), num_layers=3)
    with pytest.raises(KhalaError, match=r"has no layers\.2\."):
        start_from_backbone(SuperRes(config, LAYOUT), trained)


def test_songs_are_cut_on_whole_frames_and_keep_their_end_only_whole(data: Path) -> None:
    tokenizer = Tokenizer.from_file(data / "tokenizer.json")
    song = CodedSong(np.ones((8, 20), int), "pop", "la", {"id": "x"})
    for room, whole in ((20, True), (19, False)):
        (example,) = examples_of([song], LAYOUT, tokenizer, lambda *_, room=room: room)
        sequence = example.coarse_sequence(LAYOUT)
        assert example.codes.shape == (8, room)
        assert (sequence[-1] == LAYOUT.end_of_song) == whole
    with pytest.raises(KhalaError, match="fills the trained window"):
        examples_of([song], LAYOUT, tokenizer, lambda *_: 0)


def test_batches_of_superres_line_up(data: Path) -> None:
    tokenizer = Tokenizer.from_file(data / "tokenizer.json")
    songs = examples_of(read_coded(data, "train"), LAYOUT, tokenizer, lambda *_: 100)
    alike, rng = Alike(songs), np.random.default_rng(0)
    lengths = set()
    for _ in range(20):
        drawn = alike.draw(rng, 3)
        assert len({each.codes.shape[1] for each in drawn}) == 1
        lengths.add(drawn[0].codes.shape[1])
    assert lengths == {9, 12}


def test_a_run_is_not_overwritten_or_resumed_with_other_settings(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(KhalaError, match="--resume"):
        train_backbone(backbone_settings(), data, trained)
    with pytest.raises(KhalaError, match="other settings"):
        train_backbone(backbone_settings(seed=9), data, trained, resume=True)
    with pytest.raises(KhalaError, match="no checkpoint"):
        train_backbone(backbone_settings(), data, tmp_path, resume=True)
    (tmp_path / "checkpoint.safetensors").write_text("damaged")
    with pytest.raises(KhalaError, match="not a complete checkpoint"):
        train_backbone(backbone_settings(), data, tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(KhalaError, match="lower the learning rate"):
        train_backbone(backbone_settings(learning_rate=1e30, warmup=0), data, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_missing_data_is_one_sentence(tmp_path: Path, data: Path) -> None:
    with pytest.raises(KhalaError, match="metadata.jsonl cannot be read"):
        read_coded(tmp_path, "train")
    with pytest.raises(KhalaError, match="no songs of the split test"):
        read_coded(data, "test")


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        (BackboneTraining, {"backbone": {"vocab_size": 10}}, "says 130304"),
        (SuperResTraining, {"superres": {"vocab_size": 10}}, "says 193792"),
        (SuperResTraining, {"layer_focus": 1e6}, "100 at most"),
        (BackboneTraining, {"schedule": {"seed": -1}}, "seed must be"),
        (BackboneTraining, {"schedule": {"final_fraction": -1}}, "0 or above"),
        (CodecTraining, {"crop_frames": 0}, "crop_frames must be above 0"),
        (CodecTraining, {"quantise_after": 0}, "quantise_after must be above 0"),
        (CodecTraining, {"layer_choices": [-1]}, "layer_choices must lie"),
        (CodecTraining, {"ema_decay": 1.0}, "ema_decay must lie"),
    ],
    ids=str,
)
def test_settings_that_would_train_nothing(
    tmp_path: Path, kind: Any, given: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(given))
    with pytest.raises(KhalaError, match=sentence):
        kind.from_file(tmp_path / "settings.json")
