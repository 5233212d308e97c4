import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from khala_mlx import Khala
from khala_mlx.cli import main
from khala_mlx.errors import KhalaError
from khala_mlx.quality import goldens


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def test_a_model_agrees_with_itself(folder: Path) -> None:
    khala = Khala.from_pretrained(folder)
    before = khala.parts.fingerprint
    goldens.record(khala)
    assert khala.parts.fingerprint == before
    told = goldens.check(Khala.from_pretrained(folder))
    assert told["backbone_equal"] == told["superres_equal"] == 1
    assert max(told["backbone_nats"], told["superres_nats"]) < 1e-4
    assert told["codec_snr_db"] == 200
    assert told["holds"]
    with pytest.raises(KhalaError, match="exists already"):
        goldens.record(khala)


def zeroed(*modules: Any) -> None:
    for module in modules:
        module.apply(mx.zeros_like)


def attention_zeroed(khala: Khala, part: str) -> None:
    zeroed(getattr(khala, part).layers[2].self_attn.o_proj)


def heads_exchanged(khala: Khala, part: str) -> None:
    query = getattr(khala, part).layers[2].self_attn.q_proj
    query.weight = mx.roll(query.weight, getattr(khala.config, part).head_dim, axis=0)


def other_rope_base(khala: Khala, part: str) -> None:
    sizes = getattr(khala.config, part)
    khala.parts.config = replace(
        khala.config, **{part: replace(sizes, rope_base=50 * sizes.rope_base)}
    )


def noise(khala: Khala, part: str) -> None:
    # As a wrong kernel would.
    key = mx.random.key(3)
    change = lambda x: mx.random.normal(x.shape, key=key) if x.ndim > 1 else x  # noqa: E731
    getattr(khala, part).apply(change)


def unit_zeroed(khala: Khala, part: str) -> None:
    zeroed(getattr(khala, part).decoder.blocks[1].units[1].conv2)


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        *product(
            ("backbone", "superres"),
            (attention_zeroed, heads_exchanged, other_rope_base, noise),
        ),
        ("codec", unit_zeroed),
        ("codec", noise),
    ],
)
def test_damage_is_found(part: str, damage: Callable[[Khala, str], None]) -> None:
    """On the bundled demo model; the parts that are whole are not blamed."""
    khala = Khala.from_pretrained("demo")
    damage(khala, part)
    told = goldens.check(khala)
    assert not told["holds"]
    # All figures but those of the damaged part are good.
    good = {"backbone_equal": 1, "superres_equal": 1, "backbone_nats": 0, "superres_nats": 0}
    mended = {name: good.get(name, 99) for name in told if name.startswith(part)}
    assert goldens.holds({**told, **mended})


def test_numbers_that_are_none_do_not_hold(tiny_folder: Path) -> None:
    golden = np.log(np.full((3, 4), 0.25))
    assert goldens._distance(golden, golden * np.nan) == (0.0, math.inf)
    assert goldens._distance(golden, golden[:2]) == (0.0, math.inf)


def test_exchanged_scales_are_found(tmp_path: Path) -> None:
    """Of a quantized matrix, as a converter that mixes up two of them would leave them."""
    folder = tmp_path / "model"
    shutil.copytree(Khala.from_pretrained("demo").parts.folder, folder)
    tensors = mx.load(str(folder / "superres.safetensors"))
    one, other = (f"layers.1.self_attn.{name}_proj.scales" for name in ("q", "o"))
    assert tensors[one].shape == tensors[other].shape
    tensors[one], tensors[other] = tensors[other], tensors[one]
    # Read before the file they lie in is replaced.
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "superres.safetensors"), tensors)
    khala = Khala.from_pretrained(folder)
    khala.parts.fingerprint = Khala.from_pretrained("demo").parts.fingerprint
    told = goldens.check(khala)
    assert not told["holds"]
    assert told["superres_nats"] > goldens.MOST_NATS["superres"]


def test_the_command(folder: Path) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, ["models", "verify", str(folder), *arguments])
        return result.exit_code, result.stdout, result.stderr

    code, _, errors = run()
    assert code == 1
    assert "has no stored reference outputs" in errors
    assert run("--record")[0] == 0
    code, told, _ = run("--json")
    assert code == 0
    assert json.loads(told)["holds"]
    (folder / goldens.FILE).write_bytes(b"\xff" * 99)
    code, _, errors = run()
    assert code == 1
    assert "damaged" in errors
    assert "Traceback" not in errors


def test_goldens_of_other_weights(folder: Path, tmp_path: Path) -> None:
    from tiny_model import write_tiny_model

    goldens.record(Khala.from_pretrained(folder))
    other = write_tiny_model(tmp_path / "other", seed=5)
    shutil.copy(folder / goldens.FILE, other / goldens.FILE)
    with pytest.raises(KhalaError, match="of other weights"):
        goldens.check(Khala.from_pretrained(other))


DAMAGES: list[dict[str, Callable[[np.ndarray], np.ndarray]]] = [
    {"backbone": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.nan, x)},
    {"superres": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, -np.inf, x)},
    {"backbone": lambda x: x[:5]},
    {"backbone_ids": lambda x: x[None]},
    {"backbone_ids": lambda x: x[:0]},
    {"codes": lambda x: np.tile(x, (1, 3000))},
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_goldens_never_hold(
    folder: Path, damage: dict[str, Callable[[np.ndarray], np.ndarray]]
) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    khala = Khala.from_pretrained(folder)
    path = goldens.record(khala)
    with safe_open(path, framework="np") as file:
        about = file.metadata()
    arrays = load_file(path)
    changed = {name: np.ascontiguousarray(of(arrays[name])) for name, of in damage.items()}
    kept = {name: a.astype(arrays[name].dtype) for name, a in changed.items()}
    save_file({**arrays, **kept}, path, about)
    with pytest.raises(KhalaError, match="is damaged"):
        goldens.check(khala)
