"""Draws synthetic scenes: both sensors see the same classes in the same regions, but draw their pixels independently.

N scenes, R regions of all scenes together, P = 120 pixels along a side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from csmae.data.pairs import PairBatch
from csmae.data.synthetic.landcover import (
    BACKSCATTER,
    GRAINS,
    LANDSCAPES,
    OUT_OF_SEASON_SPECTRA,
    SPECTRA,
    TEXTURE_TABLE,
)
from csmae.data.transforms import resize_matrix
from csmae.sensors import CLASSES, IMAGE_SIZE

Floats = NDArray[np.float32]

_P = IMAGE_SIZE
_MAX_REGIONS = 4
_MIN_SHARE = 0.05
"""Smallest share of a scene's area for which a class is one of its labels."""
_LOOKS = 8.0
"""Looks of the S1 images: the shape of the speckle's gamma distribution."""
_HAZE = np.array([1000, 750, 550, 150, 450, 350, 250, 30, 10, 120], np.float32)
"""Reflectance that thick haze adds, by band."""

# Standard deviations of what differs between scenes and is not land cover; each sensor draws its own. Together they make
# a scene's mean color uninformative: an untrained encoder relies on it, a small network learns to ignore it in minutes.
_GAIN, _BAND_GAIN = 0.12, 0.03
"""Logarithm of the illumination of S2: of all bands together, and of each band."""
_HAZE_DEPTH, _SEASON, _RELIEF = 0.15, 0.08, 0.05
"""Thickness of the haze, time within the season, illumination of slopes."""
_MOISTURE, _OFFSET, _BAND_OFFSET, _TILT = 0.25, 0.7, 0.25, 0.5
"""S1 in dB: of each surface, of all bands together, of each band, and from edge to edge."""


class _Regions(NamedTuple):
    of_pixel: NDArray[np.intp]
    """Region of each pixel (N, P, P)."""
    classes: NDArray[np.intp]
    """Class of each region (R,)."""
    scene: NDArray[np.intp]
    """Scene of each region (R,)."""


def draw_scenes(months: NDArray[np.int64], random: np.random.Generator) -> tuple[PairBatch, NDArray[np.bool_]]:
    """Draw scenes; uses about 2 MB of memory per scene.

    Args:
        months: Months of the acquisitions, 1 to 12 (N,).
        random: Source of all randomness.

    Returns:
        The pairs, and their multi-hot classes (N, 19).
    """
    num_scenes = len(months)
    regions = _draw_regions(num_scenes, random)
    s2_10m, s2_20m = _draw_s2(regions, months, random)
    images = (_draw_s1(regions, random), s2_10m, s2_20m)
    return PairBatch(*(torch.from_numpy(image) for image in images)), _labels(regions, num_scenes)


def _draw_regions(num_scenes: int, random: np.random.Generator) -> _Regions:
    """Draw one to four classes of one landscape for each scene; the largest of their smooth noise fields wins a pixel."""
    counts = random.integers(1, _MAX_REGIONS + 1, num_scenes)
    classes = np.zeros((num_scenes, _MAX_REGIONS), np.intp)
    for scene, landscape in enumerate(random.integers(len(LANDSCAPES), size=num_scenes)):
        classes[scene] = random.choice(LANDSCAPES[landscape], _MAX_REGIONS, replace=False)
    fields = _noise(random, num_scenes * _MAX_REGIONS, 32) + 0.25 * _noise(random, num_scenes * _MAX_REGIONS, 8)
    fields = fields.reshape(num_scenes, _MAX_REGIONS, _P, _P)
    fields += 0.5 * random.standard_normal((num_scenes, _MAX_REGIONS, 1, 1), np.float32)
    absent = np.arange(_MAX_REGIONS) >= counts[:, None]
    fields[absent] = -np.inf
    region = np.cumsum(~absent).reshape(absent.shape) - 1
    of_pixel = np.take_along_axis(region, fields.argmax(1).reshape(num_scenes, -1), axis=1)
    scenes = np.repeat(np.arange(num_scenes), counts)
    return _Regions(of_pixel.reshape(num_scenes, _P, _P), classes[~absent], scenes)


def _labels(regions: _Regions, num_scenes: int) -> NDArray[np.bool_]:
    areas = np.bincount(regions.of_pixel.ravel(), minlength=len(regions.classes))
    labels = np.zeros((num_scenes, len(CLASSES)), bool)
    large = areas >= _MIN_SHARE * _P * _P
    labels[regions.scene[large], regions.classes[large]] = True
    return labels


