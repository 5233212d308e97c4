"""All sizes and token ids of a model, as frozen and strict dataclasses.

The defaults are the released Khala (docs/released-model.md gives the source of each number);
`tiny()` builds the same shapes small enough for a test. No other module contains a released size
or token id.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

from khala_mlx.errors import ConfigError, KhalaError
from khala_mlx.text import listed, shown

MODEL_TYPE = "khala"
FORMAT_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")
WEIGHTS_LICENCE = "CC BY-NC 4.0"
# The linear layers of a block, in the order in which published adapters number them.
ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION_LINEARS, "gate_proj", "up_proj", "down_proj")
# The DAC family fixes these sizes of the codec; strides and widths are in CodecConfig.
DILATIONS = (1, 3, 9)
KERNEL = 7
LATENT_KERNEL = 3


class Strict:
    """Adds from_dict and to_dict to frozen dataclasses; wrong keys and types are errors."""

    @classmethod
    def from_dict(cls, data: Any, where: str = "config.json") -> Self:
        return _parse(cls, data, where)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts and scalars, ready for JSON."""
        result: dict[str, Any] = _plain(self)
        return result

    def check_types(self, where: str) -> None:
        """Raise ConfigError if a value is not of its field's type; int is allowed for float."""
        for name, hint in typing.get_type_hints(type(self)).items():
            checked = _value(hint, getattr(self, name), f"{where}: {name}")
            object.__setattr__(self, name, checked)


@dataclass(frozen=True)
class SpecialTokens(Strict):
    """Names of the special tokens in a prompt; the tokenizer gives their ids."""

    begin: str = "<|begin_of_text|>"
    separator: str = "<|eom_id|>"
    lyrics: str = "<|start_header_id|>"
    newline: str = "<|end_header_id|>"
    minutes: str = "<|reserved_special_token_{minutes}|>"
    end: str = "<|eot_id|>"
    audio: str = "<|python_tag|>"

    def __post_init__(self) -> None:
        if "{minutes}" not in self.minutes:
            raise ConfigError("tokens.specials.minutes must contain {minutes}.")


@dataclass(frozen=True)
class TokenLayout(Strict):
    """The id space of both language models: text first, then each codebook.

    Code c of codebook q has the id `audio_start + codebook_size * q + c`. The superres task marker
    of codebook q is `marker_base - q`, an id inside the text range.
    """

    audio_start: int = 128256
    codebook_size: int = 1024
    num_codebooks: int = 64
    num_coarse: int = 2
    end_of_song: int = 128001
    padding: int = 128004
    marker_base: int = 128255
    max_minutes: int = 10
    specials: SpecialTokens = field(default_factory=SpecialTokens)

    def __post_init__(self) -> None:
        _check_sizes(
            self, "audio_start", "codebook_size", "num_codebooks", "num_coarse", "max_minutes"
        )
        if self.num_coarse >= self.num_codebooks:
            raise ConfigError("tokens.num_coarse must be below tokens.num_codebooks.")
        for name, lowest in (
            ("end_of_song", self.end_of_song),
            ("padding", self.padding),
            ("marker_base", self.marker_base - self.num_codebooks + 1),
        ):
            if lowest < 0 or getattr(self, name) >= self.audio_start:
                raise ConfigError(f"tokens.{name} must be a text id below audio_start.")

    @property
    def backbone_vocab(self) -> int:
        """Rows of the backbone's embedding and head: text and the coarse codebooks."""
        return self.audio_start + self.codebook_size * self.num_coarse

    @property
    def superres_vocab(self) -> int:
        """Rows of the superres embedding and head: text and all codebooks."""
        return self.audio_start + self.codebook_size * self.num_codebooks

    @classmethod
    def tiny(cls) -> TokenLayout:
        """Return a byte-level text vocabulary (256 bytes, 44 specials) and 8 small codebooks."""
        return cls(
            audio_start=300,
            codebook_size=16,
            num_codebooks=8,
            end_of_song=257,
            padding=258,
            marker_base=299,
        )


