"""Load weights: construct on meta, map the file, fit shapes as timm does, assign."""

import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.layers import LayerNorm, resample_abs_pos_embed, resample_patch_embed
from timm.models import PretrainedCfg, adapt_input_conv, named_apply
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from ..errors import CheckpointError, some
from . import registry
from .formats import UNLABELED, State
from .read import FOLDER_PREFIX, HUB_PREFIX, Networks, open_checkpoint, open_entry

_log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
_ADDED = ("head.", "attn_pool.")  # parts of a timm ViT that pretraining did not have


def resolve(
    variant: str,
    checkpoint: str | Path | Networks | None = None,
    pretrained_cfg: Any = None,
    overlay: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> Networks:
    """The checkpoint of a call of ``create_model``.

    The user's checkpoint comes first, then timm's ``pretrained_cfg_overlay={'file': ...}`` and
    'local-dir:' and 'hf-hub:' sources, then the registry.
    """
    cfg = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    tag = cfg.get("tag") if isinstance(cfg, Mapping) else cfg
    if checkpoint is None and isinstance(cfg, Mapping):
        if cfg.get("source") == "local-dir":
            checkpoint = f"{FOLDER_PREFIX}{cfg['file']}"
        elif cfg.get("source") == "hf-hub":
            checkpoint = f"{HUB_PREFIX}{cfg['hf_hub_id']}"
    if checkpoint is None and overlay:
        checkpoint = overlay.get("file")
    if isinstance(checkpoint, Networks):
        return checkpoint
    if checkpoint is not None:
        return open_checkpoint(checkpoint, cache_dir)
    if (entry := registry.find(variant, tag)) is not None:
        return open_entry(entry, cache_dir)
    known = [item.name for item in registry.checkpoints() if item.model == variant]
    raise CheckpointError(
        f"there are no released weights of {variant}{'.' + tag if tag else ''}"
        + (f" (there are {', '.join(known)})" if known else "")
        + ": use pretrained=False for random initialization, or checkpoint=PATH for your own"
    )


def build_with_weights(
    cls: type[M], arguments: Mapping[str, Any], networks: Networks, network: str
) -> M:
    """Construct an encoder from timm's arguments, uninitialized, and assign its weights."""
    arguments = dict(arguments)
    device = arguments.pop("device", None)
    if networks.norm_eps != 1e-6:
        arguments.setdefault("norm_layer", partial(LayerNorm, eps=networks.norm_eps))
    model: Any = cls(**arguments, device="meta", weight_init="skip")
    model.weight_init_mode = arguments.get("weight_init", "")
    check_architecture(model, networks.args, networks.origin)
    state = fit(networks.states[network](), model, networks.origin, networks.grid_size)
    assign(model, state, networks.origin, device)
    record_source(model, networks, network)
    return model


def record_source(model: Any, networks: Networks, network: str) -> None:
    """Note the source of a model's weights, for the records of features, probes and exports.

    Such as 'target encoder of vit_huge14_ijepa.in1k'.
    """
    prefix = "" if network == UNLABELED else f"{network.replace('_', ' ')} of "
    model.weights_origin, model.weights_network = prefix + networks.origin, network


def num_heads(vit: Any) -> int:
    """Attention heads of each block of a timm ViT."""
    return next(int(part.num_heads) for part in vit.blocks.modules() if hasattr(part, "num_heads"))


def check_architecture(model: Any, known: Mapping[str, Any], origin: str) -> None:
    """Compare the number of heads with the checkpoint's, if known: shapes do not show it."""
    heads = num_heads(model)
    if (own := known.get("num_heads", heads)) != heads:
        raise CheckpointError(
            f"{origin} has num_heads={own}, the model num_heads={heads}: pass num_heads={own}, or "
            "load the folder by its name, create_model('local-dir:FOLDER')"
        )


def fit(state: State, model: Any, origin: str, old_grid: tuple[int, int] | None = None) -> State:
    """Adapt an encoder's tensors to a model of another image, patch or channel size, as timm does.

    ``old_grid`` has rows and columns of the checkpoint's ``pos_embed``; None if it is square.
    """
    if "cls_token" in state and getattr(model, "cls_token", None) is None:
        raise CheckpointError(
            f"{origin} has a class token (cls_token), I-JEPA encoders have none: load it with "
            "timm.create_model"
        )
    state = dict(state)
    weight = state.get("patch_embed.proj.weight")
    if weight is not None and weight.ndim == 4:
        size = tuple(model.patch_embed.proj.weight.shape)
        weight = resample_patch_embed(weight, list(size[-2:]))
        if weight.shape[1] != size[1]:
            if weight.shape[1] != 3:
                raise CheckpointError(
                    f"{origin} takes {weight.shape[1]} channels, the model {size[1]}: timm adapts "
                    f"from 3 channels only; pass in_chans={weight.shape[1]}"
                )
            weight = adapt_input_conv(size[1], weight)
        state["patch_embed.proj.weight"] = weight
    positions = state.get("pos_embed")
    if positions is not None and positions.ndim == 3 and model.pos_embed is not None:
        grid = tuple(model.patch_embed.grid_size)
        first = 0 if model.no_embed_class else model.num_prefix_tokens  # of class and registers
        patches = _fit_positions(positions[:, first:], grid, origin, old_grid)
        state["pos_embed"] = torch.cat([positions[:, :first], patches], 1) if first else patches
    if "head.weight" in state and len(state["head.weight"]) != model.num_classes:
        classes = len(state["head.weight"])
        _log.warning("%s: its classifier is dropped; num_classes=%d loads it", origin, classes)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return state


def drop_class_token(state: State, origin: str) -> State:
    """Drop the class token of a ViT, with its position."""
    if "reg_token" in state:
        raise CheckpointError(f"{origin} has register tokens (reg_token), I-JEPA has none")
    if "cls_token" not in state:
        return state
    kept = {name: tensor for name, tensor in state.items() if name != "cls_token"}
    positions = kept.get("pos_embed")
    if positions is not None and math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        kept["pos_embed"] = positions[:, 1:]  # some ViTs have no position for the class token
    _log.warning("%s: its class token is dropped, I-JEPA has patch tokens only", origin)
    return kept


def fit_predictor(
    state: State, predictor: Any, origin: str, old_grid: tuple[int, int] | None = None
) -> State:
    """Adapt a predictor's positions to another patch grid; arguments as for :func:`fit`."""
    name, grid = "predictor_pos_embed", tuple(predictor.grid_size)
    if name not in state:  # which `check` reports
        return state
    return {**state, name: _fit_positions(state[name], grid, origin, old_grid)}


def _fit_positions(
    positions: Tensor, grid: tuple[int, int], origin: str, old_grid: tuple[int, int] | None
) -> Tensor:
    count = positions.shape[1]
    old = old_grid or (round(count**0.5), round(count**0.5))
    if old_grid is None and old[0] ** 2 != count == grid[0] * grid[1]:
        old = grid  # not square, and as many as the model has: made for this grid
    if old[0] * old[1] != count:
        raise CheckpointError(
            f"{origin}: pos_embed has {count} positions, neither a square grid nor the "
            f"model's {grid[0]}x{grid[1]}; pass the img_size and patch_size it was made with"
        )
    if grid == old:
        return positions
    resampled: Tensor = resample_abs_pos_embed(
        positions, new_size=list(grid), old_size=list(old), num_prefix_tokens=0
    )
    return resampled


def check(model: nn.Module, state: State, origin: str) -> set[str]:
    """Refuse tensors that are missing, left over, of another shape or not weights.

    Returns the names of a classifier or attention pooling that the checkpoint lacks.
    """
    expected = model.state_dict()
    added = {name for name in expected if name.startswith(_ADDED) and name not in state}
    problems = [f"lacks {name}" for name in expected.keys() - state.keys() - added]
    problems += [f"has unused {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {list(state[name].shape)}, in the model {list(expected[name].shape)}"
        for name in state.keys() & expected.keys()
        if state[name].shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"{origin} does not fit {type(model).__name__}: {some(problems)}; pass the "
            "checkpoint's embed_dim, depth, num_heads, mlp_ratio, qkv_bias, ... to create_model"
        )
    unusable = [
        f"{name} ({tensor.dtype}, {tensor.layout})"
        for name, tensor in state.items()
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta
    ]
    if unusable:
        raise CheckpointError(
            f"{origin} has tensors that are not floating-point weights, {some(unusable)}: convert "
            "quantized weights back first"
        )
    return added


def assign(
    model: nn.Module, state: State, origin: str, device: torch.device | str | None = None
) -> None:
    """Assign fitted tensors to a model on meta, strictly, in its dtype, without a copy on the CPU.

    A classifier or attention pooling that the checkpoint lacks is initialized. ``state`` is empty
    afterwards, so that a tensor of another dtype is freed before the next one is converted.
    """
    expected = model.state_dict()
    added = check(model, state, origin)
    target = torch.device(device or "cpu")
    for name in ("head", "attn_pool"):
        part = getattr(model, name, None)
        if isinstance(part, nn.Module) and any(key.startswith(name + ".") for key in added):
            part.to_empty(device=target)
            named_apply(partial(init_weights_vit_timm, needs_reset=True), part, include_root=True)
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    ready = {
        name: state.pop(name).to(device=target, dtype=expected[name].dtype) for name in list(state)
    }
    model.load_state_dict(ready, assign=True)
