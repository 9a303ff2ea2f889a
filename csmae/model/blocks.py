"""Transformer blocks, the last of which may compute only the tokens that are asked for.

B batch, N tokens, M tokens asked for, D width, H heads.
"""

from functools import partial

import torch.nn.functional as F  # noqa: N812
from timm.models.vision_transformer import Block as PreNormBlock
from torch import Tensor, nn

from csmae.model.patches import take_rows


class Block(PreNormBlock):  # type: ignore[misc]
    """A pre-norm transformer block (ViT, arXiv 2010.11929)."""

    def forward(self, tokens_bnd: Tensor, rows_bm: Tensor | None = None) -> Tensor:
        """Mix the tokens.

        Args:
            tokens_bnd: All tokens; each is attended to.
            rows_bm: Tokens that are read afterwards; all where None. The others' queries and hidden layer are spared.

        Returns:
            (B, N, D), or (B, M, D) where rows are given: the same values as at these rows of the whole.
        """
        if rows_bm is None:
            whole: Tensor = super().forward(tokens_bnd)
            return whole
        attention, normed, width = self.attn, self.norm1(tokens_bnd), tokens_bnd.shape[2]
        (w_q, w_kv), (b_q, b_kv) = (p.split([width, 2 * width]) for p in (attention.qkv.weight, attention.qkv.bias))
        q, kv = F.linear(take_rows(normed, rows_bm), w_q, b_q), F.linear(normed, w_kv, b_kv)
        q, k, v = (t.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, dim=2)))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = take_rows(tokens_bnd, rows_bm) + attention.proj(mixed)
        asked: Tensor = tokens + self.mlp(self.norm2(tokens))
        return asked


def make_blocks(depth: int, width: int, num_heads: int, mlp_ratio: float, norm: partial[nn.LayerNorm]) -> nn.Sequential:
    """Blocks one after another."""
    return nn.Sequential(*(Block(width, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
