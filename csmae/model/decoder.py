"""The decoder: from visible tokens to predictions of every patch.

B batch, L patches, K visible patches, N = 1 + L tokens, M patches in the loss, P values of a patch, D encoder width,
E decoder width, T distinct tokens.
"""

from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from csmae.config import Model
from csmae.model.blocks import make_blocks
from csmae.model.masking import Mask
from csmae.model.patches import index_rows, sincos_positions
from csmae.sensors import NUM_CHANNELS

NORM = partial(nn.LayerNorm, eps=1e-5)


class Decoder(nn.Module):
    """A trunk and one linear head per target sensor (MAE, arXiv 2111.06377; CSMAE, arXiv 2401.07782, section III).

    Args:
        model: Widths, depth and patch size.
        targets: Sensors that this decoder predicts.
    """

    def __init__(self, model: Model, targets: tuple[str, ...]) -> None:
        super().__init__()
        width = model.decoder_embed_dim
        self.embed = nn.Linear(model.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(model.num_patches, width), persistent=False)
        self.blocks = make_blocks(model.decoder_depth, width, model.decoder_num_heads, model.mlp_ratio, NORM)
        self.norm = NORM(width)
        self.heads = nn.ModuleDict({t: nn.Linear(width, model.patch_size**2 * NUM_CHANNELS[t]) for t in targets})

    def forward(self, tokens: dict[str, Tensor], masks: dict[str, Mask]) -> dict[str, Tensor]:
        """Run all blocks of the trunk except the last, all source sensors in one batch.

        Args:
            tokens: By source sensor, (B, 1 + K, D) from the encoder.
            masks: By source sensor, the positions of the tokens.

        Returns:
            By source sensor, (B, N, E): the class token, the visible patches, the removed patches; see ``decode``.
        """
        # Distinct tokens: those of each image, then one mask token per position, which all images share.
        visible_td = self.embed(torch.cat([t.flatten(0, 1) for t in tokens.values()]))
        positions_t = torch.cat([F.pad(masks[s].ids_keep_bk + 1, (1, 0)).flatten() for s in tokens])
        table_td = torch.cat([visible_td + self.positions[positions_t], self.mask_token[0] + self.positions[1:]])
        rows, start = [], 0
        for sensor, t in tokens.items():
            visible_rows = torch.arange(start, start + t.shape[0] * t.shape[1], device=t.device).view(t.shape[:2])
            rows.append(torch.cat([visible_rows, masks[sensor].ids_removed_bm + len(visible_td)], dim=1))
            start += visible_rows.numel()
        first_block = self.blocks[0] if len(self.blocks) > 1 else index_rows
        trunk_bne = self.blocks[1:-1](first_block(table_td, torch.cat(rows)))
        return dict(zip(tokens, trunk_bne.chunk(len(tokens)), strict=True))

    def decode(self, trunk_bne: Tensor, query_slice: slice) -> Tensor:
        """Apply the last block and the norm to the tokens in ``query_slice``: (B, M, E), the input of ``predict``."""
        decoded: Tensor = self.norm(self.blocks[-1](trunk_bne, query_slice=query_slice))
        return decoded

    def predict(self, decoded_bme: Tensor, target: str) -> Tensor:
        """Predict the values of the target sensor's patches: (B, M, P)."""
        predicted: Tensor = self.heads[target](decoded_bme)
        return predicted
