"""Which matrix is quantized to how many bits: one choice for all, and others for some parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from khala_mlx.config import Quantization
from khala_mlx.errors import ConvertError
from khala_mlx.text import shown

# What --quantize says, and the group sizes the affine modes have; the others have groups of 32.
CHOICES = ("4", "6", "8", "mxfp4", "mxfp8")
GROUP_SIZES = (32, 64, 128)
_MODES = {"mxfp4": Quantization(4, 32, "mxfp4"), "mxfp8": Quantization(8, 32, "mxfp8")}
# What can be chosen apart from the rest: the kinds of matrices, and all of superres.
PARTS = ("embedding", "head", "body", "superres")
_KINDS = {"embed_tokens": "embedding", "lm_head": "head"}
NONE = "none"


@dataclass(frozen=True)
class Recipe:
    """How matrices are quantized; None leaves them as they are. The codec is never quantized.

    With `layers`, by their names in config.json, those are quantized and nothing else.
    """

    default: Quantization | None = None
    parts: Mapping[str, Quantization | None] = field(default_factory=dict)
    layers: Mapping[str, Quantization] = field(default_factory=dict)

    def how(self, part: str, name: str, shape: tuple[int, ...]) -> Quantization | None:
        """How the tensor `name` of `part` is quantized: a matrix whose rows divide into groups."""
        chosen = self._chosen(part, name)
        if chosen is None or len(shape) != 2 or shape[1] % chosen.group_size:
            return None
        return chosen

    def _chosen(self, part: str, name: str) -> Quantization | None:
        if self.layers:
            return self.layers.get(f"{part}.{name.removesuffix('.weight')}")
        kind = _KINDS.get(name.split(".")[0], "body")
        chosen = self.parts.get(kind, self.default)
        return self.parts.get("superres", chosen) if part == "superres" else chosen

    def __bool__(self) -> bool:
        return any(how is not None for how in self._asked)

    @property
    def group_sizes(self) -> list[int]:
        """Every group size that is asked for, rising."""
        return sorted({how.group_size for how in self._asked if how is not None})

    @property
    def _asked(self) -> tuple[Quantization | None, ...]:
        return self.default, *self.parts.values(), *self.layers.values()


def recipe(
    quantize: str | int | None,
    group_size: int,
    parts: Mapping[str, str | int] | None,
    layers: Mapping[str, Quantization] | None = None,
) -> Recipe:
    """A recipe from what a user says.

    Raises:
        ConvertError: for a quantization, a part or a group size there is none of, or for `layers`
            beside anything else.
    """
    if layers:
        if quantize is not None or parts:
            raise ConvertError(
                "Either every layer is quantized by its name or by a rule, not both."
            )
        return Recipe(layers=dict(layers))
    if group_size not in GROUP_SIZES:
        raise ConvertError(
            f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got "
            f"{shown(group_size)}."
        )
    if unknown := sorted(set(parts or {}) - set(PARTS)):
        raise ConvertError(
            f"What is quantized apart must be one of {', '.join(PARTS)}, got {shown(unknown[0])}."
        )
    return Recipe(
        None if quantize is None else _chosen(quantize, group_size),
        {part: _chosen(value, group_size) for part, value in (parts or {}).items()},
    )


def _chosen(value: str | int, group_size: int) -> Quantization | None:
    if value == NONE:
        return None
    if str(value) not in CHOICES:
        raise ConvertError(f"quantize must be one of {', '.join(CHOICES)}, got {shown(value)}.")
    return _MODES.get(str(value)) or Quantization(int(value), group_size)
