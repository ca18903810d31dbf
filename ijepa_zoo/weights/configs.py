"""config.json and preprocessor_config.json of other libraries, as timm's arguments and cfg."""

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer

from ..errors import CheckpointError, some
from . import registry

_log = logging.getLogger(__name__)
# Pillow's resize filters, in the order of their numbers
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


def timm_args(config: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and pretrained cfg of a timm folder, as ``timm.models.save_for_hf`` writes it."""
    cfg = pretrained_cfg(config)
    architecture = config["architecture"]
    if registry.registered_name(architecture) is None:
        raise CheckpointError(
            f"{origin} is timm's {architecture}, not an I-JEPA encoder: load it with "
            "timm.create_model"
        )
    args = registry.entrypoint_args(architecture)
    if "input_size" in cfg:
        args |= {"in_chans": cfg["input_size"][0], "img_size": cfg["input_size"][1:]}
    for key in ("num_classes", "global_pool"):
        if config.get(key) is not None:
            args[key] = config[key]
    given = dict(config.get("model_args") or {})
    for key in ("checkpoint", "network"):
        given.pop(key, None)
    return check_args({**args, **given}, origin), cfg


def transformers_args(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """timm's arguments of the encoder that transformers' ``IJepaConfig`` describes."""
    names = {
        "img_size": "image_size",
        "patch_size": "patch_size",
        "in_chans": "num_channels",
        "embed_dim": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "norm_eps": "layer_norm_eps",
    }
    if missing := {*names.values(), "intermediate_size"} - config.keys():
        raise CheckpointError(f"{origin}/config.json lacks {some(missing)}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{origin}: hidden_act is {config['hidden_act']!r}, not 'gelu'")
    args = {ours: config[theirs] for ours, theirs in names.items()}
    args["mlp_ratio"] = mlp_ratio(config["intermediate_size"], config["hidden_size"])
    args |= {"qkv_bias": config.get("qkv_bias", True), "num_classes": 0}
    if "IJepaForImageClassification" in (config.get("architectures") or ()):
        labels = config.get("id2label") or config.get("num_labels", 2)
        args["num_classes"] = len(labels) if isinstance(labels, Mapping) else labels
    return args


def mlp_ratio(hidden: int, embed_dim: int) -> float:
    """The ratio from which timm's ``int(embed_dim * ratio)`` is ``hidden``."""
    ratio = hidden / embed_dim
    return ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def processor_cfg(
    processor: Mapping[str, Any], args: Mapping[str, Any], origin: str, is_ours: bool
) -> dict[str, Any]:
    """timm's description of the transform in transformers' ``preprocessor_config.json``."""
    target, channels = to_2tuple(args["img_size"]), args["in_chans"]
    cfg: dict[str, Any] = {"input_size": [channels, *target], "crop_pct": 1.0}
    resample = processor.get("resample")
    try:
        size, crop = _sides(processor, "size"), _sides(processor, "crop_size")
        cfg["crop_mode"] = "squash" if "height" in size else "center"  # else the shortest edge
        if size and processor.get("do_center_crop", False):
            cfg["crop_pct"] = _crop_pct(min(crop.values() or target), min(size.values()))
        if processor.get("do_normalize", True):
            cfg |= {"mean": [*processor["image_mean"]], "std": [*processor["image_std"]]}
        else:
            cfg |= {"mean": [0.0] * channels, "std": [1.0] * channels}
        cfg["interpolation"] = dict(enumerate(FILTERS))[2 if resample is None else resample]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{origin}/preprocessor_config.json is not of an image processor ({error!r}): it needs "
            f"image_mean and image_std, a resample from 0 to {len(FILTERS) - 1} and a size in "
            "pixels"
        ) from error
    if cfg["mean"] == [0.5, 0.5, 0.5] and not is_ours:
        _log.warning(
            "%s: preprocessor_config.json has mean 0.5, but I-JEPA's released weights were trained "
            "with ImageNet's mean and std: change model.pretrained_cfg if these are such weights",
            origin,
        )
    return cfg


def _sides(processor: Mapping[str, Any], key: str) -> Mapping[str, int]:
    """A size of an image processor; older files have one number, of the shortest edge or square."""
    given = processor.get(key) or {}
    if isinstance(given, Mapping):
        return given
    return {"shortest_edge": given} if key == "size" else {"height": given, "width": given}


def _crop_pct(side: int, edge: int) -> float:
    """The crop_pct from which timm's ``floor(side / crop_pct)`` is the resized edge."""
    share = side / edge
    return share if math.floor(side / share) == edge else math.nextafter(share, 0)


def check_args(args: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Refuse arguments that a ViT of timm does not have."""
    known = {*inspect.signature(VisionTransformer.__init__).parameters, "norm_eps"}
    if foreign := args.keys() - (known - {"self", "device", "dtype", "weight_init"}):
        raise CheckpointError(f"{origin}/config.json: model_args has {some(foreign)}")
    return dict(args)


def pretrained_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """Pretrained cfg of a timm folder, with the class names that timm writes beside it."""
    cfg = {k: v for k, v in config.get("pretrained_cfg", {}).items() if v is not None}
    return cfg | {key: config[key] for key in ("label_names", "multi_label") if config.get(key)}
