"""A machine for the pickles of BigEarthNet v1 that cannot execute anything: it has no way to call.

It knows the opcodes that such pickles are made of and the eleven globals that they name; objects become inert stand-ins,
and the pixels are not copied but pointed at. Whatever else a value holds is refused. Time and memory are linear in the
value's size: containers hold references, keys are strings (hashing nested tuples can take for ever), sets are kept as
lists, and no opcode allocates by a number it names. Source: the opcode descriptions of Python's ``pickletools``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from csmae.data.formats.layout import DamagedValueError

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
_KNOWN = _CLASSES | _NUMPY

_NEW = frozenset(name for _, name in _CLASSES)
_REDUCED = frozenset({"_reconstruct", "_frombuffer", "dtype"})


class Bytes(NamedTuple):
    """Bytes within the value."""

    start: int
    size: int


class Global(NamedTuple):
    """The name of a class or function, and nothing else of it."""

    name: str


class Thing:
    """Stand-in for an object: what it is called, what it was made from, what it was filled with."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...]) -> None:
        self.kind = kind
        self.args = args
        self.state: Any = None

    @property
    def attributes(self) -> dict[str, Any]:
        """What the object's ``__dict__`` would be, under plain classes, pydantic 1 and pydantic 2."""
        state = self.state if isinstance(self.state, dict) else {}
        inner = state.get("__dict__", state)
        return inner if isinstance(inner, dict) else {}


class Unpickled(NamedTuple):
    """What a value holds."""

    root: Any
    bands: list[Thing]
    """Stand-ins of band objects, wherever they hang."""
    variable: list[tuple[int, int]]
    """Ranges of the value (start, end) that do not change how the rest is read: contents of bytes, frame lengths."""
    made: int
    """First byte after the last object was made."""


def names_nothing(value: memoryview, start: int) -> bool:
    """Whether what is left of a pickle, from a byte on, makes texts, numbers and containers only, and no object."""
    return _PLAIN.fullmatch(value, start) is not None


def unpickle(value: memoryview) -> Unpickled:
    """Read one value.

    Args:
        value: A pickle of protocol 2 to 5.

    Raises:
        DamagedValueError: The value is no pickle, or not one of BigEarthNet v1.
    """
    machine = _Machine(value)
    try:
        while (opcode := machine.number(1)) != _STOP:
            _OPCODES.get(opcode, _refuse)(machine)
        return Unpickled(machine.stack.pop(), machine.bands, machine.variable, machine.made)
    except DamagedValueError:
        raise
    except (IndexError, KeyError, TypeError, ValueError):
        raise DamagedValueError(f"damaged pickle: what is before byte {machine.at} cannot be there") from None


class _Machine:
    def __init__(self, value: memoryview) -> None:
        self.value = value
        self.at = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.bands: list[Thing] = []
        self.variable: list[tuple[int, int]] = []
        self.made = 0

    def take(self, num_bytes: int) -> bytes:
        start, self.at = self.at, self.at + num_bytes
        if self.at > len(self.value):
            raise IndexError
        return bytes(self.value[start : self.at])

    def number(self, num_bytes: int) -> int:
        return int.from_bytes(self.take(num_bytes), "little")

    def integer(self) -> None:
        self.stack.append(int.from_bytes(self.take(4), "little", signed=True))

    def text(self, length_bytes: int) -> None:
        self.stack.append(self.take(self.number(length_bytes)).decode())

    def content(self, length_bytes: int) -> None:
        size = self.number(length_bytes)
        start, self.at = self.at, self.at + size
        if self.at > len(self.value):
            raise IndexError
        self.stack.append(Bytes(start, size))
        self.variable.append((start, self.at))

    def frame(self) -> None:
        self.variable.append((self.at, self.at + 8))
        self.take(8)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def close_tuple(self) -> None:
        items = tuple(self.above_mark())
        self.stack.append(items)

    def join(self, length: int) -> None:
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

    def name_lines(self) -> None:
        for _ in range(2):
            line = bytes(self.value[self.at : self.at + 200]).split(b"\n")[0]
            self.at += len(line) + 1
            self.stack.append(line.decode())
        self.name()

    def name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError
        if (module, name) not in _KNOWN:
            raise DamagedValueError(
                f"the pickle names the foreign global {f'{module}.{name}'[:100]!r}; it was refused, nothing was executed"
            )
        self.stack.append(Global(name))

    def make(self, names: frozenset[str]) -> None:
        args, made = self.stack.pop(), self.stack.pop()
        if not (isinstance(made, Global) and made.name in names and isinstance(args, tuple)):
            raise TypeError
        thing = Thing(made.name, args)
        if thing.kind in BAND_CLASSES:
            self.bands.append(thing)
        self.stack.append(thing)
        self.made = self.at

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Thing):
            raise TypeError
        self.stack[-1].state = state

    def put(self, position: int) -> None:
        self.memo[position] = self.stack[-1]

    def get(self, position: int) -> None:
        self.stack.append(self.memo[position])


