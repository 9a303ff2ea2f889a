"""One contract for every source of pairs: an archive, told apart by what is in its folder, has splits."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from csmae.config import Data
from csmae.data.formats.layout import ArchiveError, DamagedValueError
from csmae.data.formats.lmdb_values import MAX_VALUE, Store, open_store
from csmae.data.formats.v1 import PickleDecoder
from csmae.data.formats.v1 import sensors as stored_sensors
from csmae.data.formats.v2 import SafetensorsDecoder
from csmae.data.split import Source, Split
from csmae.data.splits import (
    LIST_FILES,
    METADATA,
    SPLITS,
    Metadata,
    empty_split,
    first_five,
    read_metadata,
    read_names,
)
from csmae.data.synthetic.archive import ensure_synthetic
from csmae.sensors import BANDS, SENSORS

__all__ = ["Archive", "ArchiveError", "Split", "open_archive"]

log = logging.getLogger(__name__)

_FIRST = 10
"""Values that tell what an archive is."""

_ARCHIVES = 4
"""Archives whose splits a process remembers: a worker trains many trials on one."""


@dataclass(frozen=True, eq=False)
class Archive:
    """An open archive; one a process, version of its files and options, see ``open_archive``."""

    store: Store
    is_v1: bool
    """Whether a value is a pickle that holds both sensors, as in BigEarthNet v1."""
    metadata: Metadata | None
    lists: dict[str, Path]
    """By split, the list of names that goes before the metadata's column."""
    on_error: str

    @property
    def sensors(self) -> tuple[str, ...]:
        """Those whose images the archive holds; both where none can be told, for then none is left out on purpose."""
        found: set[str] = set()
        if self.is_v1:
            for position in range(min(_FIRST, len(self.store.index.keys))):
                with suppress(DamagedValueError):
                    found |= stored_sensors(self.store.read(position).data)
        elif self.metadata is not None:
            names = {"s1": self.metadata.s1_names, "s2": self.metadata.names}
            found = {sensor for sensor in SENSORS if (self.store.find(names[sensor]) >= 0).any()}
        return tuple(sorted(found)) or SENSORS

    @property
    def described(self) -> tuple[str, ...]:
        """Splits that a list or the metadata describes."""
        rows = set() if self.metadata is None else set(np.unique(self.metadata.splits).tolist())
        return tuple(name for name in SPLITS if name in self.lists or name.encode() in rows)

    def split(self, name: str, sensors: tuple[str, ...] = SENSORS) -> Split:
        """A split. Its pairs are found once a process and version of the files: in a large archive that takes a second.

        Args:
            name: ``train``, ``validation`` or ``test``.
            sensors: Those whose images are wanted, for an archive may hold only one.

        Returns:
            With no pair known to be damaged, whatever an earlier reader found.

        Raises:
            ArchiveError: There is no such split, it is empty, or the archive lacks some of its patches.
        """
        return replace(_split(self, name, sensors, _state(self.lists.get(name))), damaged={}, types_told=set())

    def find(self, name: str, sensors: tuple[str, ...]) -> Split:
        """What ``split`` returns, found anew."""
        if name not in SPLITS:
            raise ArchiveError(f"{self.store.folder}: has the splits {', '.join(SPLITS)}, not {name!r}")
        if name in self.lists:
            return self.named(read_names(self.lists[name]), str(self.lists[name]), sensors)
        if self.metadata is None:
            raise ArchiveError(
                f"{self.store.folder.parent}: neither {METADATA} nor {LIST_FILES[name]} says which pairs are in split"
                f" {name!r}; let data.splits_dir name a folder with {', '.join(LIST_FILES.values())}"
            )
        rows = np.flatnonzero(self.metadata.splits == name.encode())
        if not len(rows):
            raise ArchiveError(empty_split(self.metadata, name))
        return self._of_rows(self.metadata, rows, f"{self.metadata.path}, split {name}", sensors)

    def named(self, names: NDArray[np.bytes_], where: str, sensors: tuple[str, ...] = SENSORS) -> Split:
        """The pairs of S2 patch names, in their order; names of either version where there is metadata.

        Args:
            names: Patch names without repetition.
            where: Named at the start of an error, such as the list's path.
            sensors: As in ``split``.

        Raises:
            ArchiveError: The archive lacks some of them.
        """
        rows = np.full(len(names), -1) if self.metadata is None else self.metadata.find(names)
        if self.metadata is not None and (rows >= 0).all():
            if len(repeated := _repeated(rows)):
                twice = first_five(self.metadata.names[repeated])
                raise ArchiveError(
                    f"{where}: {len(repeated)} patches are listed twice: {twice}; leave one row for each"
                )
            return self._of_rows(self.metadata, rows, where, sensors)
        if self.is_v1:
            return self._assemble({sensors: names}, None, where)
        unknown = names[rows < 0]
        raise ArchiveError(
            f"{where}: {len(unknown)} of {len(names)} names are not in {METADATA}: {first_five(unknown)}"
        )

    def _of_rows(self, metadata: Metadata, rows: NDArray[np.int64], where: str, sensors: tuple[str, ...]) -> Split:
        labels_nc = metadata.labels_nc[rows]
        if self.is_v1:  # whose values hold labels too
            known = labels_nc if metadata.labels_nc.any() else None
            return self._assemble({sensors: metadata.v1_names[rows]}, known, where)
        keys = {"s2": metadata.names, "s1": metadata.s1_names}
        return self._assemble({(sensor,): keys[sensor][rows] for sensor in keys if sensor in sensors}, labels_nc, where)

    def _assemble(
        self, keys: dict[tuple[str, ...], NDArray[np.bytes_]], labels_nc: NDArray[np.bool_] | None, where: str
    ) -> Split:
        """A split of values, after a check that each key is there.

        Args:
            keys: By the sensors that a value holds, the key of each pair's value.
            labels_nc: Of each pair, where they are known.
            where: Named at the start of an error.
        """
        positions = {sensors: self.store.find(names) for sensors, names in keys.items()}
        if self.is_v1 and len(repeated := _repeated(next(iter(positions.values())))):
            twice = first_five(self.store.index.keys[repeated])
            raise ArchiveError(f"{where}: {len(repeated)} patches are listed twice: {twice}; leave one row for each")
        absent = {sensors: found < 0 for sensors, found in positions.items()}
        decoder = PickleDecoder if self.is_v1 else SafetensorsDecoder
        for sensors, lacking in absent.items():
            if lacking.any():
                names = keys[sensors][lacking]
                others = [other for other in absent if lacking.all() and not absent[other].all()]
                alone = _only(others[0][0]) if others else ""
                text = f"{where}: {len(names)} of {len(lacking)} patches are not in {self.store.folder}: {first_five(names)}{alone}"
                if self.on_error == "raise" or np.any(list(absent.values()), axis=0).all():
                    raise ArchiveError(text)
                log.warning("%s; skipped", text)
        there = ~np.any(list(absent.values()), axis=0)
        sources = tuple(
            Source(sensors, decoder(tuple(band for sensor in sensors for band in BANDS[sensor])), found[there])
            for sensors, found in positions.items()
        )
        return Split(self.store, sources, None if labels_nc is None else labels_nc[there], self.on_error)


