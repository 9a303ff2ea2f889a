"""The feature store: what an encoder makes of an archive's split, on disk, in shards that are read block by block.

N scenes, D width. A folder holds ``store.json`` (of which encoder and archive), ``names.npy``, ``labels.npy`` (N, 19)
and, for each sensor, ``s1-00000.npy``, ``s1-00001.npy`` and so on: L2-normalised features of ``SHARD`` scenes each.
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
from csmae.data.split import Split
from csmae.data.splits import SPLITS
from csmae.encoders import SensorEncoder
from csmae.retrieval import nearest
from csmae.retrieval.embed import embed
from csmae.sensors import CLASSES, SENSORS

FORMAT = "csmae-features-1"
SETTINGS, NAMES, LABELS = "store.json", "names.npy", "labels.npy"
SHARD = 4096
"""Scenes of a shard: what a kill costs at most."""
BATCH = 256
"""Scenes that go through the network at once."""
SHARDS_A_BLOCK = nearest.ARCHIVE_BLOCK // SHARD

Facts = dict[str, Any]

FACTS: dict[str, type | UnionType] = {
    "encoder": str,
    "path": str,
    "splits_dir": str | None,
    "split": str,
    "archive": str,
    "sensors": list,
    "num_scenes": int,
    "width": int,
}
"""What ``store.json`` holds beside its format."""


class StoreError(ConfigError):
    """A feature store that cannot be made or used."""


@dataclass(frozen=True)
class Source:
    """The split of an archive that is embedded."""

    data: Data
    """Names the archive."""
    split: str
    sensors: tuple[str, ...]

    def open(self) -> Split:
        """The split.

        Raises:
            ArchiveError: It cannot be read.
        """
        return open_archive(self.data).split(self.split, self.sensors)


@dataclass(frozen=True)
class FeatureStore:
    """A complete store."""

    folder: Path
    facts: Facts
    """Content of ``store.json``."""
    names: NDArray[np.bytes_]
    """Of the scenes (N,)."""
    labels_nc: NDArray[np.bool_]

    @property
    def sensors(self) -> tuple[str, ...]:
        """Those whose features it holds."""
        return tuple(self.facts["sensors"])

    @property
    def source(self) -> Source:
        """Where the scenes came from."""
        data = Data(path=self._address("path"), splits_dir=self._address("splits_dir"))
        return Source(data, self.facts["split"], self.sensors)

    def _address(self, name: str) -> str | None:
        """Where the archive's part is: as seen from the store if it is there, for both may have moved; else as it was."""
        known: str | None = self.facts[name]
        seen = self.facts.get(f"{name}_from_store")
        near = Path(os.path.normpath(self.folder.absolute() / seen)) if seen else None
        if near and near.exists():
            return str(near)
        if known not in (None, "synthetic") and not Path(known).exists():
            raise StoreError(
                f"{self.folder}: what it was made from, {known}, is not there: run `python -m csmae embed` with the archive's "
                "new place and this store: what is done stays"
            )
        return known

    def blocks(self, sensor: str) -> Iterator[Tensor]:
        """One sensor's features in float32, as ``nearest.search`` takes them."""
        paths = [_shard(self.folder, sensor, start) for start in range(0, len(self.names), SHARD)]
        for first in range(0, len(paths), SHARDS_A_BLOCK):
            shards = [np.load(path, mmap_mode="r") for path in paths[first : first + SHARDS_A_BLOCK]]
            yield torch.from_numpy(np.concatenate(shards, dtype=np.float32))


def write_store(
    folder: Path, encoder: SensorEncoder, source: Source, dtype: str, advance: Callable[[int], object]
) -> int:
    """Embed a split; shards that are there already stay.

    Args:
        folder: Of the store; may hold the beginning of the same one.
        encoder: On the device that shall compute.
        source: What is embedded.
        dtype: ``float16`` or ``float32``.
        advance: Told of scenes as they are done, those of earlier runs included.

    Returns:
        Scenes that this run found damaged; their features are zero, which is like nothing.

    Raises:
        StoreError: The folder holds a store of another encoder or archive, or cannot be written.
        ArchiveError: A pair is damaged, and the source was not to skip it.
    """
    split = source.open()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _begin(folder, _describe(encoder, split, source, folder.absolute()) | {"dtype": dtype})
        _write(folder / NAMES, np.array(split.names, "S"))
        _write(folder / LABELS, split.labels())
        for start in range(0, len(split), SHARD):
            rows = range(start, min(start + SHARD, len(split)))
            if all(_shard(folder, sensor, start).exists() for sensor in split.sensors):
                advance(len(rows))
                continue
            features = embed(encoder, split.take(rows), BATCH, advance)
            for sensor, found in features.items():
                _write(_shard(folder, sensor, start), found.cpu().numpy().astype(dtype))
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error.strerror}: make room or name another folder") from None
    return len(split.damaged)


