"""An inert unpickler for the values of BigEarthNet v1: it has no way to import or call anything.

It implements the opcodes that such pickles consist of and accepts the eleven globals that they refer to. Objects become
``InertObject``; pixels are not copied but referenced by their offset. Everything else is rejected. Time and memory are
linear in the value's size: containers hold references, keys are strings (hashing nested tuples can take forever), sets
are lists, and no opcode allocates memory by a number in the value. Source: the opcode descriptions of Python's
``pickletools``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from csmae.data.errors import DamagedValueError

_PACKAGE = "bigearthnet_patch_interface"

BAND_CLASSES = frozenset({"BenS1_Band", "BenS2_10mBand", "BenS2_20mBand", "BenS2_60mBand"})

_CLASSES = {(f"{_PACKAGE}.band_interface", name) for name in BAND_CLASSES} | {
    (f"{_PACKAGE}.merged_interface", "BigEarthNet_S1_S2_Patch"),
    (f"{_PACKAGE}.s1_interface", "BigEarthNet_S1_Patch"),
    (f"{_PACKAGE}.s2_interface", "BigEarthNet_S2_Patch"),
}
_NUMPY = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
}
_ALLOWED_GLOBALS = _CLASSES | _NUMPY

_NEWOBJ_NAMES = frozenset(name for _, name in _CLASSES)
_REDUCE_NAMES = frozenset({"_reconstruct", "_frombuffer", "dtype"})


class ByteRange(NamedTuple):
    """Stands for a bytes object: where its content is in the value."""

    start: int
    size: int


class GlobalName(NamedTuple):
    """Stands for a class or function: its name only."""

    name: str


class InertObject:
    """Stands for an object: the name of its class or function, its arguments and its state."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args
        self.state: Any = None

    @property
    def attributes(self) -> dict[str, Any]:
        """The object's ``__dict__``, whether its class is plain or a model of pydantic 1 or 2."""
        state = self.state if isinstance(self.state, dict) else {}
        inner = state.get("__dict__", state)
        return inner if isinstance(inner, dict) else {}


class Unpickled(NamedTuple):
    """Content of a value."""

    root: Any
    bands: list[InertObject]
    """All band objects of the value."""
    content_ranges: list[tuple[int, int]]
    """Ranges of the value (start, end) that do not affect how the rest is read: contents of bytes, frame lengths."""
    objects_end: int
    """First byte after the last object was created."""


def is_plain_data(value: memoryview, start: int) -> bool:
    """Whether a pickle creates only texts, numbers and containers, but no object, from a byte on."""
    return _PLAIN_DATA.fullmatch(value, start) is not None


def unpickle(value: memoryview) -> Unpickled:
    """Read one value.

    Args:
        value: A pickle of protocol 2 to 5.

    Raises:
        DamagedValueError: The value is not a pickle, or not one of BigEarthNet v1.
    """
    unpickler = _InertUnpickler(value)
    try:
        while (opcode := unpickler.read_uint(1)) != _STOP:
            _OPCODES.get(opcode, _reject)(unpickler)
        return Unpickled(unpickler.stack.pop(), unpickler.bands, unpickler.content_ranges, unpickler.objects_end)
    except DamagedValueError:
        raise
    except (IndexError, KeyError, TypeError, ValueError):
        raise DamagedValueError(f"damaged pickle: invalid content before byte {unpickler.position}") from None


