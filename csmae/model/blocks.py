"""Transformer blocks that compute no token twice, and none that nobody reads.

B batch, N tokens, M tokens asked for, T distinct tokens, D width, H heads.
"""

from functools import partial

import torch.nn.functional as F  # noqa: N812
from timm.models.vision_transformer import Block as PreNormBlock
from torch import Tensor, nn

from csmae.model.patches import look_up

ALL = slice(None)


class Block(PreNormBlock):  # type: ignore[misc]
    """A pre-norm transformer block (ViT, arXiv 2010.11929)."""

    def forward(self, tokens: Tensor, which_bn: Tensor | None = None, asked: slice = ALL) -> Tensor:
        """Mix the tokens.

        Args:
            tokens: All tokens of each image (B, N, D); or a table (T, D) of the distinct ones.
            which_bn: Rows of the table that each image consists of. What images have in common, as hidden patches have,
                is projected once.
            asked: Tokens that are read afterwards. The others' queries (but in a table) and hidden layer are spared.

        Returns:
            (B, M, D): the same values as of the whole block at the tokens asked for.
        """
        if which_bn is None and asked == ALL:
            whole: Tensor = super().forward(tokens)
            return whole
        attention, normed, width = self.attn, self.norm1(tokens), tokens.shape[-1]
        if which_bn is not None:
            qkv, tokens = look_up(attention.qkv(normed), which_bn), look_up(tokens, which_bn)
            q, k, v = qkv.chunk(3, dim=2)
            q = q[:, asked]
        else:
            (w_q, w_kv), (b_q, b_kv) = (p.split([width, 2 * width]) for p in (attention.qkv.weight, attention.qkv.bias))
            q, (k, v) = F.linear(normed[:, asked], w_q, b_q), F.linear(normed, w_kv, b_kv).chunk(2, dim=2)
        q, k, v = (t.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        read = tokens[:, asked] + attention.proj(mixed)
        asked_for: Tensor = read + self.mlp(self.norm2(read))
        return asked_for


def make_blocks(depth: int, width: int, num_heads: int, mlp_ratio: float, norm: partial[nn.LayerNorm]) -> nn.Sequential:
    """Blocks one after another."""
    return nn.Sequential(*(Block(width, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
