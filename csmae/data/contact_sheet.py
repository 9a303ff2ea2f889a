"""Draws a contact sheet: pairs of an archive as pictures, with their names and labels."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from csmae.atomic import atomic_write
from csmae.data.split import Split
from csmae.data.write import report_write_errors
from csmae.sensors import CLASSES, IMAGE_SIZE, S2_RGB

_MAX_COLUMNS = 4
_LINE_LENGTH = 25
"""Characters of a line below an image."""
_MARGIN, _TEXT_HEIGHT = 16, 68
"""Pixels."""


def write_contact_sheet(split: Split, rows: list[int], path: Path) -> None:
    """Draw pairs: S2 in natural colors beside S1 in false colors, or the images of one sensor.

    Args:
        split: Holds the pairs; the images of its sensors are drawn.
        rows: Rows of the pairs to draw.
        path: PNG file to write.

    Raises:
        ArchiveError: A pair is damaged, or the picture cannot be written.
    """
    chosen = split.take(rows)
    batch, names, labels = chosen.read(range(len(rows))), chosen.names, chosen.labels()
    damaged = set(chosen.damaged_rows().tolist())
    cell = (len(split.sensors) * IMAGE_SIZE + _MARGIN, IMAGE_SIZE + _TEXT_HEIGHT)
    columns, width = min(_MAX_COLUMNS, len(rows)), _LINE_LENGTH * len(split.sensors)
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN, -(-len(rows) // columns) * cell[1] + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, name in enumerate(names):
        x, y = number % columns * cell[0] + _MARGIN, number // columns * cell[1] + _MARGIN
        if number in damaged:
            draw.multiline_text((x, y + IMAGE_SIZE + 2), f"{name}\ndamaged", fill="red", font_size=8, spacing=1)
            continue
        images = [_natural_color(batch.s2_10m[number])] if "s2" in split.sensors else []
        images += [_false_color(batch.s1[number])] if "s1" in split.sensors else []
        sheet.paste(Image.fromarray(np.concatenate(images, axis=1)), (x, y))
        classes = ", ".join(CLASSES[index] for index in np.flatnonzero(labels[number]))
        text = "\n".join([*textwrap.wrap(name, width + 10), *textwrap.wrap(classes, width, max_lines=5)])
        draw.multiline_text((x, y + IMAGE_SIZE + 2), text, fill="black", font_size=8, spacing=1)
    with report_write_errors(path), atomic_write(path, concurrent=True) as file:
        sheet.save(file, "PNG")


def _natural_color(s2_10m: Tensor) -> NDArray[np.uint8]:
    """Return red, green and blue of S2 (120, 120, 3); the brightest 1 % of the pixels are white.

    Args:
        s2_10m: Reflectance times 10,000, uint16 (4, 120, 120).
    """
    image = s2_10m.float()[list(S2_RGB)]
    white = max(float(torch.quantile(image, 0.99)), 1000.0)  # without a limit, noise would look like a scene
    return _as_bytes(image / white)


def _false_color(s1: Tensor) -> NDArray[np.uint8]:
    """Return VV, VH and their difference as red, green and blue (120, 120, 3).

    Args:
        s1: Backscatter in dB (2, 120, 120).
    """
    vh, vv = s1
    channels = ((vv, -22.0, 0.0), (vh, -28.0, -6.0), (vv - vh, 2.0, 14.0))
    return _as_bytes(torch.stack([(image - low) / (high - low) for image, low, high in channels]))


def _as_bytes(image: Tensor) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    return pixels
