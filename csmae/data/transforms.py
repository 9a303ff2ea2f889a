"""From batches as stored to what the network takes: upsampled, normalised, flipped, on the batch's device.

Shapes: B pairs, C bands, H = W the network's image size.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from csmae.config import Data
from csmae.data.pairs import PairBatch
from csmae.sensors import IMAGE_SIZE, IMAGE_SIZE_20M

_CPU_PAIRS = 8
"""Pairs that a CPU prepares at a time: so few stay in its cache."""


class Prepare(nn.Module):
    """Resize, normalise and flip a batch.

    Normalising and flipping come first: they commute with resizing, and native images are smaller.

    Args:
        data: Statistics of the bands.
        img_size: Pixels along a side of the images that come out.
    """

    s1_mean: Tensor
    s1_std: Tensor
    s2_mean: Tensor
    s2_std: Tensor
    resize_10m: Tensor
    resize_20m: Tensor

    def __init__(self, data: Data, img_size: int) -> None:
        super().__init__()
        for name in ("s1_mean", "s1_std", "s2_mean", "s2_std"):
            self.register_buffer(name, torch.tensor(getattr(data, name)).view(-1, 1, 1), persistent=False)
        self.register_buffer("resize_10m", resize_matrix(IMAGE_SIZE, img_size), persistent=False)
        self.register_buffer("resize_20m", resize_matrix(IMAGE_SIZE_20M, img_size), persistent=False)

    def forward(self, batch: PairBatch, flips_b2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The images of both sensors.

        Args:
            batch: As stored; a sensor without rows stays without.
            flips_b2: Whether each pair is mirrored left to right, and top to bottom (bool); none where missing.

        Returns:
            Images of S1 (B, 2, H, W) and S2 (B, 10, H, W), float32, both mirrored alike.
        """
        num_10m, size = batch.s2_10m.shape[1], len(self.resize_10m)
        s1 = batch.s1.new_empty(*batch.s1.shape[:2], size, size)
        s2 = batch.s1.new_empty(len(batch.s2_10m), len(self.s2_mean), size, size)
        step = _CPU_PAIRS if s1.device.type == "cpu" else max(len(s1), len(s2), 1)
        for start in range(0, max(len(s1), len(s2)), step):
            rows = slice(start, start + step)
            flips = None if flips_b2 is None else flips_b2[rows]
            _prepare(batch.s1[rows], (self.s1_mean, self.s1_std), flips, self.resize_10m, s1[rows])
            for images, matrix, bands in (
                (batch.s2_10m, self.resize_10m, slice(num_10m)),
                (batch.s2_20m, self.resize_20m, slice(num_10m, None)),
            ):
                statistics = self.s2_mean[bands], self.s2_std[bands]
                _prepare(images[rows], statistics, flips, matrix, s2[rows, bands])
        return s1, s2


def _prepare(
    images: Tensor, statistics: tuple[Tensor, Tensor], flips_b2: Tensor | None, matrix: Tensor, out: Tensor
) -> None:
    """Normalise, flip and resize images of some bands into ``out``."""
    mean, std = statistics
    same_size = images.shape == out.shape
    native = out if same_size else images.new_empty(images.shape, dtype=out.dtype)
    native.copy_(images).sub_(mean).div_(std)
    if flips_b2 is not None:
        _flip(native, flips_b2)
    if not same_size:
        out.copy_(_resize(native, matrix))


def upsample(s2_20m: Tensor, size: int) -> Tensor:
    """Resize images.

    Args:
        s2_20m: Float (B, C, h, h).
        size: Pixels along a side of the result.

    Returns:
        Float (B, C, size, size): bicubic with aligned corners, as one matrix product a side.
    """
    return _resize(s2_20m, resize_matrix(s2_20m.shape[-1], size).to(s2_20m))


def resize_matrix(source: int, target: int) -> Tensor:
    """Bicubic interpolation with aligned corners along one side, as a matrix: what it makes of the unit vectors.

    Args:
        source: Pixels given.
        target: Pixels wanted.

    Returns:
        Float32 (target, source); each row sums to one and weighs four neighbours. Single precision from the start: the
        published preparation rounds the positions so, and it must be met to a thousandth of a unit.
    """
    unit = torch.eye(source)[None, None]
    return interpolate(unit, size=(target, source), mode="bicubic", align_corners=True)[0, 0]


def _resize(images: Tensor, matrix: Tensor) -> Tensor:
    """Both sides by the matrix, in blocks: it is zero but near its diagonal, and half of the products are spared."""
    target, source = matrix.shape
    batch, channels, height, width = images.shape
    lines = images.reshape(-1, width)
    wide = images.new_empty(len(lines), target)
    resized = images.new_empty(batch * channels, target, target)
    for rows, columns in _blocks(source, target):
        torch.mm(lines[:, columns], matrix[rows, columns].T, out=wide[:, rows])
    wide = wide.view(-1, height, target)
    for rows, columns in _blocks(source, target):
        block = matrix[rows, columns]
        torch.bmm(block.expand(len(wide), *block.shape), wide[:, columns], out=resized[:, rows])
    return resized.view(batch, channels, target, target)


def _blocks(source: int, target: int, num_blocks: int = 3) -> list[tuple[slice, slice]]:
    """Ranges of rows of the matrix, and the columns outside which these rows are zero."""
    edges = [number * target // num_blocks for number in range(num_blocks + 1)]
    step = (source - 1) / max(target - 1, 1)
    # A pixel of margin: the interpolation rounds positions in single precision.
    return [
        (slice(start, end), slice(max(int(start * step) - 2, 0), min(int((end - 1) * step) + 4, source)))
        for start, end in itertools.pairwise(edges)
        if start < end
    ]


def _flip(images: Tensor, flips_b2: Tensor) -> None:
    """Mirror the chosen images in place: on a CPU one at a time, while it is in the cache, else all in few kernels."""
    if images.device.type == "cpu":
        for image, (horizontal, vertical) in zip(images, flips_b2.tolist(), strict=False):
            if horizontal or vertical:
                image.copy_(image.flip([-1] * horizontal + [-2] * vertical))
    elif len(images):
        horizontal_b, vertical_b = flips_b2.to(images.device)[:, :, None, None, None].unbind(1)
        mirrored = torch.where(horizontal_b, images.flip(-1), images)
        images.copy_(torch.where(vertical_b, mirrored.flip(-2), mirrored))
