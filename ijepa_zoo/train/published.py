"""The YAML files of the published code (facebookresearch/ijepa, `configs/`), as our settings.

Their `data.batch_size` is that of one GPU. The batch of a step is that many times the number of
processes, and masks are cut over the images of a GPU, which `mask.cut` says here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SettingsError
from ..models.predictor import PREDICTORS

_SECTIONS = ("data", "logging", "mask", "meta", "optimization")
# Published name -> (our name, patch, image) of the registered models, best known first.
_MODELS = {
    "vit_tiny": (("vit_tiny16_ijepa", 16, 224),),
    "vit_small": (("vit_small16_ijepa", 16, 224),),
    "vit_base": (("vit_base16_ijepa", 16, 224),),
    "vit_large": (("vit_large16_ijepa", 16, 224),),
    "vit_huge": (("vit_huge14_ijepa", 14, 224), ("vit_huge16_448_ijepa", 16, 448)),
    "vit_giant": (("vit_giant16_ijepa", 16, 224),),
}
_SAME = {  # theirs -> ours, with the same meaning
    "data.crop_scale": "data.crop_scale",
    "data.use_horizontal_flip": "data.horizontal_flip",
    "data.num_workers": "machine.workers",
    "data.batch_size": "mask.cut",
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
_ONLY = {  # values of theirs that a run here can have, and why no other
    "data.use_color_distortion": (False, "images are cropped and flipped, never recoloured"),
    "data.use_gaussian_blur": (False, "images are cropped and flipped, never blurred"),
    "mask.num_enc_masks": (1, "there is one context block for each image"),
    "meta.copy_data": (False, "copy the images yourself and name the copy with --data"),
    "meta.load_checkpoint": (False, "a run goes on by itself, and --init names other weights"),
    "meta.read_checkpoint": (None, "--init names weights to start from"),
}
_USED = {  # those that become something else here
    *("data.crop_size", "mask.patch_size", "meta.model_name", "meta.pred_depth"),
    *("meta.pred_emb_dim", "meta.use_bfloat16"),
    *("optimization.ema", "optimization.epochs", "optimization.warmup"),
}
# Without effect on a run here: jitter needs use_color_distortion, pinning follows the device.
_UNUSED = {"data.color_jitter_strength", "data.pin_mem", "logging.write_tag"}
_PLACES = {"data.root_path", "data.image_folder", "logging.folder"}
_KNOWN = {*_SAME, *_ONLY, *_USED, *_UNUSED, *_PLACES}


@dataclass(frozen=True)
class Places:
    """Where a file of the published code says that images are and that the run goes.

    Attributes:
        data: The folder of training images: `root_path/image_folder/train`.
        out: `logging.folder`.
    """

    data: str
    out: str


def recognised(content: Mapping[str, Any]) -> bool:
    """Whether a YAML file's content has the sections of the published code's."""
    return "meta" in content and "optimization" in content


def places(content: Mapping[str, Any], origin: str) -> Places:
    """The folders that such a file names.

    Raises:
        ValueError: A key is missing.
    """
    theirs = _flat(content, origin)
    parts = (str(theirs["data.root_path"]), str(theirs["data.image_folder"]), "train")
    return Places(
        "/".join(part.strip("/") if i else part.rstrip("/") for i, part in enumerate(parts)),
        str(theirs["logging.folder"]),
    )


def translate(content: Mapping[str, Any], origin: str, world: int) -> dict[str, Any]:
    """Our settings by name, for the file's run on `world` GPUs.

    Args:
        content: What the YAML file holds.
        origin: The file's name, for messages.
        world: Number of processes.

    Raises:
        ValueError: A key is missing or unknown, or asks for what is not supported.
    """
    theirs = _flat(content, origin)
    for key, (value, reason) in _ONLY.items():
        if theirs[key] != value:
            raise SettingsError(
                f"{origin}: {key} is {theirs[key]}, which is not supported: {reason}. "
                f"Write {'null' if value is None else str(value).lower()}"
            )
    batch, ema = theirs["data.batch_size"], theirs["optimization.ema"]
    if not isinstance(batch, int) or not isinstance(ema, list) or len(ema) != 2:
        raise SettingsError(
            f"{origin}: data.batch_size is {batch} and optimization.ema {ema}; they must be a "
            "whole number and two numbers such as [0.996, 1.0]"
        )
    ours = {ours: theirs[key] for key, ours in _SAME.items()}
    ours |= _model(theirs, origin)
    ours |= {
        "optim.batch_size": batch * world,
        "optim.duration": f"{theirs['optimization.epochs']} epochs",
        "optim.warmup": f"{theirs['optimization.warmup']} epochs",
        "optim.momentum": ema[0],
        "optim.final_momentum": ema[1],
        "optim.precision": "bf16" if theirs["meta.use_bfloat16"] else "fp32",
    }
    return ours


def _flat(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section, values in content.items():
        if section not in _SECTIONS or not isinstance(values, Mapping):
            raise SettingsError(
                f"{origin} has the sections of the published code, and {section}, which is none "
                f"of them: they are {', '.join(_SECTIONS)}"
            )
        found |= {f"{section}.{key}": value for key, value in values.items()}
    if unknown := sorted(found.keys() - _KNOWN):
        near = difflib.get_close_matches(unknown[0], sorted(_KNOWN), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SettingsError(f"{origin}: the published code has no setting {unknown[0]}{hint}")
    if missing := sorted(_KNOWN - found.keys() - _UNUSED - _ONLY.keys()):
        raise SettingsError(f"{origin} lacks {', '.join(missing)}, which the published code needs")
    return {**{key: value for key, (value, _) in _ONLY.items()}, **found}


def _model(theirs: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The registered model with the file's sizes, which are given where they are not its own."""
    name, patch, image = (
        theirs[key] for key in ("meta.model_name", "mask.patch_size", "data.crop_size")
    )
    if name not in _MODELS:
        raise SettingsError(
            f"{origin}: meta.model_name is {name}; the known ones are {', '.join(_MODELS)}"
        )
    variants = _MODELS[name]
    ours = next((v for v in variants if v[1:] == (patch, image)), variants[0])
    sizes = {
        "patch_size": (patch, ours[1]),
        "img_size": (image, ours[2]),
        "predictor_embed_dim": (theirs["meta.pred_emb_dim"], PREDICTORS[ours[0]]["embed_dim"]),
        "predictor_depth": (theirs["meta.pred_depth"], PREDICTORS[ours[0]]["depth"]),
    }
    given = {f"model.{key}": value for key, (value, own) in sizes.items() if value != own}
    return {"model.name": ours[0], **given}
