"""Opens archives: BigEarthNet v1, v2 or synthetic, detected by the content of the folder.

All archives keep one contract: their splits are ``csmae.data.split.Split``.
"""

from __future__ import annotations

import logging
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from csmae.config import Data
from csmae.data.errors import ArchiveError, DamagedValueError
from csmae.data.formats.lmdb_reader import MAX_VALUE_BYTES, LmdbReader, open_lmdb
from csmae.data.formats.v1 import PickleDecoder, stored_sensors
from csmae.data.formats.v2 import SafetensorsDecoder
from csmae.data.metadata import LIST_FILES, METADATA, SPLITS, Metadata, first_five, read_metadata, read_names
from csmae.data.split import Source, Split
from csmae.data.synthetic.archive import ensure_synthetic
from csmae.sensors import BANDS, SENSORS

log = logging.getLogger(__name__)

_NUM_PROBED = 10
"""Values that are read to detect what an archive holds."""

_MAX_CACHED_ARCHIVES = 4
"""Archives whose splits a process caches: a worker trains many trials on one."""


@dataclass(frozen=True, eq=False)
class Archive:
    """An open archive, see ``open_archive``."""

    lmdb: LmdbReader
    is_v1: bool
    """Whether a value is a pickle with the images of both sensors, as in BigEarthNet v1."""
    metadata: Metadata | None
    lists: dict[str, Path]
    """By split, the list of names that takes precedence over the metadata."""
    on_error: str

    @property
    def version(self) -> str:
        """``BigEarthNet v1`` or ``BigEarthNet v2``."""
        return f"BigEarthNet {'v1' if self.is_v1 else 'v2'}"

    @property
    def sensors(self) -> tuple[str, ...]:
        """Sensors whose images the archive holds; both if none is found, because then neither is missing on purpose."""
        found: set[str] = set()
        if self.is_v1:
            for position in range(min(_NUM_PROBED, len(self.lmdb.index.keys))):
                with suppress(DamagedValueError):
                    found |= stored_sensors(self.lmdb.read(position).data)
        elif self.metadata is not None:
            names = {"s1": self.metadata.s1_names, "s2": self.metadata.names}
            found = {sensor for sensor in SENSORS if (self.lmdb.index.find(names[sensor]) >= 0).any()}
        return tuple(sorted(found)) or SENSORS

    @property
    def split_names(self) -> tuple[str, ...]:
        """Splits that a list or the metadata defines."""
        in_metadata = set() if self.metadata is None else set(np.unique(self.metadata.splits).tolist())
        return tuple(name for name in SPLITS if name in self.lists or name.encode() in in_metadata)

    def split(self, name: str, sensors: tuple[str, ...] = SENSORS) -> Split:
        """Return a split; cached by process and version of the files, because finding its pairs may take a second.

        Args:
            name: ``train``, ``validation`` or ``test``.
            sensors: Sensors to read; an archive may hold only one.

        Returns:
            The split with an empty record of damage, whatever earlier readers found.

        Raises:
            ArchiveError: There is no such split, it is empty, or the archive lacks some of its patches.
        """
        split = _read_split(self, name, sensors, _file_state(self.lists.get(name)))
        return replace(split, damaged={}, reported_types=set())

    def select(self, names: NDArray[np.bytes_], where: str, sensors: tuple[str, ...] = SENSORS) -> Split:
        """Return the pairs of S2 patch names in the given order; with metadata, names of v1 and v2 are accepted.

        Args:
            names: Patch names without repetition.
            where: Beginning of an error text, such as the list's path.
            sensors: Sensors to read.

        Raises:
            ArchiveError: The archive lacks some of the names.
        """
        rows = np.full(len(names), -1) if self.metadata is None else self.metadata.find(names)
        if self.metadata is not None and (rows >= 0).all():
            _reject_repeated(self.metadata.names, rows, where)
            return _split_of_rows(self, self.metadata, rows, where, sensors)
        if self.is_v1:
            return _split_of_keys(self, {sensors: names}, None, where)
        unknown = names[rows < 0]
        raise ArchiveError(
            f"{where}: {len(unknown)} of {len(names)} names are not in {METADATA}: {first_five(unknown)}"
        )