@dataclass(frozen=True)
class TransformerConfig(Strict):
    """Sizes of a decoder-only transformer; both language models have the same shape.

    `context` is the length of the trained window, in tokens for the backbone and in rows for
    superres. `max_prompt` is the longest prompt in it.
    """

    vocab_size: int
    context: int
    max_prompt: int
    num_layers: int = 24
    hidden_size: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 64
    intermediate_size: int = 5632
    norm_eps: float = 1e-6
    rope_base: float = 500000.0

    def __post_init__(self) -> None:
        _check_sizes(self, *(f.name for f in dataclasses.fields(self)))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("num_heads must be a multiple of num_kv_heads.")
        if self.head_dim % 2:
            raise ConfigError("head_dim must be even: rotary positions rotate pairs.")
        if self.max_prompt >= self.context:
            raise ConfigError("max_prompt must be below context.")


_TINY_BODY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}


@dataclass(frozen=True)
class BackboneConfig(TransformerConfig):
    """The causal model of the coarse codebooks. The trained window is 16384 tokens."""

    vocab_size: int = 130304
    context: int = 16384
    max_prompt: int = 4096

    @classmethod
    def tiny(cls) -> BackboneConfig:
        """Return two narrow layers over the tiny token layout."""
        vocab = TokenLayout.tiny().backbone_vocab
        return cls(vocab_size=vocab, context=512, max_prompt=256, **_TINY_BODY)


@dataclass(frozen=True)
class SuperResConfig(TransformerConfig):
    """The full-attention model of the fine codebooks. The trained window is 8192 rows."""

    vocab_size: int = 193792
    context: int = 8192
    max_prompt: int = 2048

    @classmethod
    def tiny(cls) -> SuperResConfig:
        """Return two narrow layers over the tiny token layout."""
        vocab = TokenLayout.tiny().superres_vocab
        return cls(vocab_size=vocab, context=384, max_prompt=192, **_TINY_BODY)


@dataclass(frozen=True)
class CodecConfig(Strict):
    """A DAC-style codec: strided encoder, residual vector quantizer, upsampling decoder.

    `encoder_dim` is the width after the first encoder conv (it doubles with every block);
    `decoder_dim` the width before the last decoder conv (it starts at 2**blocks times that).
    """

    sample_rate: int = 44100
    channels: int = 2
    encoder_dim: int = 128
    encoder_strides: tuple[int, ...] = (4, 8, 8, 8)
    decoder_dim: int = 192
    decoder_rates: tuple[int, ...] = (8, 8, 8, 4)
    latent_dim: int = 128
    num_codebooks: int = 64
    codebook_size: int = 1024

    def __post_init__(self) -> None:
        _check_sizes(
            self,
            "sample_rate",
            "channels",
            "encoder_dim",
            "decoder_dim",
            "latent_dim",
            "num_codebooks",
            "codebook_size",
        )
        for name in ("encoder_strides", "decoder_rates"):
            values = getattr(self, name)
            if not values or any(v < 2 or v % 2 for v in values):
                raise ConfigError(f"codec.{name} must list even numbers, got {list(values)}.")
        if math.prod(self.encoder_strides) != math.prod(self.decoder_rates):
            raise ConfigError("codec.encoder_strides and decoder_rates must multiply to one hop.")

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.encoder_strides)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop

    @classmethod
    def tiny(cls) -> CodecConfig:
        """Return a codec of hop 128 with 8 codebooks of 16 x 6."""
        layout = TokenLayout.tiny()
        return cls(
            encoder_dim=4,
            encoder_strides=(2, 4, 4, 4),
            decoder_dim=3,
            decoder_rates=(4, 4, 4, 2),
            latent_dim=6,
            num_codebooks=layout.num_codebooks,
            codebook_size=layout.codebook_size,
        )


