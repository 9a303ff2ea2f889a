"""From the layout of BigEarthNet v1 to that of v2: nothing is unpickled again."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csmae.config import Data
from csmae.data.archive import Archive, open_archive
from csmae.data.layout import ArchiveError, DamagedValueError
from csmae.data.pairs import PairBatch
from csmae.data.split import Split
from csmae.data.splits import METADATA, SPLITS
from csmae.data.write import LMDB, Writer, write_metadata, writing
from csmae.sensors import CLASSES, S1_BANDS, S2_10M_BANDS, S2_20M_BANDS

log = logging.getLogger(__name__)

_CHUNK = 128
"""Pairs between commits: what an interruption costs."""


def convert(source: Archive, target: Path, progress: Callable[[int], object]) -> int:
    """Write the pairs of a v1 archive's splits as a v2 archive; its 60 m bands, which nothing reads, stay behind.

    An interrupted conversion goes on where it stopped; until the end it stands under a hidden name beside ``target``.

    Args:
        source: A v1 archive.
        target: Folder that appears once every pair has been compared with its source.
        progress: Told the number of pairs after each chunk.

    Returns:
        Pairs written.

    Raises:
        ArchiveError: The source is no v1 archive or damaged, or the target exists or cannot be written.
    """
"""
"""
