"""Apply LoRA and DoRA adapters to the linear layers of a backbone, and remove them.

mlx-lm's LoRALinear does the work. Any number of adapters become one pair of matrices per layer:
their ranks are concatenated and their scales multiplied in.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from khala_mlx.config import KhalaConfig
from khala_mlx.errors import KhalaError
from khala_mlx.model.cache import file_limit_kept
from khala_mlx.model.transformer import Transformer, matrix
from khala_mlx.storage.adapter import Adapter, Extent, Pair

Layers = list[tuple[str, nn.Module]]


class Adapters:
    """The adapters chosen for a backbone, and the model they are applied to."""

    def __init__(self) -> None:
        self.chosen: list[tuple[Adapter, float]] = []
        self._model: Transformer | None = None
        self._replaced: Layers = []

    def choose(
        self,
        config: KhalaConfig,
        adapters: Sequence[str | Path | Adapter],
        scales: Sequence[float] | None,
    ) -> None:
        """Replace the chosen adapters; if one does not fit, nothing changes.

        Raises:
            KhalaError: if an adapter cannot be read or does not fit, or a scale is not a number.
        """
        if isinstance(adapters, (str, Path, Adapter)):
            raise KhalaError("adapters must be a list, also for one adapter.")
        loaded = [a if isinstance(a, Adapter) else Adapter.load(Path(a)) for a in adapters]
        chosen = list(zip(loaded, _strengths(scales, len(loaded)), strict=True))
        for adapter, strength in chosen:
            adapter.check(config, strength)
        model = self._model
        self.leave()
        self.chosen = chosen
        if model is not None:
            self.enter(model)

    def enter(self, model: Transformer) -> None:
        """Apply the chosen adapters to `model`, unless they are applied already."""
        if self._model is not model:
            self._model, self._replaced = model, put_on(model, self.chosen)

    def leave(self) -> None:
        """Remove the adapters from their model, and forget the model."""
        if self._model is not None:
            _replace(self._model, self._replaced)
        self._model, self._replaced = None, []

    @property
    def extent(self) -> Extent:
        """The size of what they add to the backbone together, without those of strength 0."""
        each = [adapter.extent for adapter, strength in self.chosen if strength]
        return Extent(
            sum(extent.parameters for extent in each),
            max((extent.widest for extent in each), default=0),
            any(extent.dora for extent in each),
        )

    def summary(self) -> list[dict[str, Any]]:
        """Return name, sha256 and scale of each adapter, for the record of a song."""
        return [
            {"name": adapter.name, "sha256": adapter.sha256, "scale": strength}
            for adapter, strength in self.chosen
        ]


def _strengths(scales: Sequence[float] | None, count: int) -> list[float]:
    if scales is None:
        return [1.0] * count
    if not isinstance(scales, Sized):
        raise KhalaError("scales must be a list with one number for each adapter.")
    if len(scales) != count:
        raise KhalaError(f"There are {count} adapters, but {len(scales)} scales. Give one each.")
    for scale in scales:
        number = isinstance(scale, (int, float, np.number)) and not isinstance(scale, bool)
        if not number or not math.isfinite(scale):
            raise KhalaError(f"An adapter's scale must be a finite number, got {scale!r}.")
    return [float(scale) for scale in scales]


class Stretched(nn.Module):
    """A linear layer whose outputs, without the bias, DoRA scales by 1 + gain.

    A `gain` [out] of 0 changes no bit.
    """

    def __init__(self, linear: nn.Module, gain: mx.array) -> None:
        super().__init__()
        self.linear, self.gain = linear, gain

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        plain = y - self.linear.bias if "bias" in self.linear else y
        return y + (self.gain * plain).astype(y.dtype)


def put_on(model: Transformer, adapters: Sequence[tuple[Adapter, float]]) -> Layers:
    """Apply adapters, each with its strength, to a model that has none.

    They must fit (see Adapter.check). Those of strength 0 are skipped.

    Returns:
        The layers that were replaced; putting them back restores the model bit by bit.
    """
    shares: dict[str, list[tuple[Pair, float, float]]] = defaultdict(list)
    for adapter, strength in adapters:
        if strength:
            for path, pair in adapter.pairs.items():
                shares[path].append((pair, adapter.scale, strength))
    layers = dict(model.named_modules())
    replaced = [(path, layers[path]) for path in shares]
    adapted = []
    for path, layer in replaced:
        adapted.append((path, _adapted(layer, shares[path])))
        # Evaluated now, so that errors and memory use do not come in the middle of a song, and one
        # by one: DoRA needs its layer's matrix in float32, dequantized, for a while.
        mx.eval(adapted[-1][1].parameters())
    _replace(model, adapted)
    return replaced


def _replace(model: Transformer, layers: Layers) -> None:
    if layers:
        model.update_modules(tree_unflatten(layers))
        model.eval()


def _adapted(linear: nn.Module, shares: Sequence[tuple[Pair, float, float]]) -> nn.Module:
    """Return a linear layer with each (pair, scale, strength) applied to it."""
    with file_limit_kept():
        from mlx_lm.tuner.lora import LoRALinear
    gains = [_gain(linear, pair, scale) for pair, scale, _ in shares]
    downs = [pair.a for pair, _, _ in shares]
    ups = []
    for (pair, scale, strength), gain in zip(shares, gains, strict=True):
        up = mx.array(pair.b) * (scale * strength)
        ups.append(up if gain is None else up * (1 + gain))
    layer = LoRALinear(1, 1, r=1, scale=1.0)
    layer.lora_a, layer.lora_b = mx.array(np.concatenate(downs, axis=1)), mx.concatenate(ups)
    stretch = [s * gain for (_, _, s), gain in zip(shares, gains, strict=True) if gain is not None]
    layer.linear = Stretched(linear, sum(stretch[1:], stretch[0])) if stretch else linear
    return layer


def _gain(linear: nn.Module, pair: Pair, scale: float) -> Any:
    """Return the relative change of the norm of each row [out] in DoRA; None for LoRA."""
    if pair.m is None:
        return None
    changed = matrix(linear).astype(mx.float32) + (mx.array(pair.a) @ mx.array(pair.b * scale)).T
    return mx.array(pair.m) / mx.linalg.norm(changed, axis=1) - 1
