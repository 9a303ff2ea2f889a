"""Writes small archives of both versions as BigEarthNet's tools write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import save

from csmae.config import Data
from csmae.data.archive import Archive, open_archive
from csmae.data.formats.layout import STORED_BANDS
from csmae.sensors import CLASSES
from tests.support.v1_pickles import STYLES, pickled, write_v1

Bands = dict[str, NDArray[Any]]
SPLITS = {"train": 5, "validation": 3, "test": 2}
FILES = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}


class PairNames(NamedTuple):
    """Names of a pair's images: S2 in v2, S2 in v1, and S1."""

    v2: str
    v1: str
    s1: str


def names_of(number: int) -> PairNames:
    return PairNames(
        f"S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_{number:02}_05",
        f"S2A_MSIL2A_20170613T101031_{number}_5",
        f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_{number}_5",
    )


def bands_of(number: int) -> Bands:
    """Return a pair's bands including those at 60 m."""
    random = np.random.default_rng(number)
    bands: Bands = {
        name: random.normal(-15, 5, (band.size, band.size)).astype("<f4")
        if band.field == "s1"
        else random.integers(0, 2**16, (band.size, band.size)).astype("<u2")
        for name, band in STORED_BANDS.items()
    }
    return bands | {name: random.integers(0, 9999, (20, 20)).astype("<u2") for name in ("B01", "B09")}


def labels_of(number: int) -> list[str]:
    return [CLASSES[number % 19], CLASSES[(number + 7) % 19]]


def splits_of() -> list[str]:
    return [name for name, count in SPLITS.items() for _ in range(count)]


def put(folder: Path, values: dict[str, bytes], map_size: int = 1 << 26) -> None:
    """Write values into the LMDB of a folder, replacing those of the same key."""
    path = next(iter(folder.glob("*.lmdb")), folder / "archive.lmdb")
    path.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=map_size) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)


def write_v2(folder: Path) -> Path:
    rows, values = [], {}
    for number, split in enumerate(splits_of()):
        name, v1_name, s1_name = names_of(number)
        bands = bands_of(number)
        values[name] = save({key: band for key, band in bands.items() if key[0] == "B"})
        values[s1_name] = save({key: band for key, band in bands.items() if key[0] == "V"})
        values[f"{name}_reference_map"] = save({"Data": np.zeros((120, 120), np.uint16)})
        rows.append(
            {"patch_id": name, "s1_name": s1_name, "s2v1_name": v1_name, "split": split, "labels": labels_of(number)}
        )
    put(folder, values)
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    return folder


def without_labels(folder: Path, splits: tuple[str, ...] = tuple(SPLITS), names: tuple[str, ...] = ()) -> Path:
    """Remove the labels of these names, or of these splits; for all splits remove the column."""
    path = folder / "metadata.parquet"
    table = pq.read_table(path)
    if splits == tuple(SPLITS) and not names:
        pq.write_table(table.drop_columns(["labels"]), path)
        return folder
    rows = table.to_pylist()
    for row in rows:
        if row["patch_id"] in names or (not names and row["split"] in splits):
            row["labels"] = []
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return folder


def write_pickles(folder: Path, styles: tuple[str, ...] = STYLES) -> Path:
    patches: dict[str, bytes] = {}
    lists: dict[str, list[str]] = {file: [] for file in FILES.values()}
    for number, split in enumerate(splits_of()):
        name = names_of(number)[1]
        patches[name] = pickled(bands_of(number), labels_of(number), styles[number % len(styles)])
        lists[FILES[split]].append(name)
    write_v1(folder, patches, lists)
    return folder


def open_folder(folder: Path, **values: Any) -> Archive:
    return open_archive(Data(path=str(folder), **values))
