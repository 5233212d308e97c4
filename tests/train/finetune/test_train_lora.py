"""`khala train lora`: what is learnt, kept, continued and refused; from a song back to it."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner, Result
from mlx.utils import tree_flatten
from tiny_model import write_tiny_model
from tiny_songs import write_songs

from khala_mlx import Khala, KhalaError
from khala_mlx.cli import main
from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert, export_adapter, fuse, read_adapter
from khala_mlx.errors import KhalaWarning
from khala_mlx.model import weights
from khala_mlx.model.backbone import Backbone
from khala_mlx.storage.adapter import Adapter, backbone_id
from khala_mlx.train.finetune import run as fine_tuning
from khala_mlx.train.finetune.lora import LoraRun, LoraTask, add_lora
from khala_mlx.train.finetune.run import Plan, check_memory, plan, train_lora
from khala_mlx.train.settings import LoraTraining, Schedule

CONFIG = KhalaConfig.tiny()
QUICK = Schedule(
    steps=8, batch_size=2, learning_rate=1e-2, warmup=2, checkpoint_every=3, validate_every=2
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("songs") / "coded"
    return write_songs(folder, [9, 12, 20, 9, 12, 9, 20], held_out=2)


def settings(schedule: dict[str, Any] | None = None, **changes: Any) -> LoraTraining:
    changed = dataclasses.replace(QUICK, **(schedule or {}))
    return LoraTraining(changed, **{"rank": 4, **changes})


def log(folder: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def kill_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise InterruptedError

    return progress


def adapters(*folders: Path) -> list[str]:
    return [Adapter.load(folder).sha256 for folder in folders]


def test_a_run_leaves_an_adapter_a_log_and_a_picture(
    tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    chosen = settings({"steps": 30, "validate_every": 10})
    figures = train_lora(plan(tiny_folder, data, chosen), tmp_path / "run")
    entries = log(tmp_path / "run")
    # Held-out songs before, during and after.
    assert [entry["step"] for entry in entries if "valid_loss" in entry] == [0, 10, 20, 30]
    assert figures["loss_before"] == entries[0]["valid_loss"]
    assert figures["loss"] == entries[-1]["valid_loss"]
    assert entries[-1]["loss"] < entries[1]["loss"]
    assert (tmp_path / "run" / "loss.png").exists()
    about = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert about["base"]["backbone"] == backbone_id(CONFIG)
    assert about["training"]["schedule"]["steps"] == 30
    # The checkpoint holds the adapter and its optimiser, not the base.
    stored = mx.load(str(tmp_path / "run" / "checkpoint.safetensors"))
    assert all("lora" in name for name in stored if name.startswith("model."))
    assert set(mx.load(str(tmp_path / "run" / "adapters.safetensors"))) == {
        name.removeprefix("model.") for name in stored if name.startswith("model.")
    }


VARIANTS: list[dict[str, Any]] = [
    {"patience": 3},
    {"dropout": 0.2, "grad_checkpoint": True, "accumulate": 2},
    {"dora": True, "layers": 1, "modules": ("q_proj", "down_proj"), "whole_vocabulary": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.extended
def test_a_killed_run_goes_on_exactly(
    tiny_folder: Path, data: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    chosen = plan(tiny_folder, data, settings(**variant))
    figures = train_lora(chosen, tmp_path / "whole")
    for step in (1, 3, 7):
        folder = tmp_path / f"killed at {step}"
        with pytest.raises(InterruptedError):
            train_lora(chosen, folder, on_progress=kill_at(step))
        again = train_lora(chosen, folder, resume=True)
        assert log(folder) == log(tmp_path / "whole")
        assert adapters(folder) == adapters(tmp_path / "whole")
        assert {**again, "peak_bytes": 0} == {**figures, "peak_bytes": 0}


def test_a_run_that_is_done_has_nothing_left_to_do(
    tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    chosen = plan(tiny_folder, data, settings())
    figures = train_lora(chosen, tmp_path / "run")
    before = log(tmp_path / "run")
    again = train_lora(chosen, tmp_path / "run", resume=True)
    assert log(tmp_path / "run") == before
    assert again["loss"] == figures["loss"]
    with pytest.raises(KhalaError, match="holds an adapter already"):
        train_lora(chosen, tmp_path / "run")
    with pytest.raises(KhalaError, match="other settings"):
        train_lora(plan(tiny_folder, data, settings(rank=5)), tmp_path / "run", resume=True)


def test_patience_keeps_the_best_adapter(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Random songs cannot be foretold: held-out loss rises as soon as the others are learnt."""
    chosen = plan(
        tiny_folder,
        data,
        settings({"steps": 60, "learning_rate": 3e-2}, patience=2, rank=16),
    )
    figures = train_lora(chosen, tmp_path / "run")
    losses = {e["step"]: e["valid_loss"] for e in log(tmp_path / "run") if "valid_loss" in e}
    assert max(losses) < 60
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 4
    assert figures["loss"] == pytest.approx(losses[best], abs=1e-6)
    assert figures["steps"] == max(losses)
    again = train_lora(chosen, tmp_path / "run", resume=True)
    assert {**again, "peak_bytes": 0} == {**figures, "peak_bytes": 0}


