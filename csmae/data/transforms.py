"""Turns stored batches into the network's input: upsampled, normalized and flipped on the batch's device.

B pairs, C bands, H = W the network's image size.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, interpolate

from csmae.blas import single_threaded_blas
from csmae.config import Data
from csmae.data.pairs import PairBatch
from csmae.sensors import IMAGE_SIZE, IMAGE_SIZE_20M

STATISTICS = ("s1_mean", "s1_std", "s2_mean", "s2_std")
"""Fields of the configuration's ``data`` section that normalize the bands."""

_CPU_PAIRS = 4
"""Pairs that a CPU processes at a time: so few stay in its cache."""


class Preprocess(nn.Module):
    """Resize, normalize and flip a batch.

    Normalizing and flipping come first: they commute with resizing, and native images are smaller.

    Args:
        data: Statistics of the bands.
        img_size: Pixels along a side of the resulting images.
    """

    s1_mean: Tensor
    s1_std: Tensor
    s2_mean: Tensor
    s2_std: Tensor

    def __init__(self, data: Data, img_size: int) -> None:
        super().__init__()
        for name in STATISTICS:
            self.register_buffer(name, torch.tensor(getattr(data, name)).view(-1, 1, 1), persistent=False)
        self.img_size = img_size
        self.resize_10m = Resize(IMAGE_SIZE, img_size)
        self.resize_20m = Resize(IMAGE_SIZE_20M, img_size)

    def forward(self, batch: PairBatch, flips_b2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the images of both sensors.

        Args:
            batch: A stored batch; a sensor without rows yields none.
            flips_b2: Whether each pair is mirrored left to right, and top to bottom (bool); None mirrors no pair.

        Returns:
            Images of S1 (B, 2, H, W) and S2 (B, 10, H, W), float32; both images of a pair are mirrored alike.
        """
        num_10m, size = batch.s2_10m.shape[1], self.img_size
        s1 = batch.s1.new_empty(*batch.s1.shape[:2], size, size)
        s2 = batch.s1.new_empty(len(batch.s2_10m), len(self.s2_mean), size, size)
        step = _CPU_PAIRS if s1.device.type == "cpu" else max(len(s1), len(s2), 1)
        for start in range(0, max(len(s1), len(s2)), step):
            rows = slice(start, start + step)
            flips = None if flips_b2 is None else flips_b2[rows]
            _preprocess(batch.s1[rows], (self.s1_mean, self.s1_std), flips, self.resize_10m, s1[rows])
            for images, resize, bands in (
                (batch.s2_10m, self.resize_10m, slice(num_10m)),
                (batch.s2_20m, self.resize_20m, slice(num_10m, None)),
            ):
                statistics = self.s2_mean[bands], self.s2_std[bands]
                _preprocess(images[rows], statistics, flips, resize, s2[rows, bands])
        return s1, s2


class Resize(nn.Module):
    """Resize square images by bicubic interpolation with aligned corners (cubic coefficient −0.75).

    Interpolation is a linear map of each side. Columns are resized by a matrix product in double precision: in single
    precision, four roundings per side would sum up to 2e-3 at 10,000. Rows are resized by a weighted sum of four rows,
    the smallest weights first, rounded twice.

    Args:
        source: Pixels along a side of the input.
        target: Pixels along a side of the output.
    """

    matrix: Tensor
    """Weights of each output column (source, target)."""
    source_rows: Tensor
    """Input rows that each output row combines (target, 4)."""
    weights: Tensor
    """Weights of these input rows (target, 4)."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        matrix = resize_matrix(source, target)
        source_rows = matrix.abs().topk(min(4, source)).indices.flip(1)
        self.register_buffer("matrix", matrix.T.contiguous(), persistent=False)
        self.register_buffer("source_rows", source_rows, persistent=False)
        self.register_buffer("weights", matrix.gather(1, source_rows).float(), persistent=False)
        self._blocks = _blocks(source, target)
        self._repeated = self.source_rows, self.weights

    def forward(self, images: Tensor) -> Tensor:
        """Resize images.

        Args:
            images: Float64 (B, C, source, source).

        Returns:
            Float32 (B, C, target, target).
        """
        source, target = self.matrix.shape
        rows = images.reshape(-1, source)
        wide = rows.new_empty(len(rows), target)
        _multiply(rows, self.matrix, self._blocks, wide)
        source_rows, weights = self._repeat_rows(images.shape[0] * images.shape[1])
        resized = embedding_bag(source_rows, wide.float(), mode="sum", per_sample_weights=weights)
        return resized.view(*images.shape[:2], target, target)

    def _repeat_rows(self, num_images: int) -> tuple[Tensor, Tensor]:
        """Return ``source_rows`` and ``weights`` for stacked images; cached, because the next batch needs the same."""
        (source, target), (rows, weights) = self.matrix.shape, self._repeated
        num_rows = num_images * target
        if len(rows) < num_rows or rows.device != self.source_rows.device:
            first = torch.arange(num_images, device=self.source_rows.device)[:, None, None] * source
            rows, weights = (first + self.source_rows).flatten(0, 1), self.weights.repeat(num_images, 1)
            self._repeated = rows, weights
        return rows[:num_rows], weights[:num_rows]


def upsample(images: Tensor, size: int) -> Tensor:
    """Resize float images (B, C, h, h) to float32 (B, C, size, size), see ``Resize``."""
    if images.shape[-1] == size:
        return images.float()
    if images.requires_grad or torch.compiler.is_compiling():  # numpy supports neither gradients nor exports
        matrix = resize_matrix(images.shape[-1], size).to(images.device)
        return (matrix @ images.double() @ matrix.T).float()
    resized: Tensor = Resize(images.shape[-1], size).to(images.device)(images.double())
    return resized


def resize_matrix(source: int, target: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return bicubic interpolation with aligned corners along one side as a matrix: its results for the unit vectors.

    Args:
        source: Pixels of the input.
        target: Pixels of the output.
        dtype: Single precision also rounds the pixels' positions, which changes values of 10,000 by up to 0.04.

    Returns:
        Weights (target, source); each row sums to one and has at most four that are not zero.
    """
    unit = torch.eye(source, dtype=dtype)[None, None]
    return interpolate(unit, size=(target, source), mode="bicubic", align_corners=True)[0, 0]


def _preprocess(
    images: Tensor, statistics: tuple[Tensor, Tensor], flips_b2: Tensor | None, resize: Resize, out: Tensor
) -> None:
    """Normalize, flip and resize images of some bands into ``out``."""
    mean, std = statistics
    same_size = images.shape == out.shape
    native = out if same_size else images.new_empty(images.shape, dtype=torch.float64)
    native.copy_(images).sub_(mean).div_(std)
    if flips_b2 is not None:
        _flip(native, flips_b2)
    if not same_size:
        out.copy_(resize(native))


def _multiply(rows: Tensor, matrix: Tensor, blocks: list[tuple[slice, slice]], out: Tensor) -> None:
    """Multiply by the blocks of a matrix that are not zero."""
    if rows.device.type == "cpu":
        # numpy uses OpenBLAS; torch's MKL takes twice as long on AMD.
        a, b, c = rows.numpy(), matrix.numpy(), out.numpy()
        with single_threaded_blas():
            for outputs, inputs in blocks:
                np.matmul(a[:, inputs], b[inputs, outputs], out=c[:, outputs])
    else:
        for outputs, inputs in blocks:
            torch.mm(rows[:, inputs], matrix[inputs, outputs], out=out[:, outputs])


def _blocks(source: int, target: int, num_blocks: int = 5) -> list[tuple[slice, slice]]:
    """Return ranges of output pixels, each with the range of input pixels that it depends on."""
    edges = [number * target // num_blocks for number in range(num_blocks + 1)]
    step = (source - 1) / max(target - 1, 1)
    # One pixel of margin covers the rounding of positions.
    return [
        (slice(start, end), slice(max(int(start * step) - 2, 0), min(int((end - 1) * step) + 4, source)))
        for start, end in itertools.pairwise(edges)
        if start < end
    ]


def _flip(images: Tensor, flips_b2: Tensor) -> None:
    """Mirror images in place: on a CPU one at a time, while it is in the cache; on a GPU all in a few kernels."""
    if images.device.type == "cpu":
        for image, (horizontal, vertical) in zip(images, flips_b2.tolist(), strict=False):
            if horizontal or vertical:
                image.copy_(image.flip([-1] * horizontal + [-2] * vertical))
    elif len(images):
        horizontal_b, vertical_b = flips_b2.to(images.device)[:, :, None, None, None].unbind(1)
        mirrored = torch.where(horizontal_b, images.flip(-1), images)
        images.copy_(torch.where(vertical_b, mirrored.flip(-2), mirrored))
