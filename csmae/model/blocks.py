"""Transformer blocks that project each distinct token once and compute only the queries that are read.

B batch, N tokens of an image, Q queries, T distinct tokens, D width.
"""

from functools import partial

import torch.nn.functional as F  # noqa: N812
from timm.models.vision_transformer import Block as PreNormBlock
from torch import Tensor, nn

from csmae.model.patches import index_rows

ALL_TOKENS = slice(None)


class Block(PreNormBlock):  # type: ignore[misc]
    """A pre-norm transformer block (ViT, arXiv 2010.11929)."""

    def forward(self, tokens: Tensor, rows_bn: Tensor | None = None, query_slice: slice = ALL_TOKENS) -> Tensor:
        """Mix the tokens of each image.

        Args:
            tokens: Tokens of each image (B, N, D), or a table (T, D) of distinct tokens.
            rows_bn: Rows of the table that make up each image. Tokens that images share, such as mask tokens, are
                projected once.
            query_slice: Tokens whose output is read. The queries (except in a table) and the MLP of all others are
                skipped.

        Returns:
            (B, Q, D): the output of the full block at ``query_slice``.
        """
        if rows_bn is None and query_slice == ALL_TOKENS:
            mixed: Tensor = super().forward(tokens)
            return mixed
        attention, normed, width = self.attn, self.norm1(tokens), tokens.shape[-1]
        if rows_bn is not None:
            qkv, tokens = index_rows(attention.qkv(normed), rows_bn), index_rows(tokens, rows_bn)
            q, k, v = qkv.chunk(3, dim=2)
            q = q[:, query_slice]
        else:
            (w_q, w_kv), (b_q, b_kv) = (p.split([width, 2 * width]) for p in (attention.qkv.weight, attention.qkv.bias))
            q, (k, v) = F.linear(normed[:, query_slice], w_q, b_q), F.linear(normed, w_kv, b_kv).chunk(2, dim=2)
        q, k, v = (t.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        residual = tokens[:, query_slice] + attention.proj(attended)
        mixed = residual + self.mlp(self.norm2(residual))
        return mixed  # noqa: RET504


def make_blocks(depth: int, width: int, num_heads: int, mlp_ratio: float, norm: partial[nn.LayerNorm]) -> nn.Sequential:
    """A stack of transformer blocks."""
    return nn.Sequential(*(Block(width, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
