"""Everything a run needs to continue as if it had never stopped, in one file written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from khala_mlx.errors import KhalaError
from khala_mlx.storage.atomic import appears_whole

FILE = "checkpoint.safetensors"


def save(
    folder: Path,
    step: int,
    weights: dict[str, Any],
    optimizer: optim.Optimizer,
    state: dict[str, mx.array],
    settings: dict[str, Any],
) -> None:
    """Write a tree of weights, the optimiser and `state` as they are after `step` steps."""
    arrays = {
        **{f"model.{name}": array for name, array in tree_flatten(weights)},
        **{f"optimizer.{name}": array for name, array in tree_flatten(optimizer.state)},
        **{f"state.{name}": array for name, array in state.items()},
    }
    about = {"step": str(step), "settings": json.dumps(settings, sort_keys=True)}
    with appears_whole(folder / FILE, overwrite=True) as temporary:
        mx.save_safetensors(str(temporary), arrays, about)


def load(
    folder: Path,
    model: nn.Module,
    weights: dict[str, Any],
    optimizer: optim.Optimizer,
    settings: dict[str, Any],
) -> tuple[int, dict[str, mx.array]]:
    """Fill the `weights` of a model, and the optimiser, from a checkpoint.

    Returns:
        The checkpoint's step and state.

    Raises:
        KhalaError: if there is none, it is damaged, or belongs to other settings.
    """
    path = folder / FILE
    if not path.is_file():
        raise KhalaError(f"{folder} has no checkpoint to resume from.")
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, about = loaded
        # A copy in memory: mx.load is lazy, and this very file is written again later.
        arrays = {name: mx.array(np.array(array)) for name, array in arrays.items()}
        step, made_with = int(about["step"]), json.loads(about["settings"])
        parts: dict[str, dict[str, mx.array]] = {"model": {}, "optimizer": {}, "state": {}}
        for name, array in arrays.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = array
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise KhalaError(f"{path} is not a complete checkpoint.") from error
    if made_with != json.loads(json.dumps(settings)):
        raise KhalaError(f"{path} was made with other settings or songs; resume with the same.")
    if _shapes(parts["model"]) != _shapes(dict(tree_flatten(weights))):
        raise KhalaError(f"{path} holds other weights than this training learns.")
    model.load_weights(list(parts["model"].items()), strict=False)
    optimizer.state = tree_unflatten(list(parts["optimizer"].items()))
    return step, parts["state"]


def _shapes(arrays: dict[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}