def open_archive(data: Data) -> Archive:
    """Open the archive that a configuration names; a synthetic one is written on first use.

    Returns:
        The archive; cached by process, version of its files and options.

    Raises:
        ArchiveError: There is no archive, or it is damaged.
    """
    folder = ensure_synthetic(data.synthetic) if data.path == "synthetic" else Path(data.path).expanduser()
    lmdb = open_lmdb(_find_lmdb(folder))
    metadata = read_metadata(folder / METADATA) if (folder / METADATA).exists() else None
    is_v1 = _is_v1(lmdb)
    if not is_v1 and metadata is None:
        raise ArchiveError(f"{folder}: a BigEarthNet v2 archive needs {METADATA} beside {lmdb.folder.name}")
    lists_dir = folder if data.splits_dir is None else Path(data.splits_dir).expanduser()
    lists = {name: lists_dir / file for name, file in LIST_FILES.items()}
    if data.splits_dir is None:
        lists = {name: path for name, path in lists.items() if path.exists()}
    return _archive(lmdb, is_v1, metadata, tuple(lists.items()), data.on_error)


def data_name(data: Data) -> str:
    """Name an archive by its content: ``BigEarthNet v2, 237871 train, 122342 validation, 119825 test pairs``.

    Raises:
        ArchiveError: The archive cannot be opened, or a split is missing.
    """
    archive = open_archive(data)
    sizes = {name: len(archive.split(name)) for name in SPLITS}
    if data.max_train_pairs and data.max_train_pairs < sizes["train"]:
        sizes["train"] = data.max_train_pairs
    counts = ", ".join(f"{size} {name}" for name, size in sizes.items())
    if data.path == "synthetic":
        return f"synthetic, {counts} pairs, seed {data.synthetic.seed}"
    return f"{archive.version}, {counts} pairs"


def fingerprint(data: Data) -> str:
    """Return ``data_name`` and a checksum over the keys and sizes of all values; identical for copies of an archive.

    Raises:
        ArchiveError: The archive cannot be opened, or a split is missing.
    """
    index = open_archive(data).lmdb.index
    checksum = zlib.crc32(index.sizes.tobytes(), zlib.crc32(index.keys.tobytes()))
    return f"{data_name(data)}, checksum {checksum:08x}"


@lru_cache(maxsize=_MAX_CACHED_ARCHIVES)
def _archive(
    lmdb: LmdbReader, is_v1: bool, metadata: Metadata | None, lists: tuple[tuple[str, Path], ...], on_error: str
) -> Archive:
    return Archive(lmdb, is_v1, metadata, dict(lists), on_error)


