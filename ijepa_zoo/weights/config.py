"""config.json of a folder, checked: it may come from anybody, and it names files and sizes."""

import inspect
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from ..errors import CheckpointError
from . import catalog
from .layouts import some

_FILE = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*\.safetensors")  # inside the folder, not above it
_SIZES = ("img_size", "patch_size")
_COUNTS = ("in_chans", "embed_dim", "depth", "num_heads")
_LARGEST = 1 << 16  # of any size: beyond every network, and small enough to construct on meta
_DEEPEST = 1024
_OURS = {"self", "device", "dtype", "weight_init"}  # the caller's to choose, not the folder's
_FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_CROPS = ("center", "squash", "border")


def read_config(path: Path, origin: str) -> dict[str, Any]:
    """Read config.json.

    Raises:
        CheckpointError: If it holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin}/config.json is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin}/config.json is damaged: it holds no JSON object")
    return content


def encoder_args(args: Any, origin: str) -> dict[str, Any]:
    """timm's arguments of the encoder: only such as describe a network, and sizes within reason.

    Raises:
        CheckpointError: If there is another argument among them or a size is out of range.
    """
    _require(isinstance(args, Mapping), origin, "model_args", args)
    foreign = args.keys() - _known_args()
    if foreign:
        raise CheckpointError(
            f"{origin}/config.json has model_args that describe no encoder: {some(foreign)}"
        )
    for key in _SIZES:
        size = args.get(key, 1)
        sides = size if isinstance(size, list) and len(size) == 2 else [size]
        _require(all(map(_is_count, sides)), origin, key, size)
    for key in _COUNTS:
        most = _DEEPEST if key == "depth" else _LARGEST
        count = args.get(key, 1)
        _require(_is_count(count) and count <= most, origin, key, count)
    for key in ("mlp_ratio", "norm_eps"):
        number = args.get(key, 1.0)
        _require(_is_number(number) and 0 < number <= _LARGEST, origin, key, number)
    return dict(args)


def preprocessing(cfg: Any, origin: str) -> dict[str, Any]:
    """timm's ``pretrained_cfg``.

    Raises:
        CheckpointError: If a part of it cannot make a transform.
    """
    _require(isinstance(cfg, Mapping), origin, "pretrained_cfg", cfg)
    known = {key: value for key, value in cfg.items() if value is not None}
    size = known.get("input_size", [3, 1, 1])
    fits = isinstance(size, list) and len(size) == 3 and all(map(_is_count, size))
    _require(fits, origin, "input_size", size)
    for key, low in (("mean", -math.inf), ("std", 0.0)):
        values = known.get(key, [0.5])
        fits = isinstance(values, list) and all(_is_number(v) and v > low for v in values)
        _require(fits and bool(values), origin, key, values)
    share = known.get("crop_pct", 1.0)
    _require(_is_number(share) and 0.01 <= share <= 100, origin, "crop_pct", share)
    for key, allowed in (("interpolation", _FILTERS), ("crop_mode", _CROPS)):
        _require(known.get(key, allowed[0]) in allowed, origin, key, known.get(key))
    return dict(cfg)


def native_section(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What this package's own export says of itself.

    Raises:
        CheckpointError: If a field is missing, of another type, or names a file outside the folder.
    """
    ours = config["ijepa_zoo"]
    _require(isinstance(ours, Mapping), origin, "ijepa_zoo", ours)
    files = ours.get("networks")
    fits = isinstance(files, Mapping) and bool(files) and files.keys() <= set(catalog.NETWORKS)
    _require(fits, origin, "networks", files)
    named = [*files.values(), *([ours["optimizer"]] if "optimizer" in ours else [])]
    for name in named:
        if not isinstance(name, str) or not _FILE.fullmatch(name):
            raise CheckpointError(
                f"{origin}/config.json names {name!r}, which is no .safetensors file inside the "
                "folder: it is not opened"
            )
    predictor = ours.get("predictor")
    fits = isinstance(predictor, Mapping) and predictor.get("context", "shared") == "shared"
    fits = fits and all(_is_count(predictor[key]) for key in predictor.keys() - {"context"})
    _require(fits and predictor.get("depth", 1) <= _DEEPEST, origin, "predictor", predictor)
    _require(isinstance(ours.get("model"), str), origin, "model", ours.get("model"))
    license = ours.get("license")
    plain = license is None or (isinstance(license, str) and len(license.splitlines()) == 1)
    _require(plain, origin, "license", license)
    if "optimizer" in ours:
        _require(isinstance(ours.get("training"), Mapping), origin, "training", None)
    return dict(ours)


@cache
def _known_args() -> frozenset[str]:
    return frozenset(
        {*inspect.signature(VisionTransformer.__init__).parameters, "norm_eps"} - _OURS
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _require(fits: bool, origin: str, key: str, value: Any) -> None:
    if not fits:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        raise CheckpointError(f"{origin}/config.json: {key} cannot be {shown}")


def transformers_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """timm arguments of a transformers I-JEPA configuration.

    Raises:
        CheckpointError: If a size is missing or the activation is not that of I-JEPA.
    """
    needed = (
        *("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers"),
        *("num_attention_heads", "intermediate_size", "layer_norm_eps"),
    )
    missing = [key for key in needed if key not in config]
    if missing:
        raise CheckpointError(f"the transformers config.json lacks {', '.join(missing)}")
    for key in ("hidden_size", "intermediate_size"):
        if type(config[key]) is not int or config[key] < 1:
            raise CheckpointError(f"the transformers config.json: {key} cannot be {config[key]!r}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"hidden_act is {config['hidden_act']!r}, only 'gelu' is I-JEPA's")
    return {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config["num_channels"],
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": mlp_ratio(config["intermediate_size"], config["hidden_size"]),
        "qkv_bias": config.get("qkv_bias", True),
        "norm_eps": config["layer_norm_eps"],
    }


def mlp_ratio(hidden: int, embed_dim: int) -> float:
    """The ratio from which timm's ``int(embed_dim * ratio)`` gives ``hidden`` back."""
    ratio = hidden / embed_dim
    return ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf)
