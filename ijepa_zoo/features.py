"""Frozen features of timm models: pooled or as maps, from chosen blocks."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .data.transforms import transform_config
from .errors import SettingsError

Layers = Literal["last", "last4"] | Sequence[int]

POOLS = ("auto", "avg", "cls", "cls_avg", "map", None)
_log = logging.getLogger(__name__)


class FeatureExtractor(nn.Module):
    """Features of a frozen timm model.

    In a ViT, the final norm is applied to the tokens of each chosen block before pooling. With
    `avg`, 'last' and 'last4' are the two representations of the I-JEPA paper (arXiv 2301.08243,
    appendix A.1). Where timm normalizes after pooling (`fc_norm`), `avg` therefore differs from
    timm's pooled output.

    A network without such blocks (ResNet, ConvNeXt, Swin) gives the input of timm's classifier,
    which is called 'avg', or the map of `forward_features`.

    Args:
        model: A timm ViT, or a timm network whose `forward_features` returns a map.
        layers: 'last', 'last4', or indices of blocks, negative ones from the end. Features of
            several blocks are concatenated in the order of the blocks. Networks without blocks
            take 'last' only.
        pool: One of

            - 'avg': mean over patches, without class and register tokens.
            - 'cls': class token. I-JEPA encoders have none.
            - 'cls_avg': class token and mean over patches of each block; for one block the input
              of DINOv2's linear evaluation (which of several blocks takes the last mean only).
            - 'map': the model's own attention pooling (SigLIP), of the last block.
            - None: maps.
            - 'auto': as in the model's `global_pool`: 'cls' for 'token', 'map' for attention
              pooling, else 'avg'.

    Attributes:
        layers: The chosen block indices, ascending; [-1] without blocks.
        pool: The pooling, never 'auto'.
        num_features: Width of the features.
    """

    model: Any  # timm models are untyped
    num_features: int

    def __init__(
        self, model: nn.Module, layers: Layers = "last", pool: str | None = "auto"
    ) -> None:
        super().__init__()
        self.model = model
        self._is_vit = _is_vit(model)
        if self._is_vit:
            self.layers = _block_indices(layers, len(self.model.blocks))
            self.pool = self._choose_pool(pool)
            width = self.model.embed_dim * len(self.layers)
            self.num_features = 2 * width if self.pool == "cls_avg" else width
        else:
            self._check_network(layers, pool)
            self.layers, self.pool = [-1], "avg" if pool == "auto" else pool
            width = self.model.num_features
            pooled = getattr(model, "head_hidden_size", width)  # wider in MobileNetV3
            self.num_features = width if pool is None else pooled

    def _check_network(self, layers: Layers, pool: str | None) -> None:
        name = type(self.model).__name__
        if layers != "last" or pool not in ("auto", "avg", None):
            raise SettingsError(f"{name} has no ViT blocks: use layers='last', pool='avg' or None")
        shape: Any = ()
        if hasattr(self.model, "forward_features"):
            maps = self._map_of_zeros(transform_config(self.model)["input_size"][1:])
            shape = getattr(maps, "shape", ())
        if len(shape) != 4 or shape[1] != self.model.num_features:
            raise SettingsError(
                f"{name} is neither a timm ViT nor a timm network whose forward_features() returns "
                "a map: use another model, for example vit_huge14_ijepa"
            )

    def _choose_pool(self, pool: str | None) -> str | None:
        if pool not in POOLS:
            raise SettingsError(f"pool is {pool!r}; use one of {', '.join(map(repr, POOLS))}")
        name = type(self.model).__name__
        has_cls = _has_class_token(self.model)
        has_map = getattr(self.model, "attn_pool", None) is not None
        if pool == "auto":
            own = getattr(self.model, "global_pool", "avg")
            pool = "map" if has_map else "cls" if own == "token" and has_cls else "avg"
            if pool == "avg" and own != "avg":
                _log.warning("%s has global_pool=%r: features are pooled by 'avg'", name, own)
        if pool in ("cls", "cls_avg") and not has_cls:
            raise SettingsError(
                f"pool={pool!r} needs a class token, which the blocks of {name} do not have: use "
                "'avg'"
            )
        if pool == "map" and not (has_map and self.layers == [len(self.model.blocks) - 1]):
            why = "takes its last block only" if has_map else "does not exist"
            raise SettingsError(f"the attention pooling of {name} {why}: use pool='avg'")
        return pool

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the maps of images of `size` pixels."""
        if self._is_vit:
            height, width = self.model.patch_embed.dynamic_feat_size(size)
        else:
            height, width = self._map_of_zeros(size).shape[-2:]
        return height, width

    def row_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the features of one image of `size` pixels."""
        width = self.num_features
        return (width, *self.grid(size)) if self.pool is None else (width,)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features.

        Args:
            images: `[B, C, H, W]`, transformed by :func:`ijepa_zoo.create_transform`.

        Returns:
            `[B, D]` in float32 or wider, or maps `[B, D, h, w]` with `pool=None`; `D` is
            `num_features`.
        """
        if self._is_vit and self.pool != "map":
            features = self._from_blocks(images)
        elif self.pool is None:
            return self._map(images)
        else:
            features = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
            if features.ndim == 4:  # of a network without pooling, global_pool=""
                features = _mean(self._channels_first(features).flatten(2).transpose(1, 2))
        return features if self.pool is None else features.to(_wide(features))

    def _from_blocks(self, images: Tensor) -> Tensor:
        with_cls = self.pool in ("cls", "cls_avg")
        blocks: list[Any] = self.model.forward_intermediates(
            images,
            indices=self.layers,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
            stop_early=True,
            **({"return_prefix_tokens": True} if with_cls else {}),
        )
        norm = _final_norm(self.model)
        if with_cls:
            parts: list[Tensor] = []
            for patches, prefix in blocks:
                parts.append(norm(prefix[:, 0]))
                if self.pool == "cls_avg":
                    parts.append(_mean(norm(patches)))
            return torch.cat(parts, dim=-1)
        tokens = torch.cat([norm(patches) for patches in blocks], dim=-1)
        if self.pool == "avg":
            return _mean(tokens)
        height, width = self.grid((images.shape[-2], images.shape[-1]))
        return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)

    def _map(self, images: Tensor) -> Any:
        return self._channels_first(self.model.forward_features(images))

    def _channels_first(self, maps: Any) -> Any:
        is_channels_last = str(getattr(self.model, "output_fmt", "NCHW")) == "NHWC"
        return maps.permute(0, 3, 1, 2) if is_channels_last else maps

    @torch.inference_mode()
    def _map_of_zeros(self, size: tuple[int, int]) -> Any:
        """Map `[1, C, h, w]` of one image, or whatever `forward_features` returns instead."""
        channels = transform_config(self.model)["input_size"][0]
        with evaluating(self.model):
            return self._map(next(self.model.parameters()).new_zeros(1, channels, *size))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode; restore the mode of every submodule on exit."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _is_vit(model: nn.Module) -> bool:
    """Whether the tokens of each block are accessible, as in timm's ViTs."""
    embed = getattr(model, "patch_embed", None)
    names = ("forward_intermediates", "blocks", "num_prefix_tokens")
    return all(hasattr(model, n) for n in names) and hasattr(embed, "dynamic_feat_size")


