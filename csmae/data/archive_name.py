"""What an archive is called where people compare results: what it holds, not where it lies."""

from __future__ import annotations

import zlib

from csmae.config import Data
from csmae.data.archive import Archive, open_archive
from csmae.data.splits import SPLITS


def data_name(data: Data) -> str:
    """Kind and sizes of an archive, such as ``BigEarthNet v2, 237871 train, 122342 validation, 119825 test pairs``.

    Raises:
        ArchiveError: The archive cannot be opened, or a split is missing.
    """
    return _name(open_archive(data), data)


def fingerprint(data: Data) -> str:
    """The name, and a checksum over the keys and sizes of all values: alike where copies of an archive are alike.

    Raises:
        ArchiveError: As of ``data_name``.
    """
    archive = open_archive(data)
    index = archive.store.index
    checksum = zlib.crc32(index.sizes.tobytes(), zlib.crc32(index.keys.tobytes()))
    return f"{_name(archive, data)}, checksum {checksum:08x}"


def _name(archive: Archive, data: Data) -> str:
    sizes = {name: len(archive.split(name)) for name in SPLITS}
    if data.max_train_pairs and data.max_train_pairs < sizes["train"]:
        sizes["train"] = data.max_train_pairs
    counts = ", ".join(f"{size} {name}" for name, size in sizes.items())
    if data.path == "synthetic":
        return f"synthetic, {counts} pairs, seed {data.synthetic.seed}"
    return f"BigEarthNet {'v1' if archive.is_v1 else 'v2'}, {counts} pairs"
