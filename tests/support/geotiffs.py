"""Writes GeoTIFFs: valid scenes unless the arguments make them invalid."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

SIDE = 120


def write_geotiff(path: Path, pixels: Any, crs: str | None = "EPSG:32631", size: float = 10, **options: Any) -> Path:
    """Write pixels (bands, rows, columns) as a GeoTIFF.

    Args:
        path: File to write.
        pixels: Pixels in the file's type.
        crs, size: Projection, and side of a pixel in its unit.
        options: ``names``, ``scales`` and ``offsets`` of the bands, and options of rasterio.
    """
    rasterio = pytest.importorskip("rasterio", reason="GeoTIFFs are an extra")
    from rasterio.transform import from_origin

    tags = {tag: options.pop(tag) for tag in ("scales", "offsets") if tag in options}
    names = options.pop("names", None)
    shape = {"count": len(pixels), "height": pixels.shape[1], "width": pixels.shape[2], "dtype": pixels.dtype}
    transform = from_origin(500_000, 5_000_000, size, size)
    with rasterio.open(path, "w", driver="GTiff", crs=crs, transform=transform, **shape, **options) as file:
        file.write(pixels)
        for tag, values in tags.items():
            setattr(file, tag, values)
        if names:
            file.descriptions = names
    return path


def s1_image(bands: int = 2, side: int = SIDE) -> Any:
    return np.random.default_rng(0).uniform(-20, -5, (bands, side, side)).astype(np.float32)


def s2_image() -> Any:
    return np.random.default_rng(0).integers(200, 4000, (10, SIDE, SIDE)).astype(np.uint16)
