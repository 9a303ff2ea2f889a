"""A scene from a GeoTIFF, as the archives hold scenes: 120 × 120 pixels of 10 m."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csmae.config import ConfigError
from csmae.sensors import BANDS, IMAGE_SIZE

PIXEL_M = 10.0
"""Side of a pixel on the ground."""


S1_RANGE, S1_MEDIAN = (-80.0, 60.0), (-50.0, -2.0)
"""Decibels of any pixel, and of a scene's middle one: seas have -30, cities -7."""

S2_RANGE = (-1000.0, 32000.0)
"""Reflectance times 10,000: some is negative after correction, clouds and glint go beyond 20,000."""

FRACTION, PERCENT = 2.0, 100.0
"""Largest usual value of a scene in reflectance, and in percent; single glints are brighter."""

NOTHING, ABSURD = (-9999, -32768, -99999), 1e30
"""What files hold where nothing was measured and that they often do not declare."""

CLIPPED = 1 / 200
"""Allocation of a scene's pixels that may be zero in every band: clipped at 0 dB, or a deep shadow in S2."""


class GeoTiffError(ConfigError):
    """A GeoTIFF that is no scene as the archives hold it."""


def read_scene(path: Path, sensor: str) -> NDArray[np.float32]:
    """Read one scene.

    Args:
        path: GeoTIFF. Bands that bear descriptions are taken by name; others must come in the order of
            ``csmae.sensors``.
        sensor: ``s1`` (dB) or ``s2`` (reflectance times 10,000). Scales and offsets of the file's bands are applied.

    Returns:
        (C, 120, 120), bands in the order of ``csmae.sensors``.

    Raises:
        GeoTiffError: rasterio is missing, or the file is damaged, has gaps, or is of another size, projection, band set
            or unit.
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
            bands = _bands(path, file, sensor)
            scales = np.array([(file.scales[band - 1], file.offsets[band - 1]) for band in bands])
            pixels = file.read(bands, masked=True)
    except rasterio.errors.RasterioError as error:
        raise GeoTiffError(f"{path}: cannot be read as a GeoTIFF: {' '.join(str(error).split())[:200]}") from None
    return _measurements(path, sensor, pixels, scales)


def _measurements(path: Path, sensor: str, stored: Any, scales: NDArray[np.float64]) -> NDArray[np.float32]:
    """What the stored numbers mean.

    Args:
        path: Named in an error.
        sensor: Whose.
        stored: Masked (C, 120, 120).
        scales: Scale and offset of each band (C, 2).
    """
    scaled = bool((scales != (1, 0)).any())
    _check_type(path, str(stored.dtype), scaled)
    _check_scales(path, sensor, scales)
    _check_gaps(path, stored, may_clip=sensor == "s1" or not scales[:, 1].any())
    scene = np.ma.getdata(stored).astype(np.float64) * scales[:, :1, None] + scales[:, 1:, None]
    if sensor == "s2" and scaled and _is_fraction(scene):
        scene *= 10_000  # with its scale a file says reflectance
    after = f" after the file's scale of {scales[0, 0]:g} and offset of {scales[0, 1]:g}" if scaled else ""
    (_check_s1 if sensor == "s1" else _check_s2)(path, scene, after)
    return scene.astype(np.float32)


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


def _check_type(path: Path, dtype: str, scaled: bool) -> None:
    if dtype.startswith("complex"):
        raise GeoTiffError(
            f"{path}: holds complex numbers: give their backscatter in dB, 10·log10 of the squared modulus"
        )
    if dtype == "uint8" and not scaled:
        raise GeoTiffError(
            f"{path}: holds 8 bits a pixel, which is a picture: give the measurements that it was made of"
        )


def _check_gaps(path: Path, stored: Any, may_clip: bool) -> None:
    """Check that each pixel was measured, as far as that can be seen.

    Args:
        path: Named in the error.
        stored: Masked, before scale and offset (C, 120, 120).
        may_clip: Whether a few zeros are measurements. In S2 with an offset they are not: 0 marks missing data there.
    """
    values, declared = np.ma.getdata(stored), np.ma.getmaskarray(stored).any(0)
    nothing = np.isin(values, NOTHING) | (np.abs(values.astype(np.float64)) > ABSURD)
    if values.dtype == np.uint16:
        nothing |= values == np.iinfo(np.uint16).max
    padding = (values == 0).all(0)
    if may_clip and padding.mean() < CLIPPED:
        padding[:] = False
    kinds = {
        "declared as such": declared,
        "not finite": ~np.isfinite(values).all(0) & ~declared,
        "-9999 or the like": (nothing & np.isfinite(values)).any(0) & ~declared,
        "zero in every band": padding & ~declared,
    }
    reasons = ", ".join(f"{pixels.sum()} {kind}" for kind, pixels in kinds.items() if pixels.any())
    if reasons:
        count = np.any(list(kinds.values()), axis=0).sum()
        raise GeoTiffError(f"{path}: {count} pixels hold no data ({reasons}): cut a scene without gaps")


def _check_scales(path: Path, sensor: str, scales: NDArray[np.float64]) -> None:
    for band, scale in zip(BANDS[sensor], scales[:, 0], strict=True):
        if scale == 0 or not np.isfinite(scales).all():
            raise GeoTiffError(f"{path}: band {band} has a scale of {scale:g}: give the file its true scale and offset")


def _check_s1(path: Path, scene: NDArray[np.float64], scaled: str) -> None:
    found = f"{path}: s1 must be backscatter in dB, found {scene.min():.3g} to {scene.max():.3g}{scaled}"
    median, outside = np.median(scene), (scene < S1_RANGE[0]) | (scene > S1_RANGE[1])
    if scene.min() >= 0:
        raise GeoTiffError(f"{found}: convert it to dB: 10·log10(x)")
    if median < S1_MEDIAN[0]:
        raise GeoTiffError(f"{found}: set the file's scale (`gdal_edit.py -scale 0.01` for hundredths of dB)")
    if median > S1_MEDIAN[1] and scaled:
        raise GeoTiffError(f"{found}: where it holds dB already, clear the scale (`gdal_edit.py -scale 1 -offset 0`)")
    if median > S1_MEDIAN[1]:
        raise GeoTiffError(f"{found}: give dB as they were measured, not standardised ones")
    if outside.any():
        count = outside.any(0).sum()
        raise GeoTiffError(
            f"{found}: {count} pixels are outside {S1_RANGE[0]:g} to {S1_RANGE[1]:g}: cut a scene without them"
        )


def _is_fraction(scene: NDArray[np.float64]) -> bool:
    """Whether S2's usual values are reflectance itself: neither single glints nor bands that water leaves at 0 decide."""
    sizes = np.abs(scene[scene != 0])
    return not sizes.size or bool(np.median(sizes) <= FRACTION)


def _is_percent(scene: NDArray[np.float64]) -> bool:
    """Whether S2 is in percent: fractions of a number, few of them above 100 and none that percent could not be."""
    few_above = np.percentile(scene, 99) <= PERCENT and scene.max() <= S2_RANGE[1] / 100
    return bool(few_above and (scene % 1 != 0).any())


def _check_s2(path: Path, scene: NDArray[np.float64], scaled: str) -> None:
    found = f"{path}: s2 must be reflectance times 10,000, found {scene.min():.3g} to {scene.max():.3g}{scaled}"
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