@dataclass(frozen=True)
class Quantization(Strict):
    """How one tensor is quantized, in MLX's terms."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        _check_sizes(self, "bits", "group_size")


@dataclass(frozen=True)
class KhalaConfig(Strict):
    """A whole model folder. `quantization` maps `part.path.of.layer` to how it is quantized.

    `source` holds provenance as free text (repository, revision, checksums).
    """

    tokens: TokenLayout = field(default_factory=TokenLayout)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    superres: SuperResConfig = field(default_factory=SuperResConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    dtype: str = "bfloat16"
    fc1_bias: str = "double"
    quantization: Mapping[str, Quantization] = field(default_factory=dict)
    licence: str = WEIGHTS_LICENCE
    source: Mapping[str, Any] = field(default_factory=dict)
    model_type: str = MODEL_TYPE
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.model_type != MODEL_TYPE:
            raise ConfigError(f"model_type must be {MODEL_TYPE!r}, got {shown(self.model_type)}.")
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"The model folder has format {self.format_version}, but this version of khala-mlx "
                f"reads format {FORMAT_VERSION}. Convert the model again."
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(self.dtype)}.")
        if self.fc1_bias not in ("double", "single"):
            raise ConfigError(f"fc1_bias must be double or single, got {shown(self.fc1_bias)}.")
        for what, ours, theirs in (
            ("backbone.vocab_size", self.backbone.vocab_size, self.tokens.backbone_vocab),
            ("superres.vocab_size", self.superres.vocab_size, self.tokens.superres_vocab),
            ("codec.codebook_size", self.codec.codebook_size, self.tokens.codebook_size),
            ("codec.num_codebooks", self.codec.num_codebooks, self.tokens.num_codebooks),
        ):
            if ours != theirs:
                raise ConfigError(f"{what} is {ours}, but the token layout has {theirs}.")

    @classmethod
    def tiny(cls) -> KhalaConfig:
        """Return three tiny parts in float32: a whole song takes well under a second."""
        return cls(
            tokens=TokenLayout.tiny(),
            backbone=BackboneConfig.tiny(),
            superres=SuperResConfig.tiny(),
            codec=CodecConfig.tiny(),
            dtype="float32",
        )

    @classmethod
    def load(cls, path: Path) -> KhalaConfig:
        """Read a config.json.

        Raises:
            ConfigError: if it cannot be read, is not a JSON object, or has invalid values.
        """
        return cls.from_dict(read_object(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or raise ConfigError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as why:
        raise ConfigError(f"{path} cannot be read: {why.strerror}.") from why
    except (ValueError, RecursionError) as why:
        raise ConfigError(f"{path} is not valid JSON.") from why
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be an object.")
    return data


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return a whole number, also one of NumPy's, as an int.

    Raises:
        KhalaError: if `value` is not a whole number from `least` to `most`.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise KhalaError(f"{name} must be a whole number {bounds}, got {shown(value)}.")
    return int(value)


def _check_sizes(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (0 < value < 2**31):
            raise ConfigError(f"{name} must be above 0, got {value}.")


def _parse(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be an object.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - set(fields)):
        raise ConfigError(f"{where} has unknown keys: {listed(unknown)}.")
    if missing := sorted(set(fields) - set(data)):
        raise ConfigError(f"{where} is missing keys: {', '.join(missing)}.")
    values = {name: _value(hints[name], value, f"{where}: {name}") for name, value in data.items()}
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _parse(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in args:
            return None
        return _value(next(arg for arg in args if arg is not types.NoneType), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list.")
        return tuple(_value(args[0], item, where) for item in value)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be an object.")
        parsed = {
            key: _value(args[1], item, f"{where}.{shown(key)}") for key, item in value.items()
        }
        return types.MappingProxyType(parsed)
    if hint is Any:
        return value
    if hint in (int, float) and not isinstance(value, bool):
        # NumPy's numbers pass, and whole numbers as floats.
        with suppress(OverflowError):
            value = hint(value) if isinstance(value, Integral if hint is int else Real) else value
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ConfigError(f"{where} must be of type {hint.__name__}, got {shown(repr(value))}.")
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