class _InertUnpickler:
    def __init__(self, value: memoryview) -> None:
        self.value = value
        self.position = 0
        self.stack: list[Any] = []
        self.outer_stacks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.bands: list[InertObject] = []
        self.content_ranges: list[tuple[int, int]] = []
        self.objects_end = 0

    def read(self, num_bytes: int) -> bytes:
        start, self.position = self.position, self.position + num_bytes
        if self.position > len(self.value):
            raise IndexError
        return bytes(self.value[start : self.position])

    def read_uint(self, num_bytes: int) -> int:
        return int.from_bytes(self.read(num_bytes), "little")

    def push_text(self, length_bytes: int) -> None:
        self.stack.append(self.read(self.read_uint(length_bytes)).decode())

    def push_bytes(self, length_bytes: int) -> None:
        size = self.read_uint(length_bytes)
        start, self.position = self.position, self.position + size
        if self.position > len(self.value):
            raise IndexError
        self.stack.append(ByteRange(start, size))
        self.content_ranges.append((start, self.position))

    def skip_frame_length(self) -> None:
        self.content_ranges.append((self.position, self.position + 8))
        self.read(8)

    def mark(self) -> None:
        self.outer_stacks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer_stacks.pop()
        return items

    def push_marked_tuple(self) -> None:
        items = tuple(self.pop_mark())
        self.stack.append(items)

    def push_tuple(self, length: int) -> None:
        start = len(self.stack) - length
        if start < 0:
            raise IndexError
        self.stack[start:] = [tuple(self.stack[start:])]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in items[::2]):
            raise TypeError
        target.update(zip(items[::2], items[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError
        self.stack[-1].extend(items)

    def push_global_from_lines(self) -> None:
        for _ in range(2):
            line = bytes(self.value[self.position : self.position + 200]).split(b"\n")[0]
            self.position += len(line) + 1
            self.stack.append(line.decode())
        self.push_global()

    def push_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError
        if (module, name) not in _ALLOWED_GLOBALS:
            raise DamagedValueError(
                f"the pickle refers to the foreign global {f'{module}.{name}'[:100]!r}; it was rejected and nothing was executed"
            )
        self.stack.append(GlobalName(name))

    def push_object(self, allowed: frozenset[str]) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not (isinstance(function, GlobalName) and function.name in allowed and isinstance(args, tuple)):
            raise TypeError
        instance = InertObject(function.name, args)
        if instance.name in BAND_CLASSES:
            self.bands.append(instance)
        self.stack.append(instance)
        self.objects_end = self.position

    def set_state(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], InertObject):
            raise TypeError
        self.stack[-1].state = state

    def memoize(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def push_memo(self, number: int) -> None:
        self.stack.append(self.memo[number])


def _reject(unpickler: _InertUnpickler) -> None:
    raise DamagedValueError(f"not a v1 pickle: unexpected opcode at byte {unpickler.position - 1}")


_STOP = ord(".")

_OPCODES: dict[int, Callable[[_InertUnpickler], object]] = {
    0x80: lambda u: u.read_uint(1),  # PROTO
    0x95: _InertUnpickler.skip_frame_length,  # FRAME
    ord("("): _InertUnpickler.mark,  # MARK
    ord("N"): lambda u: u.stack.append(None),  # NONE
    0x88: lambda u: u.stack.append(True),  # NEWTRUE
    0x89: lambda u: u.stack.append(False),  # NEWFALSE
    ord("K"): lambda u: u.stack.append(u.read_uint(1)),  # BININT1
    ord("M"): lambda u: u.stack.append(u.read_uint(2)),  # BININT2
    ord("J"): lambda u: u.stack.append(int.from_bytes(u.read(4), "little", signed=True)),  # BININT
    0x8C: lambda u: u.push_text(1),  # SHORT_BINUNICODE
    ord("X"): lambda u: u.push_text(4),  # BINUNICODE
    ord("C"): lambda u: u.push_bytes(1),  # SHORT_BINBYTES
    ord("B"): lambda u: u.push_bytes(4),  # BINBYTES
    0x96: lambda u: u.push_bytes(8),  # BYTEARRAY8
    ord("}"): lambda u: u.stack.append({}),  # EMPTY_DICT
    ord("s"): lambda u: u.set_items([u.stack.pop(-2), u.stack.pop()]),  # SETITEM
    ord("u"): lambda u: u.set_items(u.pop_mark()),  # SETITEMS
    ord("]"): lambda u: u.stack.append([]),  # EMPTY_LIST
    0x8F: lambda u: u.stack.append([]),  # EMPTY_SET
    ord("a"): lambda u: u.extend([u.stack.pop()]),  # APPEND
    ord("e"): lambda u: u.extend(u.pop_mark()),  # APPENDS
    0x90: lambda u: u.extend(u.pop_mark()),  # ADDITEMS
    ord(")"): lambda u: u.stack.append(()),  # EMPTY_TUPLE
    0x85: lambda u: u.push_tuple(1),  # TUPLE1
    0x86: lambda u: u.push_tuple(2),  # TUPLE2
    0x87: lambda u: u.push_tuple(3),  # TUPLE3
    ord("t"): _InertUnpickler.push_marked_tuple,  # TUPLE
    0x94: lambda u: u.memoize(len(u.memo)),  # MEMOIZE
    ord("q"): lambda u: u.memoize(u.read_uint(1)),  # BINPUT
    ord("r"): lambda u: u.memoize(u.read_uint(4)),  # LONG_BINPUT
    ord("h"): lambda u: u.push_memo(u.read_uint(1)),  # BINGET
    ord("j"): lambda u: u.push_memo(u.read_uint(4)),  # LONG_BINGET
    ord("c"): _InertUnpickler.push_global_from_lines,  # GLOBAL
    0x93: _InertUnpickler.push_global,  # STACK_GLOBAL
    0x81: lambda u: u.push_object(_NEWOBJ_NAMES),  # NEWOBJ
    ord("R"): lambda u: u.push_object(_REDUCE_NAMES),  # REDUCE
    ord("b"): _InertUnpickler.set_state,  # BUILD
}
"""What each opcode does; all others are rejected."""


_SHORT_TEXTS = b"|".join(re.escape(bytes([length])) + b".{%d}" % length for length in range(256))
_PLAIN_DATA = re.compile(
    b"(?:[]N(saeubt})\x85-\x89\x8f\x90\x94]|[Khq].|M..|[Jrj].{4}|\x8c(?:" + _SHORT_TEXTS + b"))*+\\.", re.DOTALL
)
"""Opcodes that create no object, with their arguments. Possessive: a value that does not match is not backtracked."""
