"""Provisional heads."""

import torch
from torch import Tensor, nn


class LinearHead(nn.Module):
    """Linear."""

    def __init__(self, in_features: int, num_classes: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_features, affine=False) if batch_norm else nn.Identity()
        self.linear = nn.Linear(in_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.linear(self.norm(features))
        return logits


class AttentiveHead(nn.Module):
    """Cross-attention pooling of patch tokens, then a linear layer."""

    def __init__(
        self, embed_dim: int, num_classes: int, num_heads: int, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(embed_dim)
        hidden = int(embed_dim * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim)
        )
        self.linear = nn.Linear(embed_dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, C]` of patch tokens `[B, N, D]`."""
        tokens = self.norm1(tokens)
        query = self.query.expand(len(tokens), -1, -1)
        pooled = query + self.attn(query, tokens, tokens, need_weights=False)[0]
        pooled = pooled + self.mlp(self.norm2(pooled))
        logits: Tensor = self.linear(pooled[:, 0])
        return logits
