"""Official-looking checkpoints written without torch: the converter's rules, run backwards.

A pickle is assembled opcode by opcode, so that it can name torch's, Megatron's or a villain's
functions without any of them being there.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.errors import KhalaError

MARKER = "khala-was-here"


def works_or_says_why(action: Callable[[], object]) -> None:
    """Whatever the input, there is a result or one line for the user."""
    message = ""
    try:
        action()
    except KhalaError as error:
        message = str(error)
    assert "\n" not in message


# --- pickles -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """A global."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What `__reduce__` gives: call `function` with `args`."""

    function: Any
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Made:
    """An instance of `cls` with `state`."""

    cls: Any
    state: Any = None


@dataclass(frozen=True)
class Persistent:
    """A persistent id."""

    identity: Any


@dataclass
class Raw:
    """Opcodes as they are."""

    code: bytes


def pickled(value: Any) -> bytes:
    """A protocol 2 pickle of plain data and the classes above."""
    return b"\x80\x02" + _code(value) + b"."


def _code(value: Any) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_code, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_code, value)) + b"e"
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_code(k) + _code(v) for k, v in value.items()) + b"u"
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return _code(value.function) + _code(value.args) + b"R"
    if isinstance(value, Made):
        made = _code(value.cls) + b")\x81"
        return made if value.state is None else made + _code(value.state) + b"b"
    if isinstance(value, Persistent):
        return _code(value.identity) + b"Q"
    if isinstance(value, Raw):
        return value.code
    raise TypeError(type(value))


# --- zips ----------------------------------------------------------------------------------


def zipped(entries: Mapping[str, bytes]) -> bytes:
    """A zip of stored entries, each aligned to 64 bytes as torch does it."""
    body, directory = bytearray(), bytearray()
    for name, data in entries.items():
        title, crc, at = name.encode(), zlib.crc32(data), len(body)
        pad = b"\0" * (-(at + 30 + len(title) + 4) % 64)
        extra = b"FB" + struct.pack("<H", len(pad)) + pad
        sizes = struct.pack("<III", crc, len(data), len(data))
        body += b"PK\x03\x04" + struct.pack("<5H", 0, 0, 0, 0, 0) + sizes
        body += struct.pack("<HH", len(title), len(extra)) + title + extra + data
        directory += b"PK\x01\x02" + struct.pack("<6H", 0, 0, 0, 0, 0, 0) + sizes
        directory += struct.pack("<5HII", len(title), 0, 0, 0, 0, 0, at) + title
    count = len(entries)
    end = struct.pack("<4H2IH", 0, 0, count, count, len(directory), len(body), 0)
    return bytes(body + directory + b"PK\x05\x06" + end)


STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


