"""Writing archives in the layout of BigEarthNet v2: an LMDB of safetensors beside ``metadata.parquet``."""

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
from csmae.data.formats.layout import ArchiveError
from csmae.data.pairs import PairBatch
from csmae.data.splits import METADATA
from csmae.sensors import S1_BANDS, S2_10M_BANDS, S2_20M_BANDS

LMDB = "archive.lmdb"

PAIR_BYTES = 290_000
"""Of a pair on disk, with a margin."""

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


class Writer:
    """An LMDB under construction; ``put`` is durable after ``commit``.

    Args:
        folder: Of the LMDB; made where it is missing.
        capacity: Bytes of values that it must be able to take.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The map is address space, not disk: half as much again leaves room for partly filled pages.
        self._environment = lmdb.open(str(folder), map_size=capacity * 3 // 2 + (1 << 26), lock=False, readahead=False)
        self._values: dict[str, bytes] = {}

    def put(self, key: str, bands: Mapping[str, NDArray[Any]]) -> None:
        """Add a value: bands by name."""
        self._values[key] = save({name: np.ascontiguousarray(pixels) for name, pixels in bands.items()})

    def commit(self) -> None:
        """Bring what was put to the disk, all of it or nothing."""
        with self._environment.begin(write=True) as transaction:
            for key, value in self._values.items():
                transaction.put(key.encode(), value)
        self._values.clear()

    def close(self) -> None:
        """End the writing; what was not committed is lost."""
        self._environment.close()


def put_pair(writer: Writer, name: str, s1_name: str, pair: PairBatch, other: Mapping[str, NDArray[Any]]) -> None:
    """Add the two values of a pair.

    Args:
        writer: Takes them.
        name, s1_name: Their keys.
        pair: Without the batch dimension.
        other: Further bands of S2, by name.
    """
    bands = zip((*S2_10M_BANDS, *S2_20M_BANDS), (*pair.s2_10m.numpy(), *pair.s2_20m.numpy()), strict=True)
    writer.put(name, dict(bands) | dict(other))
    writer.put(s1_name, dict(zip(S1_BANDS, pair.s1.numpy(), strict=True)))


def write_metadata(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``metadata.parquet``, whole or not at all.

    Args:
        folder: Of the archive.
        rows: One a pair; columns that are missing are null.
    """
    with atomic_write(folder / METADATA, concurrent=True) as file:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=_SCHEMA), file)


def require_new(target: Path) -> None:
    """That nothing stands at a path.

    Raises:
        ArchiveError: Something does, or that cannot be seen.
    """
    with writing(target):
        if target.exists():
            raise ArchiveError(f"{target}: is there already; name a new folder")


REMEDY = "make room or name another folder"


@contextmanager
def writing(target: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turn what the file system and LMDB refuse into an error of one line.

    Args:
        target: Named in the error.
        remedy: What to do, named there, too.

    Raises:
        ArchiveError: No permission, no space, or the like.
    """
    try:
        yield
    except (OSError, lmdb.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
        # LMDB calls a write that a full disk cut short an input/output error.
        reason = reason.replace("Input/output error", "Input/output error (a full disk?)")
        raise ArchiveError(f"{target}: cannot be written: {reason}; {remedy}") from error
