"""A split: pairs in a fixed order, with their names and labels, read in batches.

N pairs, B pairs of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from csmae.data.formats import v1, v2
from csmae.data.formats.layout import ArchiveError, BandTypeError, DamagedValueError, Layout
from csmae.data.formats.lmdb_values import Store
from csmae.data.pairs import Buffer, PairBatch, allocate
from csmae.sensors import CLASSES

log = logging.getLogger(__name__)

_LOOKED_AT = 64
"""Patches, spread over a split, that tell whether one is of another type or all are."""


@dataclass(frozen=True)
class Source:
    """Values that hold bands of each pair of a split."""

    sensors: tuple[str, ...]
    decode: Callable[[memoryview], Layout]
    """Where the bands lie in a value."""
    positions: NDArray[np.int64]
    """Of each pair's value in the store (N,)."""


@dataclass(frozen=True)
class Split:
    """Pairs in a fixed order."""

    store: Store
    sources: tuple[Source, ...]
    labels_nc: NDArray[np.bool_] | None
    """As the metadata names them; None where only the values do."""
    on_error: str = "raise"
    damaged: dict[str, str] = field(default_factory=dict)
    """What is wrong, by patch name, with the pairs that were skipped; grows while reading."""
    types_told: set[str] = field(default_factory=set)
    """Of bands' types that are not what they must be, those that were reported: all such pairs have the same fault."""

    def __len__(self) -> int:
        return len(self.sources[0].positions)

    @property
    def sensors(self) -> tuple[str, ...]:
        """Those whose images are read."""
        return tuple(sorted(sensor for source in self.sources for sensor in source.sensors))

    @property
    def names(self) -> list[str]:
        """Keys under which the archive holds the pairs: S2 patch names."""
        return [key.decode() for key in self.store.index.keys[self.sources[0].positions].tolist()]

    def damaged_rows(self) -> NDArray[np.int64]:
        """Indices of the pairs that were found damaged so far: the images in their place are those of other pairs."""
        rows = [row for row, name in enumerate(self.names) if name in self.damaged] if self.damaged else []
        return np.array(rows, np.int64)

    def labels(self) -> NDArray[np.bool_]:
        """Classes of each pair (N, 19), in the order of ``csmae.sensors.CLASSES``.

        Raises:
            ArchiveError: A value of a v1 archive is damaged; where damage is skipped, it has no class.
        """
        if self.labels_nc is not None:
            return self.labels_nc
        return np.stack([self._stored_labels(position) for position in self.store.announced(self.sources[0].positions)])

    def take(self, indices: ArrayLike) -> Split:
        """The pairs at these indices, in their order."""
        chosen = np.asarray(indices, np.int64)
        sources = tuple(replace(source, positions=source.positions[chosen]) for source in self.sources)
        labels_nc = None if self.labels_nc is None else self.labels_nc[chosen]
        return replace(self, sources=sources, labels_nc=labels_nc)

    def read(self, rows: ArrayLike) -> PairBatch:
        """The pairs at these indices, in new memory.

        Raises:
            ArchiveError: A value is damaged.
        """
        rows = np.asarray(rows, np.int64)
        buffer = allocate(len(rows), self.sensors)
        self.expect(rows)
        self.fill(rows, buffer)
        return buffer.batch

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Let the system fetch pairs that will be read soon."""
        for source in self.sources:
            self.store.expect(source.positions[rows])

    def fill(self, rows: NDArray[np.int64], buffer: Buffer) -> None:
        """Read the pairs at these indices into the first rows of a buffer.

        A damaged pair ends it, or, where the archive was opened with ``on_error="skip"``, is remembered in
        ``damaged`` and replaced by an intact pair of the batch, or else of the split, for the ranks' batches must stay
        equally large.

        Raises:
            ArchiveError: A value is damaged and ``on_error`` is ``raise``, or no pair of the split is intact.
        """
        faults = self._read(rows, buffer)
        if faults:
            self._skip(rows, faults, buffer)

    def _read(self, rows: NDArray[np.int64], buffer: Buffer) -> dict[int, DamagedValueError]:
        """Fill a buffer; returns what is wrong, by row of the buffer."""
        faults: dict[int, DamagedValueError] = {}
        for source in self.sources:
            faults |= self._fill(source, source.positions[rows], buffer)
        return faults

    def _fill(self, source: Source, positions: NDArray[np.int64], buffer: Buffer) -> dict[int, DamagedValueError]:
        faults = {}
        for row in self.store.in_file_order(positions).tolist():
            try:
                value = self.store.read(positions[row])
                copy_runs(value, source.decode(value.data), buffer, row)
            except DamagedValueError as error:
                if isinstance(error, BandTypeError):
                    self._require_few(source, error)
                faults[row] = self._named(error, positions[row])
        if "s1" in source.sensors:
            with np.errstate(invalid="ignore", over="ignore"):
                sums = buffer.rows["s1"][: len(positions)].view(np.float32).sum(axis=1)
            for row in np.flatnonzero(~np.isfinite(sums)).tolist():
                faults.setdefault(row, self._named("S1 holds values that are not finite", positions[row]))
        return faults

    def _require_few(self, source: Source, fault: BandTypeError) -> None:
        """That bands of another type are the fault of a few patches and not of the whole archive.

        Raises:
            ArchiveError: Most patches have the same fault.
        """
        places = np.linspace(0, len(self) - 1, min(_LOOKED_AT, len(self))).astype(int)
        count = sum(self._has(fault, source, position) for position in source.positions[places].tolist())
        if 2 * count > len(places):
            raise ArchiveError(
                f"{self.store.folder}: {fault}, in {count} of {len(places)} patches looked at; write S1 as float32 and S2"
                " as uint16, row by row"
            )

    def _has(self, fault: BandTypeError, source: Source, position: int) -> bool:
        try:
            source.decode(self.store.read(position).data)
        except DamagedValueError as error:
            return str(error) == str(fault)
        return False

    def bands_60m(self, row: int) -> dict[str, NDArray[np.uint16]]:
        """S2's bands of 60 m (20, 20) that a pair's value holds, by name; none where it is damaged and skipped.

        Raises:
            ArchiveError: The value is damaged and ``on_error`` is ``raise``.
        """
        source = next(source for source in self.sources if "s2" in source.sensors)
        position = int(source.positions[row])
        find = v1.offsets_60m if "s1" in source.sensors else v2.offsets_60m
        try:
            value = self.store.read(position)
            return {
                name: np.frombuffer(value, "<u2", 400, offset).reshape(20, 20)
                for name, offset in find(value.data).items()
            }
        except DamagedValueError as error:
            self._report(self._named(error, position), position)
            return {}

    def _stored_labels(self, position: int) -> NDArray[np.bool_]:
        known = self.store.labels.get(position)
        if known is None:
            try:
                value = self.store.read(position)
                known = np.isin(CLASSES, v1.labels(value.data))
            except DamagedValueError as error:
                self._report(self._named(error, position), position)
                known = np.zeros(len(CLASSES), bool)
            self.store.labels[position] = known
        return known

    def _named(self, fault: object, position: int) -> DamagedValueError:
        kind = BandTypeError if isinstance(fault, BandTypeError) else DamagedValueError
        error = kind(f"{self.store.folder}: {self.store.key(position)}: {fault}")
        if self.on_error == "raise":
            raise error
        return error

    def _skip(self, rows: NDArray[np.int64], faults: dict[int, DamagedValueError], buffer: Buffer) -> None:
        intact = [row for row in range(len(rows)) if row not in faults]
        other = buffer if intact else self._first_intact(next(iter(faults.values())))
        for number, (row, error) in enumerate(sorted(faults.items())):
            for name, content in buffer.rows.items():
                content[row] = other.rows[name][intact[number % len(intact)] if intact else 0]
            self._report(error, int(self.sources[0].positions[rows[row]]))

    def _first_intact(self, error: DamagedValueError) -> Buffer:
        """The first pair of the split that can be read; raises the error if there is none."""
        buffer = allocate(1, self.sensors)
        for row in range(len(self)):
            if not self._read(np.array([row]), buffer):
                return buffer
        raise error

    def _report(self, error: DamagedValueError, position: int) -> None:
        name = self.store.key(position)
        if name not in self.damaged:
            self.damaged[name] = str(error)
            if not isinstance(error, BandTypeError):
                log.warning("%s; skipped, %d damaged pairs so far", error, len(self.damaged))
            elif (fault := str(error).rpartition("band ")[2]) not in self.types_told:
                self.types_told.add(fault)
                log.warning("%s; skipped; further ones are counted, not named", error)


def copy_runs(value: NDArray[np.uint8], layout: Layout, buffer: Buffer, row: int) -> None:
    """Bring a value's bands into a row of a buffer."""
    for name, source, target, num_bytes in layout:
        buffer.rows[name][row, target : target + num_bytes] = value[source : source + num_bytes]