@dataclass
class Torch:
    """Collects storages while a pickle with tensors is put together."""

    entries: dict[str, bytes] = field(default_factory=dict)

    def tensor(self, values: np.ndarray, dtype: str = "") -> Call:
        """A contiguous tensor of `values`; bfloat16 comes as uint16."""
        strides = [stride // values.itemsize for stride in values.strides]
        return self.view(values, values.shape, strides, dtype or str(values.dtype))

    def view(
        self,
        storage: np.ndarray,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: str,
        offset: int = 0,
    ) -> Call:
        """A tensor as any view of a new storage."""
        key = str(len(self.entries))
        self.entries[f"data/{key}"] = storage.tobytes()
        kind = Name("torch", STORAGES.get(dtype, dtype))
        identity = ("storage", kind, key, "cuda:0", storage.size)
        hooks = Call(Name("collections", "OrderedDict"))
        arguments = (Persistent(identity), offset, tuple(shape), tuple(strides), False, hooks)
        return Call(Name("torch._utils", "_rebuild_tensor_v2"), arguments)

    def saved(self, root: Any, name: str = "archive") -> bytes:
        """What torch.save would write."""
        entries = {"data.pkl": pickled(root), "byteorder": b"little", **self.entries}
        return zipped({f"{name}/{entry}": data for entry, data in entries.items()})


# --- torch_dist ----------------------------------------------------------------------------

META = "torch.distributed.checkpoint.metadata"
Cuts = Mapping[str, Sequence[tuple[tuple[int, ...], tuple[int, ...], str]]]


def write_dist(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    dtype: str,
    cuts: Cuts | None = None,
    **changes: Any,
) -> None:
    """A torch_dist checkpoint; `cuts` gives (offsets, sizes, file) for tensors in pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytearray] = {}
    described: dict[str, Any] = {
        "rng_state/shard_0.0_1.1": Made(Name(META, "BytesStorageMetadata"))
    }
    places: list[tuple[Any, Any]] = []
    for name, values in tensors.items():
        whole = ((0,) * values.ndim, values.shape, "__0_0.distcp")
        pieces = (cuts or {}).get(name, [whole])
        for offsets, sizes, file in pieces:
            where = tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
            torch = Torch()
            data = torch.saved(torch.tensor(np.ascontiguousarray(values[where]), dtype))
            held = files.setdefault(file, bytearray(b"\0" * 3))
            index = Made(
                Name(META, "MetadataIndex"), {"fqn": name, "offset": _size(offsets), "index": 0}
            )
            info = Made(
                Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
                {"relative_path": file, "offset": len(held), "length": len(data)},
            )
            places.append((index, info))
            held += data
        properties = Made(Name(META, "TensorProperties"), (Name("torch", dtype), None, False))
        chunk = Name(META, "ChunkStorageMetadata")
        described[name] = Made(
            Name(META, "TensorStorageMetadata"),
            {
                "properties": properties,
                "size": _size(values.shape),
                "chunks": [
                    Made(chunk, {"offsets": _size(o), "sizes": _size(s)}) for o, s, _ in pieces
                ],
            },
        )
    for file, held in files.items():
        (folder / file).write_bytes(held)
    state = {"state_dict_metadata": described, "planner_data": None, "storage_data": Pairs(places)}
    (folder / ".metadata").write_bytes(pickled(Made(Name(META, "Metadata"), state | changes)))


def _size(shape: Iterable[int]) -> Call:
    return Call(Name("torch", "Size"), (tuple(int(n) for n in shape),))


class Pairs(dict[Any, Any]):
    """A dict whose keys need not hash here."""

    def __init__(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        super().__init__()
        self._pairs = pairs

    def items(self) -> Any:
        return self._pairs


# --- models --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """A model of other sizes than the released one or the oracle's."""

    layers: int = 3
    heads: int = 6
    groups: int = 3
    head_dim: int = 2
    hidden: int = 20
    ffn: int = 36
    encoder_dim: int = 3
    strides: tuple[int, ...] = (2, 12)
    decoder_dim: int = 5
    rates: tuple[int, ...] = (6, 2, 2)
    latent: int = 7
    codebooks: int = 5
    codebook_size: int = 16

    @property
    def vocab(self) -> dict[str, int]:
        """Rows each transformer needs."""
        text = 128256
        return {
            "backbone": text + 2 * self.codebook_size,
            "superres": text + self.codebooks * self.codebook_size,
        }

    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments, as common.pt and the port's JSON hold them."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "group_query_attention": True,
            "num_query_groups": self.groups,
            "kv_channels": self.head_dim,
            "ffn_hidden_size": self.ffn,
            "swiglu": True,
            "norm_epsilon": 1e-5,
            "rotary_base": 10000,
            "rotary_percent": 1.0,
            "seq_length": 16384,
            "add_bias_linear": True,
            "untie_embeddings_and_output_weights": True,
            "normalization": "RMSNorm",
            "position_embedding_type": "rope",
        }


