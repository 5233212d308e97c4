"""Builds a Codec from upstream's codec checkpoint, without torch and without the converter.

It is a second, plain reading of the file, for the codec's own tests.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from khala_mlx.config import CodecConfig
from khala_mlx.model.codec import Codec

TINY_UPSTREAM = CodecConfig(encoder_dim=4, decoder_dim=3, latent_dim=8)


def load_codec(path: Path) -> Codec:
    """The reference codec of the fixtures, from decoder_weights.pt."""
    state = read_state(path)
    config = TINY_UPSTREAM
    codec = Codec(config)
    books = [state[f"quantizer.embed_{layer}"] for layer in range(config.num_codebooks)]
    weights = [("quantizer.codebooks", np.stack(books))]
    for ours, theirs in _names(config):
        weights += _layer(state, ours, theirs)
    codec.load_weights([(name, mx.array(value)) for name, value in weights], strict=True)
    return codec


def read_state(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a torch.save zip; any other class in its pickle is refused."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]

        class Reader(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                known = {"OrderedDict": OrderedDict, "_rebuild_tensor_v2": _tensor}
                return "float32" if name == "FloatStorage" else known[name]

            def persistent_load(self, pid: Any) -> np.ndarray:
                assert pid[1] == "float32"
                return np.frombuffer(archive.read(f"{root}/data/{pid[2]}"), np.float32)

        with archive.open(f"{root}/data.pkl") as file:
            return dict(Reader(file).load())


def _tensor(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> np.ndarray:
    steps = [4 * step for step in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps)


def _names(config: CodecConfig) -> list[tuple[str, str]]:
    names = [("encoder.conv_in", "encoder.block.0"), ("decoder.conv_in", "decoder.model.0")]
    for i in range(len(config.encoder_strides)):
        ours, theirs = f"encoder.blocks.{i}", f"encoder.block.{i + 1}.block"
        names += [(f"{ours}.snake", f"{theirs}.3"), (f"{ours}.down", f"{theirs}.4")]
        names += _units(ours, theirs, 0)
    for i in range(len(config.decoder_rates)):
        ours, theirs = f"decoder.blocks.{i}", f"decoder.model.{i + 1}.block"
        names += [(f"{ours}.snake", f"{theirs}.0"), (f"{ours}.up", f"{theirs}.1")]
        names += _units(ours, theirs, 2)
    names += [("encoder.snake", "encoder.block.5"), ("encoder.conv_out", "encoder.block.6")]
    return [*names, ("decoder.snake", "decoder.model.5"), ("decoder.conv_out", "decoder.model.6")]


def _units(ours: str, theirs: str, first: int) -> list[tuple[str, str]]:
    parts = ("snake1", "conv1", "snake2", "conv2")
    return [
        (f"{ours}.units.{j}.{part}", f"{theirs}.{first + j}.block.{k}")
        for j in range(3)
        for k, part in enumerate(parts)
    ]


def _layer(state: dict[str, np.ndarray], ours: str, theirs: str) -> list[tuple[str, np.ndarray]]:
    if f"{theirs}.alpha" in state:
        return [(f"{ours}.alpha", state[f"{theirs}.alpha"].reshape(-1))]
    v = state[f"{theirs}.weight_v"].astype(np.float64)
    norm = np.sqrt(np.square(v).sum(axis=(1, 2), keepdims=True))
    weight = state[f"{theirs}.weight_g"] * v / norm
    # Upstream: [O, I, k], and [I, O, k] for a transposed conv. Here: [O, k, I].
    axes = (1, 2, 0) if ours.endswith(".up") else (0, 2, 1)
    folded = np.ascontiguousarray(weight.transpose(axes), dtype=np.float32)
    return [(f"{ours}.weight", folded), (f"{ours}.bias", state[f"{theirs}.bias"])]
