"""The encoder: from patches of either sensor to tokens, and from tokens to one feature per image.

B batch, C channels, H W pixels, L patches, K visible patches, P values of a patch, D width.
"""

from functools import partial

import torch
from torch import Tensor, nn

from csmae.config import Model
from csmae.model.blocks import make_blocks
from csmae.model.patches import gather_tokens, patchify, sincos_positions
from csmae.sensors import NUM_CHANNELS

NORM = partial(nn.LayerNorm, eps=1e-6)


class Encoder(nn.Module):
    """Sensor-specific blocks, then blocks that both sensors share (CSMAE, arXiv 2401.07782, section III).

    Args:
        model: Widths, depths, patch size and pooling.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        width, patch_size = model.embed_dim, model.patch_size
        blocks = partial(make_blocks, width=width, num_heads=model.num_heads, mlp_ratio=model.mlp_ratio, norm=NORM)
        self.patch_size, self.pooling = patch_size, model.pooling
        self.patch_embed = nn.ModuleDict({s: nn.Linear(patch_size**2 * c, width) for s, c in NUM_CHANNELS.items()})
        self.cls_token = nn.ParameterDict({s: nn.Parameter(torch.zeros(1, 1, width)) for s in NUM_CHANNELS})
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(model.num_patches, width), persistent=False)
        specific = NUM_CHANNELS if model.sensor_depth else ()
        self.sensor_blocks = nn.ModuleDict({s: blocks(model.sensor_depth) for s in specific})
        self.sensor_norm = nn.ModuleDict({s: NORM(width) for s in specific})
        self.cross_blocks = blocks(model.cross_depth)
        self.norm = NORM(width)
        self.fc_norm = NORM(width) if model.pooling == "avg" else nn.Identity()

    def forward(self, patches: dict[str, Tensor], ids_keep: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Encode the visible patches.

        Args:
            patches: By sensor, (B, L, P). One sensor alone is enough; the sensors' B may differ.
            ids_keep: By sensor, indices (B, K) of the visible patches; all patches if None.

        Returns:
            By sensor, (B, 1 + K, D): the class token, then the visible patches in the order of ``ids_keep``.
        """
        tokens = {s: self._encode_sensor(s, p, ids_keep[s] if ids_keep else None) for s, p in patches.items()}
        lengths = [t.shape[1] for t in tokens.values()]
        if len(set(lengths)) > 1:
            return {s: self.norm(self.cross_blocks(t)) for s, t in tokens.items()}
        encoded = self.norm(self.cross_blocks(torch.cat(list(tokens.values()))))
        return dict(zip(tokens, encoded.split([t.shape[0] for t in tokens.values()]), strict=True))

    def pool(self, tokens_bkd: Tensor) -> Tensor:
        """Pool the tokens that ``forward`` returns into one feature per image, (B, D)."""
        if self.pooling == "cls":
            return tokens_bkd[:, 0]
        pooled: Tensor = self.fc_norm(tokens_bkd[:, 1:].mean(dim=1))
        return pooled

    def features(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features (B, D) of unmasked, normalized images (B, C, H, W), by sensor."""
        patches = {s: patchify(image, self.patch_size) for s, image in images.items()}
        return {s: self.pool(tokens) for s, tokens in self(patches).items()}

    def _encode_sensor(self, sensor: str, patches_blp: Tensor, ids_keep_bk: Tensor | None) -> Tensor:
        """Embed the visible patches and run the sensor-specific blocks: (B, 1 + K, D)."""
        positions = self.positions[1:]
        if ids_keep_bk is not None:
            patches_blp, positions = gather_tokens(patches_blp, ids_keep_bk), positions[ids_keep_bk]
        tokens = self.patch_embed[sensor](patches_blp) + positions
        cls = self.cls_token[sensor] + self.positions[:1]
        cls = cls.expand(tokens.shape[0], -1, -1)  # len() would make the batch size a constant of exported programs
        tokens = torch.cat([cls.to(tokens.dtype), tokens], dim=1)
        if sensor in self.sensor_blocks:
            tokens = self.sensor_norm[sensor](self.sensor_blocks[sensor](tokens))
        assert isinstance(tokens, Tensor)
        return tokens
