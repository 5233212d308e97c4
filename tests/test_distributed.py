"""Several processes that share work; training one adapter, they have the losses of one alone."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from launching import launched, needs_ring
from tiny_songs import write_songs

from khala_mlx import KhalaError
from khala_mlx.cli import main
from khala_mlx.distributed import Processes
from khala_mlx.storage.adapter import Adapter
from khala_mlx.train.finetune.run import plan, train_lora
from khala_mlx.train.settings import LoraTraining, Schedule

pytestmark = pytest.mark.extended


@needs_ring
def test_two_processes_have_the_losses_of_one(tiny_folder: Path, tmp_path: Path) -> None:
    data = write_songs(tmp_path / "coded", [9, 12, 20, 9, 12, 9, 20], held_out=3)
    # Five batches to a step and three held-out songs: neither can be halved.
    options = [
        "train", "lora", "-m", tiny_folder, "--data", data, "--rank", 4, "--steps", 4,
        "--batch-size", 2, "--grad-accumulation", 5, "--dropout", 0.1, "--learning-rate", 1e-2,
        "--validate-every", 2, "--checkpoint-every", 2, "--json",
    ]  # fmt: skip
    alone = CliRunner().invoke(main, [*map(str, options), "--out", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.stderr
    together = launched(2, *options, "--out", tmp_path / "two")
    assert together.returncode == 0, together.stderr
    # One process reports, and writes.
    told = json.loads(together.stdout)
    assert told["steps"] == 4
    assert together.stderr.count("Memory: about") == 1
    logs = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    assert [entry["step"] for entry in logs[1]] == [0, 1, 2, 3, 4]
    for ours, theirs in zip(*logs, strict=True):
        for name in set(ours) - {"seconds"}:
            # Sums in another order; Adam divides what is left by its size.
            assert theirs[name] == pytest.approx(ours[name], abs=2e-5)
    pairs = [Adapter.load(tmp_path / run).pairs for run in ("one", "two")]
    for path, pair in pairs[0].items():
        assert abs(pair.b - pairs[1][path].b).max() < 1e-3
        assert abs(pair.b).max() > 1e-3


class Group:
    """What mx.distributed would say of one of three processes."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 3


def test_each_takes_its_part_and_one_leads() -> None:
    three = [Processes(Group(rank)) for rank in range(3)]
    assert [each.leads for each in three] == [True, False, False]
    assert sorted(n for each in three for n in range(7)[each.part]) == list(range(7))
    alone = Processes()
    tree = {"a": mx.ones(2)}
    assert alone.summed(tree) is tree
    assert alone.from_leader(tree) is tree
    alone.agree("anything", "nothing")
    assert alone.gathered({"a": [1]}) == [{"a": [1]}]
    assert Processes.launched().size == 1


def test_fewer_batches_than_processes_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    data = write_songs(tmp_path / "coded", [9, 9, 9], held_out=1)
    settings = LoraTraining(Schedule(steps=2, batch_size=1), accumulate=2)
    with pytest.raises(KhalaError, match="take --grad-accumulation 3 or more"):
        train_lora(
            plan(tiny_folder, data, settings), tmp_path / "run", processes=Processes(Group(1))
        )
    assert not (tmp_path / "run").exists()
