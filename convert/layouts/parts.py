"""What a reader of any layout hands over: a part of the model under the model folder's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from khala_mlx.config import (
    BackboneConfig,
    CodecConfig,
    KhalaConfig,
    SuperResConfig,
    TokenLayout,
    TransformerConfig,
)
from khala_mlx.convert.formats.tensors import Tensor, require_float
from khala_mlx.errors import ConvertError, KhalaError
from khala_mlx.text import listed, shown


class Checkpoint(Protocol):
    """Named tensors; only some of them may be opened."""

    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...


class Held:
    """Tensors at hand as a Checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.names = sorted(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


PartConfig = TypeVar("PartConfig", bound=TransformerConfig | CodecConfig, covariant=True)


@dataclass(frozen=True)
class Part(Generic[PartConfig]):
    """One of backbone, superres and codec.

    `tensors` has exactly the model folder's names and shapes; `ignored` names what is left out on
    purpose, `unused` what nothing here knows; `files` was read beside the tensors' own files;
    `root` is the folder of them all, where it is not the source's.
    """

    name: str
    config: PartConfig
    tensors: dict[str, Tensor]
    unused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    dropped_rows: int = 0
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    root: Path | None = None


@dataclass(frozen=True)
class Opened:
    """A whole source. `config` is what it says itself, if it is in this package's own form."""

    layout: str
    backbone: Part[BackboneConfig]
    superres: Part[SuperResConfig]
    codec: Part[CodecConfig]
    config: KhalaConfig | None = None

    @property
    def parts(self) -> tuple[Part[TransformerConfig | CodecConfig], ...]:
        return self.backbone, self.superres, self.codec


def token_layout(codec: CodecConfig) -> TokenLayout:
    """The released ids, for the codec at hand."""
    return TokenLayout(codebook_size=codec.codebook_size, num_codebooks=codec.num_codebooks)


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Say in every error which part it is about: the tensors of both transformers are namesakes."""
    try:
        yield
    except KhalaError as error:
        raise ConvertError(f"{part}: {error}") from error


def require_names(wanted: Iterable[str], there: Iterable[str]) -> None:
    """Refuse a source that is missing tensors, naming each."""
    have = set(there)
    if missing := [name for name in wanted if name not in have]:
        raise ConvertError(f"{len(missing)} tensors are missing: {listed(missing)}.")


def require_shapes(wrong: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
    """Refuse misshapen tensors given as (name, shape, expected shape), naming each."""
    told = [f"{shown(name)} {list(is_)} instead of {list(wanted)}" for name, is_, wanted in wrong]
    if told:
        raise ConvertError(f"{len(told)} tensors are misshapen: {listed(told)}.")


def require_floats(tensors: Iterable[Tensor]) -> None:
    """Refuse tensors of other dtypes than the three that weights come in."""
    for tensor in tensors:
        require_float(tensor)


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many blocks `prefix`0., `prefix`1., ... there are; a gap is an error."""
    found = set()
    for name in names:
        if name.startswith(prefix):
            number = name[len(prefix) :].split(".", 1)[0]
            if number.isascii() and number.isdigit() and len(number) < 9:
                found.add(int(number))
    for expected in range(len(found)):
        if expected not in found:
            raise ConvertError(f"{prefix}{expected} is missing, though higher numbers exist.")
    return len(found)
