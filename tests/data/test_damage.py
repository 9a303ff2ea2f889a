"""A damaged or hostile archive is reported in one line; nothing hangs, crashes or is executed."""

import json
import logging
import os
import pickle
import pickletools
import resource
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from csmae.config import ConfigError
from csmae.data.errors import ArchiveError, DamagedValueError
from csmae.data.formats.layout import STORED_BANDS
from csmae.data.formats.lmdb_index import read_index
from csmae.data.formats.unpickle import is_plain_data
from csmae.data.formats.v1 import PickleDecoder, class_names
from csmae.data.formats.v2 import SafetensorsDecoder
from csmae.sensors import S1_BANDS, S2_BANDS
from tests.support.archives import bands_of, labels_of, names_of, open_folder, put, write_pickles, write_v2
from tests.support.v1_pickles import STYLES, pickled

S2_NAME, V1_NAME, S1_NAME = names_of(1)


def data_file(folder: Path) -> Path:
    return next(folder.glob("*.lmdb/data.mdb"))


def assert_one_line(error: pytest.ExceptionInfo[ConfigError], *parts: object) -> None:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    assert all(str(part) in text for part in parts), text


def test_a_truncated_file_is_rejected_when_opened(tmp_path: Path) -> None:
    file = data_file(write_v2(tmp_path))
    os.truncate(file, file.stat().st_size - 4096)
    with pytest.raises(ArchiveError) as error:
        open_folder(tmp_path)
    assert_one_line(error, file, "is truncated", file.stat().st_size)


def test_a_file_that_shrinks_is_rejected_when_read(tmp_path: Path) -> None:
    split = open_folder(write_v2(tmp_path)).split("train")
    os.truncate(data_file(tmp_path), 3 * 4096)
    with pytest.raises(DamagedValueError) as error:
        split.read([0])
    assert_one_line(error, tmp_path, "the file has shrunk")


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_a_stub_of_a_file_is_rejected_when_opened(tmp_path: Path, size: int) -> None:
    file = data_file(write_v2(tmp_path))
    os.truncate(file, size)
    with pytest.raises(ArchiveError) as error:
        open_folder(tmp_path)
    assert_one_line(error, file)


@pytest.mark.parametrize("at", [10, 16, 20, 40, 42, 4096 + 10, 4096 + 16, 4096 + 92, 4096 + 94, 4096 + 128, 4096 + 136])
def test_a_flipped_byte_in_a_meta_page_is_rejected_when_opened(tmp_path: Path, at: int) -> None:
    file = data_file(write_v2(tmp_path))
    content = bytearray(file.read_bytes())
    content[at] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(ArchiveError) as error:
        open_folder(tmp_path)
    assert_one_line(error, file)