def _find_lmdb(folder: Path) -> Path:
    """Return the only LMDB of an archive's folder."""
    try:
        next(folder.iterdir(), None)  # unlike glob, this fails if the folder is missing or unreadable
        found = sorted(path.parent for path in folder.glob("*/data.mdb"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArchiveError(f"data.path: there is no folder {folder}: correct the path, or mount the archive") from None
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be read: {error.strerror}: grant this account read access") from None
    if len(found) == 1:
        return found[0]
    what = f"found {', '.join(path.name for path in found)}" if found else "found none"
    raise ArchiveError(
        f"{folder}: must hold one LMDB (a folder with data.mdb), with {METADATA} (BigEarthNet v2) or"
        f" {', '.join(LIST_FILES.values())} (v1): {what}"
    )


def _is_v1(lmdb: LmdbReader) -> bool:
    """Whether the values are pickles; a safetensors value has ``{`` after its eight bytes of length."""
    first_values = np.flatnonzero(lmdb.index.sizes[:_NUM_PROBED] <= MAX_VALUE_BYTES)
    if not len(first_values):
        raise ArchiveError(f"{lmdb.folder}: holds no patches: copy or download it again")
    return all(lmdb.read(position)[8:9].tobytes() != b"{" for position in first_values.tolist())


@lru_cache(maxsize=_MAX_CACHED_ARCHIVES * len(SPLITS))
def _read_split(archive: Archive, name: str, sensors: tuple[str, ...], _list_state: tuple[int, ...]) -> Split:
    if name not in SPLITS:
        raise ArchiveError(f"{archive.lmdb.folder}: split must be one of {', '.join(SPLITS)}: found {name!r}")
    if name in archive.lists:
        return archive.select(read_names(archive.lists[name]), str(archive.lists[name]), sensors)
    if archive.metadata is None:
        raise ArchiveError(
            f"{archive.lmdb.folder.parent}: neither {METADATA} nor {LIST_FILES[name]} defines split {name!r};"
            f" set data.splits_dir to a folder with {', '.join(LIST_FILES.values())}"
        )
    rows = archive.metadata.rows_of_split(name)
    return _split_of_rows(archive, archive.metadata, rows, f"{archive.metadata.path}, split {name}", sensors)


def _file_state(path: Path | None) -> tuple[int, ...]:
    """Return what changes with a file's content; empty if there is no file."""
    try:
        state = path.stat() if path else None
    except OSError:  # reading the file reports it
        state = None
    return (state.st_ino, state.st_mtime_ns, state.st_size) if state else ()


def _split_of_rows(
    archive: Archive, metadata: Metadata, rows: NDArray[np.int64], where: str, sensors: tuple[str, ...]
) -> Split:
    labels_nc = metadata.labels_nc[rows]
    if archive.is_v1:
        known = labels_nc if metadata.labels_nc.any() else None  # v1 values hold labels, too
        return _split_of_keys(archive, {sensors: metadata.v1_names[rows]}, known, where)
    keys = {"s2": metadata.names, "s1": metadata.s1_names}
    return _split_of_keys(
        archive, {(sensor,): keys[sensor][rows] for sensor in keys if sensor in sensors}, labels_nc, where
    )


def _split_of_keys(
    archive: Archive,
    keys: dict[tuple[str, ...], NDArray[np.bytes_]],
    labels_nc: NDArray[np.bool_] | None,
    where: str,
) -> Split:
    """Build a split from the keys of its values.

    Args:
        archive: Holds the values.
        keys: By the sensors that a value holds, the key of each pair's value.
        labels_nc: Labels of each pair, if the metadata has them.
        where: Beginning of an error text.

    Raises:
        ArchiveError: A key is repeated or missing.
    """
    positions = {sensors: archive.lmdb.index.find(names) for sensors, names in keys.items()}
    if archive.is_v1:
        _reject_repeated(archive.lmdb.index.keys, next(iter(positions.values())), where)
    present = _present_pairs(archive, keys, positions, where)
    decoder = PickleDecoder if archive.is_v1 else SafetensorsDecoder
    sources = tuple(
        Source(sensors, decoder(tuple(band for sensor in sensors for band in BANDS[sensor])), found[present])
        for sensors, found in positions.items()
    )
    return Split(archive.lmdb, sources, None if labels_nc is None else labels_nc[present], archive.on_error)


def _present_pairs(
    archive: Archive,
    keys: dict[tuple[str, ...], NDArray[np.bytes_]],
    positions: dict[tuple[str, ...], NDArray[np.int64]],
    where: str,
) -> NDArray[np.bool_]:
    """Return for each pair whether the archive has all its values (N,).

    Raises:
        ArchiveError: A value is missing and ``on_error`` is ``raise``, or each pair lacks a value.
    """
    missing = {sensors: found < 0 for sensors, found in positions.items()}
    present: NDArray[np.bool_] = ~np.any(list(missing.values()), axis=0)
    for sensors, is_missing in missing.items():
        if not is_missing.any():
            continue
        names = keys[sensors][is_missing]
        text = (
            f"{where}: {len(names)} of {len(is_missing)} patches are not in {archive.lmdb.folder}: {first_five(names)}"
        )
        others = [other[0] for other in missing if not missing[other].all()]
        if is_missing.all() and others:
            text += f"; to read only {others[0]}, pass --sensor {others[0]} to `data stats`, `data show` or `embed`"
        if archive.on_error == "raise" or not present.any():
            raise ArchiveError(text)
        log.warning("%s; skipped", text)
    return present


def _reject_repeated(names: NDArray[np.bytes_], positions: NDArray[np.int64], where: str) -> None:
    """Check that no position in ``names`` is repeated; -1 stands for a missing name."""
    unique, counts = np.unique(positions[positions >= 0], return_counts=True)
    if len(repeated := unique[counts > 1]):
        raise ArchiveError(
            f"{where}: {len(repeated)} patches are listed twice: {first_five(names[repeated])}; keep one row for each"
        )
