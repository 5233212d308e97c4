"""What a pickle's names and calls become: plain data, never the thing itself.

Every class or function is a `Global` that is never looked up, everything made by calling one an
`Object` that remembers name, arguments and state. Only the names in `_BUILDERS` have a meaning,
each with code of its own here. This file knows torch's pickles, not how a pickle is encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

MOST_AXES = 16


class Global:
    """A class or function by its dotted name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Object:
    """What a pickle would have made by calling `name`."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute of the object, if its state is a plain dict."""
        return self.state.get(attribute, default) if isinstance(self.state, dict) else default


@dataclass(frozen=True, eq=False)
class Storage:
    """A torch storage as a persistent id claims it: nothing is checked against the file yet."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor as a view of a storage, as claimed; offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def call(callee: Any, arguments: Any) -> Any:
    """What calling `callee` stands for."""
    name = callee.name if isinstance(callee, Global) else "?"
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    build = _BUILDERS.get(name)
    made = build(arguments) if build else None
    return Object(name, arguments) if made is None else made


def persistent(identity: Any) -> Storage | Object:
    """torch's persistent ids: ("storage", type, key, location, numel)."""
    if isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage":
        _, kind, key, _, numel = identity
        if isinstance(kind, Global) and isinstance(key, str) and type(numel) is int:
            return Storage(_STORAGES.get(kind.name, kind.name), key, numel)
    return Object("persistent id", (identity,))


def is_shape(value: Any) -> TypeGuard[tuple[int, ...]]:
    """Whether `value` is a short tuple of integers from 0 up, none of absurd size."""
    if not isinstance(value, tuple) or len(value) > MOST_AXES:
        return False
    return all(type(item) is int and 0 <= item < 2**62 for item in value)


def _tensor(arguments: tuple[Any, ...], dtype: str | None = None) -> TensorRef | None:
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        return None
    if not is_shape(shape) or not is_shape(strides) or len(shape) != len(strides):
        return None
    return TensorRef(storage, dtype or storage.dtype, offset, shape, strides)


def _tensor_v3(arguments: tuple[Any, ...]) -> TensorRef | None:
    dtype = arguments[6]
    if not isinstance(dtype, Global):
        return None
    return _tensor(arguments, dtype.name.removeprefix("torch."))


def _from_type(arguments: tuple[Any, ...]) -> Any:
    function, _, inner, _ = arguments
    return call(function, inner)


def _wrapped(arguments: tuple[Any, ...]) -> Any:
    return arguments[0]


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any] | None:
    return None if arguments else {}


def _size(arguments: tuple[Any, ...]) -> Any:
    (sizes,) = arguments
    sizes = tuple(sizes) if isinstance(sizes, list) and len(sizes) <= MOST_AXES else sizes
    return sizes if is_shape(sizes) else None


# A builder's None leaves an inert Object.
_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _wrapped,
    "torch._utils._rebuild_parameter_with_state": _wrapped,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}

_STORAGES = {
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}