def _refuse(machine: _Machine) -> None:
    raise DamagedValueError(f"no v1 pickle: the opcode at byte {machine.at - 1} is none that such a pickle uses")


_STOP = ord(".")

_OPCODES: dict[int, Callable[[_Machine], object]] = {
    0x80: lambda m: m.number(1),  # PROTO
    0x95: _Machine.frame,  # FRAME
    ord("("): _Machine.mark,  # MARK
    ord("N"): lambda m: m.stack.append(None),  # NONE
    0x88: lambda m: m.stack.append(True),  # NEWTRUE
    0x89: lambda m: m.stack.append(False),  # NEWFALSE
    ord("K"): lambda m: m.stack.append(m.number(1)),  # BININT1
    ord("M"): lambda m: m.stack.append(m.number(2)),  # BININT2
    ord("J"): _Machine.integer,  # BININT
    0x8C: lambda m: m.text(1),  # SHORT_BINUNICODE
    ord("X"): lambda m: m.text(4),  # BINUNICODE
    ord("C"): lambda m: m.content(1),  # SHORT_BINBYTES
    ord("B"): lambda m: m.content(4),  # BINBYTES
    0x96: lambda m: m.content(8),  # BYTEARRAY8
    ord("}"): lambda m: m.stack.append({}),  # EMPTY_DICT
    ord("s"): lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),  # SETITEM
    ord("u"): lambda m: m.set_items(m.above_mark()),  # SETITEMS
    ord("]"): lambda m: m.stack.append([]),  # EMPTY_LIST
    0x8F: lambda m: m.stack.append([]),  # EMPTY_SET
    ord("a"): lambda m: m.extend([m.stack.pop()]),  # APPEND
    ord("e"): lambda m: m.extend(m.above_mark()),  # APPENDS
    0x90: lambda m: m.extend(m.above_mark()),  # ADDITEMS
    ord(")"): lambda m: m.stack.append(()),  # EMPTY_TUPLE
    0x85: lambda m: m.join(1),  # TUPLE1
    0x86: lambda m: m.join(2),  # TUPLE2
    0x87: lambda m: m.join(3),  # TUPLE3
    ord("t"): _Machine.close_tuple,  # TUPLE
    0x94: lambda m: m.put(len(m.memo)),  # MEMOIZE
    ord("q"): lambda m: m.put(m.number(1)),  # BINPUT
    ord("r"): lambda m: m.put(m.number(4)),  # LONG_BINPUT
    ord("h"): lambda m: m.get(m.number(1)),  # BINGET
    ord("j"): lambda m: m.get(m.number(4)),  # LONG_BINGET
    ord("c"): _Machine.name_lines,  # GLOBAL
    0x93: _Machine.name,  # STACK_GLOBAL
    0x81: lambda m: m.make(_NEW),  # NEWOBJ
    ord("R"): lambda m: m.make(_REDUCED),  # REDUCE
    ord("b"): _Machine.build,  # BUILD
}
"""What each opcode does; those that are not here are refused."""


_TEXTS = b"|".join(re.escape(bytes([length])) + b".{%d}" % length for length in range(256))
_PLAIN = re.compile(
    b"(?:[]N(saeubt})\x85-\x89\x8f\x90\x94]|[Khq].|M..|[Jrj].{4}|\x8c(?:" + _TEXTS + b"))*+\\.", re.DOTALL
)
"""Opcodes that name nothing, with their arguments. Possessive: a value that does not fit costs no search."""
