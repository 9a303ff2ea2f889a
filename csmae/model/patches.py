"""Patches of images, their positions, and how tokens are selected.

B batch, C channels, H W pixels, L patches, K selected patches, P = patch_size² · C values of a patch, D width,
T rows of a table.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def patchify(images_bchw: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches.

    Args:
        images_bchw: Images whose sides are multiples of ``patch_size``.
        patch_size: Side of a patch in pixels.

    Returns:
        (B, L, P): patches row by row, their values in the order row, column, channel.
    """
    batch, channels, height, width = images_bchw.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images_bchw.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches_blp: Tensor, patch_size: int) -> Tensor:
    """Reassemble square images from their patches: (B, L, P) to (B, C, H, W)."""
    batch, num_patches, values = patches_blp.shape
    rows, channels = int(num_patches**0.5), values // patch_size**2
    grid = patches_blp.reshape(batch, rows, rows, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch_size, rows * patch_size)


def gather_tokens(tokens_bld: Tensor, ids_bk: Tensor) -> Tensor:
    """Select tokens of each image by their indices: (B, K, D)."""
    batch, length, width = tokens_bld.shape
    # One index per row copies whole rows; gather reads an index for every value and is several times slower on a CPU.
    starts = torch.arange(0, batch * length, length, device=ids_bk.device)
    return index_rows(tokens_bld.reshape(-1, width), ids_bk + starts[:, None])


def index_rows(table_td: Tensor, rows_bk: Tensor) -> Tensor:
    """Select rows of a table, which may repeat: (B, K, D)."""
    if table_td.is_cuda:  # its backward pass adds repeated rows in float32 and in a fixed order
        return F.embedding(rows_bk, table_td)
    return table_td.index_select(0, rows_bk.flatten()).view(*rows_bk.shape, -1)


def sincos_positions(num_patches: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding.

    Args:
        num_patches: L, a square number.
        width: D, a multiple of 4: one quarter each for sine and cosine of column and row.

    Returns:
        (1 + L, D) float32: zeros for the class token, then the patches row by row.

    Source: MAE (arXiv 2111.06377), after Transformer (arXiv 1706.03762), section 3.5.
    """
    side = int(num_patches**0.5)
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    grid = torch.cat([columns, rows], dim=2).reshape(num_patches, width)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), grid]).float()
