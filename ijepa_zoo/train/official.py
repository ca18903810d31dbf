"""YAML files of the official repository (facebookresearch/ijepa, `configs/`) as our settings.

Their `data.batch_size` is that of one GPU, whose images also share a context length: it becomes
`mask.group_size`, and `optim.batch_size` is that many times the number of processes. A run that is
resumed on another number of processes needs `optim.batch_size=N`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SettingsError, some
from ..models.predictor import PREDICTORS

_MODELS = {  # meta.model_name -> our name, patch size, image size
    "vit_tiny": ("vit_tiny16_ijepa", 16, 224),
    "vit_small": ("vit_small16_ijepa", 16, 224),
    "vit_base": ("vit_base16_ijepa", 16, 224),
    "vit_large": ("vit_large16_ijepa", 16, 224),
    "vit_huge": ("vit_huge14_ijepa", 14, 224),
    "vit_giant": ("vit_giant16_ijepa", 16, 224),
}
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
_OTHERS = {
    "data.crop_size", "mask.patch_size", "meta.model_name", "meta.pred_depth",
    "meta.pred_emb_dim", "meta.use_bfloat16",
    "optimization.ema", "optimization.epochs", "optimization.warmup",
}  # fmt: skip
_SUPPORTED = {  # the only supported value
    "data.use_color_distortion": False,
    "data.use_gaussian_blur": False,
    "mask.num_enc_masks": 1,
    "meta.copy_data": False,
    "meta.load_checkpoint": False,  # a run resumes by itself, --init names other weights
    "meta.read_checkpoint": None,
}
_IGNORED = {  # --data and --out name the folders
    "data.color_jitter_strength", "data.image_folder", "data.pin_mem", "data.root_path",
    "logging.folder", "logging.write_tag",
}  # fmt: skip


def is_official(values: Mapping[str, Any]) -> bool:
    """Whether values by full name have the sections of the official repository's files."""
    return {"meta", "optimization"} <= {name.partition(".")[0] for name in values}


def translate(values: Mapping[str, Any], origin: str, world: int) -> dict[str, Any]:
    """Our settings by full name, for the file's run on `world` GPUs."""
    required = {*_SAME, *_OTHERS}
    if unknown := values.keys() - required - _SUPPORTED.keys() - _IGNORED:
        raise SettingsError(f"{origin}: the official repository has no setting {some(unknown)}")
    if missing := required - values.keys():
        raise SettingsError(f"{origin} lacks {some(missing)}")
    for name, supported in _SUPPORTED.items():
        if values.get(name, supported) != supported:
            raise SettingsError(f"{origin}: {name} is {values[name]}; use {supported}")
    batch, ema = values["data.batch_size"], values["optimization.ema"]
    if type(batch) is not int or not isinstance(ema, list) or len(ema) != 2:
        raise SettingsError(
            f"{origin}: data.batch_size is {batch!r} and optimization.ema is {ema!r}: use an "
            "integer and two numbers"
        )
    return {
        **{ours: values[theirs] for theirs, ours in _SAME.items()},
        **_model(values, origin),
        "optim.batch_size": batch * world,
        "optim.duration": f"{values['optimization.epochs']} epochs",
        "optim.warmup": f"{values['optimization.warmup']} epochs",
        "optim.momentum": ema[0],
        "optim.final_momentum": ema[1],
        "optim.precision": "bf16" if values["meta.use_bfloat16"] else "fp32",
    }


def _model(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The registered model, and the sizes that differ from it."""
    theirs, patch, size = (
        values[key] for key in ("meta.model_name", "mask.patch_size", "data.crop_size")
    )
    if theirs not in _MODELS:
        known = ", ".join(_MODELS)
        raise SettingsError(f"{origin}: meta.model_name is {theirs!r}: use one of {known}")
    model = _MODELS[theirs]
    if (theirs, patch, size) == ("vit_huge", 16, 448):
        model = ("vit_huge16_448_ijepa", 16, 448)
    predictor = PREDICTORS[model[0]]
    sizes = {
        "patch_size": (patch, model[1]),
        "img_size": (size, model[2]),
        "predictor_embed_dim": (values["meta.pred_emb_dim"], predictor["embed_dim"]),
        "predictor_depth": (values["meta.pred_depth"], predictor["depth"]),
    }
    changed = {f"model.{name}": given for name, (given, own) in sizes.items() if given != own}
    return {"model.name": model[0], **changed}
