"""Files of the official repository give the same run as our recipes, or are refused by name."""

import copy
import re

import pytest
import yaml

from ijepa_zoo.errors import SettingsError
from ijepa_zoo.train.config import PretrainConfig, load_config, named_values
from ijepa_zoo.train.folder import differences

# keys and values of the official in1k_vith14_ep300.yaml
H14 = {
    "data": {
        "batch_size": 128, "color_jitter_strength": 0.0, "crop_scale": [0.3, 1.0], "crop_size": 224,
        "image_folder": "imagenet_full_size/061417/", "num_workers": 10, "pin_mem": True,
        "root_path": "/data", "use_color_distortion": False, "use_gaussian_blur": False,
        "use_horizontal_flip": False,
    },
    "logging": {"folder": "/logs/h14/", "write_tag": "jepa"},
    "mask": {
        "allow_overlap": False, "aspect_ratio": [0.75, 1.5], "enc_mask_scale": [0.85, 1.0],
        "min_keep": 10, "num_enc_masks": 1, "num_pred_masks": 4, "patch_size": 14,
        "pred_mask_scale": [0.15, 0.2],
    },
    "meta": {
        "copy_data": False, "load_checkpoint": False, "model_name": "vit_huge", "pred_depth": 12,
        "pred_emb_dim": 384, "read_checkpoint": None, "use_bfloat16": True,
    },
    "optimization": {
        "ema": [0.996, 1.0], "epochs": 300, "final_lr": 1.0e-06, "final_weight_decay": 0.4,
        "ipe_scale": 1.0, "lr": 0.001, "start_lr": 0.0002, "warmup": 40, "weight_decay": 0.04,
    },
}  # fmt: skip


def official(folder, **changes):
    """An official file; changes are written `section__key=value`, and None removes a key."""
    content = copy.deepcopy(H14)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        content[section][key] = value
        if value is None:
            del content[section][key]
    path = folder / "official.yaml"
    path.write_text("# a comment\n" + yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("recipe", "gpus", "changes"),
    [
        ("vith14_in1k", 16, {}),
        ("vith16_448_in1k", 128,
         {"data__batch_size": 16, "data__crop_size": 448, "mask__patch_size": 16}),
        ("vith14_in22k", 64,
         {"data__batch_size": 32, "optimization__epochs": 66, "optimization__warmup": 3}),
        ("vitg16_in22k", 128,
         {"data__batch_size": 16, "mask__patch_size": 16, "meta__model_name": "vit_giant",
          "meta__pred_depth": 16, "optimization__epochs": 44, "optimization__warmup": 3}),
    ],
)  # fmt: skip
def test_official_files_give_the_recipes_run(tmp_path, recipe, gpus, changes):
    config = load_config(official(tmp_path, **changes), world=gpus)
    assert differences(load_config(recipe), config) == []
    assert config.runtime.workers == 10


CHANGED = {  # theirs: value, ours
    "data__crop_scale": ([0.2, 0.9], "data.crop_scale"),
    "data__crop_size": (96, "model.img_size"),
    "data__use_horizontal_flip": (True, "data.horizontal_flip"),
    "mask__allow_overlap": (True, "mask.allow_overlap"),
    "mask__aspect_ratio": ([0.5, 2.0], "mask.target_aspect"),
    "mask__enc_mask_scale": ([0.5, 0.9], "mask.context_scale"),
    "mask__min_keep": (4, "mask.min_keep"),
    "mask__num_pred_masks": (3, "mask.num_targets"),
    "mask__patch_size": (8, "model.patch_size"),
    "mask__pred_mask_scale": ([0.1, 0.3], "mask.target_scale"),
    "meta__pred_depth": (3, "model.predictor_depth"),
    "meta__pred_emb_dim": (192, "model.predictor_embed_dim"),
    "optimization__final_lr": (2e-6, "optim.final_lr"),
    "optimization__final_weight_decay": (0.2, "optim.final_weight_decay"),
    "optimization__ipe_scale": (1.25, "optim.schedule_scale"),
    "optimization__lr": (5e-4, "optim.lr"),
    "optimization__start_lr": (1e-5, "optim.start_lr"),
    "optimization__weight_decay": (0.1, "optim.weight_decay"),
}


def test_values_reach_the_setting_of_the_same_meaning(tmp_path):
    theirs = {name: value for name, (value, _) in CHANGED.items()}
    theirs |= {"meta__use_bfloat16": False, "optimization__warmup": 2.5}
    path = official(tmp_path, **theirs, optimization__ema=[0.99, 0.999])
    before = named_values(PretrainConfig())
    now = named_values(load_config(path, ["seed=5"], world=2)).items()
    expected = {ours: tuple(v) if isinstance(v, list) else v for v, ours in CHANGED.values()}
    assert {name: value for name, value in now if value != before[name]} == expected | {
        "seed": 5, "optim.batch_size": 256, "optim.warmup": "2.5 epochs", "optim.momentum": 0.99,
        "optim.final_momentum": 0.999, "optim.precision": "fp32", "runtime.workers": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__use_gaussian_blur": True}, "data.use_gaussian_blur"),
        ({"meta__model_name": "vit_enormous"}, "vit_enormous"),
        ({"optimization__lrr": 1}, "optimization.lrr"),
        ({"optimization__lr": None}, "official.yaml lacks optimization.lr"),
        ({"optimization__ema": 0.996}, "optimization.ema"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(SettingsError, match=re.escape(named)):
        load_config(official(tmp_path, **changes))
