"""Pickles of protocol 5, which numpy writes with ``_frombuffer``, are read like the others and as safely."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csmae.cli.main import main
from csmae.data.errors import DamagedValueError
from csmae.data.formats import v1
from csmae.data.formats.layout import STORED_BANDS
from csmae.data.formats.unpickle import unpickle
from csmae.data.formats.v1 import PickleDecoder, class_names
from csmae.sensors import S1_BANDS
from tests.support.archives import FILES, bands_of, labels_of, names_of, open_folder, splits_of
from tests.support.v1_pickles import STYLES, pickled, write_v1


def read_only(bands: dict[str, Any]) -> dict[str, Any]:
    """Make arrays read-only: numpy pickles them as bytes, writable ones as bytearrays."""
    for band in bands.values():
        band.flags.writeable = False
    return bands


def write_protocol5(folder: Path, styles: tuple[str, ...] = STYLES, module: bytes = b"numpy._core.numeric") -> Path:
    patches: dict[str, bytes] = {}
    lists: dict[str, list[str]] = {file: [] for file in FILES.values()}
    for number, split in enumerate(splits_of()):
        name = names_of(number).v1
        bands = bands_of(number) if number % 2 else read_only(bands_of(number))
        value = pickled(bands, labels_of(number), styles[number % len(styles)], protocol=5)
        assert b"numpy._core.numeric" in value, "numpy 2 wrote it"
        patches[name] = value.replace(b"\x8c\x13numpy._core.numeric", b"\x8c" + bytes([len(module)]) + module)
        lists[FILES[split]].append(name)
    write_v1(folder, patches, lists)
    return folder


@pytest.mark.parametrize("module", [b"numpy._core.numeric", b"numpy.core.numeric"])
def test_pairs_in_protocol_5_are_read_as_they_were_written(tmp_path: Path, module: bytes) -> None:
    split = open_folder(write_protocol5(tmp_path, module=module)).split("train")
    batch = split.read(range(5))
    for number in range(5):
        bands = bands_of(number)
        for name, band in STORED_BANDS.items():
            assert np.array_equal(getattr(batch, band.field)[number][band.channel].numpy(), bands[name])
        assert [split.labels()[number].sum()] == [2]
        found = split.bands_60m(number)
        assert all(np.array_equal(found[name], bands[name]) for name in ("B01", "B09"))


def test_an_archive_in_protocol_5_is_checked_and_converted(tmp_path: Path) -> None:
    write_protocol5(tmp_path / "v1")
    assert main(["data", "check", str(tmp_path / "v1")]) == 0
    assert main(["data", "convert", str(tmp_path / "v1"), str(tmp_path / "v2")]) == 0


@pytest.mark.parametrize("writable", [True, False])
def test_the_second_value_in_protocol_5_matches_the_cached_skeleton(
    monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    decode, calls = PickleDecoder(S1_BANDS), []
    monkeypatch.setattr(v1, "unpickle", lambda value: calls.append(1) or unpickle(value))  # type: ignore[func-returns-value]
    for number in range(4):
        bands = bands_of(number) if writable else read_only(bands_of(number))
        decode(memoryview(pickled(bands, labels_of(number), protocol=5)))
    assert len(calls) == 1


class Attack:
    """Executes a command when Python's pickle reads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["extra", "new_labels"])
def test_a_malicious_object_in_protocol_5_is_rejected_after_known_pixels_too(tmp_path: Path, where: str) -> None:
    marker, decode = tmp_path / "executed", PickleDecoder(S1_BANDS)
    attack: Any = {where: Attack(marker)}
    decode(memoryview(pickled(bands_of(0), labels_of(0), protocol=5)))
    hostile = memoryview(pickled(bands_of(0), labels_of(0), protocol=5, **attack))
    for read in (decode, PickleDecoder(S1_BANDS), class_names):
        with pytest.raises(DamagedValueError, match=r"foreign global '(posix|nt)\.system'"):
            read(hostile)
    assert not marker.exists()


VALID = pickled({name: bands_of(1)[name] for name in S1_BANDS}, labels_of(1), protocol=5)
AT = VALID.index(b"\x96" + struct.pack("<Q", 57600))
"""The first band's BYTEARRAY8."""
END = AT + 9 + 57600
REDUCE = [place or 0 for code, _, place in pickletools.genops(VALID) if code.name == "REDUCE" and (place or 0) > END][1]
"""Creates the first band's array; the REDUCE before it creates the dtype."""


