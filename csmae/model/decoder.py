"""The decoder: visible tokens to predictions of every patch.

B batch, L patches, K visible patches, N = 1 + L tokens, M patches to predict, P values of a patch, D encoder width,
E decoder width.
"""

from functools import partial

import torch
from torch import Tensor, nn

from csmae.config import Model
from csmae.model.blocks import make_blocks
from csmae.model.encoder import NUM_CHANNELS
from csmae.model.masking import Mask
from csmae.model.patches import sincos_positions, take_rows

NORM = partial(nn.LayerNorm, eps=1e-5)


class Decoder(nn.Module):
    """One trunk and a linear head for each target sensor (MAE, arXiv 2111.06377; arXiv 2401.07782, section III).

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
        """Pass the tokens of each source sensor through the trunk but for its last block, all sources in one batch.

        Args:
            tokens: By source sensor, (B, 1 + K, D) from the encoder.
            masks: By source sensor, where the tokens came from.

        Returns:
            By source sensor, (B, 1 + L, E): ready for ``finish``.
        """
        whole = torch.cat([self._unshuffle(t, masks[s]) for s, t in tokens.items()])
        return dict(zip(tokens, self.blocks[:-1](whole).chunk(len(tokens)), strict=True))

    def finish(self, trunk_bne: Tensor, rows_bm: Tensor | None = None) -> Tensor:
        """The last block and the norm at the given patches, all where None: (B, M, E), ready for ``predict``."""
        last = self.blocks[-1]
        decoded: Tensor = self.norm(last(trunk_bne)[:, 1:] if rows_bm is None else last(trunk_bne, rows_bm + 1))
        return decoded

    def predict(self, decoded_bme: Tensor, target: str) -> Tensor:
        """Values of the target sensor's patches: (B, M, P)."""
        predicted: Tensor = self.heads[target](decoded_bme)
        return predicted

    def _unshuffle(self, tokens_bkd: Tensor, mask: Mask) -> Tensor:
        """Put visible tokens where they came from and mask tokens elsewhere: (B, 1 + L, E)."""
        embedded = self.embed(tokens_bkd)
        hidden = self.mask_token.to(embedded.dtype).expand(len(embedded), mask.removed_bm.shape[1], -1)
        patches = take_rows(torch.cat([embedded[:, 1:], hidden], dim=1), mask.restore_bl)
        return torch.cat([embedded[:, :1], patches], dim=1) + self.positions