def test_several_batches_make_one_step(tiny_folder: Path, data: Path) -> None:
    """Gradients of three batches are those of their songs together, by tokens."""
    chosen = plan(tiny_folder, data, settings(accumulate=3, dropout=0.0))
    model = Backbone(CONFIG.backbone, CONFIG.tokens)
    add_lora(model, chosen.settings)
    names = [n for n, _ in tree_flatten(model.trainable_parameters()) if n.endswith("lora_b")]
    shapes = dict(tree_flatten(model.trainable_parameters()))
    values = [(name, 0.1 * mx.random.normal(shapes[name].shape)) for name in names]
    model.load_weights(values, strict=False)
    task: Any = LoraTask(model, chosen.settings, chosen.train, [])
    run = LoraRun(task, chosen.settings.schedule, {}, Path(), {})
    batches = task.batch(np.random.default_rng(0), 0)
    assert len(batches) == 3
    (loss, _), gradients = run.value_and_grad()(batches)

    def together(_: Any) -> mx.array:
        return sum(task.loss(batch)[0] for batch in batches)

    whole, expected = nn.value_and_grad(model, together)(None)
    assert loss.item() == pytest.approx(whole.item(), abs=1e-5)
    theirs = dict(tree_flatten(expected))
    assert all(
        mx.abs(array - theirs[name]).max().item() < 1e-5 for name, array in tree_flatten(gradients)
    )
    # All targets count the same, however long the songs of a batch are.
    counts = sum(each.count for batch in batches for each in batch.targets)
    assert all(batch.share == 1 / counts for batch in batches)


def test_batches_are_a_function_of_the_step(tiny_folder: Path, data: Path) -> None:
    chosen = plan(tiny_folder, data, settings())
    model = Backbone(CONFIG.backbone, CONFIG.tokens)
    task = LoraTask(model, chosen.settings, chosen.train, [])
    drawn = [task.batch(np.random.default_rng([7, step]), step)[0] for step in (4, 4, 5)]
    assert mx.array_equal(drawn[0].inputs, drawn[1].inputs).item()
    assert drawn[0].seed == drawn[1].seed != drawn[2].seed