def test_the_index_matches_the_lmdb_library(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = {
        f"key {n} {'x' * (n % 90)}".encode(): bytes(random.bytes(int(size)))
        for n, size in enumerate(random.integers(0, 9000, 2000))
    }
    with lmdb.open(str(tmp_path), map_size=1 << 26) as environment:
        for keys in np.array_split(random.permutation(list(values)), 5):
            with environment.begin(write=True) as transaction:
                for key in keys:
                    transaction.put(bytes(key), values[bytes(key)])
        with environment.begin(write=True) as transaction:
            for key in list(values)[::3]:
                transaction.delete(key)
                del values[key]
    index = read_index(tmp_path)
    content = (tmp_path / "data.mdb").read_bytes()
    found = {
        bytes(key): content[offset : offset + size]
        for key, offset, size in zip(index.keys, index.offsets.tolist(), index.sizes.tolist(), strict=True)
    }
    assert found == values
    assert list(index.keys) == sorted(values)
    assert index.find(np.array([b"key 1 x", b"no key"])).tolist() == [list(index.keys).index(b"key 1 x"), -1]


def test_flipped_bytes_in_the_tree_are_rejected_or_harmless(tmp_path: Path) -> None:
    """The LMDB library would follow such pages out of the file and crash."""
    with lmdb.open(str(tmp_path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for number in range(400):
            transaction.put(f"key {number:05}".encode(), bytes(3000))
    file = tmp_path / "data.mdb"
    whole, random = file.read_bytes(), np.random.default_rng(0)
    tree = [page for page in range(2, len(whole) // 4096) if whole[page * 4096 + 10] in (1, 2)]
    num_rejected = 0
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            content[int(random.choice(tree)) * 4096 + int(random.integers(400))] = int(random.integers(256))
        file.write_bytes(content)
        try:
            index = read_index(tmp_path)
        except ArchiveError:
            num_rejected += 1
        else:
            assert (index.offsets >= 0).all() and (index.offsets + index.sizes <= len(content)).all()
    assert num_rejected > 150


def test_pages_whose_pointers_share_a_node_are_rejected_in_little_memory(tmp_path: Path) -> None:
    """Otherwise a few kilobytes would expand to gigabytes of keys."""
    with lmdb.open(str(tmp_path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for number in range(20_000):
            transaction.put(f"key {number:06} {'x' * 400}".encode(), b"")
    file = tmp_path / "data.mdb"
    content = bytearray(file.read_bytes())
    for page in range(2 * 4096, len(content), 4096):
        if content[page + 10] == 2:
            count = 1700
            content[page + 12 : page + 14] = (16 + 2 * count).to_bytes(2, "little")
            content[page + 16 : page + 16 + 2 * count] = (4096 - 420).to_bytes(2, "little") * count
            content[page + 4096 - 420 : page + 4096] = bytes(6) + (400).to_bytes(2, "little") + bytes(412)
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ArchiveError, match="longer than they can be"):
        read_index(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def header(**changes: Any) -> bytes:
    """Return the header of an S1 value with fields of VV replaced."""
    entries: dict[str, Any] = {
        "VH": {"dtype": "F32", "shape": [120, 120], "data_offsets": [0, 57600]},
        "VV": {"dtype": "F32", "shape": [120, 120], "data_offsets": [57600, 115200]},
    }
    entries["VV"] |= changes
    return json.dumps(entries).encode()


def value(text: bytes, length: int | None = None, num_data: int = 115200) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(num_data)


BROKEN_S1 = {
    "dtype": (value(header(dtype="F64")), "band VV must have dtype F32: found F64"),
    "shape": (value(header(shape=[60, 60])), r"band VV must have shape \[120, 120\]: found \[60, 60\]"),
    "offsets beyond the end": (value(header(data_offsets=[57601, 115201])), "its data_offsets are 57601, 115201"),
    "offsets too near": (value(header(data_offsets=[57600, 57700])), "needs 57600 bytes"),
    "offsets reversed": (value(header(data_offsets=[115200, 57600])), "needs 57600 bytes"),
    "offsets negative": (value(header(data_offsets=[-57600, 0])), "needs 57600 bytes"),
    "offsets no numbers": (value(header(data_offsets=["0", True])), "must have two data_offsets"),
    "too few data": (value(header(), num_data=115199), "needs 57600 bytes within 115199"),
    "band missing": (value(b'{"VH": {}}'), "band VH must have dtype"),
    "no bands": (value(b"{}"), "band VH is missing"),
    "header of absurd size": (value(header(), length=2**63), "with a header of 9223372036854775808"),
    "header longer than the value": (value(header(), length=2**17), "with a header of 131072"),
    "no JSON": (value(b"{'VV': 1}"), "the header is not JSON"),
    "JSON without end": (value(b"[" * 60000), "the header is not JSON"),
    "no object": (value(b"[1]"), "the header is not a JSON object"),
    "nothing": (b"", "0 bytes"),
    "huge": (bytes(5 * 2**20), "5242880 bytes are too many for a patch"),
    "NaN": (
        save({"VH": np.full((120, 120), np.nan, np.float32), "VV": np.zeros((120, 120), np.float32)}),
        "not finite",
    ),
    "infinite": (
        save({"VH": np.zeros((120, 120), np.float32), "VV": np.full((120, 120), -np.inf, np.float32)}),
        "not finite",
    ),
}


@pytest.mark.parametrize("kind", list(BROKEN_S1))
def test_a_broken_v2_value_is_reported_with_archive_and_key(tmp_path: Path, kind: str) -> None:
    content, message = BROKEN_S1[kind]
    put(write_v2(tmp_path), {S1_NAME: content})
    split = open_folder(tmp_path).split("train")
    with pytest.raises(DamagedValueError, match=message) as error:
        split.read([0, 1])
    assert_one_line(error, tmp_path, S1_NAME)
    split.read([0, 2])


class Attack:
    """Executes a command when Python's pickle reads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_pickle_is_rejected_and_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    put(write_pickles(tmp_path / "v1"), {V1_NAME: pickled(bands_of(1), labels_of(1), extra=Attack(marker))})
    split = open_folder(tmp_path / "v1").split("train")
    for read in (lambda: split.labels(), lambda: split.read([1])):
        with pytest.raises(DamagedValueError, match=r"foreign global '(posix|nt)\.system'") as error:
            read()
        assert_one_line(error, tmp_path, V1_NAME, "nothing was executed")
    assert not marker.exists()


@pytest.mark.parametrize("where", ["extra", "new_labels"])
def test_a_malicious_object_after_the_pixels_is_rejected_although_the_skeleton_matches(
    tmp_path: Path, where: str
) -> None:
    write_pickles(tmp_path / "v1", styles=("pydantic 2",))
    marker = tmp_path / "executed"
    attack: Any = {where: Attack(marker)}
    split = open_folder(tmp_path / "v1").split("train")
    split.read([0])
    put(tmp_path / "v1", {V1_NAME: pickled(bands_of(1), labels_of(1), **attack)})
    split = open_folder(tmp_path / "v1").split("train")
    with pytest.raises(DamagedValueError, match=r"foreign global '(posix|nt)\.system'"):
        split.read([0, 1])
    assert not marker.exists()


def test_plain_data_is_distinguished_from_objects() -> None:
    content = memoryview(VALID)
    end = VALID.rindex(b"new_labels")
    assert is_plain_data(content, end + len(b"new_labels"))
    assert not is_plain_data(content, 0)
    assert not is_plain_data(content[:-1], end), "an end is missing"
    assert not is_plain_data(memoryview(b"\x8c\x02os\x8c\x06system\x93)R."), 0)
    assert not is_plain_data(memoryview(b"cos\nsystem\n)R."), 0)
    assert is_plain_data(memoryview(b"\x8c\x05cosR\x93\x94."), 0), "the same bytes within a text"


def reopcode(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


VALID = pickled(bands_of(1), labels_of(1))
HUGE = 2**31 - 1

BROKEN_V1 = {
    "a global by line": (b"\x80\x03cos\nsystem\n(X\x02\x00\x00\x00idtR.", "foreign global 'os.system'"),
    "an extension": (b"\x80\x04\x82\x01.", "unexpected opcode at byte 2"),
    "a persistent id": (b"\x80\x04Q.", "opcode at byte 2"),
    "duplication": (b"\x80\x04]2.", "opcode at byte 3"),
    "a long memo index": (
        b"\x80\x04Kx" + b"r" + struct.pack("<I", HUGE) + b".",
        "unnamed band|is missing|is not an array",
    ),
    "bytes that are not there": (b"\x80\x04B" + struct.pack("<I", HUGE) + b".", "damaged pickle"),
    "text that is not there": (b"\x80\x04X" + struct.pack("<I", HUGE) + b".", "damaged pickle"),
    "a tuple of nothing": (b"\x80\x04\x87.", "damaged pickle"),
    "lists in lists": (b"\x80\x04" + b"]" * 400_000 + b"a" * 399_999 + b".", "band VH is missing"),
    "tuples in tuples": (b"\x80\x04)" + b"\x85" * 800_000 + b".", "band VH is missing"),
    "no end": (b"\x80\x04]" * 1000, "damaged pickle"),
    "cut": (VALID[: len(VALID) // 2], "damaged pickle"),
    "nothing": (b"", "damaged pickle"),
    "a dictionary with a key that hashes for ever": (
        b"\x80\x04}" + b")" + b"".join(b"\x94h" + bytes([n]) + b"\x86" for n in range(60)) + b"Ns.",
        "damaged pickle",
    ),
    "another dtype": (
        reopcode(VALID, b"\x8c\x02f4", b"\x8c\x02i4"),
        "band VH must be <f4 in row-major order: found <i4",
    ),
    "columns first": (
        pickled(bands_of(1) | {"VH": np.asfortranarray(bands_of(1)["VH"])}, labels_of(1)),
        "band VH must be <f4 in row-major order: found <f4 in column-major order",
    ),
    "another byte order": (
        reopcode(VALID, b"\x8c\x01<", b"\x8c\x01>"),
        "band VH must be <f4 in row-major order: found >f4",
    ),
    "another shape": (reopcode(VALID, b"K\x01KxKx\x86", b"K\x01KxKy\x86"), r"shape \[120, 120\]: found \[120, 121\]"),
    "another length": (
        reopcode(VALID, b"B" + struct.pack("<I", 57600), b"B" + struct.pack("<I", 57599)),
        "damaged pickle|not a v1 pickle|needs 57600 bytes",
    ),
    "a patch of something else": (pickle.dumps({"VH": 1}, protocol=4), "band VH is missing"),
    "a foreign class": (pickle.dumps(Path("x"), protocol=4), "foreign global 'pathlib"),
    "NaN": (pickled(bands_of(1) | {"VV": np.full((120, 120), np.nan, np.float32)}, []), "not finite"),
}


@pytest.mark.parametrize("kind", list(BROKEN_V1))
def test_a_broken_v1_value_is_reported_with_archive_and_key(tmp_path: Path, kind: str) -> None:
    content, message = BROKEN_V1[kind]
    put(write_pickles(tmp_path), {V1_NAME: content})
    split = open_folder(tmp_path).split("train")
    with pytest.raises(DamagedValueError, match=message) as error:
        split.read([0, 1])
    assert_one_line(error, tmp_path, V1_NAME)
    split.read([0, 2])


def test_labels_other_than_the_19_classes_are_rejected(tmp_path: Path) -> None:
    put(write_pickles(tmp_path), {V1_NAME: pickled(bands_of(1), ["Arable land", "Lava"])})
    with pytest.raises(DamagedValueError, match=rf"{V1_NAME}: new_labels .* found 'Lava'"):
        open_folder(tmp_path).split("train").labels()


def test_skipping_replaces_and_records_damaged_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(write_v2(tmp_path), {S1_NAME: b"x", names_of(3).v2: b"y"})
    split = open_folder(tmp_path, on_error="skip").split("train")
    with caplog.at_level(logging.WARNING):
        batch = split.read([0, 1, 2, 3])
    whole = split.read([0, 2])
    assert torch.equal(batch.s1[[0, 2]], whole.s1)
    assert torch.equal(batch.s1[1], whole.s1[0]) and torch.equal(batch.s2_20m[1], whole.s2_20m[0])
    assert torch.equal(batch.s2_10m[3], whole.s2_10m[1])
    assert set(split.damaged) == {S2_NAME, names_of(3).v2}
    assert "2 damaged pairs so far" in caplog.text and S1_NAME in caplog.text
    assert torch.equal(split.read([1]).s1, whole.s1[:1]), "a batch without an intact pair takes one of the split"
    with pytest.raises(DamagedValueError, match=S1_NAME):
        split.take([1, 3]).read([0])


def test_skipping_leaves_damaged_v1_patches_without_labels(tmp_path: Path) -> None:
    put(write_pickles(tmp_path), {V1_NAME: b"x"})
    split = open_folder(tmp_path, on_error="skip").split("train")
    assert split.labels().sum(1).tolist() == [2, 0, 2, 2, 2]
    assert list(split.damaged) == [V1_NAME]


def test_skipping_drops_missing_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_v2(tmp_path)
    with (
        lmdb.open(str(tmp_path / "archive.lmdb"), map_size=1 << 26) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.delete(S1_NAME.encode())
    with pytest.raises(ArchiveError) as error:
        open_folder(tmp_path).split("train")
    assert_one_line(error, tmp_path, "1 of 5 patches", S1_NAME)
    with caplog.at_level(logging.WARNING):
        split = open_folder(tmp_path, on_error="skip").split("train")
    assert S2_NAME not in split.names and len(split) == len(split.labels()) == 4
    assert S1_NAME in caplog.text


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """Replace, insert or cut some bytes, most often in the structure."""
    places = st.one_of(st.integers(0, 1200), st.integers(0, len(content) - 1))
    edits = st.lists(st.tuples(places, st.integers(0, 3), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4)

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        result = content
        for at, cut, new in changes:
            result = result[:at] + new + result[at + cut :]
        return result

    return edits.map(apply)


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
PIECES = [
    *OPCODES,
    b"\x8c\x04name",
    b"\x8c\x02B02",
    b"\x8c\x05numpy",
    b"\x8c\x07ndarray",
    b"\x8c\x02os\x8c\x06system\x93",
    *(bytes([n]) for n in range(16)),
]


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=150, deadline=1000)
@given(content=st.data())
def test_mutated_pickles_are_decoded_or_rejected(style: str, content: st.DataObject) -> None:
    value = content.draw(mutated(pickled({name: bands_of(0)[name] for name in STORED_BANDS}, labels_of(0), style)))
    decode = PickleDecoder(S1_BANDS + S2_BANDS)
    for read in (decode, class_names):
        try:
            result = read(memoryview(value))
        except DamagedValueError:
            continue
        for item in result:
            assert isinstance(item, str) or 0 <= item.source <= len(value) - item.num_bytes


def scrambled(content: bytes, random: np.random.Generator) -> bytes:
    """Replace a few bytes of the structure, or repeat or cut pieces of it."""
    result = bytearray(content)
    for _ in range(random.integers(1, 5)):
        at, length = (
            int(random.integers(min(len(result), 1500)) if random.random() < 0.8 else random.integers(len(result))),
            int(random.integers(1, 9)),
        )
        kind = random.integers(4)
        if kind == 0:
            result[at : at + length] = random.bytes(length)
        elif kind == 1:
            result[at : at + 1] = PIECES[random.integers(len(PIECES))]
        elif kind == 2:
            result[at:at] = result[at : at + 20 * length]
        elif len(result) > 100:
            del result[at : at + length]
    return bytes(result)


@pytest.mark.slow
@pytest.mark.parametrize("decode", [PickleDecoder, SafetensorsDecoder])
def test_a_hundred_thousand_scrambled_values_are_decoded_or_rejected_in_little_memory(decode: Any) -> None:
    bands, random = {name: bands_of(0)[name] for name in S1_BANDS}, np.random.default_rng(0)
    seeds = (
        [pickled(bands, labels_of(0), style, protocol) for style in STYLES for protocol in (4, 5)]
        if decode is PickleDecoder
        else [save(bands)]
    )
    num_rejected, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(100_000):
        content = scrambled(seeds[number % len(seeds)], random)
        try:
            segments = decode(S1_BANDS)(memoryview(content))
        except DamagedValueError:
            num_rejected += 1
        else:
            assert all(0 <= s.source <= len(content) - s.num_bytes for s in segments)
    assert 10_000 < num_rejected < 100_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@settings(max_examples=1500, deadline=1000)
@given(parts=st.lists(st.sampled_from(PIECES), max_size=60))
def test_random_opcodes_are_rejected(parts: list[bytes]) -> None:
    value = b"\x80\x04" + b"".join(parts) + b"."
    with pytest.raises(DamagedValueError):
        PickleDecoder(S1_BANDS)(memoryview(value))


@settings(max_examples=1000, deadline=1000)
@given(content=st.one_of(st.binary(max_size=400), mutated(save({name: bands_of(0)[name] for name in S1_BANDS}))))
def test_any_safetensors_value_is_decoded_within_its_bounds_or_rejected(content: bytes) -> None:
    try:
        segments = SafetensorsDecoder(S1_BANDS)(memoryview(content))
    except DamagedValueError:
        return
    assert all(0 <= s.source <= len(content) - s.num_bytes for s in segments)
