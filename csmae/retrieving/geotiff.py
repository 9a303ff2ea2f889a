"""A scene from a GeoTIFF, as the archives hold scenes: 120 × 120 pixels of 10 m."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csmae.config import ConfigError
from csmae.encoders import BANDS
from csmae.sensors import IMAGE_SIZE

PIXEL_M = 10.0
"""Side of a pixel on the ground."""


class GeoTiffError(ConfigError):
    """A GeoTIFF that is no scene as the archives hold it."""


def read_scene(path: Path, sensor: str) -> NDArray[np.float32]:
    """Read one scene.

    Args:
        path: GeoTIFF. Bands that bear descriptions are taken by name; others must come in the order of
            ``csmae.sensors``.
        sensor: ``s1`` (dB) or ``s2`` (reflectance times 10,000).

    Returns:
        (C, 120, 120), bands in the order of ``csmae.sensors``.

    Raises:
        GeoTiffError: rasterio is missing, or the file is damaged or of another size, projection, band set or unit.
    """
    if not find_spec("rasterio"):
        raise GeoTiffError(f"{path}: reading GeoTIFFs needs rasterio: pip install 'csmae[geotiff]'")
    import rasterio

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # _check_place says it
            file = rasterio.open(path)
        with file:
            _check_place(path, file)
            pixels = file.read(_bands(path, file, sensor), masked=True)
    except rasterio.errors.RasterioError as error:
        raise GeoTiffError(f"{path}: cannot be read as a GeoTIFF: {' '.join(str(error).split())[:200]}") from None
    return _check_values(path, sensor, pixels)


def _check_place(path: Path, file: Any) -> None:
    if (file.height, file.width) != (IMAGE_SIZE, IMAGE_SIZE):
        raise GeoTiffError(f"{path}: must be {IMAGE_SIZE} × {IMAGE_SIZE} pixels, found {file.height} × {file.width}")
    if file.crs is None or not file.crs.is_projected:
        found = f"found {file.crs}" if file.crs else "it says none"
        raise GeoTiffError(f"{path}: must be in a projection in metres such as UTM, {found}: reproject it")
    size = [abs(side) * file.crs.linear_units_factor[1] for side in file.res]
    if not np.allclose(size, PIXEL_M, rtol=0.01):
        raise GeoTiffError(f"{path}: pixels must be 10 m wide, found {size[0]:g} × {size[1]:g} m: resample it")


def _bands(path: Path, file: Any, sensor: str) -> list[int]:
    """Rasterio's numbers of the sensor's bands."""
    wanted = BANDS[sensor]
    named = {str(name).upper(): number for number, name in enumerate(file.descriptions, start=1) if name}
    if named:
        missing = [name for name in wanted if name not in named]
        if missing:
            raise GeoTiffError(
                f"{path}: {sensor} needs the bands {' '.join(wanted)}: {' '.join(missing)} missing among {' '.join(named)}"
            )
        return [named[name] for name in wanted]
    if file.count != len(wanted):
        raise GeoTiffError(f"{path}: {sensor} must have {len(wanted)} bands, {' '.join(wanted)}: found {file.count}")
    return list(range(1, file.count + 1))


def _check_values(path: Path, sensor: str, pixels: Any) -> NDArray[np.float32]:
    scene = np.ma.filled(pixels.astype(np.float32), np.nan)
    if not np.isfinite(scene).all():
        raise GeoTiffError(f"{path}: {np.isnan(scene).any(0).sum()} pixels hold no data: cut a scene without gaps")
    if sensor == "s1" and scene.min() >= 0:
        raise GeoTiffError(
            f"{path}: s1 must be backscatter in dB, found {scene.min():.3g} to {scene.max():.3g}: 10·log10"
        )
    if sensor == "s2" and scene.max() <= 2:
        raise GeoTiffError(
            f"{path}: s2 must be reflectance times 10,000, found {scene.min():.3g} to {scene.max():.3g}: multiply it"
        )
    return np.asarray(scene, np.float32)
