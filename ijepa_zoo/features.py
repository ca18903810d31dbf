"""Frozen features of a timm ViT: chosen blocks, final LayerNorm, mean over patches or maps."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import SettingsError

Layers = Literal["last", "last4"] | Sequence[int]


class FeatureExtractor(nn.Module):
    """Features as I-JEPA's evaluations take them.

    The model's final LayerNorm is applied to the output of each chosen block; then the patch
    tokens are averaged ('last' and 'last4' are the two representations of the I-JEPA paper,
    arXiv 2301.08243, appendix A.1), or laid out as a map. Prefix tokens (class, registers) of
    other ViTs take no part.

    Args:
        model: Any timm ViT with ``forward_intermediates`` and ``blocks``.
        layers: 'last', 'last4', or indices of blocks counted from 0, negative ones from the end.
            Features of several blocks are concatenated in the order of the blocks.
        pool: 'avg' for the mean over patches, None for maps.

    Attributes:
        layers: The chosen block indices, ascending.
        num_features: Width of the features, ``D`` times the number of blocks.

    Raises:
        TypeError: If the model is no such ViT.
        ValueError: If a block index is out of range or given twice, or ``pool`` is unknown.
    """

    model: Any  # timm models are untyped
    num_features: int

    def __init__(self, model: nn.Module, layers: Layers = "last", pool: str | None = "avg") -> None:
        super().__init__()
        if not (hasattr(model, "forward_intermediates") and hasattr(model, "blocks")):
            raise SettingsError(
                f"{type(model).__name__} is no timm ViT: features need forward_intermediates() and "
                "blocks, for example ijepa_zoo.create_model('vit_huge14_ijepa')"
            )
        if pool not in ("avg", None):
            raise SettingsError(
                f"pool is {pool!r}; use 'avg' for the mean over patches, None for maps"
            )
        self.model = model
        self.pool = pool
        self.layers = _block_indices(layers, len(self.model.blocks))
        self.num_features = self.model.embed_dim * len(self.layers)

    @property
    def final_norm(self) -> nn.Module:
        """The final LayerNorm; some timm ViTs keep it behind the pooling, as ``fc_norm``."""
        candidates = (getattr(self.model, name, None) for name in ("norm", "fc_norm"))
        found = (n for n in candidates if n is not None and not isinstance(n, nn.Identity))
        return next(found, nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features.

        Args:
            images: ``[B, 3, H, W]``, transformed by :func:`ijepa_zoo.create_transform`.

        Returns:
            ``[B, D]`` (``[B, nD]`` for n blocks) in float32 or wider, or maps
            ``[B, nD, h, w]`` with ``pool=None``.
        """
        blocks: list[Tensor] = self.model.forward_intermediates(
            images,
            indices=self.layers,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
            stop_early=True,
        )
        norm = self.final_norm
        tokens = torch.cat([norm(block) for block in blocks], dim=-1)
        if self.pool == "avg":
            return tokens.mean(1, dtype=torch.promote_types(tokens.dtype, torch.float32))
        height, width = self.model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


def _block_indices(layers: Layers, depth: int) -> list[int]:
    if isinstance(layers, str):
        if layers not in ("last", "last4"):
            raise SettingsError(
                f"layers is {layers!r}; use 'last', 'last4' or a list of block indices"
            )
        layers = range(-1, 0) if layers == "last" else range(-4, 0)
    bad = [i for i in layers if not -depth <= i < depth]
    if bad or not layers:
        raise SettingsError(
            f"layers {list(layers)} do not fit a model of {depth} blocks: indices run from 0 to "
            f"{depth - 1}, or from {-depth} to -1 counted from the end"
        )
    indices = sorted(i % depth for i in layers)
    if len(set(indices)) < len(indices):
        raise SettingsError(
            f"layers {list(layers)} name a block twice; the model has {depth} blocks"
        )
    return indices
