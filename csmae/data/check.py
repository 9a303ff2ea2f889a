"""Reads a whole archive to find what is wrong with it before a training does."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from csmae.atomic import atomic_write
from csmae.data.archive import Archive
from csmae.data.errors import ArchiveError, BandTypeError, DamagedValueError
from csmae.data.formats.layout import copy_segments
from csmae.data.formats.v1 import PickleDecoder, class_names
from csmae.data.formats.v2 import SafetensorsDecoder, parse_header, read_header
from csmae.data.metadata import SPLITS
from csmae.data.pairs import Buffer, allocate
from csmae.data.write import report_write_errors
from csmae.sensors import BANDS

S1_RANGE = (-100.0, 60.0)
"""Range of backscatter in dB."""

_NUM_EXAMPLES = 3


class Problems:
    """Problems of an archive, grouped by kind, with the first examples of each."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, list[str]]] = {}
        self._types: dict[str, tuple[int, str]] = {}

    @property
    def count(self) -> int:
        """Number of problems; all values with the same wrong band type are one."""
        return len(self._types) + sum(count for count, _ in self._kinds.values())

    def add_type(self, text: str, where: str) -> None:
        """Add a value whose bands have the wrong type: usually the whole archive has it, which is one problem."""
        count, first = self._types.get(text, (0, where))
        self._types[text] = count + 1, first

    def add(self, text: str, where: str) -> None:
        """Add a problem.

        Args:
            text: The fault; texts that differ only in numbers are of one kind.
            where: A key or file.
        """
        kind = re.sub(r"\d+", "#", text)
        count, examples = self._kinds.get(kind, (0, []))
        if count < _NUM_EXAMPLES:
            examples.append(f"{where}: {text}")
        self._kinds[kind] = count + 1, examples

    def lines(self) -> Iterator[str]:
        """Yield the lines of a report, the most frequent kind first."""
        for text, (count, first) in self._types.items():
            yield f"{count} values: {text}, first in {first}; write S1 as float32 and S2 as uint16, in row-major order"
        for count, examples in sorted(self._kinds.values(), key=lambda kind: -kind[0]):
            yield f"{count} ×"
            yield from (f"    {example}" for example in examples)
            if count > len(examples):
                yield "    …"


def check_archive(archive: Archive, checksums: Path | None, progress: Callable[[], object]) -> Problems:
    """Check every split and every value.

    Args:
        archive: An open archive; the structure of its file was checked when it was opened.
        checksums: A file of CRC-32 checksums by key: written if it does not exist, otherwise compared with.
        progress: Called after each value.

    Raises:
        ArchiveError: The checksum file cannot be read or written; this is checked first.
    """
    problems = Problems()
    known = _read_checksums(checksums) if checksums else None
    sensors = archive.sensors
    _check_splits(archive, sensors, problems)
    lmdb = archive.lmdb
    buffer, decoders = allocate(1), {sensor: SafetensorsDecoder(bands) for sensor, bands in BANDS.items()}
    computed: dict[str, int] = {}
    for position in lmdb.iter_prefetched(lmdb.file_order(np.arange(len(lmdb.index.keys)))):
        key = lmdb.key(position)
        try:
            value = lmdb.read(position)
            computed[key] = zlib.crc32(value.data) if checksums else 0
            if archive.is_v1:
                _check_pickle(value, sensors, buffer)
            else:
                _check_safetensors(value, decoders, buffer)
        except BandTypeError as error:
            problems.add_type(str(error), key)
        except DamagedValueError as error:
            problems.add(str(error), key)
        progress()
    if known is not None:
        _compare_checksums(known, computed, problems)
    elif checksums:
        _write_checksums(checksums, computed)
    return problems


def _check_splits(archive: Archive, sensors: tuple[str, ...], problems: Problems) -> None:
    """Check that all patches of the splits exist, and that no two splits share one."""
    split_of: dict[str, str] = {}
    for name in SPLITS:
        try:
            patches = archive.split(name, sensors).names
        except ArchiveError as error:
            problems.add(str(error), f"split {name}")
            continue
        for patch in patches:
            if split_of.setdefault(patch, name) != name:
                problems.add(f"is in split {split_of[patch]} and in split {name}", patch)


def _check_pickle(value: NDArray[np.uint8], sensors: tuple[str, ...], buffer: Buffer) -> None:
    """Check a v1 value: every opcode, every band of the archive's sensors, and the labels."""
    # A new decoder for each value: a known skeleton would skip the opcodes that are to be checked.
    decode = PickleDecoder(tuple(band for sensor in sensors for band in BANDS[sensor]))
    copy_segments(value, decode(value.data), buffer, 0)
    class_names(value.data)
    for sensor in sensors:
        _check_pixels(buffer, sensor)


def _check_safetensors(value: NDArray[np.uint8], decoders: dict[str, SafetensorsDecoder], buffer: Buffer) -> None:
    """Check a v2 value: the bands of the sensor that it holds, or only its header if it holds something else."""
    entries = parse_header(read_header(value.data))
    for sensor, decode in decoders.items():
        if not entries.keys().isdisjoint(BANDS[sensor]):
            copy_segments(value, decode(value.data), buffer, 0)
            _check_pixels(buffer, sensor)


def _check_pixels(buffer: Buffer, sensor: str) -> None:
    """Check that a pair's pixels are plausible.

    Raises:
        DamagedValueError: S1 is not finite or not backscatter, or a band of S2 is all zero.
    """
    if sensor == "s1":
        s1 = buffer.batch.s1[0].numpy()
        if not np.isfinite(s1).all():
            raise DamagedValueError("S1 holds values that are not finite")
        if s1.min() < S1_RANGE[0] or s1.max() > S1_RANGE[1]:
            raise DamagedValueError(f"S1 is not backscatter in dB: from {s1.min():.0f} to {s1.max():.0f}")
        return
    for bands in (buffer.batch.s2_10m[0].numpy(), buffer.batch.s2_20m[0].numpy()):
        if not bands.any(axis=(1, 2)).all():
            raise DamagedValueError("a band of S2 is all zero")


def _read_checksums(file: Path) -> dict[str, int] | None:
    """Read checksums by key; return None if the file does not exist, after checking that it can be written."""
    try:
        if not file.exists():
            _write_checksums(file, {})
            file.unlink()
            return None
        known = json.loads(file.read_text(encoding="utf-8"))
    except ArchiveError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArchiveError(f"{file}: cannot be read as checksums: {reason}") from None
    if not isinstance(known, dict):
        raise ArchiveError(f"{file}: does not hold checksums by key; choose another file to write them")
    return known


def _write_checksums(file: Path, checksums: dict[str, int]) -> None:
    with report_write_errors(file), atomic_write(file, concurrent=True) as draft:
        draft.write(json.dumps(checksums, indent=0).encode())


def _compare_checksums(known: dict[str, int], computed: dict[str, int], problems: Problems) -> None:
    for key in sorted(known.keys() | computed.keys()):
        if known.get(key) != computed.get(key):
            in_both = key in known and key in computed
            problems.add("its checksum changed" if in_both else "is only in the archive or only in the checksums", key)
