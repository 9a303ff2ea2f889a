"""Appearance of the 19 classes: surfaces with spectra and backscatter, and how each class mixes two of them.

The figures are rounded from BigEarthNet and spectral libraries; they are plausible, not exact. Sources: Sumbul et al.,
"BigEarthNet-MM" (arXiv 2105.07921); ESA's Sentinel-1 and -2 user guides.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SURFACES = {
    # bands of S2 (reflectance times 10,000), then of S1 (dB), in the order of csmae.sensors
    "deep water": (340, 310, 190, 110, 170, 130, 120, 60, 40, 100, -27.0, -19.0),
    "turbid water": (480, 680, 560, 280, 560, 350, 330, 110, 80, 260, -25.0, -16.5),
    "needle trees": (200, 350, 230, 2000, 560, 1550, 1850, 820, 400, 2100, -14.5, -9.0),
    "leaf trees": (240, 510, 290, 3600, 830, 2700, 3300, 1500, 660, 3750, -13.0, -7.5),
    "shrub": (400, 620, 600, 2150, 930, 1720, 1980, 1950, 1150, 2300, -16.5, -10.5),
    "marsh": (300, 500, 400, 1750, 720, 1400, 1600, 900, 440, 1800, -18.0, -8.0),
    "grass": (430, 790, 560, 3250, 1120, 2550, 3000, 2100, 1120, 3400, -19.5, -12.5),
    "dry grass": (640, 940, 1180, 2300, 1520, 1900, 2080, 2900, 2050, 2430, -20.5, -13.0),
    "crop": (360, 740, 400, 4300, 1080, 3250, 3950, 1800, 840, 4450, -17.0, -11.0),
    "dark soil": (680, 920, 1120, 1750, 1360, 1500, 1630, 2250, 1850, 1850, -22.0, -13.5),
    "bright soil": (1080, 1480, 1920, 2650, 2200, 2350, 2500, 3350, 2850, 2750, -23.0, -14.5),
    "sand": (1850, 2350, 2750, 3350, 3000, 3100, 3250, 3850, 3450, 3450, -25.0, -17.5),
    "roofs": (1250, 1400, 1550, 1950, 1700, 1800, 1900, 2150, 1950, 2000, -10.5, -3.5),
    "concrete": (2150, 2350, 2450, 2750, 2500, 2560, 2650, 2650, 2400, 2750, -13.5, -5.0),
}

OUT_OF_SEASON_SURFACES = {"crop": "bright soil", "grass": "dry grass", "leaf trees": "shrub", "marsh": "dry grass"}
"""Surfaces that look like another one out of season."""


class Texture(NamedTuple):
    """How a class mixes two surfaces: the share of the second one, between 0 and 1, at each pixel."""

    first: str
    second: str
    share: float
    """Mean share of the second surface."""
    grain: float
    """Feature size of the noise in pixels, one of ``GRAINS``."""
    noise: float
    """Amplitude of the noise."""
    parcel_size: float = 16.0
    """Pixels along a side of a parcel or block."""
    parcels: float = 0.0
    """Amplitude of the differences between parcels."""
    rows: float = 0.0
    """Amplitude of planted rows or waves."""
    streets: float = 0.0
    """Width of the streets between parcels, relative to a parcel's side; streets consist of the second surface."""


GRAINS = (1, 2, 4, 8, 16)

TEXTURES = (
    Texture("dry grass", "leaf trees", 0.25, 2, 0.45),
    Texture("crop", "dark soil", 0.45, 8, 0.05, parcel_size=26, parcels=0.55),
    Texture("sand", "turbid water", 0.15, 16, 0.20),
    Texture("leaf trees", "shrub", 0.20, 2, 0.20),
    Texture("marsh", "turbid water", 0.40, 8, 0.60),
    Texture("crop", "bright soil", 0.45, 2, 0.10, parcel_size=9, parcels=0.55),
    Texture("needle trees", "dark soil", 0.12, 1, 0.16),
    Texture("concrete", "dark soil", 0.10, 4, 0.05, parcel_size=17, parcels=0.30, streets=0.16),
    Texture("turbid water", "deep water", 0.30, 16, 0.20),
    Texture("marsh", "grass", 0.40, 4, 0.35),
    Texture("crop", "leaf trees", 0.40, 8, 0.45, parcel_size=13, parcels=0.35),
    Texture("deep water", "turbid water", 0.12, 8, 0.06, parcel_size=7, rows=0.08),
    Texture("needle trees", "leaf trees", 0.50, 4, 0.50),
    Texture("shrub", "dark soil", 0.35, 4, 0.25),
    Texture("dry grass", "bright soil", 0.45, 16, 0.35),
    Texture("grass", "dry grass", 0.20, 4, 0.05, parcel_size=30, parcels=0.20),
    Texture("shrub", "bright soil", 0.45, 1, 0.05, parcel_size=22, parcels=0.10, rows=0.45),
    Texture("shrub", "needle trees", 0.40, 2, 0.55),
    Texture("roofs", "grass", 0.30, 2, 0.15, parcel_size=8, parcels=0.25, streets=0.20),
)
"""One for each of ``csmae.sensors.CLASSES``."""

LANDSCAPES = (
    (1, 5, 10, 15, 18, 8, 3),
    (3, 6, 12, 17, 9, 8, 10),
    (11, 2, 4, 18, 13, 7),
    (0, 16, 14, 1, 10, 18),
    (6, 13, 9, 14, 17, 15),
    (18, 7, 15, 1, 8),
)
"""Classes that occur together."""

_SURFACE_NAMES = tuple(SURFACES)

SPECTRA = np.array([SURFACES[name][:10] for name in _SURFACE_NAMES], np.float32)
"""Reflectance times 10,000 in season (surfaces, 10)."""

OUT_OF_SEASON_SPECTRA = np.array(
    [SURFACES[OUT_OF_SEASON_SURFACES.get(name, name)][:10] for name in _SURFACE_NAMES], np.float32
)

BACKSCATTER = np.array([SURFACES[name][10:] for name in _SURFACE_NAMES], np.float32)
"""Backscatter in dB (surfaces, 2)."""

TEXTURE_TABLE = np.array(
    [
        (
            _SURFACE_NAMES.index(texture.first),
            _SURFACE_NAMES.index(texture.second),
            texture.share,
            GRAINS.index(int(texture.grain)),
            *texture[4:],
        )
        for texture in TEXTURES
    ],
    np.float32,
)
"""The fields of ``TEXTURES`` (classes, 9); surfaces and grains are indices."""
