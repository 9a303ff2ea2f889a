"""The decoder: visible tokens to predictions of every patch.

B batch, L patches, K visible patches, N = 1 + L tokens, M patches to predict, P values of a patch, D encoder width,
E decoder width.
"""

from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from csmae.config import Model
from csmae.model.blocks import make_blocks
from csmae.model.masking import Mask
from csmae.model.patches import look_up, sincos_positions
from csmae.sensors import NUM_CHANNELS

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
            By source sensor, (B, 1 + L, E): the class token, the visible patches, the hidden ones; ready for ``finish``.
        """
        # The distinct tokens: every image's own, then the mask token at each place, which all images have in common.
        embedded = self.embed(torch.cat([t.flatten(0, 1) for t in tokens.values()]))
        lie = torch.cat([F.pad(masks[s].keep_bk + 1, (1, 0)).flatten() for s in tokens])
        table = torch.cat([embedded + self.positions[lie], self.mask_token[0] + self.positions[1:]])
        which, start = [], 0
        for sensor, t in tokens.items():
            own = torch.arange(start, start + t.shape[0] * t.shape[1], device=t.device).view(t.shape[:2])
            which.append(torch.cat([own, masks[sensor].removed_bm + len(embedded)], dim=1))
            start += own.numel()
        whole = (self.blocks[0] if len(self.blocks) > 1 else look_up)(table, torch.cat(which))
        return dict(zip(tokens, self.blocks[1:-1](whole).chunk(len(tokens)), strict=True))

    def finish(self, trunk_bne: Tensor, asked: slice) -> Tensor:
        """The last block and the norm for the tokens that are asked for: (B, M, E), ready for ``predict``."""
        decoded: Tensor = self.norm(self.blocks[-1](trunk_bne, asked=asked))
        return decoded

    def predict(self, decoded_bme: Tensor, target: str) -> Tensor:
        """Values of the target sensor's patches: (B, M, P)."""
        predicted: Tensor = self.heads[target](decoded_bme)
        return predicted
