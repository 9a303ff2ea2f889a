"""The feature store: an encoder's features of an archive's split on disk, in shards that are read block by block.

N scenes, D width. A folder holds ``store.json`` (encoder and archive), ``names.npy``, ``labels.npy`` (N, 19)
and, for each sensor, ``s1-00000.npy``, ``s1-00001.npy`` and so on: L2-normalized features of ``SHARD`` scenes each.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csmae.atomic import atomic_write
from csmae.config import ConfigError, Data
from csmae.data.archive import open_archive
from csmae.data.metadata import SPLITS
from csmae.data.split import Split
from csmae.encoders import SensorEncoder
from csmae.retrieval import nearest
from csmae.retrieval.embed import embed
from csmae.sensors import CLASSES, SENSORS

FORMAT = "csmae-features-1"
METADATA, NAMES, LABELS = "store.json", "names.npy", "labels.npy"
SHARD = 4096
"""Scenes per shard: a killed process loses at most one shard."""
SHARDS_PER_BLOCK = nearest.ARCHIVE_BLOCK // SHARD

Metadata = dict[str, Any]
"""Content of ``store.json``."""

METADATA_TYPES: dict[str, type | UnionType] = {
    "encoder": str,
    "path": str,
    "splits_dir": str | None,
    "split": str,
    "archive": str,
    "sensors": list,
    "num_scenes": int,
    "width": int,
}
"""Required fields of ``store.json`` beside its format."""

LOCATION_FIELDS = ("path", "splits_dir", "path_from_store", "splits_dir_from_store")
"""Fields that may change: the fingerprint ``archive`` tells whether two locations hold the same archive."""


class StoreError(ConfigError):
    """A feature store cannot be written or used."""


@dataclass(frozen=True)
class Source:
    """The split of an archive that is embedded."""

    data: Data
    """Location of the archive."""
    split: str
    sensors: tuple[str, ...]

    def open(self) -> Split:
        """Open the split.

        Raises:
            ArchiveError: It cannot be read.
        """
        return open_archive(self.data).split(self.split, self.sensors)


@dataclass(frozen=True)
class FeatureStore:
    """A complete store."""

    folder: Path
    metadata: Metadata
    names: NDArray[np.bytes_]
    """S2 patch names (N,)."""
    labels_nc: NDArray[np.bool_]

    @property
    def sensors(self) -> tuple[str, ...]:
        """The sensors whose features it holds."""
        return tuple(self.metadata["sensors"])

    @property
    def source(self) -> Source:
        """The split that was embedded.

        Raises:
            StoreError: The archive has moved.
        """
        data = Data(path=self._locate("path"), splits_dir=self._locate("splits_dir"))
        return Source(data, self.metadata["split"], self.sensors)

    def _locate(self, field: str) -> str | None:
        """Current path of the archive or its split lists: relative to the store, as both may have moved, else absolute."""
        absolute: str | None = self.metadata[field]
        relative = self.metadata.get(f"{field}_from_store")
        moved = Path(os.path.normpath(self.folder.absolute() / relative)) if relative else None
        if moved and moved.exists():
            return str(moved)
        if absolute not in (None, "synthetic") and not Path(absolute).exists():
            raise StoreError(
                f"{self.folder}: its source {absolute} no longer exists: run `csmae embed` with the archive's new"
                " location and this store; existing shards are kept"
            )
        return absolute

    def blocks(self, sensor: str) -> Iterator[Tensor]:
        """Read one sensor's features in float32, in blocks for ``nearest.search``."""
        paths = [_shard(self.folder, sensor, start) for start in range(0, len(self.names), SHARD)]
        for first in range(0, len(paths), SHARDS_PER_BLOCK):
            shards = [np.load(path, mmap_mode="r") for path in paths[first : first + SHARDS_PER_BLOCK]]
            yield torch.from_numpy(np.concatenate(shards, dtype=np.float32))


def write_store(
    folder: Path, encoder: SensorEncoder, source: Source, dtype: str, advance: Callable[[int], object]
) -> int:
    """Embed a split into a feature store; existing shards are kept.

    Args:
        folder: The store's folder; may hold an incomplete store of the same split.
        encoder: On the device that computes.
        source: The split to embed.
        dtype: ``float16`` or ``float32``.
        advance: Called with the number of finished scenes, those of existing shards included.

    Returns:
        Number of scenes that this run found damaged; their features are zero, and no query retrieves them.

    Raises:
        StoreError: The folder holds a store of another encoder or archive, or cannot be written.
        ArchiveError: A pair is damaged, and the source does not skip damaged pairs.
    """
    split = source.open()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_metadata(folder, _build_metadata(encoder, split, source, folder.absolute()) | {"dtype": dtype})
        _write_array(folder / NAMES, np.array(split.names, "S"))
        _write_array(folder / LABELS, split.labels())
        for start in range(0, len(split), SHARD):
            rows = range(start, min(start + SHARD, len(split)))
            if all(_shard(folder, sensor, start).exists() for sensor in split.sensors):
                advance(len(rows))
                continue
            for sensor, features_nd in embed(encoder, split.take(rows), advance=advance).items():
                _write_array(_shard(folder, sensor, start), features_nd.cpu().numpy().astype(dtype))
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot be written: {error.strerror}: free some space or choose another folder"
        ) from None
    return len(split.damaged)


