"""YAML files of the official repository (facebookresearch/ijepa, `configs/`) as our settings.

Their `data.batch_size` is that of one GPU, whose images also share a context length: it becomes
`mask.group_size`, and `optim.batch_size` is that many times the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SettingsError, some
from ..models.predictor import PREDICTORS

_MODELS = (  # meta.model_name, our name, patch size, image size
    ("vit_tiny", "vit_tiny16_ijepa", 16, 224),
    ("vit_small", "vit_small16_ijepa", 16, 224),
    ("vit_base", "vit_base16_ijepa", 16, 224),
    ("vit_large", "vit_large16_ijepa", 16, 224),
    ("vit_huge", "vit_huge14_ijepa", 14, 224),
    ("vit_huge", "vit_huge16_448_ijepa", 16, 448),
    ("vit_giant", "vit_giant16_ijepa", 16, 224),
)
_SAME = {  # theirs -> ours, with the same meaning
    "data.batch_size": "mask.group_size",
    "data.crop_scale": "data.crop_scale",
    "data.num_workers": "runtime.workers",
    "data.use_horizontal_flip": "data.horizontal_flip",
    "mask.allow_overlap": "mask.allow_overlap",
    "mask.aspect_ratio": "mask.target_aspect",
    "mask.enc_mask_scale": "mask.context_scale",
    "mask.min_keep": "mask.min_keep",
    "mask.num_pred_masks": "mask.num_targets",
    "mask.pred_mask_scale": "mask.target_scale",
    "optimization.final_lr": "optim.final_lr",
    "optimization.final_weight_decay": "optim.final_weight_decay",
    "optimization.ipe_scale": "optim.schedule_scale",
    "optimization.lr": "optim.lr",
    "optimization.start_lr": "optim.start_lr",
    "optimization.weight_decay": "optim.weight_decay",
}
_CONVERTED = {
    *("data.crop_size", "mask.patch_size", "meta.model_name", "meta.pred_depth"),
    *("meta.pred_emb_dim", "meta.use_bfloat16"),
    *("optimization.ema", "optimization.epochs", "optimization.warmup"),
}
_PLACES = {"data.root_path", "data.image_folder", "logging.folder"}
_SUPPORTED = {  # the only value that a run here can have
    "data.use_color_distortion": False,
    "data.use_gaussian_blur": False,
    "mask.num_enc_masks": 1,
    "meta.copy_data": False,
    "meta.load_checkpoint": False,  # a run resumes by itself, --init names other weights
    "meta.read_checkpoint": None,
}
_IGNORED = {"data.color_jitter_strength", "data.pin_mem", "logging.write_tag"}
_REQUIRED = {*_SAME, *_CONVERTED, *_PLACES}


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether the content of a YAML file has the sections of the official repository's files."""
    return "meta" in content and "optimization" in content


def folders(content: Mapping[str, Any], origin: str) -> tuple[str, str]:
    """The folder of training images and the folder of the run that a file names."""
    theirs = _flat(content, origin)
    parts = [str(theirs["data.root_path"]).rstrip("/"), str(theirs["data.image_folder"]).strip("/")]
    return "/".join([*parts, "train"]), str(theirs["logging.folder"])


def translate(content: Mapping[str, Any], origin: str, world: int) -> dict[str, Any]:
    """Our settings by full name, for the file's run on `world` GPUs.

    Args:
        content: What the YAML file holds.
        origin: The file's name, for messages.
        world: Number of processes.

    Raises:
        SettingsError: A key is missing, unknown, or asks for what is not supported.
    """
    theirs = _flat(content, origin)
    for key, supported in _SUPPORTED.items():
        if theirs.get(key, supported) != supported:
            raise SettingsError(f"{origin}: {key} is {theirs[key]}; only {supported} is supported")
    batch, ema = theirs["data.batch_size"], theirs["optimization.ema"]
    if not isinstance(batch, int):
        raise SettingsError(f"{origin}: data.batch_size is {batch!r}; it must be a whole number")
    if not isinstance(ema, list) or len(ema) != 2:
        raise SettingsError(f"{origin}: optimization.ema is {ema!r}; it must be two numbers")
    return {
        **{ours: theirs[key] for key, ours in _SAME.items()},
        **_model(theirs, origin),
        "optim.batch_size": batch * world,
        "optim.duration": f"{theirs['optimization.epochs']} epochs",
        "optim.warmup": f"{theirs['optimization.warmup']} epochs",
        "optim.momentum": ema[0],
        "optim.final_momentum": ema[1],
        "optim.precision": "bf16" if theirs["meta.use_bfloat16"] else "fp32",
    }


def _flat(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Values by `section.key`, after comparing the keys with those of the official repository."""
    found: dict[str, Any] = {}
    for section, values in content.items():
        named = values if isinstance(values, Mapping) else {}
        found |= {f"{section}.{key}": value for key, value in named.items()} or {section: values}
    if unknown := found.keys() - _REQUIRED - _SUPPORTED.keys() - _IGNORED:
        raise SettingsError(f"{origin}: the official repository has no setting {some(unknown)}")
    if missing := _REQUIRED - found.keys():
        raise SettingsError(f"{origin} lacks {some(missing)}")
    return found


def _model(theirs: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The registered model, and those sizes of the file that are not its own."""
    name = theirs["meta.model_name"]
    models = [model for model in _MODELS if model[0] == name]
    if not models:
        known = ", ".join(sorted({model[0] for model in _MODELS}))
        raise SettingsError(f"{origin}: meta.model_name is {name!r}; use one of {known}")
    sizes = theirs["mask.patch_size"], theirs["data.crop_size"]
    _, ours, patch_size, img_size = next((m for m in models if m[2:] == sizes), models[0])
    own = {
        "model.patch_size": patch_size,
        "model.img_size": img_size,
        "model.predictor_embed_dim": PREDICTORS[ours]["embed_dim"],
        "model.predictor_depth": PREDICTORS[ours]["depth"],
    }
    given = dict(zip(own, (*sizes, theirs["meta.pred_emb_dim"], theirs["meta.pred_depth"])))
    return {"model.name": ours, **{k: v for k, v in given.items() if v != own[k]}}
