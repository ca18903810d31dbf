"""The I-JEPA encoder: timm's VisionTransformer with fixed positions and one added method.

timm's forward path is not overridden, so whatever works with a timm ViT works here.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, to_2tuple, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import SettingsError
from ..weights import load, registry
from ..weights.read import packaged_folder


def sincos_positions(embed_dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed sine-cosine positions of a grid in raster order, ``[1, rows * columns, embed_dim]``.

    The first half of the channels varies along the width, the second along the height; each half
    is ``[sin(p * w_k), cos(p * w_k)]`` with ``w_k = 10000 ** (-k / (embed_dim / 4))`` (Vaswani et
    al., 2017, applied per axis as in MAE and I-JEPA). Computed in float64.
    """
    if embed_dim % 4:
        raise SettingsError(f"embed_dim must be a multiple of 4, got {embed_dim}")
    omega = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim / 4))
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid_size)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (column, row)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return table.float().unsqueeze(0)


def encode_visible(vit: Any, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """Patch tokens of a timm ViT after its final norm, of all patches or of some.

    With ``keep`` the other patches are dropped right after the positions are added, so they
    take no part in attention and cost nothing: the context encoder of I-JEPA. Class and register
    tokens stay beside the kept patches in every block and are left out of the result.

    Args:
        vit: A timm ``VisionTransformer`` with absolute positions.
        images: ``[B, C, H, W]``, normalized.
        keep: Patch indices ``[B * R, K]``, int64, in raster order of the grid, R rows for each
            image; None for all.

    Returns:
        Tokens ``[B, N, D]``, or ``[B * R, K, D]`` with ``keep``.

    Raises:
        SettingsError: ``vit`` is another network, or ``keep`` is not an int64 tensor
            ``[B * R, K]``.
    """
    if not isinstance(vit, IJepaEncoder):
        check_encoder(vit)
    prefix = vit.num_prefix_tokens
    if keep is None:
        x = vit.forward_features(images)
        return x[:, prefix:] if prefix else x
    if keep.ndim != 2 or not len(keep) or len(keep) % len(images) or keep.dtype != torch.int64:
        raise SettingsError(
            f"keep (the context) must hold int64 patch indices [B, K] or [B * R, K], "
            f"B = {len(images)}, got {keep.dtype} {list(keep.shape)}"
        )
    embedded = vit._pos_embed(vit.patch_embed(images))
    tokens = keep + prefix if prefix else keep
    index = tokens.view(len(images), -1, 1).expand(-1, -1, embedded.shape[-1])
    x = embedded.gather(1, index).view(*keep.shape, -1)
    if prefix:
        first = embedded[:, :prefix].repeat_interleave(len(keep) // len(images), dim=0)
        x = torch.cat([first, x], dim=1)
    x = vit.norm_pre(vit.patch_drop(x))
    x = checkpoint_seq(vit.blocks, x) if vit.grad_checkpointing else vit.blocks(x)
    return vit.norm(x[:, prefix:] if prefix else x)


def check_encoder(vit: Any) -> None:
    """Refuse a network that :func:`encode_visible` does not support."""
    own = ("_pos_embed", "forward_features")  # overridden by other ViTs
    if getattr(vit, "rope", None) is not None:
        reason = "has rotary positions"
    elif not isinstance(vit, VisionTransformer) or any(
        getattr(type(vit), name) is not getattr(VisionTransformer, name) for name in own
    ):
        reason = "does not run as timm's VisionTransformer does"
    elif not isinstance(vit.patch_embed, PatchEmbed) or vit.patch_embed.grid_size is None:
        reason = "has no grid of patches"
    elif vit.pos_embed is None:
        reason = "has no absolute positions"
    elif not isinstance(vit.patch_drop, nn.Identity):
        reason = "drops patches at random (patch_drop_rate)"
    else:
        return
    name = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture") or type(vit).__name__
    raise SettingsError(
        f"{name} {reason}, so it cannot encode chosen patches: use an I-JEPA model such as "
        "vit_base16_ijepa, or a timm ViT with absolute positions such as "
        "vit_small_patch14_reg4_dinov2"
    )


def as_encoder(vit: Any) -> Any:
    """Give a timm ViT the method `encode`, in place.

    FSDP2 gathers the parameters around registered methods of a module, not around functions.
    """
    if not hasattr(vit, "encode"):
        check_encoder(vit)
        # A partial function is copied and pickled with the object.
        vit.encode = partial(encode_visible, vit)
    return vit


class IJepaEncoder(VisionTransformer):
    """Vision transformer of I-JEPA: no class token, fixed sine-cosine positions, final LayerNorm.

    Takes every argument of ``timm.models.vision_transformer.VisionTransformer``. The defaults that
    differ: no class token, mean pooling *after* the final LayerNorm (``fc_norm=False``), no
    classifier, and the initialization of the official repository (std 0.02 everywhere).

    ``pos_embed`` is a buffer, not a parameter: it is saved and loaded under timm's name, and no
    optimizer, EMA or weight decay ever sees it.
    """

    def __init__(
        self,
        *,
        num_classes: int = 0,
        global_pool: str = "avg",
        class_token: bool = False,
        reg_tokens: int = 0,
        fc_norm: bool = False,
        weight_init: str = "",
        **kwargs: Any,
    ) -> None:
        if class_token or reg_tokens or global_pool == "token":
            raise SettingsError(
                "I-JEPA encoders have patch tokens only: use class_token=False, reg_tokens=0 and "
                "global_pool='avg', 'avgmax', 'max', 'map' or ''"
            )
        patch, image = to_2tuple(kwargs.get("patch_size", 16)), kwargs.get("img_size", 224)
        if image is not None and not kwargs.get("dynamic_img_pad"):
            _check_patches(to_2tuple(image), patch)
        try:
            super().__init__(
                num_classes=num_classes,
                global_pool=global_pool,
                class_token=False,
                fc_norm=fc_norm,
                weight_init="skip",
                **kwargs,
            )
        except (AssertionError, ArithmeticError) as error:  # timm's and Python's way to refuse
            options: dict[str, Any] = {"global_pool": global_pool, **kwargs}
            names = ("embed_dim", "num_heads", "global_pool")
            given = {name: options[name] for name in names if name in options}
            raise SettingsError(f"a ViT cannot have these arguments, {given}: {error}") from error
        self._positions_to_buffer()
        if weight_init != "skip":
            self.weight_init_mode = weight_init
            self.init_weights(needs_reset=False)

    def _positions_to_buffer(self) -> None:
        positions = self._parameters.pop("pos_embed", None)
        if positions is not None:
            self.register_buffer("pos_embed", positions.detach())

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialize as the official repository does (mode ''), or by one of timm's modes.

        Linear layers and the patch embedding: truncated normal, std 0.02, biases 0. Its
        classes also divide by the depth, but its training script undoes that.
        """
        mode = mode or self.weight_init_mode
        super().init_weights(mode, needs_reset)
        if mode == "":
            trunc_normal_(self.patch_embed.proj.weight, std=0.02)
            if self.patch_embed.proj.bias is not None:
                nn.init.zeros_(self.patch_embed.proj.bias)
        if self.pos_embed is not None:
            table = sincos_positions(self.embed_dim, self.patch_embed.grid_size)
            self.pos_embed.copy_(table)

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change image or patch size in place; positions are resampled as timm does."""
        embed = self.patch_embed
        if not embed.dynamic_img_pad:
            _check_patches(
                to_2tuple(img_size or embed.img_size), to_2tuple(patch_size or embed.patch_size)
            )
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self._positions_to_buffer()

    encode = encode_visible


def _check_patches(image: tuple[int, int], patch: tuple[int, int]) -> None:
    """Refuse sizes that patches do not fill: timm would leave out the last rows and columns."""
    if min(*image, *patch) < 1:
        raise SettingsError(f"img_size {image} and patch_size {patch} must be at least 1")
    if any(side % piece for side, piece in zip(image, patch)):
        below = tuple(max(side // piece, 1) * piece for side, piece in zip(image, patch))
        above = tuple(-(-side // piece) * piece for side, piece in zip(image, patch))
        raise SettingsError(
            f"img_size {image} is not a multiple of patch_size {patch}: use {below} or {above}"
        )


_SHARED_CFG: dict[str, Any] = {
    **{"num_classes": 0, "pool_size": None, "fixed_input_size": True, "crop_pct": 0.875},
    **{"input_size": (3, 224, 224), "first_conv": "patch_embed.proj", "classifier": "head"},
    **{"paper_name": "I-JEPA", "paper_ids": "arXiv:2301.08243"},
}


def _cfg(checkpoint: registry.Checkpoint) -> dict[str, Any]:
    """timm's pretrained_cfg of released weights."""
    source = checkpoint.source
    return {
        **_SHARED_CFG,
        **checkpoint.preprocessing,
        "url": source.url,
        "hf_hub_id": source.hf_hub_id,
        "file": str(packaged_folder(source.folder)) if source.folder else None,
        "license": checkpoint.license.lower(),
        "description": f"{checkpoint.network} of I-JEPA, {checkpoint.data}, "
        f"{checkpoint.epochs:g} epochs",
    }


default_cfgs = generate_default_cfgs(
    {checkpoint.name: _cfg(checkpoint) for checkpoint in registry.checkpoints()}
    | {
        name: _SHARED_CFG
        for name in (*registry.ARCHITECTURES, registry.CUSTOM)
        if registry.find(name) is None
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    """Build a variant from timm's arguments, ``checkpoint`` and ``network`` (`create_model`)."""
    checkpoint, network = kwargs.pop("checkpoint", None), kwargs.pop("network", None)
    # timm saves these arguments with a model; the weights saved beside them take precedence.
    recorded = kwargs.get("pretrained_model_args") or {}
    checkpoint = None if checkpoint == recorded.get("checkpoint") else checkpoint
    network = None if network == recorded.get("network") else network
    if not kwargs.pop("pretrained_strict", True):
        raise SettingsError("I-JEPA weights load strictly: leave pretrained_strict at True")
    if network == "predictor":
        raise SettingsError("create_model makes encoders: use create_ijepa for the predictor")
    if network is not None and not pretrained and checkpoint is None:
        raise SettingsError(
            f"network={network!r} selects weights, but there are none: use pretrained=True or "
            "checkpoint=PATH"
        )
    networks = None
    if pretrained or checkpoint is not None:
        networks = load.resolve(
            variant,
            checkpoint,
            pretrained_cfg=kwargs.get("pretrained_cfg"),
            overlay=kwargs.get("pretrained_cfg_overlay"),
            cache_dir=kwargs.get("cache_dir"),
        )

    def build(**arguments: Any) -> IJepaEncoder:
        if networks is None:
            return IJepaEncoder(**arguments)
        chosen = networks.choose(network)
        return load.build_with_weights(IJepaEncoder, arguments, networks, chosen)

    model = build_model_with_cfg(
        build,
        variant,
        pretrained=False,  # `build` has loaded the weights by then
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{**registry.ARCHITECTURES.get(variant, {}), **kwargs},
    )
    has_own_cfg = isinstance(kwargs.get("pretrained_cfg"), dict)
    if networks is not None and checkpoint is not None and not has_own_cfg:
        model.pretrained_cfg = {**model.pretrained_cfg, **networks.preprocessing}
        model.default_cfg = model.pretrained_cfg
    return model


@register_model
def vit_nano8_64_ijepa(pretrained: bool = False, **kwargs: Any) -> IJepaEncoder:
    """The small model that ships with the package: 64x64 images, patch 8."""
    return _create("vit_nano8_64_ijepa", pretrained, kwargs)


@register_model
def vit_tiny16_ijepa(pretrained: bool = False, **kwargs: Any) -> IJepaEncoder:
    """ViT-Ti/16."""
    return _create("vit_tiny16_ijepa", pretrained, kwargs)


@register_model
def vit_small16_ijepa(pretrained: bool = False, **kwargs: Any) -> IJepaEncoder:
    """ViT-S/16."""
    return _create("vit_small16_ijepa", pretrained, kwargs)


@register_model
def vit_base16_ijepa(pretrained: bool = False, **kwargs: Any) -> IJepaEncoder:
    """ViT-B/16."""
    return _create("vit_base16_ijepa", pretrained, kwargs)


@register_model
def vit_large16_ijepa(pretrained: bool = False, **kwargs: Any) -> IJepaEncoder:
    """ViT-L/16."""
    return _create("vit_large16_ijepa", pretrained, kwargs)


@register_model
def vit_huge14_ijepa(pretrained: bool = False, **kwargs: Any) -> IJepaEncoder:
    """ViT-H/14 of the paper."""
    return _create("vit_huge14_ijepa", pretrained, kwargs)


@register_model
def vit_huge16_448_ijepa(pretrained: bool = False, **kwargs: Any) -> IJepaEncoder:
    """ViT-H/16 of the paper, at 448x448."""
    return _create("vit_huge16_448_ijepa", pretrained, kwargs)


@register_model
def vit_giant16_ijepa(pretrained: bool = False, **kwargs: Any) -> IJepaEncoder:
    """ViT-g/16, the paper's "ViT-G/16"."""
    return _create("vit_giant16_ijepa", pretrained, kwargs)


@register_model
def vit_custom_ijepa(pretrained: bool = False, **kwargs: Any) -> IJepaEncoder:
    """A ViT of other sizes: pass patch_size, embed_dim, depth, num_heads."""
    return _create("vit_custom_ijepa", pretrained, kwargs)
