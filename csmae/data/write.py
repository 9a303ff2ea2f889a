"""Writes archives in the layout of BigEarthNet v2: an LMDB of safetensors values beside ``metadata.parquet``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import save

from csmae.atomic import atomic_write
from csmae.data.errors import ArchiveError
from csmae.data.metadata import METADATA
from csmae.data.pairs import PairBatch
from csmae.sensors import S1_BANDS, S2_BANDS

LMDB_NAME = "archive.lmdb"

_PAIR_BYTES = 290_000
"""Size of a pair on disk, with a margin."""

_SCHEMA = pa.schema(
    [
        ("patch_id", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("split", pa.string()),
        ("country", pa.string()),
        ("s1_name", pa.string()),
        ("s2v1_name", pa.string()),
        ("contains_seasonal_snow", pa.bool_()),
        ("contains_cloud_or_shadow", pa.bool_()),
    ]
)


class LmdbWriter:
    """Writes the values of pairs; they are durable after ``commit``.

    Args:
        folder: Folder of the LMDB; created if it does not exist.
        num_pairs: Largest number of pairs.
    """

    def __init__(self, folder: Path, num_pairs: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The map is address space, not disk; the margin is for partly filled pages.
        map_size = num_pairs * _PAIR_BYTES * 3 // 2 + (1 << 26)
        self._environment = lmdb.open(str(folder), map_size=map_size, lock=False, readahead=False)
        self._values: dict[str, bytes] = {}

    def put_pair(self, name: str, s1_name: str, pair: PairBatch, bands_60m: Mapping[str, NDArray[np.uint16]]) -> None:
        """Add the two values of a pair.

        Args:
            name, s1_name: Keys of the S2 and the S1 value.
            pair: One pair without the batch dimension.
            bands_60m: S2 bands that no batch holds, by name.
        """
        s2 = zip(S2_BANDS, (*pair.s2_10m.numpy(), *pair.s2_20m.numpy()), strict=True)
        self._put(name, dict(s2) | dict(bands_60m))
        self._put(s1_name, dict(zip(S1_BANDS, pair.s1.numpy(), strict=True)))

    def _put(self, key: str, bands: Mapping[str, NDArray[Any]]) -> None:
        self._values[key] = save({name: np.ascontiguousarray(pixels) for name, pixels in bands.items()})

    def commit(self) -> None:
        """Write the added values to disk, all or none."""
        with self._environment.begin(write=True) as transaction:
            for key, value in self._values.items():
                transaction.put(key.encode(), value)
        self._values.clear()

    def close(self) -> None:
        """Close the LMDB; values that were not committed are lost."""
        self._environment.close()


def write_metadata(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``metadata.parquet`` atomically.

    Args:
        folder: Folder of the archive.
        rows: One row per pair; missing columns are null.
    """
    with atomic_write(folder / METADATA, concurrent=True) as file:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=_SCHEMA), file)


def require_new(target: Path) -> None:
    """Check that a path does not exist.

    Raises:
        ArchiveError: It exists, or its parent cannot be read.
    """
    with report_write_errors(target):
        if target.exists():
            raise ArchiveError(f"{target}: already exists; choose a new folder")


@contextmanager
def report_write_errors(target: Path, remedy: str = "free some space or choose another folder") -> Iterator[None]:
    """Turn errors of the file system and of LMDB into one line.

    Args:
        target: What is written; named in the error.
        remedy: What the user can do; named in the error.

    Raises:
        ArchiveError: No permission, no space, or the like.
    """
    try:
        yield
    except (OSError, lmdb.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
        # LMDB reports a write that a full disk cut short as an input/output error.
        reason = reason.replace("Input/output error", "Input/output error (a full disk?)")
        raise ArchiveError(f"{target}: cannot be written: {reason}; {remedy}") from error
