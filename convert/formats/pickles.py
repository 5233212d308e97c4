"""Pickles read without running them: a stack machine that imports and calls nothing.

It knows the encoding and its dangers; what names and calls mean is in inert.py.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from khala_mlx.convert.formats.pickle_objects import (
    Global,
    Object,
    Storage,
    TensorRef,
    call,
    persistent,
)
from khala_mlx.errors import ConvertError
from khala_mlx.text import shown

# The oracle's .metadata takes 7 KB and 2,600 opcodes per layer. A hostile file gets at most
# some 200 bytes of Python objects out of an opcode, so memory stays bounded too.
MAX_BYTES = 64 << 20
MAX_OPCODES = 4_000_000

_MARK = object()
_SCALARS = (str, int, float, bytes, bool, type(None), Global, Object, Storage, TensorRef)


def loads(data: bytes, what: str) -> Any:
    """The plain data in a pickle; `what` names the file in errors.

    Raises:
        ConvertError: if it is malformed or too large.
    """
    if len(data) > MAX_BYTES:
        raise ConvertError(f"{what} holds a pickle of {len(data)} bytes, too large to be Khala's.")
    try:
        return _Machine(what).run(data)
    except ConvertError:
        raise
    except Exception as error:
        # Whatever a malformed pickle trips over, a short stack or bad UTF-8, means one thing.
        raise ConvertError(f"{what} holds no readable pickle; the file is damaged.") from error


class _Machine:
    """The stack and the memo; one method or line per opcode."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > MAX_OPCODES:
                raise ConvertError(f"{self.what} holds a pickle too long to be Khala's.")
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _LITERALS:
                self.stack.append(argument)
            elif opcode.name in _MAKERS:
                self.stack.append(_MAKERS[opcode.name]())
            else:
                _STEPS[opcode.name](self, argument)
        raise ValueError("no STOP")

    def to_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise ValueError("no MARK")
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise ValueError("short stack")
        self.stack[-count:] = [items]

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target.items if isinstance(target, Object) else target).extend(values)

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        if isinstance(target, Object):
            target.items.extend(pairs)
            return
        for key, value in pairs:
            if isinstance(key, str) and key in target:
                raise ConvertError(f"{self.what} holds {shown(key)} twice.")
            target[_key(key)] = value

    def dictionary(self) -> None:
        flat = self.to_mark()
        self.stack.append({})
        self.set_items(flat)

    def unordered(self) -> None:
        made = Object("set")
        made.items = self.to_mark()
        self.stack.append(made)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        known = isinstance(name, str) and isinstance(module, str)
        # Joined again for every use, so two long strings could fill the memory.
        short = known and len(module) + len(name) <= 1000
        self.stack.append(Global(f"{module}.{name}" if short else "?"))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack.append(call(self.stack.pop(), arguments))

    def reduce_with_keywords(self) -> None:
        self.stack.pop()
        self.reduce()

    def obj(self) -> None:
        callee, *arguments = self.to_mark()
        self.stack.append(call(callee, tuple(arguments)))

    def build(self) -> None:
        state = self.stack.pop()
        # State of anything else, such as the attributes of an OrderedDict, has no use here.
        if isinstance(self.stack[-1], Object):
            self.stack[-1].state = state

    def refuse(self) -> None:
        raise ConvertError(f"{self.what} holds a pickle with buffers or extension codes.")


def _key(key: Any) -> Any:
    # Hashing a deep tuple overflows the C stack, a wide nested one takes forever: keys are flat.
    flat = isinstance(key, tuple) and all(isinstance(item, _SCALARS) for item in key)
    return key if flat or isinstance(key, _SCALARS) else Object("key", (key,))


_LITERALS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)

_MAKERS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Object("set"),
    "MARK": lambda: _MARK,
}


def _dotted(name: str) -> Global:
    return Global(name.replace(" ", ".", 1))


_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.to_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.to_mark())),
    "LIST": lambda m, _: m.stack.append(m.to_mark()),
    "DICT": lambda m, _: m.dictionary(),
    "FROZENSET": lambda m, _: m.unordered(),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.to_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.to_mark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.to_mark()),
    "GET": lambda m, slot: m.stack.append(m.memo[slot]),
    "BINGET": lambda m, slot: m.stack.append(m.memo[slot]),
    "LONG_BINGET": lambda m, slot: m.stack.append(m.memo[slot]),
    "PUT": lambda m, slot: m.memo.__setitem__(slot, m.stack[-1]),
    "BINPUT": lambda m, slot: m.memo.__setitem__(slot, m.stack[-1]),
    "LONG_BINPUT": lambda m, slot: m.memo.__setitem__(slot, m.stack[-1]),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "GLOBAL": lambda m, name: m.stack.append(_dotted(name)),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "INST": lambda m, name: m.stack.append(call(_dotted(name), tuple(m.to_mark()))),
    "OBJ": lambda m, _: m.obj(),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.reduce(),
    "NEWOBJ_EX": lambda m, _: m.reduce_with_keywords(),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, name: m.stack.append(persistent(name)),
    "BINPERSID": lambda m, _: m.stack.append(persistent(m.stack.pop())),
    "EXT1": lambda m, _: m.refuse(),
    "EXT2": lambda m, _: m.refuse(),
    "EXT4": lambda m, _: m.refuse(),
    "NEXT_BUFFER": lambda m, _: m.refuse(),
    "READONLY_BUFFER": lambda m, _: m.refuse(),
}
