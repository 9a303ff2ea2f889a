"""Read a scene from a GeoTIFF: 120 × 120 pixels of 10 m, in the units of the archives."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csmae.config import ConfigError, one_line
from csmae.sensors import BANDS, IMAGE_SIZE

PIXEL_M = 10.0
"""Side of a pixel on the ground."""

S1_RANGE, S1_MEDIAN = (-80.0, 60.0), (-50.0, -2.0)
"""Valid dB of a pixel, and plausible median of a scene: seas have -30, cities -7."""

S2_RANGE = (-1000.0, 32000.0)
"""Valid reflectance times 10,000: atmospheric correction makes some negative, clouds and glints exceed 20,000."""

FRACTION, PERCENT = 2.0, 100.0
"""Largest typical value of a scene in reflectance, and in percent; single glints are brighter."""

NODATA_VALUES, NODATA_MAGNITUDE = (-9999, -32768, -99999), 1e30
"""Values, and the magnitude of values, that often mark missing data without being declared as nodata."""

MAX_ZERO_FRACTION = 1 / 200
"""Fraction of a scene's pixels that may be zero in every band: clipped at 0 dB, or a deep shadow in S2."""


class GeoTiffError(ConfigError):
    """A GeoTIFF is not a valid scene."""


def read_scene(path: Path, sensor: str) -> NDArray[np.float32]:
    """Read one scene.

    Args:
        path: GeoTIFF. Bands with descriptions are found by name; without descriptions they must be in the order of
            ``csmae.sensors``.
        sensor: ``s1`` (dB) or ``s2`` (reflectance times 10,000). The scale and offset of each band are applied.

    Returns:
        (C, 120, 120), bands in the order of ``csmae.sensors``.

    Raises:
        GeoTiffError: rasterio is not installed, the file is damaged or has gaps, or its size, projection, bands or unit
            are wrong.
    """
    if not find_spec("rasterio"):
        raise GeoTiffError(f"{path}: reading GeoTIFFs needs rasterio: pip install 'csmae[geotiff]'")
    import rasterio

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # _check_grid reports it
            file = rasterio.open(path)
        with file:
            _check_grid(path, file)
            bands = _find_bands(path, file, sensor)
            scales = np.array([(file.scales[band - 1], file.offsets[band - 1]) for band in bands])
            pixels = file.read(bands, masked=True)
    except rasterio.errors.RasterioError as error:
        raise GeoTiffError(f"{path}: cannot be read as a GeoTIFF: {one_line(error)}") from None
    return _to_archive_unit(path, sensor, pixels, scales)


def _to_archive_unit(path: Path, sensor: str, stored: Any, scales: NDArray[np.float64]) -> NDArray[np.float32]:
    """Convert stored values to dB or reflectance times 10,000.

    Args:
        path: Named in errors.
        sensor: ``s1`` or ``s2``.
        stored: Masked array (C, 120, 120).
        scales: Scale and offset of each band (C, 2).

    Raises:
        GeoTiffError: There are gaps, or the unit is wrong.
    """
    scaled = bool((scales != (1, 0)).any())
    _check_type(path, str(stored.dtype), scaled)
    _check_scales(path, sensor, scales)
    _check_gaps(path, stored, may_clip=sensor == "s1" or not scales[:, 1].any())
    scene = np.ma.getdata(stored).astype(np.float64) * scales[:, :1, None] + scales[:, 1:, None]
    if sensor == "s2" and scaled and _is_fraction(scene):
        scene *= 10_000  # such a scale converts to reflectance
    suffix = f" after the file's scale of {scales[0, 0]:g} and offset of {scales[0, 1]:g}" if scaled else ""
    (_check_s1 if sensor == "s1" else _check_s2)(path, scene, suffix)
    return scene.astype(np.float32)


def _check_grid(path: Path, file: Any) -> None:
    if (file.height, file.width) != (IMAGE_SIZE, IMAGE_SIZE):
        raise GeoTiffError(f"{path}: must be {IMAGE_SIZE} × {IMAGE_SIZE} pixels, found {file.height} × {file.width}")
    if file.crs is None or not file.crs.is_projected:
        found = f"found {file.crs}" if file.crs else "found none"
        raise GeoTiffError(f"{path}: must be in a projection in meters such as UTM, {found}: reproject it")
    size = [abs(side) * file.crs.linear_units_factor[1] for side in file.res]
    if not np.allclose(size, PIXEL_M, rtol=0.01):
        raise GeoTiffError(f"{path}: pixels must be 10 m wide, found {size[0]:g} × {size[1]:g} m: resample it")


def _find_bands(path: Path, file: Any, sensor: str) -> list[int]:
    """1-based indices of the sensor's bands in the file."""
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