def transformer(sizes: Sizes, part: str, seed: int, padding: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors under the model folder's names; padding rows are loud."""
    rng = np.random.default_rng(seed)
    vocab, hidden = sizes.vocab[part], sizes.hidden
    queries, keys = sizes.heads * sizes.head_dim, sizes.groups * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(sizes.layers):
        at = f"layers.{layer}."
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
        for name, out, into in (
            ("self_attn.q", queries, hidden),
            ("self_attn.k", keys, hidden),
            ("self_attn.v", keys, hidden),
            ("self_attn.o", hidden, queries),
            ("mlp.gate", sizes.ffn, hidden),
            ("mlp.up", sizes.ffn, hidden),
            ("mlp.down", hidden, sizes.ffn),
        ):
            shapes[f"{at}{name}_proj.weight"] = (out, into)
            shapes[f"{at}{name}_proj.bias"] = (out,)
    shapes["norm.weight"] = (hidden,)
    # Values that float16 and bfloat16 hold exactly, so that every dtype is the same model.
    made = {
        name: (rng.integers(-64, 64, shape) / 32).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name in ("embed_tokens.weight", "lm_head.weight"):
        table = np.zeros((vocab, hidden), np.float32)
        table[::97] = rng.integers(-64, 64, table[::97].shape) / 32
        table[-40:] = rng.integers(-64, 64, (40, hidden)) / 32
        made[name] = np.concatenate([table, np.full((padding, hidden), 1000, np.float32)])
    return made


def megatron(sizes: Sizes, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors under Megatron's names, q, k and v fused per group."""
    made = {
        "embedding.word_embeddings.weight": tensors["embed_tokens.weight"],
        "output_layer.weight": tensors["lm_head.weight"],
        "decoder.final_layernorm.weight": tensors["norm.weight"],
    }
    for layer in range(sizes.layers):
        here, there = f"layers.{layer}.", f"decoder.layers.{layer}."
        norm = "layer_norm_weight"
        made[f"{there}self_attention.linear_qkv.{norm}"] = tensors[here + "input_layernorm.weight"]
        made[f"{there}mlp.linear_fc1.{norm}"] = tensors[here + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            q, k, v = (
                np.split(tensors[f"{here}self_attn.{name}_proj.{kind}"], sizes.groups)
                for name in "qkv"
            )
            fused = [part for group in zip(q, k, v, strict=True) for part in group]
            made[f"{there}self_attention.linear_qkv.{kind}"] = np.concatenate(fused)
            for name, target in (
                ("self_attention.linear_proj." + kind, f"self_attn.o_proj.{kind}"),
                (f"mlp.linear_fc1.{kind}_w", f"mlp.gate_proj.{kind}"),
                (f"mlp.linear_fc1.{kind}_v", f"mlp.up_proj.{kind}"),
                (f"mlp.linear_fc2.{kind}", f"mlp.down_proj.{kind}"),
            ):
                made[there + name] = tensors[here + target]
    return made


def vinpolar(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors under the PyTorch port's names."""
    renamed = (
        ("embed_tokens", "embed"),
        ("input_layernorm", "input_norm"),
        ("post_attention_layernorm", "post_attn_norm"),
        ("self_attn", "attn"),
    )
    made = {}
    for name, values in tensors.items():
        for ours, theirs in renamed:
            name = name.replace(ours, theirs)
        made[name] = values
    return made


def codec(sizes: Sizes, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Upstream's generator state dict, and the model folder's tensors it stands for.

    Rows of weight_v hold 1 or -1 four times or once, so that their norms are exact.
    """
    rng = np.random.default_rng(seed)
    theirs: dict[str, np.ndarray] = {}
    ours: dict[str, np.ndarray] = {}

    def conv(here: str, there: str, out: int, into: int, kernel: int, up: bool = False) -> None:
        first, second = (into, out) if up else (out, into)
        v = np.zeros((first, second * kernel), np.float32)
        ones = 4 if second * kernel >= 4 else 1
        for row in v:
            row[rng.choice(len(row), ones, replace=False)] = rng.choice([-1.0, 1.0], ones)
        v = v.reshape(first, second, kernel)
        g = np.exp2(rng.integers(-3, 3, (first, 1, 1))).astype(np.float32)
        bias = rng.standard_normal(out).astype(np.float32)
        theirs[f"{there}.weight_v"], theirs[f"{there}.weight_g"] = v, g
        theirs[f"{there}.bias"] = ours[f"{here}.bias"] = bias
        folded = v * (g / np.float32(np.sqrt(ones)))
        ours[f"{here}.weight"] = folded.transpose((1, 2, 0) if up else (0, 2, 1))

    def snake(here: str, there: str, width: int) -> None:
        alpha = rng.standard_normal(width).astype(np.float32)
        theirs[f"{there}.alpha"], ours[f"{here}.alpha"] = alpha.reshape(1, -1, 1), alpha

    def unit(here: str, there: str, width: int) -> None:
        snake(f"{here}.snake1", f"{there}.block.0", width)
        conv(f"{here}.conv1", f"{there}.block.1", width, width, 7)
        snake(f"{here}.snake2", f"{there}.block.2", width)
        conv(f"{here}.conv2", f"{there}.block.3", width, width, 1)

    width = sizes.encoder_dim
    conv("encoder.conv_in", "encoder.block.0", width, 2, 7)
    for i, stride in enumerate(sizes.strides):
        here, there = f"encoder.blocks.{i}", f"encoder.block.{i + 1}"
        for j in range(3):
            unit(f"{here}.units.{j}", f"{there}.block.{j}", width)
        snake(f"{here}.snake", f"{there}.block.3", width)
        conv(f"{here}.down", f"{there}.block.4", 2 * width, width, 2 * stride)
        width *= 2
    count = len(sizes.strides)
    snake("encoder.snake", f"encoder.block.{count + 1}", width)
    conv("encoder.conv_out", f"encoder.block.{count + 2}", sizes.latent, width, 3)
    books = rng.standard_normal((sizes.codebooks, sizes.codebook_size, sizes.latent))
    ours["quantizer.codebooks"] = books.astype(np.float32)
    for q, book in enumerate(ours["quantizer.codebooks"]):
        at = f"quantizer.vq_layer_{q}._codebook"
        theirs[f"{at}.inited"] = np.ones(1, np.float32)
        theirs[f"{at}.cluster_size"] = np.ones(sizes.codebook_size, np.float32)
        theirs[f"{at}.embed"], theirs[f"{at}.embed_avg"] = book, book * 3
    width = sizes.decoder_dim * 2 ** len(sizes.rates)
    conv("decoder.conv_in", "decoder.model.0", width, sizes.latent, 7)
    for i, rate in enumerate(sizes.rates):
        here, there = f"decoder.blocks.{i}", f"decoder.model.{i + 1}.block"
        snake(f"{here}.snake", f"{there}.0", width)
        conv(f"{here}.up", f"{there}.1", width // 2, width, 2 * rate, up=True)
        width //= 2
        for j in range(3):
            unit(f"{here}.units.{j}", f"{there}.{j + 2}", width)
    count = len(sizes.rates)
    snake("decoder.snake", f"decoder.model.{count + 1}", width)
    conv("decoder.conv_out", f"decoder.model.{count + 2}", 2, width, 7)
    return theirs, ours


# --- whole sources -------------------------------------------------------------------------


def lightning(state: Mapping[str, np.ndarray], **extras: Any) -> bytes:
    """A Lightning checkpoint of the codec with a discriminator and an optimiser."""
    torch = Torch()
    tensors = {f"generator.{name}": torch.tensor(values) for name, values in state.items()}
    tensors["discriminator.mpd.weight"] = torch.tensor(np.ones((3, 4), np.float64), "DoubleStorage")
    root = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": tensors,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.tensor(np.ones(3, np.float32))}}}],
        **extras,
    }
    return torch.saved(root, "dac_rvq_1")


def common(arguments: Mapping[str, Any], **extras: Any) -> bytes:
    """common.pt: Megatron's arguments, with an enum and a dtype among them."""
    enum = Call(Name("megatron.core.transformer.enums", "AttnBackend"), (5,))
    values = {**arguments, "attention_backend": enum, "params_dtype": Name("torch", "float16")}
    namespace = Made(Name("argparse", "Namespace"), values)
    return Torch().saved({"args": namespace, "iteration": 7, **extras}, "common")


DTYPES = {"float32": np.float32, "float16": np.float16}


def carried(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values, exactly representable, as `dtype` travels in NumPy."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(DTYPES[dtype])


def write_megatron(
    root: Path,
    sizes: Sizes,
    *,
    dtype: str = "float16",
    cuts: Mapping[str, Cuts] | None = None,
    padding: int = 96,
) -> dict[str, dict[str, np.ndarray]]:
    """A source in upstream's layout; returns what it stands for, unpadded."""
    expected = {}
    for seed, (part, folder) in enumerate(
        (("backbone", "backbone"), ("superres", "superresolution"))
    ):
        tensors = transformer(sizes, part, seed, padding)
        there = root / folder / "iter_0000007"
        named = {k: carried(v, dtype) for k, v in megatron(sizes, tensors).items()}
        write_dist(there, named, dtype, (cuts or {}).get(part))
        (there / "common.pt").write_bytes(common(sizes.arguments()))
        (root / folder / "latest_checkpointed_iteration.txt").write_text("7")
        expected[part] = {
            name: values[: sizes.vocab[part]] if values.shape[0] > sizes.vocab[part] else values
            for name, values in tensors.items()
        }
    state, expected["codec"] = codec(sizes, 2)
    (root / "dac_rvq_1.ckpt").write_bytes(lightning(state))
    return expected


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """A safetensors file."""
    code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    header, body = {}, b""
    for name, values in tensors.items():
        data = values.tobytes()
        header[name] = {
            "dtype": code,
            "shape": list(values.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def write_vinpolar(
    root: Path, sizes: Sizes, *, dtype: str = "bfloat16"
) -> dict[str, dict[str, np.ndarray]]:
    """A source in the port's layout, of the same model as write_megatron's."""
    root.mkdir(parents=True, exist_ok=True)
    expected = {}
    for seed, part in enumerate(("backbone", "superres")):
        expected[part] = transformer(sizes, part, seed)
        named = {k: carried(v, dtype) for k, v in vinpolar(expected[part]).items()}
        write_safetensors(root / f"khala_{part}.safetensors", named, dtype)
        (root / f"{part}_megatron_args.json").write_text(json.dumps(sizes.arguments()))
    state, expected["codec"] = codec(sizes, 2)
    torch = Torch()
    tensors = {name: torch.tensor(values) for name, values in state.items()}
    (root / "decoder_weights.pt").write_bytes(torch.saved(tensors, "decoder_weights"))
    return expected


def write_tokenizer(folder: Path, **changes: int) -> Path:
    """A tokenizer.json with Llama 3.1's specials; `changes` move some of them."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|finetune_right_pad_id|>": 128004,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
    }
    free = [token for token in range(128002, 128256) if token not in named.values()]
    named |= {f"<|reserved_special_token_{n}|>": token for n, token in enumerate(free)}
    added = [{"id": token, "content": name} for name, token in (named | changes).items()]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({"added_tokens": added, "model": {"vocab": {"a": 0, "b": 1}}}))
    return path
