"""The synthetic archive: written once to disk as a real v2 archive, the same for the same settings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csmae.config import Synthetic
from csmae.data.splits import METADATA
from csmae.data.synthetic.scenes import draw_scenes
from csmae.data.write import LMDB, PAIR_BYTES, Writer, put_pair, write_metadata, writing
from csmae.scratch import scratch
from csmae.sensors import CLASSES

GENERATOR = 2
"""Version of the scenes; another one makes another archive."""

_CHUNK = 32
"""Scenes drawn at a time; the random state is that of the chunk, so it shapes the scenes."""

_PLACES = (
    ("33UUP", "Austria"),
    ("34WFS", "Finland"),
    ("29UPU", "Ireland"),
    ("29SNB", "Portugal"),
    ("35VLC", "Lithuania"),
    ("34TFN", "Serbia"),
    ("32UMC", "Luxembourg"),
    ("31UES", "Belgium"),
)


CACHE_REMEDY = "make room, or set CSMAE_CACHE to a folder that this account may write"


def cache_dir() -> Path:
    """Where written archives are kept: ``$CSMAE_CACHE``, or ``~/.cache/csmae``."""
    return Path(os.environ.get("CSMAE_CACHE", "~/.cache/csmae")).expanduser()


def ensure_synthetic(settings: Synthetic) -> Path:
    """The synthetic archive of these settings; it is written if it is not there yet.

    Processes may race: each writes under a name of its own, and the first to finish gives its archive the final name.

    Returns:
        The archive's folder.

    Raises:
        ArchiveError: It cannot be written.
    """
    digest = hashlib.sha256(f"{GENERATOR} {settings.model_dump_json()}".encode()).hexdigest()[:12]
    final = cache_dir() / f"synthetic-{digest}"
    with writing(final, CACHE_REMEDY):
        there = (final / METADATA).exists()
    if not there:
        synthesize(settings, final)
    return final


def synthesize(settings: Synthetic, final: Path, progress: Callable[[int], object] = lambda scenes: None) -> None:
    """Write a synthetic archive.

    Args:
        settings: Sizes and seed.
        final: Folder that appears once the archive is complete; where another process was quicker, its archive stays.
        progress: Told the number of scenes after each chunk.

    Raises:
        ArchiveError: It cannot be written.
    """
    with writing(final, *([CACHE_REMEDY] if final.parent == cache_dir() else [])):
        final.parent.mkdir(parents=True, exist_ok=True)
        with scratch(f".{final.name}", final.parent) as temporary:
            try:
                _write(settings, temporary, progress)
                temporary.chmod(0o755)
                if not (final / METADATA).exists():
                    temporary.replace(final)
            except OSError:
                if not (final / METADATA).exists():
                    raise


def _write(settings: Synthetic, folder: Path, progress: Callable[[int], object]) -> None:
    splits = ["train"] * settings.num_train + ["validation"] * settings.num_validation + ["test"] * settings.num_test
    writer = Writer(folder / LMDB, len(splits) * PAIR_BYTES)
    try:
        rows = []
        for start in range(0, len(splits), _CHUNK):
            random = np.random.default_rng((settings.seed, start))
            months = random.integers(1, 13, min(_CHUNK, len(splits) - start))
            pairs, labels_nc = draw_scenes(months, random)
            for scene, month in enumerate(months.tolist()):
                row = _describe(start + scene, month, splits[start + scene], labels_nc[scene])
                put_pair(writer, row["patch_id"], row["s1_name"], pairs.row(scene), {})
                rows.append(row)
            writer.commit()
            progress(len(months))
    finally:
        writer.close()
    write_metadata(folder, rows)


def _describe(number: int, month: int, split: str, labels: NDArray[np.bool_]) -> dict[str, Any]:
    """A scene's row of the metadata, named as BigEarthNet names its patches."""
    tile, country = _PLACES[number % len(_PLACES)]
    cell, visit = number % 8100, number // 8100
    date = f"{2017 if month > 5 else 2018}{month:02}15"
    place = f"{cell // 90:02}_{cell % 90:02}"
    time = f"T10{visit // 60:02}{visit % 60:02}"
    return {
        "patch_id": f"S2A_MSIL2A_{date}{time}_N9999_R022_T{tile}_{place}",
        "labels": [CLASSES[index] for index in np.flatnonzero(labels)],
        "split": split,
        "country": country,
        "s1_name": f"S1A_IW_GRDH_1SDV_{date}{time.replace('T10', 'T16')}_{tile}_{cell // 90}_{cell % 90}",
        "s2v1_name": f"S2A_MSIL2A_{date}{time}_{cell // 90}_{cell % 90}",
        "contains_seasonal_snow": False,
        "contains_cloud_or_shadow": False,
    }
