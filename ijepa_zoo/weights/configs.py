"""What config.json and preprocessor_config.json of other libraries say, in timm's words."""

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from ..errors import CheckpointError, some
from . import registry

_log = logging.getLogger(__name__)
_FILTERS = dict(zip("012345", ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")))


def timm_args(config: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and pretrained cfg of a timm folder, as ``timm.models.save_for_hf`` writes it."""
    cfg = pretrained_cfg(config, origin)
    given, architecture = config.get("model_args") or {}, config["architecture"]
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
    if isinstance(given, Mapping):
        given = {k: v for k, v in given.items() if k not in ("checkpoint", "network")}
    return check_args({**args, **given} if isinstance(given, dict) else given, origin), cfg


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
    missing = {*names.values(), "intermediate_size"} - config.keys()
    if missing:
        raise CheckpointError(f"{origin}/config.json lacks {some(missing)}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{origin}: hidden_act is {config['hidden_act']!r}, not 'gelu'")
    args = {ours: config[theirs] for ours, theirs in names.items()}
    for key in ("hidden_size", "intermediate_size"):
        _require(_is_count(config[key]), origin, key, config[key])
    args["mlp_ratio"] = mlp_ratio(config["intermediate_size"], config["hidden_size"])
    args |= {"qkv_bias": config.get("qkv_bias", True), "num_classes": 0}
    if "IJepaForImageClassification" in (config.get("architectures") or ()):
        labels = config.get("id2label") or config.get("num_labels", 2)
        args["num_classes"] = len(labels) if isinstance(labels, Mapping) else labels
    return check_args(args, origin)


def mlp_ratio(hidden: int, embed_dim: int) -> float:
    """The ratio from which timm's ``int(embed_dim * ratio)`` gives ``hidden`` back."""
    ratio = hidden / embed_dim
    return ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def processor_cfg(
    processor: Mapping[str, Any], args: Mapping[str, Any], origin: str, is_ours: bool
) -> dict[str, Any]:
    """timm's description of the transform in transformers' ``preprocessor_config.json``.

    Args:
        processor: Content of that file.
        args: timm arguments of the encoder.
        origin: The folder, for messages.
        is_ours: The folder is an export of this package.
    """
    size, crop = _edges(processor.get("size")), _edges(processor.get("crop_size"))
    side = args["img_size"]
    target = [side, side] if isinstance(side, int) else list(side)
    cfg: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash" if len(size) == 2 else "center"}
    if size and processor.get("do_center_crop", False):
        cfg["crop_pct"] = _crop_pct(min(crop or target), min(size))
    cfg["input_size"] = [args["in_chans"], *target]
    if processor.get("do_normalize", True):
        cfg |= {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    else:
        cfg |= {"mean": [0.0] * args["in_chans"], "std": [1.0] * args["in_chans"]}
    cfg["interpolation"] = _FILTERS.get(str(processor.get("resample", 2)))
    if cfg["mean"] == [0.5, 0.5, 0.5] and not is_ours:
        _log.warning(
            "%s: preprocessor_config.json has mean 0.5, but I-JEPA's released weights were trained "
            "with ImageNet's mean and std: change model.pretrained_cfg if these are such weights",
            origin,
        )
    cfg = check_preprocessing(cfg, origin)
    for key in ("mean", "std"):
        _require(len(cfg[key]) == args["in_chans"], origin, f"image_{key}", cfg[key])
    return cfg


def _crop_pct(side: int, edge: int) -> float:
    """The share from which timm's ``floor(side / crop_pct)`` gives the resized edge back."""
    share = side / edge
    return share if math.floor(side / share) == edge else math.nextafter(share, 0)


def _edges(size: Any) -> list[int]:
    """Height and width, or the shortest edge alone, of a size in transformers' words."""
    if _is_count(size):
        return [size, size]
    for keys in (("height", "width"), ("shortest_edge",)):
        if isinstance(size, dict) and all(_is_count(size.get(key)) for key in keys):
            return [size[key] for key in keys]
    return []


def check_args(args: Any, origin: str) -> dict[str, Any]:
    """Refuse arguments that do not describe an encoder, before they become a traceback."""
    _require(isinstance(args, Mapping), origin, "model_args", args)
    known = {*inspect.signature(VisionTransformer.__init__).parameters, "norm_eps"}
    foreign = args.keys() - (known - {"self", "device", "dtype", "weight_init"})
    if foreign:
        raise CheckpointError(f"{origin}/config.json: model_args has {some(foreign)}")
    for key in ("img_size", "patch_size"):
        size = args.get(key, 1)
        is_pair = isinstance(size, list | tuple) and len(size) == 2
        _require(all(map(_is_count, size if is_pair else [size])), origin, key, size)
    for key in ("in_chans", "embed_dim", "depth", "num_heads"):
        _require(_is_count(args.get(key, 1)), origin, key, args.get(key))
    classes = args.get("num_classes", 0)
    _require(classes == 0 or _is_count(classes), origin, "num_classes", classes)
    for key in ("mlp_ratio", "norm_eps"):
        value = args.get(key, 1.0)
        _require(_is_number(value) and 0 < value < 1e4, origin, key, value)
    return dict(args)


def check_predictor(predictor: Any, origin: str) -> dict[str, Any]:
    """Refuse sizes of a predictor that are not numbers."""
    _require(isinstance(predictor, Mapping), origin, "predictor", predictor)
    for key in ("embed_dim", "depth"):
        value = predictor.get(key, 1)
        _require(_is_count(value), origin, f"{key} of the predictor", value)
    return dict(predictor)


def pretrained_cfg(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Pretrained cfg of a timm folder, with the class names that timm writes beside it."""
    cfg = check_preprocessing(config.get("pretrained_cfg", {}), origin)
    return cfg | {key: config[key] for key in ("label_names", "multi_label") if config.get(key)}


def check_preprocessing(cfg: Any, origin: str) -> dict[str, Any]:
    """Refuse a pretrained cfg that cannot become a transform."""
    _require(isinstance(cfg, Mapping), origin, "pretrained_cfg", cfg)
    known = {key: value for key, value in cfg.items() if value is not None}
    size = known.get("input_size", [3, 1, 1])
    fits = isinstance(size, list | tuple) and len(size) == 3 and all(map(_is_count, size))
    _require(fits, origin, "input_size", size)
    for key in ("mean", "std"):
        values = known.get(key, [0.5])
        fits = isinstance(values, list | tuple) and bool(values) and all(map(_is_number, values))
        _require(fits and (key == "mean" or min(values) > 0), origin, key, values)
    crop_pct = known.get("crop_pct", 1.0)
    _require(_is_number(crop_pct) and 0.01 <= crop_pct <= 100, origin, "crop_pct", crop_pct)
    filters = {*_FILTERS.values(), "random"}
    interpolation = known.get("interpolation", "bicubic")
    _require(str(interpolation) in filters, origin, "interpolation", interpolation)
    mode = known.get("crop_mode", "center")
    _require(mode in ("center", "squash", "border"), origin, "crop_mode", mode)
    return known


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1 << 16


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(fits: bool, origin: str, key: str, value: Any) -> None:
    if not fits:
        raise CheckpointError(f"{origin}: {key} in its configuration cannot be {value!r}")