def _only(sensor: str) -> str:
    """The end of an error text where an archive may hold one sensor on purpose."""
    return f"; where {sensor} alone is meant, `data stats`, `data show` and `embed` take --sensor {sensor}"


def _repeated(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those that occur more than once; -1 stands for none."""
    unique, counts = np.unique(places[places >= 0], return_counts=True)
    return unique[counts > 1]


def open_archive(data: Data) -> Archive:
    """Open the archive that a configuration names; a synthetic one is written first, if it is not there yet.

    Raises:
        ArchiveError: There is no archive, or it is damaged.
    """
    folder = ensure_synthetic(data.synthetic) if data.path == "synthetic" else Path(data.path).expanduser()
    store = open_store(_find_lmdb(folder))
    metadata = read_metadata(folder / METADATA) if (folder / METADATA).exists() else None
    is_v1 = _is_v1(store)
    if not is_v1 and metadata is None:
        raise ArchiveError(f"{folder}: a BigEarthNet v2 archive needs {METADATA} beside {store.folder.name}")
    lists_dir = folder if data.splits_dir is None else Path(data.splits_dir).expanduser()
    lists = {name: lists_dir / file for name, file in LIST_FILES.items()}
    if data.splits_dir is None:
        lists = {name: path for name, path in lists.items() if path.exists()}
    return _archive(store, is_v1, metadata, tuple(lists.items()), data.on_error)


@lru_cache(maxsize=_ARCHIVES)
def _archive(
    store: Store, is_v1: bool, metadata: Metadata | None, lists: tuple[tuple[str, Path], ...], on_error: str
) -> Archive:
    return Archive(store, is_v1, metadata, dict(lists), on_error)


@lru_cache(maxsize=_ARCHIVES * len(SPLITS))
def _split(archive: Archive, name: str, sensors: tuple[str, ...], _state: tuple[int, ...]) -> Split:
    return archive.find(name, sensors)


def _state(path: Path | None) -> tuple[int, ...]:
    """What changes when a file does; nothing where there is none."""
    try:
        state = path.stat() if path else None
    except OSError:  # named when it is read
        state = None
    return (state.st_ino, state.st_mtime_ns, state.st_size) if state else ()


def _find_lmdb(folder: Path) -> Path:
    """The one LMDB of an archive's folder."""
    try:
        next(folder.iterdir(), None)  # glob keeps silent where there is no folder, or none that may be read
        found = sorted(path.parent for path in folder.glob("*/data.mdb"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArchiveError(f"data.path: there is no folder {folder}: name the archive's, or mount it") from None
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be read: {error.strerror}: let this account read it") from None
    if len(found) == 1:
        return found[0]
    what = f"found {', '.join(path.name for path in found)}" if found else "found none"
    raise ArchiveError(
        f"{folder}: must hold one LMDB (a folder with data.mdb), with {METADATA} (BigEarthNet v2) or"
        f" {', '.join(LIST_FILES.values())} (v1): {what}"
    )


def _is_v1(store: Store) -> bool:
    """Whether the values are pickles; a safetensors value has ``{`` after its eight bytes of length."""
    first_values = np.flatnonzero(store.index.sizes[:_FIRST] <= MAX_VALUE)
    if not len(first_values):
        raise ArchiveError(f"{store.folder}: holds no patches: copy or download it again")
    return all(store.read(position)[8:9].tobytes() != b"{" for position in first_values.tolist())
