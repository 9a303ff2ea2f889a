"""Images of scenes in red, green and blue: natural color for S2, false color for S1, one stretch for images to compare."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from csmae import sensors
from csmae.retrieval.panel import Image

RgbImage = NDArray[np.float32]
"""(H, W, 3), between 0 and 1."""

HIDDEN_GRAY = 0.86
"""Gray level of hidden pixels."""
BLACK_PERCENTILE, WHITE_PERCENTILE = 2.0, 98.0
"""Percentiles of the values that become black and white."""
GAMMA = 0.8
"""Below 1: brightens dark values, because land is mostly dark."""


class Stretch(NamedTuple):
    """The values that become black and white, (3,) each."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]


def rgb_channels(image_chw: Image) -> NDArray[np.float32]:
    """Select the three channels to display, (H, W, 3), not yet stretched.

    S2: B04, B03, B02. S1: VV, VH and their difference in dB: water is dark, towns are pink, forest is green.
    """
    if len(image_chw) == len(sensors.S1_BANDS):
        vh, vv = image_chw
        return np.stack([vv, vh, vv - vh], axis=-1)
    return np.moveaxis(image_chw[list(sensors.S2_RGB)], 0, -1)


def stretch_of(image_chw: Image) -> Stretch:
    """Compute the stretch of an image from its percentiles; a constant channel becomes gray."""
    values = rgb_channels(image_chw).reshape(-1, 3)
    low, high = np.percentile(values, (BLACK_PERCENTILE, WHITE_PERCENTILE), axis=0).astype(np.float32)
    constant = high - low < 1e-6
    return Stretch(np.where(constant, low - 0.5, low), np.where(constant, high + 0.5, high))


def render(image_chw: Image, stretch: Stretch | None = None, visible_hw: NDArray[np.bool_] | None = None) -> RgbImage:
    """Render an image.

    Args:
        image_chw: An image of either sensor; NaN pixels are hidden.
        stretch: The original's stretch for a reconstruction that is compared with it; by default the image's own.
        visible_hw: Pixels that are False are hidden.
    """
    low, high = stretch or stretch_of(image_chw)
    rendered = np.clip((rgb_channels(image_chw) - low) / (high - low), 0, 1) ** GAMMA
    rendered[np.isnan(rendered)] = HIDDEN_GRAY
    if visible_hw is not None:
        rendered[~visible_hw] = HIDDEN_GRAY
    return rendered.astype(np.float32)