def test_the_offsets_that_the_hostile_pickles_change_are_the_intended_opcodes() -> None:
    names = {place: opcode.name for opcode, _, place in pickletools.genops(VALID)}
    assert (names[AT], names[REDUCE]) == ("BYTEARRAY8", "REDUCE")
    assert PickleDecoder(S1_BANDS)(memoryview(VALID))[0].source == AT + 9


def replace(start: int, end: int, new: bytes) -> bytes:
    return VALID[:start] + new + VALID[end:]


def order(letter: bytes) -> bytes:
    assert VALID.count(b"\x8c\x01C") == 1
    return VALID.replace(b"\x8c\x01C", b"\x8c\x01" + letter)


HOSTILE = {
    "a buffer out of band": (replace(AT, END, b"\x97"), "unexpected opcode"),
    "a read-only buffer out of band": (replace(AT, END, b"\x97\x98"), "unexpected opcode"),
    "a buffer longer than the value": (replace(AT + 1, AT + 9, struct.pack("<Q", 2**63)), "damaged pickle"),
    "a buffer that is a text": (replace(AT, END, b"\x8c\x02os"), "band VH is not an array"),
    "a buffer that is too short": (
        replace(AT, END, b"\x96" + struct.pack("<Q", 57596) + bytes(57596)),
        "band VH needs 57600 bytes: found 57596",
    ),
    "bytes of eight bytes of length": (replace(AT, AT + 1, b"\x8e"), "unexpected opcode"),
    "columns first": (order(b"F"), "band VH must be <f4 in row-major order: found <f4 in column-major order"),
    "any order": (order(b"K"), "band VH must be <f4 in row-major order: found <f4 in unknown order"),
    "another axis order": (replace(REDUCE - 2, REDUCE - 2, b"K\x01K\x00\x86"), "band VH is not an array"),
    "no arguments": (replace(REDUCE, REDUCE, b")"), "damaged pickle"),
    "a state on top": (replace(REDUCE + 1, REDUCE + 1, b"(K\x01K\x01tb"), "band VH is not an array"),
    "a class made with it": (replace(REDUCE, REDUCE + 1, b"\x81"), "damaged pickle"),
    "the function of another module": (
        VALID.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.lib._npyio_x"),
        "foreign global 'numpy.lib._npyio_x._frombuffer'",
    ),
    "another function of the module": (
        VALID.replace(b"\x8c\x0b_frombuffer", b"\x8c\x0bfromfile_xx"),
        "foreign global 'numpy._core.numeric.fromfile_xx'",
    ),
    "the function by line": (
        b"\x80\x05cnumpy.core.numeric\nfromfile\n(X\x0b\x00\x00\x00/etc/passwdtR.",
        "foreign global 'numpy.core.numeric.fromfile'",
    ),
    "a bytearray that is made": (
        b"\x80\x05cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        "foreign global 'builtins.bytearray'",
    ),
    "the dtype of a text": (
        VALID.replace(b"\x8c\x02f4", b"\x8c\x02O8"),
        "band VH must be <f4 in row-major order: found <O8",
    ),
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_a_hostile_pickle_in_protocol_5_is_rejected(kind: str) -> None:
    content, message = HOSTILE[kind]
    assert content != VALID
    known = PickleDecoder(S1_BANDS)
    known(memoryview(VALID))
    for decode in (PickleDecoder(S1_BANDS), known):
        with pytest.raises(DamagedValueError, match=message):
            decode(memoryview(content))


def test_scrambled_pickles_in_protocol_5_are_decoded_within_their_bounds_or_rejected() -> None:
    random, num_rejected = np.random.default_rng(0), 0
    known = PickleDecoder(S1_BANDS)
    for _ in range(1500):
        content = bytearray(VALID)
        for _ in range(random.integers(1, 4)):
            pixels = int(random.choice([0, AT - 200, END, len(VALID) - 700]))
            content[min(pixels + int(random.integers(600)), len(content) - 1)] = int(random.integers(256))
        for decode in (PickleDecoder(S1_BANDS), known):
            try:
                segments = decode(memoryview(content))
            except DamagedValueError:
                num_rejected += 1
            else:
                assert all(0 <= s.source <= len(content) - s.num_bytes for s in segments)
    assert 500 < num_rejected < 3000


def test_protocol_5_is_decoded_as_python_reads_it(tmp_path: Path) -> None:
    array = bands_of(3)["VH"]
    value = pickled({"VH": array, "VV": bands_of(3)["VV"]}, [], "plain", protocol=5)
    start = next(segment.source for segment in PickleDecoder(S1_BANDS)(memoryview(value)))
    assert np.array_equal(np.frombuffer(value, "<f4", array.size, start).reshape(120, 120), array)
    assert np.array_equal(pickle.loads(pickle.dumps(array, protocol=5)), array)
