"""The I-JEPA predictor: a narrow vision transformer over context and mask tokens."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import SettingsError
from .positions import sincos_positions
from .predictor_blocks import ClosingBlock, OpeningBlock, SharedBlock

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
    only, as in the published code. Parameter names are those of the published code; the positions
    are a buffer.

    Args:
        grid_size: Rows and columns of the encoder's patch grid.
        embed_dim: Width of the encoder.
        predictor_embed_dim: Width of the predictor.
        depth: Number of blocks.
        num_heads: Attention heads per block: as many as the encoder has.
        mlp_ratio: Hidden width of the blocks' MLP over ``predictor_embed_dim``.
        context: ``repeated`` is the published predictor, where the context is processed anew
            beside every target block. ``shared`` processes it once: it does not see the mask
            tokens, which costs less and is another method. The parameters are the same.
        device: Device to construct on.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If ``predictor_embed_dim`` is not divisible by ``num_heads``, a size is 0, or
            ``context`` is unknown.
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
        context: Literal["repeated", "shared"] = "repeated",
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
        if context not in ("repeated", "shared"):
            raise SettingsError(f"context must be 'repeated' or 'shared', got {context!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grid_size = grid_size
        self.context = context
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_embed_dim, **dd))
        positions = sincos_positions(predictor_embed_dim, grid_size).to(**dd)
        self.register_buffer("predictor_pos_embed", positions)
        self.predictor_embed = nn.Linear(embed_dim, predictor_embed_dim, **dd)
        self.predictor_blocks = nn.ModuleList(
            self._block_class(number, depth)(
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

    def _block_class(self, number: int, depth: int) -> type[Block]:
        if self.context == "shared":
            return SharedBlock
        if number == 0:
            return OpeningBlock
        return ClosingBlock if number == depth - 1 else Block

    def init_weights(self) -> None:
        """Initialise as the published recipe does: std 0.02 everywhere, biases 0."""
        trunc_normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tensor, context: Tensor, targets: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Predict the tokens of every target block.

        Args:
            tokens: The context encoder's tokens ``[B, K, D]``.
            context: Their patch indices ``[B, K]``, int64.
            targets: Patch indices of the target blocks ``[B, M, L]``, int64.
            noise: Added to the mask token of each position, embedded like context tokens:
                ``[N, D]``; see :meth:`ijepa_zoo.models.jepa.IJepa.forward`.

        Returns:
            Predicted tokens ``[B, M, L, D]``.

        Raises:
            ValueError: If the shapes of the indices are others.
        """
        if context.shape != tokens.shape[:2] or targets.ndim != 3 or len(targets) != len(tokens):
            raise SettingsError(
                f"for tokens {list(tokens.shape)} the context must be {list(tokens.shape[:2])} and "
                f"targets [{len(tokens)}, M, L], got {list(context.shape)} and "
                f"{list(targets.shape)}"
            )
        table = self.mask_token[0] + self.predictor_pos_embed[0]
        if noise is not None:
            table = table + self.predictor_embed(noise)
        known = self.predictor_embed(tokens)
        # embedding() refuses negative indices, which indexing would count from the end.
        known = known + F.embedding(context, self.predictor_pos_embed[0]).to(known.dtype)
        hidden = (self._shared if self.context == "shared" else self._repeated)(
            known, table, targets
        )
        prediction: Tensor = self.predictor_proj(self.predictor_norm(hidden))
        return prediction

    def _repeated(self, known: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """Target tokens ``[B, M, L, C]`` after all blocks, each block with a context of its own."""
        first, *others = self.predictor_blocks
        x = first(known, table, targets)
        length = targets.shape[-1]
        for block in others:
            x = block(x, length) if isinstance(block, ClosingBlock) else block(x)
        return x[:, x.shape[1] - length :].unflatten(0, targets.shape[:2])

    def _shared(self, known: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """Target tokens ``[B, M, L, C]`` after all blocks, with one context for all."""
        hidden = F.embedding(targets, table).to(known.dtype)
        for block in self.predictor_blocks:
            known, hidden = block(known, hidden, block is self.predictor_blocks[-1])
        return hidden
