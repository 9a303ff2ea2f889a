"""GeoTIFFs from practice: scales and offsets, undeclared gaps, other units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csmae.encoders import EncoderError, SensorEncoder
from csmae.model.csmae import build_model
from csmae.retrieval.geotiff import GeoTiffError, read_scene
from tests.conftest import small_config
from tests.support.geotiffs import SIDE, s1_image, s2_image, write_geotiff

S1, S2 = s1_image(), s2_image()
TAGS_S1: dict[str, Any] = {"scales": (0.01, 0.01), "offsets": (0.0, 0.0)}


def stored(image: Any, scale: float, offset: float, dtype: Any) -> Any:
    """Values that a file with this scale and offset stores for an image."""
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
    unit = 1e4 if scale == 1e-4 else 1  # such files hold reflectance, the archives hold it times 10,000
    pixels = stored(image / unit, scale, offset, dtype)
    tags: Any = {"scales": [scale] * len(image), "offsets": [offset] * len(image)}
    scene = read_scene(write_geotiff(tmp_path / "scene.tif", pixels, **tags), sensor)
    assert scene.dtype == np.float32
    np.testing.assert_allclose(scene, image, atol=0.01)


def test_each_band_has_its_own_scale_and_offset_in_any_order(tmp_path: Path) -> None:
    pixels = np.stack([stored(S1[1], 0.01, 0, np.int16), stored(S1[0], 0.02, -10, np.int16)])
    path = write_geotiff(tmp_path / "a.tif", pixels, names=("VV", "VH"), scales=(0.01, 0.02), offsets=(0, -10))
    np.testing.assert_allclose(read_scene(path, "s1"), S1, atol=0.011)


def test_a_scaled_file_has_the_same_feature_as_its_scene(tmp_path: Path) -> None:
    config = small_config()
    encoder = SensorEncoder.from_model(build_model(config), config).eval()
    path = write_geotiff(tmp_path / "a.tif", stored(S1, 0.01, 0, np.int16), **TAGS_S1)
    first, second = (encoder.encode(s1=image[None]).s1 for image in (S1, read_scene(path, "s1")))
    assert first is not None and second is not None
    assert float(torch.cosine_similarity(first, second)) > 0.9999


def with_rows(image: Any, value: float, rows: int = 3, band: int | None = None) -> Any:
    """The image with a value in the first rows of one band, or of all."""
    changed = image.copy()
    changed[slice(None) if band is None else band, :rows] = value
    return changed


def with_glint(image: Any, value: float) -> Any:
    """The image with one very bright pixel."""
    changed = image.copy()
    changed[:, 60, 60] = value
    return changed


CENTI = stored(S1, 0.01, 0, np.int16)
FLOATS = S2.astype(np.float32)

GAPS: dict[str, tuple[str, Any, dict[str, Any], int]] = {
    "declared nodata": ("s1", with_rows(S1, -50), {"nodata": -50}, 3 * SIDE),
    "not a number": ("s1", with_rows(S1, np.nan, band=1), {}, 3 * SIDE),
    "minus infinity, the logarithm of zero": ("s1", with_rows(S1, -np.inf, 1), {}, SIDE),
    "infinity": ("s2", with_rows(FLOATS, np.inf, band=4), {}, 3 * SIDE),
    "undeclared -9999": ("s1", with_rows(S1, -9999), {}, 3 * SIDE),
    "-9999 that becomes plausible by a scale": ("s1", with_rows(CENTI, -9999), TAGS_S1, 3 * SIDE),
    "-32768": ("s1", with_rows(CENTI, -32768, band=0), TAGS_S1, 3 * SIDE),
    "the smallest float": ("s1", with_rows(S1, float(np.finfo(np.float32).min)), {}, 3 * SIDE),
    "-9999 of S2": ("s2", with_rows(FLOATS, -9999), {}, 3 * SIDE),
    "zeros beside dB": ("s1", with_rows(S1, 0), {}, 3 * SIDE),
    "zeros beside hundredths of dB": ("s1", with_rows(CENTI, 0), TAGS_S1, 3 * SIDE),
    "zeros that become plausible by an offset": (
        "s1",
        with_rows(stored(S1, 0.002, -60, np.uint16), 0),
        {"scales": (0.002, 0.002), "offsets": (-60, -60)},
        3 * SIDE,
    ),
    "zeros in every band of S2": ("s2", with_rows(S2, 0, 1), {}, SIDE),
    "65535": ("s2", with_rows(S2, 65535), {}, 3 * SIDE),
}


@pytest.mark.parametrize("kind", list(GAPS))
def test_gaps_are_rejected_whether_or_not_they_are_declared(tmp_path: Path, kind: str) -> None:
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
    "dB with a scale that was already applied": (
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
    "standardized dB": ("s1", (S1 - S1.mean()) / S1.std(), {}, "must be backscatter in dB, .* not standardized"),
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
    "a picture of 8 bits": ("s2", (S2 // 16).astype(np.uint8), {}, "8 bits .* picture"),
    "reflectance with a glint": (
        "s2",
        with_glint(FLOATS / 1e4, 2.15),
        {},
        "must be reflectance times 10,000, found 0.02 to 2.15: multiply it by 10,000",
    ),
    "reflectance in percent with a glint": (
        "s2",
        with_glint(FLOATS / 100, 215),
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
def test_another_unit_is_rejected_with_one_line_that_says_what_to_do(tmp_path: Path, kind: str) -> None:
    sensor, pixels, options, text = UNITS[kind]
    path = write_geotiff(tmp_path / "scene.tif", pixels, **options)
    with pytest.raises(GeoTiffError, match=text) as error:
        read_scene(path, sensor)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))


def test_dark_bright_and_clipped_scenes_are_not_gaps(tmp_path: Path) -> None:
    sea, snow = np.full((10, SIDE, SIDE), 60, np.uint16), np.full((10, SIDE, SIDE), 16_000, np.uint16)
    sea[5:, 10:] = 0  # some bands are 0 over water
    calm, city = np.full_like(S1, -35), with_rows(S1, 25, 20)
    clipped = S1.copy()
    clipped[:, 50, :40] = 0  # the brightest pixels of a file that ends at 0 dB
    for sensor, image in (("s2", sea), ("s2", snow), ("s1", calm), ("s1", city), ("s1", clipped)):
        scene = read_scene(write_geotiff(tmp_path / "scene.tif", image), sensor)
        assert np.array_equal(scene, image.astype(np.float32))


@pytest.mark.parametrize("scale", [1, 1e-4])
def test_a_glint_does_not_change_the_unit_of_its_scene(tmp_path: Path, scale: float) -> None:
    image = with_glint(S2, 21_500)
    scene = read_scene(write_geotiff(tmp_path / "scene.tif", image, scales=[scale] * 10), "s2")
    np.testing.assert_allclose(scene, image, rtol=1e-6)


def test_an_impossibly_bright_scaled_scene_is_not_mistaken_for_another_unit(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "scene.tif", with_glint(S2, 40_000), scales=[1e-4] * 10)
    with pytest.raises(GeoTiffError, match=r"found 200 to 4e[+]04 .*: 1 pixels are outside"):
        read_scene(path, "s2")


def test_dark_water_with_negative_reflectance_is_read(tmp_path: Path) -> None:
    sea = np.full((10, SIDE, SIDE), 940, np.uint16)
    path = write_geotiff(tmp_path / "scene.tif", sea, offsets=[-1000] * 10)
    assert np.array_equal(read_scene(path, "s2"), np.full_like(sea, -60, np.float32))


def test_fractional_values_of_a_sea_are_not_mistaken_for_percent(tmp_path: Path) -> None:
    sea = np.full((10, SIDE, SIDE), 60.5, np.float32)
    sea[:, :2, :30] = 1500  # ships
    assert np.array_equal(read_scene(write_geotiff(tmp_path / "scene.tif", sea), "s2"), sea)


def test_a_shadow_that_is_zero_in_every_band_is_not_a_gap(tmp_path: Path) -> None:
    image = with_glint(S2, 0)
    assert np.array_equal(read_scene(write_geotiff(tmp_path / "scene.tif", image), "s2"), image)


def test_a_declared_zero_and_a_zero_with_a_negative_offset_are_gaps(tmp_path: Path) -> None:
    image = with_glint(S2, 0)
    for options in ({"nodata": 0}, {"offsets": [-1000] * 10}, {"scales": [1e-4] * 10, "offsets": [-0.1] * 10}):
        path = write_geotiff(tmp_path / "scene.tif", image, **options)
        with pytest.raises(GeoTiffError, match="1 pixels hold no data"):
            read_scene(path, "s2")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sensor", ["s1", "s2"])
def test_an_encoder_rejects_images_that_are_not_finite(sensor: str, value: float) -> None:
    config = small_config()
    encoder = SensorEncoder.from_model(build_model(config), config).eval()
    image = with_rows(S1 if sensor == "s1" else FLOATS, value)
    with pytest.raises(EncoderError, match=f"encode: {sensor} holds values that are not finite"):
        encoder.encode(**{sensor: image[None]})
