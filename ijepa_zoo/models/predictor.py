"""The I-JEPA predictor: a narrow vision transformer over context and mask tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import SettingsError
from .encoder import sincos_positions

PREDICTORS: dict[str, dict[str, int]] = {
    "vit_nano8_64_ijepa": {"embed_dim": 64, "depth": 3},
    "vit_tiny16_ijepa": {"embed_dim": 384, "depth": 6},
    "vit_small16_ijepa": {"embed_dim": 384, "depth": 6},
    "vit_base16_ijepa": {"embed_dim": 384, "depth": 6},
    "vit_large16_ijepa": {"embed_dim": 384, "depth": 12},
    "vit_huge14_ijepa": {"embed_dim": 384, "depth": 12},
    "vit_huge16_448_ijepa": {"embed_dim": 384, "depth": 12},
    "vit_giant16_ijepa": {"embed_dim": 384, "depth": 16},
}


class Predictor(nn.Module):
    """Predicts the target encoder's tokens of hidden blocks from the context encoder's tokens.

    Each target block is predicted on its own: the context attends to that block's mask tokens
    only. Parameter names are those of the official repository; the positions are a buffer.

    ``grid_size`` and ``embed_dim`` are the encoder's, ``num_heads`` too.
    """

    predictor_pos_embed: Tensor

    def __init__(
        self,
        grid_size: tuple[int, int],
        embed_dim: int,
        predictor_embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(predictor_embed_dim, depth, num_heads) < 1:
            raise SettingsError(
                f"predictor_embed_dim {predictor_embed_dim}, depth {depth} and num_heads "
                f"{num_heads} must be at least 1"
            )
        if predictor_embed_dim % num_heads:
            raise SettingsError(
                f"predictor_embed_dim {predictor_embed_dim} must be divisible by num_heads "
                f"{num_heads}, which the predictor shares with the encoder"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grid_size = grid_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_embed_dim, **dd))
        positions = sincos_positions(predictor_embed_dim, grid_size).to(**dd)
        self.register_buffer("predictor_pos_embed", positions)
        self.predictor_embed = nn.Linear(embed_dim, predictor_embed_dim, **dd)
        self.predictor_blocks = nn.ModuleList(
            _block_class(number, depth)(
                predictor_embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=True,
                norm_layer=LayerNorm,
                **dd,
            )
            for number in range(depth)
        )
        self.predictor_norm = LayerNorm(predictor_embed_dim, **dd)
        self.predictor_proj = nn.Linear(predictor_embed_dim, embed_dim, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize as the official repository does: std 0.02 everywhere, biases 0."""
        trunc_normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Predict the tokens ``[B, M, L, D]`` of the target blocks ``targets`` ``[B, M, L]``.

        ``tokens`` ``[B, K, D]`` are the context encoder's, at the patch indices ``context``
        ``[B, K]``.
        """
        if context.shape != tokens.shape[:2] or targets.ndim != 3 or len(targets) != len(tokens):
            raise SettingsError(
                f"for tokens {list(tokens.shape)} the context must be {list(tokens.shape[:2])} and "
                f"targets [{len(tokens)}, M, L], got {list(context.shape)} and "
                f"{list(targets.shape)}"
            )
        table = self.mask_token[0] + self.predictor_pos_embed[0]
        visible = self.predictor_embed(tokens)
        # embedding() refuses negative indices, which indexing would count from the end.
        visible = visible + F.embedding(context, self.predictor_pos_embed[0]).to(visible.dtype)
        first, *others = self.predictor_blocks
        x = first(visible, table, targets)
        length = targets.shape[-1]
        for block in others:
            x = block(x, length) if isinstance(block, ClosingBlock) else block(x)
        predicted = x[:, x.shape[1] - length :].unflatten(0, targets.shape[:2])
        return self.predictor_proj(self.predictor_norm(predicted))


# timm's blocks without redundant computation. Until the first attention, the tokens of a context
# are the same for every target block, and mask tokens differ only by position; after the last
# attention only target tokens are needed. All of it is in `forward`, as FSDP2 and torch.compile
# expect.


class OpeningBlock(Block):
    """The first block: queries, keys and values once per context and once per position."""

    def forward(self, context: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """Append mask tokens, from the table ``[N, C]``, to contexts: ``[B * M, K + L, C]``."""
        x = _append(context, F.embedding(targets, table))
        table_qkv = self.attn.qkv(self.norm1(table))
        # In float32: the gradients of many tokens add up in one position.
        masked = F.embedding(targets, table_qkv.float()).to(table_qkv.dtype)
        qkv = _append(self.attn.qkv(self.norm1(context)), masked)
        return _attend(self, x, *_heads(self, qkv, 3))


class ClosingBlock(Block):
    """The last block: all tokens are attended to, only target tokens are computed."""

    def forward(self, x: Tensor, length: int) -> Tensor:
        """The last tokens of ``[B, T, C]``, updated: ``[B, length, C]``."""
        width, first = x.shape[-1], x.shape[1] - length
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        normed = self.norm1(x)
        queries = F.linear(normed[:, first:], weight[:width], bias[:width])
        (q,) = _heads(self, queries, 1)
        k, v = _heads(self, F.linear(normed, weight[width:], bias[width:]), 2)
        return _attend(self, x[:, first:], q, k, v)


def _block_class(number: int, depth: int) -> type[Block]:
    if number == 0:
        return OpeningBlock
    return ClosingBlock if number == depth - 1 else Block


def _append(context: Tensor, masked: Tensor) -> Tensor:
    """``[B, K, C]`` repeated for each of ``[B, M, L, C]``: ``[B * M, K + L, C]``."""
    repeated = context.unsqueeze(1).expand(-1, masked.shape[1], -1, -1)
    return torch.cat([repeated, masked.to(context.dtype)], dim=2).flatten(0, 1)


def _heads(block: Block, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """``[B, T, parts * C]`` as ``parts`` tensors ``[B, heads, T, C / heads]``."""
    attn = block.attn
    split = x.reshape(len(x), x.shape[1], parts, attn.num_heads, attn.head_dim)
    return split.permute(2, 0, 3, 1, 4).unbind(0)


def _attend(block: Block, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention and MLP of a block for the tokens ``x``, whose queries are ``q``."""
    attn = block.attn
    if attn.fused_attn:
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        mixed = (q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    x = x + attn.proj(mixed.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))