def _noise(random: np.random.Generator, count: int, grain: int) -> Floats:
    """Draw smooth noise of about unit variance (count, P, P) with features of ``grain`` pixels."""
    if grain == 1:
        return random.standard_normal((count, _P, _P), np.float32)
    side = _P // grain + 3
    coarse = random.standard_normal((count, side, side), np.float32)
    matrix: Floats = np.float32(1.25) * resize_matrix(side, _P + 2 * grain, torch.float32).numpy()
    rows = matrix[grain // 2 : grain // 2 + _P]
    noise: Floats = rows @ (coarse @ rows.T)
    return noise


def _shares(regions: _Regions, random: np.random.Generator) -> Floats:
    """Draw the share of each pixel's second surface (N, P, P); each sensor draws its own."""
    _, _, share, grain, noise, _, parcels, rows, streets = TEXTURE_TABLE[regions.classes].T[:, :, None, None]
    textures = np.empty((len(regions.classes), _P, _P), np.float32)
    for number, size in enumerate(GRAINS):
        chosen = np.flatnonzero(grain[:, 0, 0] == number)
        textures[chosen] = _noise(random, len(chosen), size)
    textures *= noise
    patterned = np.flatnonzero((parcels + rows + streets)[:, 0, 0])
    textures[patterned] += _pattern(regions.classes[patterned], random)
    textures += share
    sampled = textures.reshape(len(textures), -1)[
        regions.of_pixel.reshape(-1), np.tile(np.arange(_P * _P), len(regions.of_pixel))
    ]
    return np.clip(sampled, 0, 1).reshape(regions.of_pixel.shape)


def _pattern(classes: NDArray[np.intp], random: np.random.Generator) -> Floats:
    """Draw parcels, rows and streets of regions (R, P, P), each region rotated by a random angle."""
    count = len(classes)
    _, _, _, _, _, side, parcels, rows, streets = TEXTURE_TABLE[classes].T[:, :, None, None]
    angle = random.uniform(0, np.pi, (count, 1, 1)).astype(np.float32)
    side = side * random.uniform(0.8, 1.25, (count, 1, 1)).astype(np.float32)
    x, y = np.arange(_P, dtype=np.float32)[None, None, :], np.arange(_P, dtype=np.float32)[None, :, None]
    u = (x * np.cos(angle) + y * np.sin(angle)) / side + 64
    v = (y * np.cos(angle) - x * np.sin(angle)) / (0.6 * side) + 64
    row = v.astype(np.int32)
    u += 0.37 * (row % 3)
    column = u.astype(np.int32)
    values = random.uniform(-1, 1, (count, 32, 32)).astype(np.float32)
    pattern = parcels * values[np.arange(count)[:, None, None], row % 32, column % 32]
    pattern += rows * np.sin((2 * np.pi / 4.5) * (u * side))
    lines = np.minimum(u - column, v - row) < streets
    return np.where(lines, np.float32(1), pattern)


def _draw_s2(
    regions: _Regions, months: NDArray[np.int64], random: np.random.Generator
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Draw reflectance at 10 m and 20 m with each scene's season, illumination, haze and relief."""
    num_scenes = len(months)
    winter = 0.5 - 0.5 * np.cos((months - 7) * (2 * np.pi / 12))
    season = (
        0.5 * np.clip(winter + _SEASON * random.standard_normal(num_scenes), 0, 1).astype(np.float32)[:, None, None]
    )
    surfaces = SPECTRA + season * (OUT_OF_SEASON_SPECTRA - SPECTRA)
    gain = np.exp(_GAIN * random.standard_normal((num_scenes, 1), np.float32))
    gain = gain * np.exp(_BAND_GAIN * random.standard_normal((num_scenes, 10), np.float32))
    haze = np.abs(random.standard_normal((num_scenes, 1), np.float32)) * _HAZE * _HAZE_DEPTH
    relief = 1 + _RELIEF * _noise(random, num_scenes, 32)
    share = _shares(regions, random)
    share_20m = _average_2x2(share)
    bands = surfaces * gain[:, None]
    s2_10m = _mix(regions, bands[..., :4], share, regions.of_pixel) * relief[:, None] + haze[:, :4, None, None]
    s2_20m = _mix(regions, bands[..., 4:], share_20m, regions.of_pixel[:, ::2, ::2])
    s2_20m = s2_20m * _average_2x2(relief)[:, None] + haze[:, 4:, None, None]
    return _as_reflectance(s2_10m, random), _as_reflectance(s2_20m, random)


def _mix(regions: _Regions, surfaces: Floats, share: Floats, of_pixel: NDArray[np.intp]) -> Floats:
    """Mix the two surfaces of each pixel.

    Args:
        regions: Classes and scenes of the regions.
        surfaces: Values of each scene's surfaces (N, surfaces, bands).
        share: Share of the second surface (N, p, p).
        of_pixel: Region of each pixel (N, p, p).

    Returns:
        (N, bands, p, p).
    """
    pair = TEXTURE_TABLE[regions.classes, :2].astype(np.intp)
    first, second = (surfaces[regions.scene, pair[:, i]] for i in (0, 1))
    mixed = [a[of_pixel] + share * (b - a)[of_pixel] for a, b in zip(first.T, second.T, strict=True)]
    return np.stack(mixed, axis=1)


def _average_2x2(images: Floats) -> Floats:
    """Average each 2×2 pixels."""
    averages: Floats = images.reshape(len(images), _P // 2, 2, _P // 2, 2).mean((2, 4))
    return averages


def _as_reflectance(images: Floats, random: np.random.Generator) -> NDArray[np.uint16]:
    noise = 1 + 0.02 * random.standard_normal(images.shape, np.float32)
    return np.clip(images * noise, 1, 16000).astype(np.uint16)


def _draw_s1(regions: _Regions, random: np.random.Generator) -> Floats:
    """Draw backscatter in dB with each scene's calibration, moisture, incidence and speckle."""
    num_scenes = len(regions.of_pixel)
    surfaces = BACKSCATTER + _MOISTURE * random.standard_normal((num_scenes, len(BACKSCATTER), 1), np.float32)
    surfaces = surfaces + _OFFSET * random.standard_normal((num_scenes, 1, 1), np.float32)
    surfaces = surfaces + _BAND_OFFSET * random.standard_normal((num_scenes, 1, 2), np.float32)
    power = _mix(regions, np.power(10, surfaces / 10), _shares(regions, random), regions.of_pixel)
    speckle = random.standard_gamma(_LOOKS, power.shape, np.float32) / np.float32(_LOOKS)
    tilt = _TILT * random.standard_normal((num_scenes, 1, 1, 1), np.float32) * np.linspace(-1, 1, _P, dtype=np.float32)
    decibels: Floats = 10 * np.log10(power * speckle) + tilt
    return decibels.astype(np.float32)
