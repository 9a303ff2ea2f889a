"""How a scene becomes a picture: natural colour for S2, false colour for S1, one stretch for what is compared."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from csmae import sensors
from csmae.retrieval.panel import Image

Picture = NDArray[np.float32]
"""(H, W, 3), red, green and blue between 0 and 1."""

HIDDEN = 0.86
"""Grey of what a network does not see."""
SHADOWS, LIGHTS = 2.0, 98.0
"""Percentiles that become black and white."""
GAMMA = 0.8
"""Below 1: lifts the dark, for land is mostly dark."""


class Stretch(NamedTuple):
    """The values that become black and white, (3,) each."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]


def channels(image_chw: Image) -> Picture:
    """The three channels that are shown, not yet stretched.

    S2: B04, B03, B02. S1: VV, VH and their difference in dB: water is dark, towns are pink, forest is green.
    """
    if len(image_chw) == len(sensors.S1_BANDS):
        vh, vv = image_chw
        return np.stack([vv, vh, vv - vh], axis=-1)
    return np.moveaxis(image_chw[list(sensors.S2_RGB)], 0, -1)


def stretch_of(image_chw: Image) -> Stretch:
    """The stretch that shows an image well; a flat channel becomes grey."""
    shown = channels(image_chw).reshape(-1, 3)
    low, high = np.percentile(shown, (SHADOWS, LIGHTS), axis=0).astype(np.float32)
    flat = high - low < 1e-6
    return Stretch(np.where(flat, low - 0.5, low), np.where(flat, high + 0.5, high))


def paint(image_chw: Image, stretch: Stretch | None = None, visible_hw: NDArray[np.bool_] | None = None) -> Picture:
    """A picture of an image.

    Args:
        image_chw: Of either sensor; pixels that are NaN are hidden.
        stretch: That of the original where a reconstruction is compared with it; by default the image's own.
        visible_hw: Where False, the pixel is hidden.
    """
    low, high = stretch or stretch_of(image_chw)
    picture = np.clip((channels(image_chw) - low) / (high - low), 0, 1) ** GAMMA
    picture[np.isnan(picture)] = HIDDEN
    if visible_hw is not None:
        picture[~visible_hw] = HIDDEN
    return picture.astype(np.float32)
