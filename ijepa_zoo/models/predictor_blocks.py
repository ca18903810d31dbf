"""The predictor's blocks: timm's, without the work that changes no number.

The tokens of a context are the same for every target block until the first attention, and mask
tokens differ by their position alone; after the last attention only target tokens are wanted.
All of it happens in `forward`, so that FSDP2 and torch.compile see the blocks as they see timm's.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor


class OpeningBlock(Block):
    """The first block: queries, keys and values once per context and once per position."""

    def forward(self, known: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """Lay out the tokens of every target block beside its context, and attend.

        Args:
            known: Context tokens ``[B, K, C]``.
            table: The mask token at every position of the grid ``[N, C]``.
            targets: Patch indices ``[B, M, L]``, int64.

        Returns:
            ``[B * M, K + L, C]``.
        """
        x = _beside(known, F.embedding(targets, table))
        read = self.attn.qkv(self.norm1(table))
        # in float32: many tokens add their gradients to one position's
        hidden = F.embedding(targets, read.float()).to(read.dtype)
        qkv = _beside(self.attn.qkv(self.norm1(known)), hidden)
        return _finish(self, x, *_heads(self, qkv, 3))


class ClosingBlock(Block):
    """The last block: all tokens are attended to, those of the targets go on."""

    def forward(self, x: Tensor, length: int) -> Tensor:
        """Attend and update the last tokens only.

        Args:
            x: Tokens ``[B, T, C]``.
            length: How many of them go on.

        Returns:
            ``[B, length, C]``.
        """
        width, first = x.shape[-1], x.shape[1] - length
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        normed = self.norm1(x)
        queries = F.linear(normed[:, first:], weight[:width], bias[:width])
        (q,) = _heads(self, queries, 1)
        k, v = _heads(self, F.linear(normed, weight[width:], bias[width:]), 2)
        return _finish(self, x[:, first:], q, k, v)


class SharedBlock(Block):
    """A block whose context tokens pass once and do not see the mask tokens.

    The mask tokens of a target block attend to the context and to each other. Not the paper's
    predictor, where the context is processed anew beside every target block.
    """

    def forward(self, known: Tensor, hidden: Tensor, last: bool = False) -> tuple[Tensor, Tensor]:
        """Update context and mask tokens.

        Args:
            known: Context tokens ``[B, K, C]``.
            hidden: Mask tokens ``[B, M, L, C]``.
            last: Leave the context as it is: nobody reads it any more.

        Returns:
            Both, of the same shapes.
        """
        blocks = hidden.shape[1]
        own = _heads(self, self.attn.qkv(self.norm1(known)), 3)
        q, k, v = _heads(self, self.attn.qkv(self.norm1(hidden)).flatten(0, 1), 3)
        keys, values = (
            torch.cat([part.repeat_interleave(blocks, 0), more], dim=2)
            for part, more in zip(own[1:], (k, v))
        )
        hidden = _finish(self, hidden.flatten(0, 1), q, keys, values).view_as(hidden)
        return known if last else _finish(self, known, *own), hidden


def _beside(known: Tensor, hidden: Tensor) -> Tensor:
    """``[B, K, C]`` repeated for each of ``[B, M, L, C]``: ``[B * M, K + L, C]``."""
    repeated = known.unsqueeze(1).expand(-1, hidden.shape[1], -1, -1)
    return torch.cat([repeated, hidden.to(known.dtype)], dim=2).flatten(0, 1)


def _heads(block: Block, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """``[B, T, parts * C]`` as ``parts`` tensors ``[B, heads, T, C / heads]``."""
    attn = block.attn
    split = x.reshape(len(x), x.shape[1], parts, attn.num_heads, attn.head_dim)
    return split.permute(2, 0, 3, 1, 4).unbind(0)


def _finish(block: Block, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The rest of a block, for the tokens ``x`` that `q` belongs to."""
    attn = block.attn
    if attn.fused_attn:
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        mixed = (q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    x = x + attn.proj(mixed.transpose(1, 2).flatten(2))
    x = x + block.mlp(block.norm2(x))
    return x
