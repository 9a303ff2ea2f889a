"""Reading an archive from end to end, to find what is wrong with it before a training does."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from csmae.atomic import atomic_write
from csmae.data.archive import Archive, ArchiveError
from csmae.data.formats.layout import BandTypeError, DamagedValueError
from csmae.data.formats.v1 import PickleDecoder, labels
from csmae.data.formats.v2 import SafetensorsDecoder, header_of, parse_header
from csmae.data.pairs import Buffer, allocate
from csmae.data.split import copy_runs
from csmae.data.splits import SPLITS
from csmae.data.write import writing
from csmae.sensors import BANDS

S1_RANGE = (-100.0, 60.0)
"""Decibels outside which a value is no backscatter."""

_EXAMPLES = 3


class Problems:
    """What is wrong: alike texts together, with the first examples."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, list[str]]] = {}
        self._of_archive: dict[str, tuple[int, str]] = {}

    @property
    def count(self) -> int:
        """One for each ``add``, and one for each kind of bands that are of another type."""
        return len(self._of_archive) + sum(count for count, _ in self._kinds.values())

    def add_type(self, text: str, where: str) -> None:
        """Note that a value's bands are of another type: most often those of the whole archive are, which is one problem."""
        count, first = self._of_archive.get(text, (0, where))
        self._of_archive[text] = count + 1, first

    def add(self, text: str, where: str) -> None:
        """Note a problem.

        Args:
            text: What is wrong; texts that differ in numbers alone are alike.
            where: A key or file.
        """
        kind = re.sub(r"\d+", "#", text)
        count, examples = self._kinds.get(kind, (0, []))
        if count < _EXAMPLES:
            examples.append(f"{where}: {text}")
        self._kinds[kind] = count + 1, examples

    def lines(self) -> Iterator[str]:
        """The report, the most frequent kind first."""
        for text, (values, first) in self._of_archive.items():
            yield f"{values} values: {text}, first in {first}; write S1 as float32 and S2 as uint16, row by row"
        for count, examples in sorted(self._kinds.values(), key=lambda kind: -kind[0]):
            yield f"{count} ×"
            yield from (f"    {example}" for example in examples)
            if count > len(examples):
                yield "    …"


def check_archive(archive: Archive, checksums: Path | None, progress: Callable[[], object]) -> Problems:
    """Look at every split and every value.

    Args:
        archive: An open archive: its file's structure is sound already.
        checksums: A file of CRC-32 sums by key: written if it is not there, else compared with.
        progress: Called after each value.

    Raises:
        ArchiveError: The file of sums cannot be read or written; that is seen before anything else.
    """
    problems = Problems()
    known = _known_sums(checksums) if checksums else None
    sensors = archive.sensors
    _check_splits(archive, sensors, problems)
    store = archive.store
    check = _PickleCheck(sensors) if archive.is_v1 else _SafetensorsCheck()
    sums: dict[str, int] = {}
    for position in store.announced(store.in_file_order(np.arange(len(store.index.keys)))):
        key = store.key(position)
        try:
            value = store.read(position)
            sums[key] = zlib.crc32(value.data) if checksums else 0
            check(value)
        except BandTypeError as error:
            problems.add_type(str(error), key)
        except DamagedValueError as error:
            problems.add(str(error), key)
        progress()
    if known is not None:
        _compare_sums(known, sums, problems)
    elif checksums:
        _write_sums(checksums, sums)
    return problems


def _check_splits(archive: Archive, sensors: tuple[str, ...], problems: Problems) -> None:
    """That the splits name patches that are there, of the sensors that the archive holds, and share none."""
    seen: dict[str, str] = {}
    for name in SPLITS:
        try:
            names = archive.split(name, sensors).names
        except ArchiveError as error:
            problems.add(str(error), f"split {name}")
            continue
        for patch in names:
            if seen.setdefault(patch, name) != name:
                problems.add(f"is in split {seen[patch]} and in split {name}", patch)


class _PickleCheck:
    """A v1 value: every opcode, every band of the sensors that the archive holds, the labels."""

    def __init__(self, sensors: tuple[str, ...]) -> None:
        self._sensors = sensors
        self._buffer = allocate(1)

    def __call__(self, value: NDArray[np.uint8]) -> None:
        # A new decoder each time: a known skeleton would spare it the opcodes that are to be checked.
        decode = PickleDecoder(tuple(band for sensor in self._sensors for band in BANDS[sensor]))
        copy_runs(value, decode(value.data), self._buffer, 0)
        labels(value.data)
        for sensor in self._sensors:
            check_pixels(self._buffer, sensor)


class _SafetensorsCheck:
    """A v2 value: the bands of the sensor whose band it names, or something else that is well formed."""

    def __init__(self) -> None:
        self._buffer = allocate(1)
        self._decoders = {sensor: SafetensorsDecoder(bands) for sensor, bands in BANDS.items()}

    def __call__(self, value: NDArray[np.uint8]) -> None:
        entries = parse_header(header_of(value.data))
        for sensor, bands in BANDS.items():
            if not entries.keys().isdisjoint(bands):
                copy_runs(value, self._decoders[sensor](value.data), self._buffer, 0)
                check_pixels(self._buffer, sensor)


def check_pixels(buffer: Buffer, sensor: str) -> None:
    """That a pair's pixels can be an image.

    Raises:
        DamagedValueError: S1 is not finite or no backscatter, or a band of S2 is all zero.
    """
    if sensor == "s1":
        s1 = buffer.batch.s1[0].numpy()
        if not np.isfinite(s1).all():
            raise DamagedValueError("S1 holds values that are not finite")
        if s1.min() < S1_RANGE[0] or s1.max() > S1_RANGE[1]:
            raise DamagedValueError(f"S1 is no backscatter in dB: from {s1.min():.0f} to {s1.max():.0f}")
        return
    for bands in (buffer.batch.s2_10m[0].numpy(), buffer.batch.s2_20m[0].numpy()):
        if not bands.any(axis=(1, 2)).all():
            raise DamagedValueError("a band of S2 is all zero")


def _known_sums(file: Path) -> dict[str, int] | None:
    """Sums by key; None where they are yet to be written, which must be possible."""
    try:
        if not file.exists():
            _write_sums(file, {})
            file.unlink()
            return None
        known = json.loads(file.read_text(encoding="utf-8"))
    except ArchiveError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArchiveError(f"{file}: cannot be read as checksums: {reason}") from None
    if not isinstance(known, dict):
        raise ArchiveError(f"{file}: holds no checksums by key; name another file to write them")
    return known


def _write_sums(file: Path, sums: dict[str, int]) -> None:
    with writing(file), atomic_write(file, concurrent=True) as draft:
        draft.write(json.dumps(sums, indent=0).encode())


def _compare_sums(known: dict[str, int], sums: dict[str, int], problems: Problems) -> None:
    for key in sorted(known.keys() | sums.keys()):
        if known.get(key) != sums.get(key):
            text = "its checksum changed" if key in known and key in sums else "is in one of archive and checksums only"
            problems.add(text, key)