def _describe(encoder: SensorEncoder, split: Split, source: Source, folder: Path) -> Facts:
    index, positions = split.store.index, split.sources[0].positions
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


MAY_MOVE = ("path", "splits_dir", "path_from_store", "splits_dir_from_store")
"""Addresses; whether they name the same archive is what its fingerprint says."""


def _begin(folder: Path, facts: Facts) -> None:
    """Write what the store is, or make sure that it was begun as the same."""
    if (folder / SETTINGS).exists():
        before = read_facts(folder)
        for name in facts:
            if name not in MAY_MOVE and before.get(name) != facts[name]:
                values = f"{str(before.get(name))[:12]}, not {str(facts[name])[:12]}"
                raise StoreError(f"{folder}: was made with another {name} ({values}): name a new folder")
    elif any(folder.iterdir()):
        raise StoreError(f"{folder}: is no feature store and not empty: name a new folder")
    with atomic_write(folder / SETTINGS, durable=True) as file:
        file.write(json.dumps(facts, indent=2).encode())


def open_store(folder: Path) -> FeatureStore:
    """Open a store, its shards looked at but not read.

    Raises:
        StoreError: There is none, it is not complete, or a file of it is damaged.
    """
    facts = read_facts(folder)
    names, labels = (_load(folder / name) for name in (NAMES, LABELS))
    expected = {NAMES: (names, "S", (facts["num_scenes"],)), LABELS: (labels, "b", (facts["num_scenes"], len(CLASSES)))}
    for name, (array, kind, shape) in expected.items():
        if array.dtype.kind != kind or array.shape != shape:
            raise StoreError(
                f"{folder / name}: is not of the {shape[0]} scenes of this store: delete it and embed again"
            )
    starts = range(0, facts["num_scenes"], SHARD)
    shards = {_shard(folder, sensor, start): start for sensor in facts["sensors"] for start in starts}
    missing = [path.name for path in shards if not path.exists()]
    if missing:
        raise StoreError(
            f"{folder}: is not complete: {len(missing)} of {len(shards)} shards are missing, {missing[0]} first: "
            "run `python -m csmae embed` again, it goes on"
        )
    for path, start in shards.items():
        shape = (min(SHARD, facts["num_scenes"] - start), facts["width"])
        if _load(path).shape != shape:
            raise StoreError(
                f"{path}: must hold {shape} features, found {_load(path).shape}: delete it and embed again"
            )
    return FeatureStore(folder, facts, names, labels)


def read_facts(folder: Path) -> Facts:
    """Content of a store's ``store.json``.

    Raises:
        StoreError: It is not there, or is no feature store's.
    """
    path = folder / SETTINGS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}: `python -m csmae embed` makes a store") from None
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise StoreError(f"{path}: is no {FORMAT}: name a folder that `python -m csmae embed` made")
    for name, kind in FACTS.items():
        if not isinstance(facts.get(name), kind):
            raise StoreError(f"{path}: {name} cannot be {facts.get(name)!r}: name a new folder and embed again")
    if facts["split"] not in SPLITS or not set(facts["sensors"]) <= set(SENSORS):
        raise StoreError(f"{path}: names an unknown split or sensor: name a new folder and embed again")
    return facts


def _shard(folder: Path, sensor: str, start: int) -> Path:
    return folder / f"{sensor}-{start // SHARD:05}.npy"


def _load(path: Path) -> NDArray[Any]:
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is damaged"
        raise StoreError(f"{path}: {reason}: delete it and embed again") from None
    return found


def _write(path: Path, array: NDArray[Any]) -> None:
    content = io.BytesIO()
    np.save(content, array)
    with atomic_write(path, durable=True) as file:
        file.write(content.getvalue())
