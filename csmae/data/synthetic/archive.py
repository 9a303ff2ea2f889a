"""The synthetic archive: written once to disk in the layout of BigEarthNet v2, identical for identical settings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csmae.config import Synthetic
from csmae.data.metadata import METADATA
from csmae.data.synthetic.scenes import draw_scenes
from csmae.data.write import LMDB_NAME, LmdbWriter, report_write_errors, write_metadata
from csmae.scratch import scratch
from csmae.sensors import CLASSES

GENERATOR_VERSION = 2
"""Increase it when the scenes change: cached archives of another version are not used."""

_CHUNK = 32
"""Scenes drawn at a time; each chunk has its own random state, so the size affects the scenes."""

_TILES = (
    ("33UUP", "Austria"),
    ("34WFS", "Finland"),
    ("29UPU", "Ireland"),
    ("29SNB", "Portugal"),
    ("35VLC", "Lithuania"),
    ("34TFN", "Serbia"),
    ("32UMC", "Luxembourg"),
    ("31UES", "Belgium"),
)

_CACHE_REMEDY = "free some space, or set CSMAE_CACHE to a folder that this account may write"


def cache_dir() -> Path:
    """Return the folder of cached archives: ``$CSMAE_CACHE``, or ``~/.cache/csmae``."""
    return Path(os.environ.get("CSMAE_CACHE", "~/.cache/csmae")).expanduser()


def ensure_synthetic(settings: Synthetic) -> Path:
    """Return the folder of the synthetic archive with these settings; write the archive if it is not cached.

    Processes may race: each writes to a temporary folder, and the first to finish renames its folder.

    Raises:
        ArchiveError: It cannot be written.
    """
    digest = hashlib.sha256(f"{GENERATOR_VERSION} {settings.model_dump_json()}".encode()).hexdigest()[:12]
    target = cache_dir() / f"synthetic-{digest}"
    with report_write_errors(target, _CACHE_REMEDY):
        exists = (target / METADATA).exists()
    if not exists:
        synthesize(settings, target)
    return target


def synthesize(settings: Synthetic, target: Path, progress: Callable[[int], object] = lambda scenes: None) -> None:
    """Write a synthetic archive.

    Args:
        settings: Sizes and seed.
        target: Folder that appears once the archive is complete; an archive that another process wrote meanwhile stays.
        progress: Called with the number of scenes after each chunk.

    Raises:
        ArchiveError: It cannot be written.
    """
    with report_write_errors(target, *([_CACHE_REMEDY] if target.parent == cache_dir() else [])):
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch(f".{target.name}", target.parent) as temporary:
            try:
                _write(settings, temporary, progress)
                temporary.chmod(0o755)
                if not (target / METADATA).exists():
                    temporary.replace(target)
            except OSError:
                if not (target / METADATA).exists():
                    raise


def _write(settings: Synthetic, folder: Path, progress: Callable[[int], object]) -> None:
    splits = ["train"] * settings.num_train + ["validation"] * settings.num_validation + ["test"] * settings.num_test
    writer = LmdbWriter(folder / LMDB_NAME, len(splits))
    try:
        rows = []
        for start in range(0, len(splits), _CHUNK):
            random = np.random.default_rng((settings.seed, start))
            months = random.integers(1, 13, min(_CHUNK, len(splits) - start))
            pairs, labels_nc = draw_scenes(months, random)
            for scene, month in enumerate(months.tolist()):
                row = _metadata_row(start + scene, month, splits[start + scene], labels_nc[scene])
                writer.put_pair(row["patch_id"], row["s1_name"], pairs.pair(scene), {})
                rows.append(row)
            writer.commit()
            progress(len(months))
    finally:
        writer.close()
    write_metadata(folder, rows)


def _metadata_row(number: int, month: int, split: str, labels_c: NDArray[np.bool_]) -> dict[str, Any]:
    """Describe a scene; its names follow BigEarthNet's pattern."""
    tile, country = _TILES[number % len(_TILES)]
    cell, visit = number % 8100, number // 8100
    row, column = cell // 90, cell % 90
    date = f"{2017 if month > 5 else 2018}{month:02}15"
    time = f"T10{visit // 60:02}{visit % 60:02}"
    return {
        "patch_id": f"S2A_MSIL2A_{date}{time}_N9999_R022_T{tile}_{row:02}_{column:02}",
        "labels": [CLASSES[index] for index in np.flatnonzero(labels_c)],
        "split": split,
        "country": country,
        "s1_name": f"S1A_IW_GRDH_1SDV_{date}{time.replace('T10', 'T16')}_{tile}_{row}_{column}",
        "s2v1_name": f"S2A_MSIL2A_{date}{time}_{row}_{column}",
        "contains_seasonal_snow": False,
        "contains_cloud_or_shadow": False,
    }
