"""A split of an archive: pairs in a fixed order, with their names and labels, read in batches.

N pairs, B pairs of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from csmae.data.errors import ArchiveError, BandTypeError, DamagedValueError
from csmae.data.formats import v1, v2
from csmae.data.formats.layout import Segments, copy_segments
from csmae.data.formats.lmdb_reader import LmdbReader
from csmae.data.pairs import Buffer, PairBatch, allocate
from csmae.sensors import CLASSES, IMAGE_SIZE_60M

log = logging.getLogger(__name__)

_TYPE_SAMPLE = 64
"""Patches, spread over a split, that tell whether a few have bands of another type or most do."""


@dataclass(frozen=True)
class Source:
    """Where some bands of each pair are stored."""

    sensors: tuple[str, ...]
    decode: Callable[[memoryview], Segments]
    """Returns where the bands are in a value."""
    positions: NDArray[np.int64]
    """Position of each pair's value in the LMDB (N,)."""


@dataclass(frozen=True)
class Split:
    """Pairs in a fixed order: the contract of every archive.

    ``names`` and ``labels()`` describe the N pairs, ``take()`` selects some of them as a new split, ``read()`` returns pairs
    as a batch. To read without allocating memory, announce rows with ``prefetch()`` and copy them into a buffer with
    ``fill()``. Rows are indices into the split; pixels are those of the archive, unchanged.

    Damage: with ``on_error="raise"`` a damaged pair raises an ``ArchiveError``; with ``"skip"`` it is logged, recorded in
    ``damaged``, and replaced by an intact pair, so that the batches of all ranks keep their size.
    """

    lmdb: LmdbReader
    sources: tuple[Source, ...]
    labels_nc: NDArray[np.bool_] | None
    """Labels from the metadata; None if only the values hold labels."""
    on_error: str = "raise"
    damaged: dict[str, str] = field(default_factory=dict)
    """By patch name, the faults of the pairs that were skipped; grows while reading."""
    reported_types: set[str] = field(default_factory=set)
    """Wrong band types that were logged: all pairs with one of them have the same fault."""

    def __len__(self) -> int:
        return len(self.sources[0].positions)

    @property
    def sensors(self) -> tuple[str, ...]:
        """Sensors whose images are read."""
        return tuple(sorted(sensor for source in self.sources for sensor in source.sensors))

    @property
    def names(self) -> list[str]:
        """Keys of the pairs in the archive: S2 patch names."""
        return [key.decode() for key in self.lmdb.index.keys[self.sources[0].positions].tolist()]

    def damaged_rows(self) -> NDArray[np.int64]:
        """Return the rows of the pairs found damaged so far; their images are those of other pairs."""
        rows = [row for row, name in enumerate(self.names) if name in self.damaged] if self.damaged else []
        return np.array(rows, np.int64)

    def labels(self) -> NDArray[np.bool_]:
        """Return the classes of each pair (N, 19), in the order of ``csmae.sensors.CLASSES``.

        Raises:
            ArchiveError: A value of a v1 archive is damaged; if damage is skipped, the pair has no class instead.
        """
        if self.labels_nc is not None:
            return self.labels_nc
        positions = self.lmdb.iter_prefetched(self.sources[0].positions)
        return np.stack([self._stored_labels(position) for position in positions])

    def take(self, rows: ArrayLike) -> Split:
        """Return the pairs of these rows, in this order."""
        chosen = np.asarray(rows, np.int64)
        sources = tuple(replace(source, positions=source.positions[chosen]) for source in self.sources)
        labels_nc = None if self.labels_nc is None else self.labels_nc[chosen]
        return replace(self, sources=sources, labels_nc=labels_nc)

    def read(self, rows: ArrayLike) -> PairBatch:
        """Read pairs into new memory.

        Raises:
            ArchiveError: See ``fill``.
        """
        rows = np.asarray(rows, np.int64)
        buffer = allocate(len(rows), self.sensors)
        self.prefetch(rows)
        self.fill(rows, buffer)
        return buffer.batch

    def prefetch(self, rows: NDArray[np.int64]) -> None:
        """Let the system read pairs in the background."""
        for source in self.sources:
            self.lmdb.prefetch(source.positions[rows])

    def fill(self, rows: NDArray[np.int64], buffer: Buffer) -> None:
        """Read pairs into the first rows of a buffer.

        With ``on_error="skip"`` a damaged pair is replaced by an intact pair of the batch, or else of the split.

        Raises:
            ArchiveError: A pair is damaged and ``on_error`` is ``raise``, or no pair of the split is intact, or most pairs
                have bands of another type.
        """
        faults = self._read_rows(rows, buffer)
        if faults:
            self._replace_damaged(rows, faults, buffer)

    def bands_60m(self, row: int) -> dict[str, NDArray[np.uint16]]:
        """Return the S2 bands at 60 m (20, 20) that a pair's value holds, by name; empty if it is damaged and skipped.

        Raises:
            ArchiveError: The value is damaged and ``on_error`` is ``raise``.
        """
        source = next(source for source in self.sources if "s2" in source.sensors)
        position = int(source.positions[row])
        find_offsets = v1.offsets_60m if "s1" in source.sensors else v2.offsets_60m
        shape = (IMAGE_SIZE_60M, IMAGE_SIZE_60M)
        try:
            value = self.lmdb.read(position)
            return {
                name: np.frombuffer(value, "<u2", IMAGE_SIZE_60M**2, offset).reshape(shape)
                for name, offset in find_offsets(value.data).items()
            }
        except DamagedValueError as error:
            self._record(self._located(error, position), position)
            return {}

    def _read_rows(self, rows: NDArray[np.int64], buffer: Buffer) -> dict[int, DamagedValueError]:
        """Fill a buffer; return the faults by row of the buffer."""
        faults: dict[int, DamagedValueError] = {}
        for source in self.sources:
            faults |= self._read_source(source, source.positions[rows], buffer)
        return faults

    def _read_source(
        self, source: Source, positions: NDArray[np.int64], buffer: Buffer
    ) -> dict[int, DamagedValueError]:
        faults = {}
        for row in self.lmdb.file_order(positions).tolist():
            try:
                value = self.lmdb.read(positions[row])
                copy_segments(value, source.decode(value.data), buffer, row)
            except DamagedValueError as error:
                if isinstance(error, BandTypeError):
                    self._require_minority(source, error)
                faults[row] = self._located(error, positions[row])
        if "s1" in source.sensors:
            with np.errstate(invalid="ignore", over="ignore"):
                sums = buffer.row_bytes["s1"][: len(positions)].view(np.float32).sum(axis=1)
            for row in np.flatnonzero(~np.isfinite(sums)).tolist():
                faults.setdefault(row, self._located("S1 holds values that are not finite", positions[row]))
        return faults

    def _require_minority(self, source: Source, fault: BandTypeError) -> None:
        """Check that bands of another type are a fault of a few patches, not of the whole archive.

        Raises:
            ArchiveError: Most patches have the same fault.
        """
        rows = np.linspace(0, len(self) - 1, min(_TYPE_SAMPLE, len(self))).astype(int)
        count = sum(self._has_fault(fault, source, position) for position in source.positions[rows].tolist())
        if 2 * count > len(rows):
            raise ArchiveError(
                f"{self.lmdb.folder}: {fault}, in {count} of {len(rows)} patches checked; write S1 as float32 and S2 as"
                " uint16, in row-major order"
            )

    def _has_fault(self, fault: BandTypeError, source: Source, position: int) -> bool:
        try:
            source.decode(self.lmdb.read(position).data)
        except DamagedValueError as error:
            return str(error) == str(fault)
        return False

    def _stored_labels(self, position: int) -> NDArray[np.bool_]:
        known = self.lmdb.labels.get(position)
        if known is None:
            try:
                value = self.lmdb.read(position)
                known = np.isin(CLASSES, v1.class_names(value.data))
            except DamagedValueError as error:
                self._record(self._located(error, position), position)
                known = np.zeros(len(CLASSES), bool)
            self.lmdb.labels[position] = known
        return known

    def _located(self, fault: object, position: int) -> DamagedValueError:
        """Return the error that names archive and key; raise it if damage is not skipped."""
        kind = BandTypeError if isinstance(fault, BandTypeError) else DamagedValueError
        error = kind(f"{self.lmdb.folder}: {self.lmdb.key(position)}: {fault}")
        if self.on_error == "raise":
            raise error
        return error

    def _replace_damaged(self, rows: NDArray[np.int64], faults: dict[int, DamagedValueError], buffer: Buffer) -> None:
        intact = [row for row in range(len(rows)) if row not in faults]
        other = buffer if intact else self._first_intact(next(iter(faults.values())))
        for number, (row, error) in enumerate(sorted(faults.items())):
            for name, content in buffer.row_bytes.items():
                content[row] = other.row_bytes[name][intact[number % len(intact)] if intact else 0]
            self._record(error, int(self.sources[0].positions[rows[row]]))

    def _first_intact(self, error: DamagedValueError) -> Buffer:
        """Read the first intact pair of the split; raise the error if there is none."""
        buffer = allocate(1, self.sensors)
        for row in range(len(self)):
            if not self._read_rows(np.array([row]), buffer):
                return buffer
        raise error

    def _record(self, error: DamagedValueError, position: int) -> None:
        name = self.lmdb.key(position)
        if name not in self.damaged:
            self.damaged[name] = str(error)
            if not isinstance(error, BandTypeError):
                log.warning("%s; skipped, %d damaged pairs so far", error, len(self.damaged))
            elif (fault := str(error).rpartition("band ")[2]) not in self.reported_types:
                self.reported_types.add(fault)
                log.warning("%s; skipped; further pairs with this fault are counted, not logged", error)