def _has_class_token(model: Any) -> bool:
    options = inspect.signature(model.forward_intermediates).parameters
    in_blocks = "return_prefix_tokens" in options  # CaiT adds it after the blocks
    return in_blocks and getattr(model, "cls_token", None) is not None


def _final_norm(model: nn.Module) -> nn.Module:
    """The final LayerNorm; in some timm ViTs it is `fc_norm`, after the pooling."""
    candidates = (getattr(model, name, None) for name in ("norm", "fc_norm"))
    found = (n for n in candidates if n is not None and not isinstance(n, nn.Identity))
    return next(found, nn.Identity())


def _wide(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype.itemsize > 4 else torch.float32


def _mean(tokens: Tensor) -> Tensor:
    return tokens.mean(1, dtype=_wide(tokens))


def _block_indices(layers: Layers, depth: int) -> list[int]:
    """Indices from 0, ascending."""
    if isinstance(layers, str):
        ends = {"last": range(-1, 0), "last4": range(-4, 0)}
        if layers not in ends:
            raise SettingsError(f"layers is {layers!r}; use last, last4 or a list of block indices")
        layers = ends[layers]
    indices = sorted(i % depth for i in layers if -depth <= i < depth)
    if not layers or len(set(indices)) < len(layers):
        raise SettingsError(
            f"layers {list(layers)} do not fit {depth} blocks: use each index once, from "
            f"0 to {depth - 1}, or from {-depth} to -1 counted from the end"
        )
    return indices