def test_old_songs_are_mixed_in(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """As often as asked for; without a share the draws are what they were."""
    old = write_songs(tmp_path / "old", [30, 30, 30], held_out=1, seed=1)
    model = Backbone(CONFIG.backbone, CONFIG.tokens)

    def lengths(share: float, replay: Path | None) -> list[int]:
        chosen = plan(tiny_folder, data, settings(replay_share=share, accumulate=50), replay)
        task = LoraTask(model, chosen.settings, chosen.train, [], chosen.replay)
        return [each.inputs.shape[1] for each in task.batch(np.random.default_rng(0), 0)]

    new = set(lengths(0.0, None))
    assert lengths(0.0, None) == lengths(0.5, None)
    mixed = lengths(0.4, old)
    # Their rows are the longest.
    assert max(mixed) > max(new)
    assert 10 <= mixed.count(max(mixed)) <= 30
    chosen = plan(tiny_folder, data, settings(replay_share=0.4), old)
    assert chosen.forecast.total > plan(tiny_folder, data, settings()).forecast.total


def test_other_songs_are_not_gone_on_with(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    train_lora(plan(tiny_folder, data, settings({"steps": 1})), tmp_path / "run")
    other = write_songs(tmp_path / "other", [9, 12, 20, 9, 12, 9, 20], held_out=2, seed=5)
    with pytest.raises(KhalaError, match="other settings or songs"):
        train_lora(plan(tiny_folder, other, settings({"steps": 1})), tmp_path / "run", resume=True)


def test_only_the_adapter_learns(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    base = dict(tree_flatten(Khala.from_pretrained(tiny_folder).backbone.parameters()))
    chosen = plan(tiny_folder, data, settings())
    train_lora(chosen, tmp_path / "run")
    khala = Khala.from_pretrained(tiny_folder)
    khala.load_adapters([tmp_path / "run"])
    adapted = dict(tree_flatten(khala.backbone.parameters()))
    for name, array in base.items():
        found = adapted.get(name)
        if found is None:
            path, leaf = name.rsplit(".", 1)
            found = adapted[f"{path}.linear.{leaf}"]
        assert mx.array_equal(found, array).item()


def test_a_fresh_adapter_is_written_at_once_and_changes_nothing(
    tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    for dora in (False, True):
        folder = tmp_path / f"dora-{dora}"
        with pytest.raises(InterruptedError):
            train_lora(
                plan(tiny_folder, data, settings({"checkpoint_every": 50}, dora=dora)),
                folder,
                on_progress=kill_at(1),
            )
        khala = Khala.from_pretrained(tiny_folder)
        base = khala.backbone(np.arange(60)[None])
        khala.load_adapters([folder])
        assert np.abs(khala.backbone(np.arange(60)[None]) - base).max() == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dora", [False, True])
def test_on_a_packed_base(
    tiny_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    dora: bool,
) -> None:
    monkeypatch.setattr(weights, "CPU_DEQUANTIZED_BYTES", 0)
    convert(tiny_folder, tmp_path / "packed", dtype="float32", quantize=bits, group_size=32)
    chosen = settings({"steps": 30}, dora=dora)
    figures = train_lora(plan(tmp_path / "packed", data, chosen), tmp_path / "run")
    entries = log(tmp_path / "run")
    assert entries[-1]["loss"] < entries[1]["loss"]
    assert math.isfinite(figures["loss"])
    # The adapter fits what the base was quantized from, too.
    Khala.from_pretrained(tmp_path / "packed").load_adapters([tmp_path / "run"])


def test_dora_on_six_bits_is_refused(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tiny_folder, tmp_path / "packed", dtype="float32", quantize=6, group_size=32)
    # Dequantized when loaded, it does not matter.
    plan(tmp_path / "packed", data, settings(dora=True))
    monkeypatch.setattr(fine_tuning, "CPU_DEQUANTIZED_BYTES", 0)
    with pytest.raises(KhalaError, match="quantized to 4 or 8 bits"):
        plan(tmp_path / "packed", data, settings(dora=True))


def test_songs_are_cut_to_seconds_and_to_the_window(tiny_folder: Path, data: Path) -> None:
    rate = CONFIG.codec.frame_rate
    cut = plan(tiny_folder, data, settings(max_seconds=10.2 / rate))
    assert {each.codes.shape[1] for each in cut.train} == {9, 10}
    assert all(each.whole == (each.codes.shape[1] == 9) for each in cut.train)
    with pytest.raises(KhalaError, match="less than one frame"):
        plan(tiny_folder, data, settings(max_seconds=0.1 / rate))


def test_what_does_not_fit_into_memory_is_refused_with_what_would(
    tiny_folder: Path, data: Path
) -> None:
    chosen = plan(tiny_folder, data, settings({"batch_size": 4}))
    checkpointed = dataclasses.replace(chosen.settings, grad_checkpoint=True)
    single = dataclasses.replace(
        checkpointed,
        schedule=dataclasses.replace(chosen.settings.schedule, batch_size=1),
        accumulate=4,
    )
    check_memory(chosen, chosen.forecast.total)
    check_memory(chosen)
    for fitting, option in (
        (checkpointed, "add --grad-checkpoint."),
        (single, "add --grad-checkpoint --batch-size 1 --grad-accumulation 4."),
    ):
        limit = Plan.forecast_with(chosen, fitting).total
        with pytest.raises(KhalaError, match=f"are there: {option}"):
            check_memory(chosen, limit)
    with pytest.raises(KhalaError, match="a smaller model, or this one with --quantize 4"):
        check_memory(chosen, 1000)


def test_a_long_song_is_to_be_cut(tiny_folder: Path, tmp_path: Path) -> None:
    # Ten seconds in the window of a model with a long one.
    config = dataclasses.replace(
        CONFIG, backbone=dataclasses.replace(CONFIG.backbone, context=16384)
    )
    model = write_tiny_model(tmp_path / "model", config)
    data = write_songs(tmp_path / "coded", [3000, 40], held_out=0)
    with pytest.warns(KhalaWarning, match="has no held-out songs"):
        chosen = plan(model, data, settings({"batch_size": 1}, grad_checkpoint=True))
    with pytest.raises(KhalaError, match=r"add --max-seconds [1-8]\.") as error:
        check_memory(chosen, chosen.forecast.total / 2)
    seconds = int(str(error.value).rstrip(".").rsplit(" ", 1)[1])
    shorter = dataclasses.replace(chosen.settings, max_seconds=seconds)
    with pytest.warns(KhalaWarning):
        cut = plan(model, data, shorter)
    check_memory(cut, chosen.forecast.total / 2)


def test_data_that_does_not_go_with_the_model(
    tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(KhalaError, match="holds no prepared songs"):
        plan(tiny_folder, tmp_path, settings())
    other = Path(shutil.copytree(data, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps({**tokenizer, "version": "2"}))
    with pytest.raises(KhalaError, match="is not the model's"):
        plan(tiny_folder, other, settings())
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(KhalaError, match="not valid JSON"):
        plan(tiny_folder, other, settings())
    foreign = write_songs(tmp_path / "foreign", [9, 9], held_out=1, codes=400)
    with pytest.raises(KhalaError, match="another codec"):
        plan(tiny_folder, foreign, settings())
    with pytest.raises(KhalaError, match="has 2 layers, 3 were to get"):
        plan(tiny_folder, data, settings(layers=3))
    alone = write_songs(tmp_path / "alone", [9])
    with pytest.raises(KhalaError, match="has no held-out songs to stop by"):
        plan(tiny_folder, alone, settings(patience=1))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank": 0}, "rank must be above 0"),
        ({"scale": math.nan}, "scale must be a number"),
        ({"max_seconds": math.inf}, "max_seconds must be a number"),
        ({"schedule": {"seed": -1}}, "seed must be a whole number from 0"),
        ({"dropout": 1.0}, "dropout must lie"),
        ({"replay_share": 1.0}, "replay_share must lie"),
        ({"layers": -1}, "layers must be 0 or above"),
        ({"modules": ("q_proj", "lm_head")}, "modules are q_proj, .*, not lm_head"),
        ({"modules": ()}, "each linear layer once"),
        ({"modules": ("q_proj", "q_proj")}, "each linear layer once"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KhalaError, match=sentence):
        settings(**changes)


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    wild = settings({"learning_rate": 1e30, "warmup": 0})
    with pytest.raises(KhalaError, match="lower the learning rate"):
        train_lora(plan(tiny_folder, data, wild), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("content", ["nonsense\n", "[]\n", None])
def test_a_run_goes_on_without_its_log_but_not_with_a_damaged_one(
    tiny_folder: Path, data: Path, tmp_path: Path, content: str | None
) -> None:
    chosen, folder = plan(tiny_folder, data, settings({"steps": 2})), tmp_path / "run"
    whole = train_lora(chosen, folder)
    if content is None:
        (folder / "log.jsonl").unlink()
        assert train_lora(chosen, folder, resume=True)["loss"] == whole["loss"]
        return
    (folder / "log.jsonl").write_text(content)
    with pytest.raises(KhalaError, match=r"log\.jsonl is damaged; remove it"):
        train_lora(chosen, folder, resume=True)


@pytest.mark.parametrize("about", [{}, {"step": "x", "settings": "{"}], ids=str)
def test_another_file_is_no_checkpoint(
    tiny_folder: Path, data: Path, tmp_path: Path, about: dict[str, str]
) -> None:
    mx.save_safetensors(str(tmp_path / "checkpoint.safetensors"), {"a": mx.zeros(2)}, about)
    with pytest.raises(KhalaError, match="is not a complete checkpoint"):
        train_lora(plan(tiny_folder, data, settings()), tmp_path, resume=True)


def test_a_file_in_the_place_of_the_folder(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(KhalaError, match="cannot be written"):
        train_lora(plan(tiny_folder, data, settings()), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [{"id": None, "codes": 5}, {"minutes": "2"}, {"tags": None}, {"lyrics": ["a"]}, {"artist": 5}],
    ids=str,
)
def test_a_line_of_another_kind_is_damage(
    tiny_folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = write_songs(tmp_path / "coded", [5])
    line = json.loads((folder / "metadata.jsonl").read_text())
    (folder / "metadata.jsonl").write_text(json.dumps({**line, **change}))
    with pytest.raises(KhalaError, match="is damaged; prepare the songs again"):
        plan(tiny_folder, folder, settings())


def test_codes_of_no_frames_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = write_songs(tmp_path / "coded", [5])
    np.savez(folder / "codes" / "s0.npz", codes=np.zeros((8, 0), int))
    with pytest.raises(KhalaError, match="hold nothing"):
        plan(tiny_folder, folder, settings())


def test_no_songs_held_out_means_no_figures(tiny_folder: Path, tmp_path: Path) -> None:
    alone = write_songs(tmp_path / "alone", [9, 12])
    with pytest.warns(KhalaWarning, match="has no held-out songs"):
        chosen = plan(tiny_folder, alone, settings())
    assert set(train_lora(chosen, tmp_path / "run")) == {"steps", "peak_bytes"}


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["train", "lora", *map(str, arguments)])


def test_from_the_command_line(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    options = [
        "-m", tiny_folder, "--data", data, "--out", tmp_path / "run", "--rank", 4, "--steps", 3,
        "--grad-accumulation", 2, "--modules", "q_proj, v_proj", "--layers", 1,
        "--grad-checkpoint", "--validate-every", 2, "--checkpoint-every", 2,
    ]  # fmt: skip
    result = run(*options, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    forecast = json.loads(result.stdout)
    assert set(forecast) == {
        f"{name}_bytes" for name in ("weights", "adapter", "kept", "at_work", "total")
    }
    assert "Memory: about" in result.stderr
    assert not (tmp_path / "run").exists()
    result = run(*options, "--memory-limit", 1e-5)
    assert result.exit_code == 1
    assert "Error: This training takes about" in result.stderr
    result = run(*options, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["forecast_bytes"] == forecast["total_bytes"]
    assert {"folder", "loss_before", "loss", "steps", "peak_bytes"} <= set(told)
    assert "holds an adapter already" in run(*options).stderr
    assert run(*options, "--resume").exit_code == 0
    about = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert about["num_layers"] == 1
    assert about["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert run("--data", data, "--out", "x", "--rank", 0).exit_code == 2
    wrong = run("-m", tiny_folder, "--data", data, "--out", "x", "--modules", "lm_head")
    assert "not lm_head" in wrong.stderr


SUNG = 110


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """A model, an adapter that has learnt one random song of 110 frames by heart, and the song."""
    root = tmp_path_factory.mktemp("overfit")
    # Wide enough for a random, frozen head to tell 16 codes apart.
    backbone = dataclasses.replace(
        CONFIG.backbone, hidden_size=192, head_dim=48, intermediate_size=128
    )
    model = write_tiny_model(root / "model", dataclasses.replace(CONFIG, backbone=backbone))
    data = write_songs(root / "coded", [SUNG])
    schedule = Schedule(steps=75, batch_size=1, learning_rate=1e-2, warmup=10, validate_every=100)
    with pytest.warns(KhalaWarning):
        chosen = plan(model, data, LoraTraining(schedule, rank=16))
    train_lora(chosen, root / "adapter")
    with np.load(data / "codes" / "s0.npz") as stored:
        return model, root / "adapter", stored["codes"][:2]


def greedy(model: Path, *adapter: Any) -> np.ndarray:
    khala = Khala.from_pretrained(model)
    khala.load_adapters(adapter)
    prompt, _ = khala.prompt_ids(tags="pop", lyrics="do re")
    return khala.compose(prompt, max_frames=SUNG, top_k=1)


@pytest.mark.extended
def test_one_song_is_learnt_by_heart_and_sung_back(
    learnt: tuple[Path, Path, np.ndarray],
) -> None:
    model, adapter, song = learnt
    assert log(adapter)[-1]["loss"] < 0.05
    sung = greedy(model, adapter)
    # 220 tokens, and the end was learnt, too.
    assert np.array_equal(sung, song)
    base = Khala.from_pretrained(model)
    prompt, _ = base.prompt_ids(tags="pop", lyrics="do re")
    assert not np.array_equal(
        base.compose(prompt, max_frames=9, min_frames=9, top_k=1), song[:, :9]
    )


def test_saved_fused_exported_and_imported_it_sings_the_same(
    learnt: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    model, adapter, song = learnt
    export_adapter(read_adapter(adapter), tmp_path / "peft", "peft")
    export_adapter(read_adapter(tmp_path / "peft"), tmp_path / "mlx", "mlx")
    for path in (tmp_path / "peft", tmp_path / "mlx"):
        assert np.array_equal(greedy(model, read_adapter(path)), song)
    fuse(model, [(read_adapter(adapter), 1.0)], tmp_path / "fused")
    assert np.array_equal(greedy(tmp_path / "fused"), song)
    with pytest.raises(KhalaError, match="another backbone"):
        greedy(tmp_path / "fused", adapter)
