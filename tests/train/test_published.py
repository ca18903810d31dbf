"""Files of the published code give the same run as our recipes, or are refused by name."""

import copy
import re

import pytest
import yaml

from ijepa_zoo.train import settings
from ijepa_zoo.train.config import PretrainConfig

# keys and values of the published in1k_vith14_ep300.yaml
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


def published(folder, **changes):
    """A file of the published form; changes are written `section__key=value`."""
    content = copy.deepcopy(H14)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        content.setdefault(section, {})[key] = value
    path = folder / "published.yaml"
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
def test_published_files_give_the_recipes_run(tmp_path, recipe, gpus, changes):
    config = settings.load_config(published(tmp_path, **changes), world=gpus)
    assert settings.differences(settings.load_config(recipe), config) == []
    assert config.machine.workers == 10


def test_values_reach_the_setting_of_the_same_meaning(tmp_path):
    path = published(
        tmp_path, data__use_horizontal_flip=True, meta__use_bfloat16=False, mask__min_keep=4,
        mask__num_pred_masks=3, mask__aspect_ratio=[0.5, 2], mask__allow_overlap=True,
        mask__enc_mask_scale=[0.5, 0.9], mask__pred_mask_scale=[0.1, 0.3],
        optimization__ema=[0.99, 0.999], optimization__ipe_scale=1.25, optimization__warmup=2.5,
        optimization__lr="5e-4",
        optimization__start_lr=1e-5, optimization__final_lr=2e-6, optimization__weight_decay=0.1,
        optimization__final_weight_decay=0.2, data__crop_scale=[0.2, 0.9],
    )  # fmt: skip
    config = settings.load_config(path, ["seed=5"], world=2)
    assert dict(line.split(": ") for line in settings.differences(PretrainConfig(), config)) == {
        "seed": "0 then, 5 now",
        "data.crop_scale": "[0.3, 1.0] then, [0.2, 0.9] now",
        "data.horizontal_flip": "false then, true now",
        "mask.num_targets": "4 then, 3 now",
        "mask.target_scale": "[0.15, 0.2] then, [0.1, 0.3] now",
        "mask.target_aspect": "[0.75, 1.5] then, [0.5, 2.0] now",
        "mask.context_scale": "[0.85, 1.0] then, [0.5, 0.9] now",
        "mask.min_keep": "10 then, 4 now",
        "mask.allow_overlap": "false then, true now",
        "optim.batch_size": "2048 then, 256 now",
        "optim.warmup": "40 epochs then, 2.5 epochs now",
        "optim.schedule_scale": "1.0 then, 1.25 now",
        "optim.start_lr": "0.0002 then, 1e-05 now",
        "optim.lr": "0.001 then, 0.0005 now",
        "optim.final_lr": "1e-06 then, 2e-06 now",
        "optim.weight_decay": "0.04 then, 0.1 now",
        "optim.final_weight_decay": "0.4 then, 0.2 now",
        "optim.momentum": "0.996 then, 0.99 now",
        "optim.final_momentum": "1.0 then, 0.999 now",
        "optim.precision": "bf16 then, fp32 now",
    }


def test_other_sizes_are_given_to_the_model(tmp_path):
    path = published(
        tmp_path, meta__model_name="vit_small", mask__patch_size=8, data__crop_size=96,
        meta__pred_depth=3, meta__pred_emb_dim=192,
    )  # fmt: skip
    model = settings.load_config(path).model
    assert (model.name, model.patch_size, model.img_size) == ("vit_small16_ijepa", 8, 96)
    assert (model.predictor_depth, model.predictor_embed_dim) == (3, 192)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__use_gaussian_blur": True}, "data.use_gaussian_blur is True, which is not"),
        ({"data__use_color_distortion": True}, "data.use_color_distortion is True"),
        ({"mask__num_enc_masks": 2}, "mask.num_enc_masks is 2, which is not supported"),
        ({"meta__load_checkpoint": True}, "meta.load_checkpoint is True"),
        ({"meta__read_checkpoint": "a.pth.tar"}, "--init"),
        ({"meta__model_name": "vit_enormous"}, "meta.model_name is vit_enormous"),
        ({"optimization__lrr": 1}, "no setting optimization.lrr; did you mean optimization.lr?"),
        ({"extra__key": 1}, "extra, which is none of them"),
        ({"optimization__lr": "fast"}, "optim.lr is fast; it must be a number"),
        ({"data__batch_size": "many"}, "data.batch_size is many"),
        ({"optimization__ema": 0.996}, "optimization.ema 0.996"),
        ({"optimization__epochs": 0}, "optim.duration is '0 epochs'; it must be more than 0"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(tmp_path, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        settings.load_config(published(tmp_path, **changes))


def test_missing_keys_are_named(tmp_path):
    content = copy.deepcopy(H14)
    del content["optimization"]["lr"], content["data"]["crop_scale"]
    path = tmp_path / "cut.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"cut\.yaml lacks data\.crop_scale, optimization\.lr"):
        settings.load_config(path)


def test_places(tmp_path):
    places = settings.published_places(published(tmp_path))
    assert places.data == "/data/imagenet_full_size/061417/train"
    assert places.out == "/logs/h14/"
    own = tmp_path / "own.yaml"
    own.write_text("seed: 1")
    assert settings.published_places(own) is None
