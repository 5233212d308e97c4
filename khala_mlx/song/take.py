"""A take: a song, finished or not, as one file with its codes and the record of how it is made.

It knows files and arrays, but no models: the pipeline decides whether a take fits a model.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from khala_mlx.audio.files import SUFFIXES
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.prompt.request import Request
from khala_mlx.storage.atomic import appears_whole
from khala_mlx.text import resuming, shown

SUFFIX = ".take.safetensors"
# The one entry of the file's metadata.
_ENTRY = "khala"
# Stands in `codes` for a codebook that is not made yet.
_ABSENT = -1
# No honest take is larger: 64 codebooks of 6 minutes take 2 MB.
_MOST_BYTES = 1 << 28


def no_codes() -> np.ndarray:
    """Return the codes of a song that is not composed yet, int32 [0, 0]."""
    return np.empty((0, 0), dtype=np.int32)


@dataclass(eq=False)
class Take:
    """A song, finished or not; a take equals only itself.

    Attributes:
        metadata: the content of the sidecar; "request" and "model" are always in it.
        codes: int [k, T], the codebooks made so far; [0, 0] while nothing is composed.
        prefix: int [k, T0], codes of the song that this one continues; [0, 0] if it has none.
        prompts: token ids of the backbone's and the superres prompt; empty if not recorded.
        budget: (most, least) frames it may have; not in the file, but found from the request again.
        num_codebooks: codebooks of a whole song.
        source: the model as the user named it.
        options: how its sound is to be written, named like the command line's options.
    """

    metadata: dict[str, Any]
    codes: np.ndarray = field(default_factory=no_codes)
    prefix: np.ndarray = field(default_factory=no_codes)
    prompts: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    budget: tuple[int, int] = (0, 0)
    num_codebooks: int = 0
    source: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def request(self) -> Request:
        """The request of the song."""
        return Request.from_dict(self.metadata["request"])

    @property
    def codebooks(self) -> int:
        """The number of codebooks made; 0 while nothing is composed."""
        return len(self.codes)

    @property
    def suffix(self) -> str:
        """The suffix of its sound file; .wav unless the take names another."""
        suffix = self.options.get("suffix")
        known = isinstance(suffix, str) and suffix.lower() in SUFFIXES
        return str(suffix) if known else ".wav"

    @property
    def whole(self) -> bool:
        """Whether all codebooks are made, so that only rendering is left."""
        return 0 < self.num_codebooks == self.codebooks

    def check_composed(self, path: Path) -> None:
        """Raise KhalaError if the take of file `path` has no codes yet."""
        if not self.codebooks:
            raise KhalaError(f"{path} has no codes yet. Resume it with `{resuming(path)}`.")

    def set_codes(self, codes: np.ndarray, frame_rate: float) -> None:
        """Set the codes made so far, [k, T] of T / frame_rate seconds."""
        self.codes = codes
        self.metadata["frames"] = codes.shape[1]
        self.metadata["seconds"] = round(codes.shape[1] / frame_rate, 3)

    def credit(self, maker: Take) -> None:
        """Name the model of `maker`, whose codes these are, as the one that made them.

        Any model may render codes, but only the one that started them can continue them.
        """
        ours, theirs = self.metadata["model"], maker.metadata["model"]
        named = {n: v for n, v in theirs.items() if isinstance(v, type(ours.get(n)))}
        self.metadata["model"] = named or ours
        self.metadata["backend"] = maker.metadata["backend"] or self.metadata["backend"]
        self.source = maker.source or self.source
        if maker.prompts != ([], []):
            self.prompts = maker.prompts

    def with_request(self, request: Request) -> Self:
        """Return a copy of this take with another request; the two share no data."""
        other = copy.deepcopy(self)
        other.metadata["request"] = request.to_dict()
        return other

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the take. A killed write leaves the file as it was.

        Raises:
            KhalaError: if the file exists (and `overwrite` is false) or cannot be written.
        """
        with appears_whole(Path(path), overwrite=overwrite) as temporary:
            self.write(temporary)

    def write(self, path: Path) -> None:
        """Write to `path` directly; see `save`."""
        from safetensors.numpy import save

        frames = self.codes.shape[1]
        codes = np.full((max(self.num_codebooks, self.codebooks), frames), _ABSENT, dtype=np.int32)
        codes[: self.codebooks] = self.codes
        arrays = {"codes": codes}
        if coarse := self.metadata.get("num_coarse"):
            arrays["coarse"] = np.ascontiguousarray(codes[:coarse])
        if self.prefix.size:
            arrays["kept"] = np.ascontiguousarray(self.prefix, dtype=np.int32)
        text = {
            **self.metadata,
            "refined_layers": self.codebooks,
            "prompt_ids": dict(zip(("backbone", "superres"), self.prompts, strict=True)),
            "model_given": self.source,
            "options": self.options,
        }
        # Not its save_file, which hides the file from everyone but its owner.
        path.write_bytes(save(arrays, {_ENTRY: json.dumps(text, ensure_ascii=False)}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a take. Its codes are checked to be integers, not to fit a model.

        Raises:
            KhalaError: if the file cannot be read or is not a take.
        """
        path = Path(path)
        arrays, text = _read(path)
        metadata = _metadata(text, path)
        metadata["request"] = _request(metadata, path).to_dict()
        codes = _codes(arrays, "codes", path)
        made = metadata.pop("refined_layers", len(codes))
        if not _is_count(made) or made > len(codes) or (made > 0) != (codes.shape[1] > 0):
            raise _not_a_take(path, "its codes do not match its metadata")
        return cls(
            metadata=metadata,
            codes=codes[:made] if made else no_codes(),
            prefix=_codes(arrays, "kept", path) if "kept" in arrays else no_codes(),
            prompts=_prompts(metadata.pop("prompt_ids", {}), path),
            num_codebooks=len(codes),
            source=_typed(metadata.pop("model_given", ""), str, path),
            options=dict(_typed(metadata.pop("options", {}), dict, path)),
        )


def song_path(take: Path, suffix: str = ".wav") -> Path:
    """song.take.safetensors -> song.wav"""
    return take.with_name(take.name.removesuffix(SUFFIX).removesuffix(".safetensors") + suffix)


def check_same_song(take: Take, fresh: Take, *, strict: bool) -> None:
    """Check that a model can continue `take`; `fresh` is the model's own take of its request.

    Raises:
        KhalaError: if the numbers of codebooks differ or, when `strict`, another model, other
            adapters or another prompt started the take; otherwise that is a KhalaWarning.
    """
    if take.num_codebooks != fresh.num_codebooks:
        raise KhalaError(
            f"The take has {take.num_codebooks} codebooks, but the model has {fresh.num_codebooks}."
        )
    ours, theirs = fresh.metadata["model"], take.metadata["model"]
    if other := _other_maker(ours, theirs):
        if strict:
            raise KhalaError(
                f"The take was started {other}. Name the same with --model and --adapter, or make "
                "new detail with `khala refine`."
            )
        warnings.warn(f"The take was started {other}.", KhalaWarning, stacklevel=4)
        return
    if strict and take.prompts not in (([], []), fresh.prompts):
        raise KhalaError("The take was started with another prompt than that of its request.")
    backends = take.metadata["backend"], fresh.metadata["backend"]
    if theirs.get("dtype", ours["dtype"]) != ours["dtype"] or (
        backends[0] not in ({}, backends[1])
    ):
        warnings.warn(
            "The take was started with another dtype, device or version of MLX. The rest of the "
            "song is as good, but not bit-identical to what it would have been there.",
            KhalaWarning,
            stacklevel=4,
        )


def _other_maker(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Return how a take's model differs from ours; "" if it does not."""
    for what in ("config_sha256", "weights_fingerprint"):
        if what in theirs and theirs[what] != ours[what]:
            return f"by another model ({shown(theirs.get('name'))})"
    if "adapters" in theirs and theirs["adapters"] != ours["adapters"]:
        return "with other adapters"
    return ""


def _read(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Return the arrays of a take and the text in its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _not_a_take(path, "it is too large")
        with safe_open(path, framework="np") as file:
            names = set(file.keys()) & {"codes", "kept"}
            return {n: file.get_tensor(n) for n in names}, (file.metadata() or {}).get(_ENTRY, "")
    except OSError as error:
        raise KhalaError(f"{path} cannot be read: {error.strerror or error}.") from error
    # A type unknown to NumPy is a TypeError, bfloat16 an AttributeError.
    except (SafetensorError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise _not_a_take(path, "it is not a complete safetensors file") from error


def _metadata(text: str, path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_a_take(path, "its metadata is missing") from error
    metadata = _typed(metadata, dict, path)
    metadata["model"] = _typed(metadata.get("model", {}), dict, path)
    metadata["backend"] = _typed(metadata.get("backend", {}), dict, path)
    timings = _typed(metadata.get("timings", {}), dict, path)
    if not all(_is_time(value) for value in timings.values()):
        raise _not_a_take(path, "its timings are not numbers")
    metadata["timings"] = timings
    return metadata


def _request(metadata: dict[str, Any], path: Path) -> Request:
    _typed(metadata.get("request"), dict, path)
    return Request.from_record(metadata, str(path))


def _codes(arrays: Mapping[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    array = arrays.get(name)
    if array is None or array.ndim != 2 or array.dtype.kind not in "iu":
        raise _not_a_take(path, "it has no integer codes [codebooks, frames]")
    if array.size and (array.min() < _ABSENT or array.max() >= 2**31):
        raise _not_a_take(path, "its codes are out of range")
    return array.astype(np.int32)


def _prompts(recorded: Any, path: Path) -> tuple[list[int], list[int]]:
    found = _typed(recorded, dict, path)
    backbone, superres = (
        _typed(found.get(stage, []), list, path) for stage in ("backbone", "superres")
    )
    if not all(_is_count(value) for value in (*backbone, *superres)):
        raise _not_a_take(path, "its prompt ids are not numbers")
    return backbone, superres


def _not_a_take(path: Path, why: str) -> KhalaError:
    return KhalaError(f"{path} is not a Khala take: {why}.")


def _typed(value: Any, wanted: type, path: Path) -> Any:
    if not isinstance(value, wanted):
        raise _not_a_take(path, "its metadata is malformed")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_time(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < 2**53 and math.isfinite(value)