def _build_metadata(encoder: SensorEncoder, split: Split, source: Source, folder: Path) -> Metadata:
    index, positions = split.lmdb.index, split.sources[0].positions
    digest = hashlib.sha256("\n".join(split.names).encode())
    digest.update(np.ascontiguousarray(index.sizes[positions]).tobytes())
    path = Path(source.data.path).absolute() if source.data.path != "synthetic" else None
    splits_dir = Path(source.data.splits_dir).absolute() if source.data.splits_dir else None
    return {
        "format": FORMAT,
        "encoder": encoder.fingerprint(),
        "path": str(path) if path else "synthetic",
        "splits_dir": splits_dir and str(splits_dir),
        "path_from_store": path and os.path.relpath(path, folder),
        "splits_dir_from_store": splits_dir and os.path.relpath(splits_dir, folder),
        "split": source.split,
        "archive": digest.hexdigest(),
        "sensors": list(source.sensors),
        "num_scenes": len(split),
        "width": encoder.width,
    }


def _write_metadata(folder: Path, metadata: Metadata) -> None:
    """Write ``store.json``.

    Raises:
        StoreError: The folder holds another store, or other files.
    """
    if (folder / METADATA).exists():
        existing = read_metadata(folder)
        for name, value in metadata.items():
            if name not in LOCATION_FIELDS and existing.get(name) != value:
                values = f"{str(existing.get(name))[:12]}, not {str(value)[:12]}"
                raise StoreError(f"{folder}: was made with another {name} ({values}): choose a new folder")
    elif any(folder.iterdir()):
        raise StoreError(f"{folder}: is neither empty nor a feature store: choose a new folder")
    with atomic_write(folder / METADATA, durable=True) as file:
        file.write(json.dumps(metadata, indent=2).encode())


def open_store(folder: Path) -> FeatureStore:
    """Open a store; the shards' headers are checked, their features are not read.

    Raises:
        StoreError: There is no store, it is incomplete, or one of its files is damaged.
    """
    metadata = read_metadata(folder)
    names, labels = (_load(folder / name) for name in (NAMES, LABELS))
    expected = {
        NAMES: (names, "S", (metadata["num_scenes"],)),
        LABELS: (labels, "b", (metadata["num_scenes"], len(CLASSES))),
    }
    for name, (array, kind, shape) in expected.items():
        if array.dtype.kind != kind or array.shape != shape:
            raise StoreError(
                f"{folder / name}: does not match the {shape[0]} scenes of this store: delete it and embed again"
            )
    starts = range(0, metadata["num_scenes"], SHARD)
    shards = {_shard(folder, sensor, start): start for sensor in metadata["sensors"] for start in starts}
    missing = [path.name for path in shards if not path.exists()]
    if missing:
        raise StoreError(
            f"{folder}: is not complete: {len(missing)} of {len(shards)} shards are missing, {missing[0]} first: "
            "run `csmae embed` again to resume"
        )
    for path, start in shards.items():
        shape = (min(SHARD, metadata["num_scenes"] - start), metadata["width"])
        if _load(path).shape != shape:
            raise StoreError(
                f"{path}: must hold {shape} features, found {_load(path).shape}: delete it and embed again"
            )
    return FeatureStore(folder, metadata, names, labels)


def read_metadata(folder: Path) -> Metadata:
    """Read a store's ``store.json``.

    Raises:
        StoreError: It does not exist, or is not that of a feature store.
    """
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}: create a store with `csmae embed`") from None
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise StoreError(f"{path}: is not a {FORMAT}: choose a folder that `csmae embed` wrote")
    for name, kind in METADATA_TYPES.items():
        if not isinstance(metadata.get(name), kind):
            raise StoreError(f"{path}: {name} cannot be {metadata.get(name)!r}: choose a new folder and embed again")
    if metadata["split"] not in SPLITS or not set(metadata["sensors"]) <= set(SENSORS):
        raise StoreError(f"{path}: unknown split or sensor: choose a new folder and embed again")
    return metadata


def _shard(folder: Path, sensor: str, start: int) -> Path:
    return folder / f"{sensor}-{start // SHARD:05}.npy"


def _load(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is damaged"
        raise StoreError(f"{path}: {reason}: delete it and embed again") from None
    return array


def _write_array(path: Path, array: NDArray[Any]) -> None:
    content = io.BytesIO()
    np.save(content, array)
    with atomic_write(path, durable=True) as file:
        file.write(content.getvalue())