def _check_type(path: Path, dtype: str, scaled: bool) -> None:
    if dtype.startswith("complex"):
        raise GeoTiffError(
            f"{path}: holds complex numbers: convert them to backscatter in dB, 10·log10 of the squared modulus"
        )
    if dtype == "uint8" and not scaled:
        raise GeoTiffError(
            f"{path}: holds 8 bits a pixel, which is a rendered picture: give the measurements behind it"
        )


def _check_gaps(path: Path, stored: Any, may_clip: bool) -> None:
    """Check that no pixel is missing.

    Args:
        path: Named in the error.
        stored: Masked array (C, 120, 120), before scale and offset.
        may_clip: Whether a few zeros are measurements. In S2 with an offset, 0 marks missing data.
    """
    values, declared = np.ma.getdata(stored), np.ma.getmaskarray(stored).any(0)
    nodata = np.isin(values, NODATA_VALUES) | (np.abs(values.astype(np.float64)) > NODATA_MAGNITUDE)
    if values.dtype == np.uint16:
        nodata |= values == np.iinfo(np.uint16).max
    zero = (values == 0).all(0)
    if may_clip and zero.mean() < MAX_ZERO_FRACTION:
        zero[:] = False
    kinds = {
        "declared as nodata": declared,
        "not finite": ~np.isfinite(values).all(0) & ~declared,
        "-9999 or the like": (nodata & np.isfinite(values)).any(0) & ~declared,
        "zero in every band": zero & ~declared,
    }
    reasons = ", ".join(f"{pixels.sum()} {kind}" for kind, pixels in kinds.items() if pixels.any())
    if reasons:
        count = np.any(list(kinds.values()), axis=0).sum()
        raise GeoTiffError(f"{path}: {count} pixels hold no data ({reasons}): cut a scene without gaps")


def _check_scales(path: Path, sensor: str, scales: NDArray[np.float64]) -> None:
    for band, scale in zip(BANDS[sensor], scales[:, 0], strict=True):
        if scale == 0 or not np.isfinite(scales).all():
            raise GeoTiffError(
                f"{path}: band {band} has a scale of {scale:g}: set the scale and offset that the file was written with"
            )


def _check_s1(path: Path, scene: NDArray[np.float64], suffix: str) -> None:
    found = f"{path}: s1 must be backscatter in dB, found {scene.min():.3g} to {scene.max():.3g}{suffix}"
    median, outside = np.median(scene), ((scene < S1_RANGE[0]) | (scene > S1_RANGE[1])).any(0).sum()
    if scene.min() >= 0:
        raise GeoTiffError(f"{found}: convert it to dB: 10·log10(x)")
    if median < S1_MEDIAN[0]:
        raise GeoTiffError(f"{found}: set the file's scale (`gdal_edit.py -scale 0.01` for hundredths of dB)")
    if median > S1_MEDIAN[1] and suffix:
        raise GeoTiffError(f"{found}: if it holds dB already, reset the scale (`gdal_edit.py -scale 1 -offset 0`)")
    if median > S1_MEDIAN[1]:
        raise GeoTiffError(f"{found}: give measured dB, not standardized values")
    if outside:
        raise GeoTiffError(
            f"{found}: {outside} pixels are outside {S1_RANGE[0]:g} to {S1_RANGE[1]:g}: cut a scene without them"
        )


def _is_fraction(scene: NDArray[np.float64]) -> bool:
    """Whether S2 holds reflectance from 0 to 1. The median ignores single glints and bands that are 0 over water."""
    magnitudes = np.abs(scene[scene != 0])
    return not magnitudes.size or bool(np.median(magnitudes) <= FRACTION)


def _is_percent(scene: NDArray[np.float64]) -> bool:
    """Whether S2 holds percent: not all values are integers, 99 % are at most 100, and all are possible in percent."""
    in_range = np.percentile(scene, 99) <= PERCENT and scene.max() <= S2_RANGE[1] / 100
    return bool(in_range and (scene % 1 != 0).any())


def _check_s2(path: Path, scene: NDArray[np.float64], suffix: str) -> None:
    found = f"{path}: s2 must be reflectance times 10,000, found {scene.min():.3g} to {scene.max():.3g}{suffix}"
    if _is_fraction(scene):
        raise GeoTiffError(f"{found}: multiply it by 10,000")
    if _is_percent(scene):
        raise GeoTiffError(f"{found}: multiply it by 100")
    outside = ((scene < S2_RANGE[0]) | (scene > S2_RANGE[1])).any(0).sum()
    if outside:
        raise GeoTiffError(
            f"{found}: {outside} pixels are outside {S2_RANGE[0]:g} to {S2_RANGE[1]:g}: set the file's scale, or cut a"
            " scene without them"
        )
