"""GeoTIFFs as people have them: scales and offsets, gaps that nobody declared, other units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csmae.encoders import EncoderError
from csmae.retrieval.geotiff import GeoTiffError, read_scene
from csmae.training.scoring import encoder_of, seeded_model
from tests.conftest import small_config
from tests.support.geotiffs import SIDE, s1_image, s2_image, write_geotiff

S1, S2 = s1_image(), s2_image()
TAGS_S1: dict[str, Any] = {"scales": (0.01, 0.01), "offsets": (0.0, 0.0)}


def stored(image: Any, scale: float, offset: float, dtype: Any) -> Any:
    """An image as a file with a scale and an offset holds it."""
    return np.round((image.astype(float) - offset) / scale).astype(dtype)


@pytest.mark.parametrize(
    ("sensor", "scale", "offset", "dtype"),
    [
        ("s1", 0.01, 0, np.int16),
        ("s1", 0.002, -60, np.uint16),
        ("s2", 1, -1000, np.uint16),
        ("s2", 1e-4, 0, np.uint16),
        ("s2", 1e-4, -0.1, np.uint16),
    ],
)
def test_scale_and_offset_of_the_file_are_applied(
    tmp_path: Path, sensor: str, scale: float, offset: float, dtype: Any
) -> None:
    image = S1 if sensor == "s1" else S2
    unit = 1e4 if scale == 1e-4 else 1  # such files say reflectance, the archives hold it times 10,000
    pixels = stored(image / unit, scale, offset, dtype)
    tags: Any = {"scales": [scale] * len(image), "offsets": [offset] * len(image)}
    scene = read_scene(write_geotiff(tmp_path / "scene.tif", pixels, **tags), sensor)
    assert scene.dtype == np.float32
    np.testing.assert_allclose(scene, image, atol=0.01)


def test_each_band_has_its_own_scale_and_offset_in_whatever_order_the_bands_are(tmp_path: Path) -> None:
    pixels = np.stack([stored(S1[1], 0.01, 0, np.int16), stored(S1[0], 0.02, -10, np.int16)])
    path = write_geotiff(tmp_path / "a.tif", pixels, names=("VV", "VH"), scales=(0.01, 0.02), offsets=(0, -10))
    np.testing.assert_allclose(read_scene(path, "s1"), S1, atol=0.011)


def test_a_scaled_file_asks_like_the_very_same_scene(tmp_path: Path) -> None:
    config = small_config()
    encoder = encoder_of(seeded_model(config), config).eval()
    path = write_geotiff(tmp_path / "a.tif", stored(S1, 0.01, 0, np.int16), **TAGS_S1)
    first, second = (encoder.encode(s1=image[None]).s1 for image in (S1, read_scene(path, "s1")))
    assert first is not None and second is not None
    assert float(torch.cosine_similarity(first, second)) > 0.9999


def holding(image: Any, value: float, rows: int = 3, band: int | None = None) -> Any:
    """The image with a value in its first rows, of one band or all."""
    changed = image.copy()
    changed[slice(None) if band is None else band, :rows] = value
    return changed


def glinting(image: Any, value: float) -> Any:
    """The image with one pixel as bright as the sun on a roof."""
    changed = image.copy()
    changed[:, 60, 60] = value
    return changed


CENTI = stored(S1, 0.01, 0, np.int16)
FLOATS = S2.astype(np.float32)

GAPS: dict[str, tuple[str, Any, dict[str, Any], int]] = {
    "declared": ("s1", holding(S1, -50), {"nodata": -50}, 3 * SIDE),
    "not a number": ("s1", holding(S1, np.nan, band=1), {}, 3 * SIDE),
    "minus infinite, the logarithm of nothing": ("s1", holding(S1, -np.inf, 1), {}, SIDE),
    "infinite": ("s2", holding(FLOATS, np.inf, band=4), {}, 3 * SIDE),
    "-9999 that is not declared": ("s1", holding(S1, -9999), {}, 3 * SIDE),
    "-9999 that a scale makes a measurement": ("s1", holding(CENTI, -9999), TAGS_S1, 3 * SIDE),
    "-32768": ("s1", holding(CENTI, -32768, band=0), TAGS_S1, 3 * SIDE),
    "the smallest float": ("s1", holding(S1, float(np.finfo(np.float32).min)), {}, 3 * SIDE),
    "-9999 of S2": ("s2", holding(FLOATS, -9999), {}, 3 * SIDE),
    "zeros beside dB": ("s1", holding(S1, 0), {}, 3 * SIDE),
    "zeros beside hundredths of dB": ("s1", holding(CENTI, 0), TAGS_S1, 3 * SIDE),
    "zeros that an offset makes a measurement": (
        "s1",
        holding(stored(S1, 0.002, -60, np.uint16), 0),
        {"scales": (0.002, 0.002), "offsets": (-60, -60)},
        3 * SIDE,
    ),
    "zeros in every band of S2": ("s2", holding(S2, 0, 1), {}, SIDE),
    "65535": ("s2", holding(S2, 65535), {}, 3 * SIDE),
}


@pytest.mark.parametrize("kind", list(GAPS))
def test_gaps_are_refused_whether_or_not_the_file_declares_them(tmp_path: Path, kind: str) -> None:
    sensor, pixels, options, count = GAPS[kind]
    path = write_geotiff(tmp_path / "scene.tif", pixels, **options)
    with pytest.raises(GeoTiffError, match=rf"scene\.tif: {count} pixels hold no data \(.+\): cut a scene") as error:
        read_scene(path, sensor)
    assert "\n" not in str(error.value)


UNITS: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "hundredths of dB without a scale": (
        "s1",
        CENTI,
        {},
        r"found -2e\+03 to -500: set the file's scale \(`gdal_edit.py -scale 0.01`",
    ),
    "dB whose scale was applied already": (
        "s1",
        S1,
        TAGS_S1,
        r"after the file's scale of 0.01.*gdal_edit.py -scale 1 -offset 0",
    ),
    "power": (
        "s1",
        10 ** (S1 / 10),
        {},
        r"must be backscatter in dB, found 0.01 to 0.316: convert it to dB: 10·log10\(x\)",
    ),
    "standardised dB": ("s1", (S1 - S1.mean()) / S1.std(), {}, "must be backscatter in dB, .* not standardised"),
    "complex numbers": ("s1", S1.astype(np.complex64), {}, "holds complex numbers: .*10·log10"),
    "reflectance": (
        "s2",
        FLOATS / 1e4,
        {},
        "must be reflectance times 10,000, found 0.02 to 0.4: multiply it by 10,000",
    ),
    "reflectance in percent": (
        "s2",
        FLOATS / 100,
        {},
        "must be reflectance times 10,000, found 2 to 40: multiply it by 100",
    ),
    "a picture of 8 bits": ("s2", (S2 // 16).astype(np.uint8), {}, "8 bits .* a picture"),
    "reflectance with a glint": (
        "s2",
        glinting(FLOATS / 1e4, 2.15),
        {},
        "must be reflectance times 10,000, found 0.02 to 2.15: multiply it by 10,000",
    ),
    "reflectance in percent with a glint": (
        "s2",
        glinting(FLOATS / 100, 215),
        {},
        "must be reflectance times 10,000, found 2 to 215: multiply it by 100",
    ),
    "too bright": (
        "s2",
        FLOATS * 20,
        {},
        "must be reflectance times 10,000, found .* to 8e[+]04: .*: set the file's scale, or cut",
    ),
    "a scale of zero": ("s1", CENTI, {"scales": (0.01, 0)}, "band VV has a scale of 0"),
}


@pytest.mark.parametrize("kind", list(UNITS))
def test_another_unit_is_told_in_one_line_that_says_what_to_do(tmp_path: Path, kind: str) -> None:
    sensor, pixels, options, says = UNITS[kind]
    path = write_geotiff(tmp_path / "scene.tif", pixels, **options)
    with pytest.raises(GeoTiffError, match=says) as error:
        read_scene(path, sensor)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))


def test_dark_bright_and_clipped_scenes_are_no_gaps(tmp_path: Path) -> None:
    sea, snow = np.full((10, SIDE, SIDE), 60, np.uint16), np.full((10, SIDE, SIDE), 16_000, np.uint16)
    sea[5:, 10:] = 0  # some bands see nothing of water
    calm, city = np.full_like(S1, -35), holding(S1, 25, 20)
    clipped = S1.copy()
    clipped[:, 50, :40] = 0  # the brightest pixels of a file that ends at 0 dB
    for sensor, image in (("s2", sea), ("s2", snow), ("s1", calm), ("s1", city), ("s1", clipped)):
        scene = read_scene(write_geotiff(tmp_path / "scene.tif", image), sensor)
        assert np.array_equal(scene, image.astype(np.float32))


@pytest.mark.parametrize("scale", [1, 1e-4])
def test_a_glint_does_not_change_the_unit_of_its_scene(tmp_path: Path, scale: float) -> None:
    image = glinting(S2, 21_500)
    scene = read_scene(write_geotiff(tmp_path / "scene.tif", image, scales=[scale] * 10), "s2")
    np.testing.assert_allclose(scene, image, rtol=1e-6)


def test_a_scaled_scene_that_is_brighter_than_any_is_not_taken_for_another_unit(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "scene.tif", glinting(S2, 40_000), scales=[1e-4] * 10)
    with pytest.raises(GeoTiffError, match=r"found 200 to 4e[+]04 .*: 1 pixels are outside"):
        read_scene(path, "s2")


def test_dark_water_that_the_offset_makes_negative_is_read(tmp_path: Path) -> None:
    sea = np.full((10, SIDE, SIDE), 940, np.uint16)
    path = write_geotiff(tmp_path / "scene.tif", sea, offsets=[-1000] * 10)
    assert np.array_equal(read_scene(path, "s2"), np.full_like(sea, -60, np.float32))


def test_a_sea_in_fractions_of_a_number_is_not_taken_for_percent(tmp_path: Path) -> None:
    sea = np.full((10, SIDE, SIDE), 60.5, np.float32)
    sea[:, :2, :30] = 1500  # ships
    assert np.array_equal(read_scene(write_geotiff(tmp_path / "scene.tif", sea), "s2"), sea)


def test_a_shadow_that_is_zero_in_every_band_is_no_gap(tmp_path: Path) -> None:
    image = glinting(S2, 0)
    assert np.array_equal(read_scene(write_geotiff(tmp_path / "scene.tif", image), "s2"), image)


def test_a_zero_that_the_file_declares_or_that_an_offset_makes_negative_is_a_gap(tmp_path: Path) -> None:
    image = glinting(S2, 0)
    for options in ({"nodata": 0}, {"offsets": [-1000] * 10}, {"scales": [1e-4] * 10, "offsets": [-0.1] * 10}):
        path = write_geotiff(tmp_path / "scene.tif", image, **options)
        with pytest.raises(GeoTiffError, match="1 pixels hold no data"):
            read_scene(path, "s2")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sensor", ["s1", "s2"])
def test_an_encoder_takes_no_image_that_is_not_finite(sensor: str, value: float) -> None:
    config = small_config()
    encoder = encoder_of(seeded_model(config), config).eval()
    image = holding(S1 if sensor == "s1" else FLOATS, value)
    with pytest.raises(EncoderError, match=f"encode: {sensor} holds values that are not finite"):
        encoder.encode(**{sensor: image[None]})
