"""Adapters of PEFT: patterns of ranks and strengths, and settings that are left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from khala_mlx import KhalaError
from khala_mlx.config import KhalaConfig
from khala_mlx.convert import read_adapter

CONFIG = KhalaConfig.tiny()
Q, UP = "layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"


def adapter(folder: Path, **settings: Any) -> Path:
    """An adapter of rank 4 on two layers, as PEFT writes it."""
    folder.mkdir()
    sizes, rng = CONFIG.backbone, np.random.default_rng(0)
    widths = {Q: sizes.num_heads * sizes.head_dim, UP: sizes.intermediate_size}
    tensors = {}
    for path, width in widths.items():
        name = f"base_model.model.model.{path}"
        for part, shape in (("A", (4, sizes.hidden_size)), ("B", (width, 4))):
            tensors[f"{name}.lora_{part}.weight"] = rng.normal(size=shape).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    values = {name: value for name, value in values.items() if value != "left out"}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def strength(folder: Path, path: str, plain: Path) -> float:
    """How much stronger a layer is than in the adapter without settings of its own."""
    ours, theirs = (read_adapter(each) for each in (folder, plain))
    change = ours.scale * ours.pairs[path].b
    return float((change / (theirs.scale * theirs.pairs[path].b)).mean())


@pytest.mark.parametrize(
    ("pattern", "q", "up"),
    [
        ({"model.layers.0.self_attn.q_proj": 32}, 4, 1),
        ({"layers.0.self_attn.q_proj": 32}, 4, 1),
        ({"q_proj": 32}, 4, 1),
        ({r".*\.mlp\..*": 16}, 1, 2),
        ({r"layers\.\d+\.self_attn\.(q|k)_proj": 4}, 0.5, 1),
        # The first key that matches counts.
        ({"q_proj": 16, "model.layers.0.self_attn.q_proj": 32}, 2, 1),
        # Only the end of a name.
        ({"layers.0": 32, "proj": 32, "layers.1.self_attn.q_proj": 32}, 1, 1),
    ],
    ids=str,
)
def test_patterns_are_matched_as_peft_matches_them(
    tmp_path: Path, pattern: dict[str, float], q: float, up: float
) -> None:
    plain, other = adapter(tmp_path / "plain"), adapter(tmp_path / "x", alpha_pattern=pattern)
    assert strength(other, Q, plain) == pytest.approx(q)
    assert strength(other, UP, plain) == pytest.approx(up)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({"lora_alpha": "left out"}, 2.0), ({"r": "left out", "lora_alpha": 16}, 4.0)],
)
def test_settings_that_are_left_out_have_pefts_defaults(
    tmp_path: Path, settings: dict[str, Any], scale: float
) -> None:
    """r and lora_alpha are 8; the rank is that of the matrices."""
    plain = adapter(tmp_path / "plain", lora_alpha=4)
    assert strength(adapter(tmp_path / "x", **settings), Q, plain) == pytest.approx(scale)


@pytest.mark.parametrize("key", ["(a+)+$", "(", "x" * 300, "(.*)*y", ".*" * 9])
def test_expressions_that_could_match_for_ever_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(KhalaError, match="not a name of a layer"):
        read_adapter(adapter(tmp_path / "x", alpha_pattern={key: 1}))
