"""Recipes, files and `key=value` changes become settings; what cannot be meant is refused."""

import math
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import ijepa_zoo
from ijepa_zoo.train import settings
from ijepa_zoo.train.config import (
    DataConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    Schedule,
)

RECIPES = Path(ijepa_zoo.__file__).parent / "train" / "recipes"


def load(*changes, recipe="vith14_in1k"):
    return settings.load_config(recipe, changes)


def write(folder, text):
    path = folder / "own.yaml"
    path.write_text(text)
    return path


def test_recipes_are_those_of_the_folder_and_say_what_they_are_for():
    assert settings.recipes() == sorted(path.stem for path in RECIPES.iterdir())
    table = dict(settings.recipe_table())
    assert list(table) == settings.recipes()
    assert all(20 < len(line) < 90 for line in table.values())


@pytest.mark.parametrize("name", settings.recipes())
def test_every_recipe_is_usable_and_survives_being_written(name):
    config = settings.load_config(name)
    settings.check(config)
    text = settings.dump(config)
    assert settings.parse(text, "config.yaml") == config
    assert settings.dump(settings.parse(text, "config.yaml")) == text
    header = (RECIPES / f"{name}.yaml").read_text().split("\n")[1:]
    comment = " ".join(line for line in header if line.startswith("#"))
    assert "ardware" in comment or "GPU" in comment


def test_published_runs():
    """The table of the published recipes (paper and published configurations), written out."""
    table = {
        "vith14_in1k": ("vit_huge14_ijepa", 128, "300 epochs", "40 epochs"),
        "vith16_448_in1k": ("vit_huge16_448_ijepa", 16, "300 epochs", "40 epochs"),
        "vith14_in22k": ("vit_huge14_ijepa", 32, "66 epochs", "3 epochs"),
        "vitg16_in22k": ("vit_giant16_ijepa", 16, "44 epochs", "3 epochs"),
        "vitl16_in1k": ("vit_large16_ijepa", 128, "600 epochs", "40 epochs"),
        "vitb16_in1k": ("vit_base16_ijepa", 128, "600 epochs", "40 epochs"),
    }
    for name, (model, cut, duration, warmup) in table.items():
        config = settings.load_config(name)
        assert config.model == ModelConfig(name=model)
        assert config.data == DataConfig(
            crop_scale=(0.3, 1.0), crop_ratio=(3 / 4, 4 / 3), horizontal_flip=False,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), held_out=512,
        )  # fmt: skip
        assert config.mask == MaskConfig(
            mode="published", cut=cut, num_targets=4, target_scale=(0.15, 0.2),
            target_aspect=(0.75, 1.5), context_scale=(0.85, 1.0), min_keep=10, allow_overlap=False,
        )  # fmt: skip
        assert config.optim == OptimConfig(
            batch_size=2048, duration=duration, warmup=warmup, schedule_scale=1.0, start_lr=2e-4,
            lr=1e-3, final_lr=1e-6, weight_decay=0.04, final_weight_decay=0.4,
            weight_decay_schedule="cosine", momentum=0.996, final_momentum=1.0, loss="smooth_l1",
            regularizer_weight=0.0, precision="bf16",
        )  # fmt: skip
        assert config.machine.parallel == ("fsdp2" if "vitg" in name else "ddp")
    assert settings.load_config("vith14_in1k") == PretrainConfig()


def test_the_papers_text_is_a_recipe_of_its_own():
    differing = settings.differences(load(), load(recipe="vith14_in1k_paper"))
    assert sorted(differing) == [
        "optim.loss: smooth_l1 then, l2 now",
        "optim.start_lr: 0.0002 then, 0.0001 now",
        "optim.warmup: 40 epochs then, 15 epochs now",
        "optim.weight_decay_schedule: cosine then, linear now",
    ]


def test_the_shipped_models_recipe_runs_its_3000_steps():
    config = settings.load_config("nano_scenes")
    schedule = Schedule.of(config.optim, 40_000)
    assert (schedule.steps, schedule.warmup_steps) == (3000, 100)
    assert schedule.rates(99)["lr"] == pytest.approx(4e-4)
    assert schedule.rates(2999) == pytest.approx(
        {"lr": 2e-5, "weight_decay": 0.1, "momentum": 0.99 + 2999 / 3000 * 0.01}
    )


@pytest.mark.parametrize(
    ("change", "section", "name", "value"),
    [
        ("optim.lr=5e-4", "optim", "lr", 5e-4),  # YAML 1.1 reads these two as text
        ("optim.lr=1e8", "optim", "lr", 1e8),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("optim.batch_size=4.096e3", "optim", "batch_size", 4096),
        ("optim.duration=1e8 images", "optim", "duration", "1e8 images"),
        ("mask.target_scale=0.1,0.2", "mask", "target_scale", (0.1, 0.2)),
        ("mask.target_scale=[0.1, 0.2]", "mask", "target_scale", (0.1, 0.2)),
        ("mask.target_scale=(1e-1, 2e-1)", "mask", "target_scale", (0.1, 0.2)),
        ("data.mean=0.5", "data", "mean", (0.5,)),
        ("mask.cut=global", "mask", "cut", "global"),
        ("mask.cut=64", "mask", "cut", 64),
        ("model.img_size=448", "model", "img_size", 448),
        ("model.img_size=null", "model", "img_size", None),
        ("log.keep_every=50 epochs", "log", "keep_every", "50 epochs"),
        ("machine.compile=true", "machine", "compile", True),
        ("data.horizontal_flip=yes", "data", "horizontal_flip", True),
    ],
)
def test_changes_on_the_command_line(change, section, name, value):
    found = getattr(getattr(load(change), section), name)
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, tuple):
        assert all(type(part) is float for part in found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.lrr=3", "optim.lr"),
        ("lr=5e-4", "did you mean optim.lr?"),
        ("masks.cut=3", "did you mean mask.cut?"),
        ("optim=3", "optim is a section, with optim.batch_size, optim.duration"),
        ("optim.xyz=1", "there are optim.batch_size, optim.duration"),
        ("optim.lr=fast", "optim.lr is fast; it must be a number"),
        ("optim.lr=", "optim.lr is null; it must be a number"),
        ("optim.lr=nan", "it must be a number"),
        ("optim.batch_size=2.5", "optim.batch_size is 2.5; it must be a whole number"),
        ("optim.batch_size=true", "optim.batch_size is true; it must be a whole number"),
        ("machine.workers=auto", "it must be a whole number or null"),
        ("machine.compile=1", "it must be true or false"),
        ("optim.loss=l1", "optim.loss is l1; it must be smooth_l1 or l2"),
        ("mask.cut=all", "it must be a whole number or global"),
        ("data.crop_scale=0.3", "it must be two numbers such as"),
        ("data.crop_scale=[0.3, 1, 2]", "it must be two numbers such as"),
        ("data.mean=[]", "it must be numbers such as"),
        ("optim.duration=300", "it must be a duration such as '300 epochs'"),
        ("fast", "write fast=VALUE"),
    ],
)
def test_unknown_names_and_wrong_types_are_refused(change, words):
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        load(change)
    assert change in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.lr=0", "optim.lr is 0.0; it must be more than 0"),
        ("optim.start_lr=-1", "optim.start_lr is -1.0; it must be 0 or more"),
        ("optim.momentum=1.1", "optim.momentum is 1.1; it must be between 0 and 1"),
        ("data.max_broken=-0.1", "it must be between 0 and 1"),
        ("optim.batch_size=0", "it must be at least 1"),
        ("machine.micro_batch_size=0", "it must be at least 1"),
        ("machine.workers=-1", "it must be 0 or more"),
        ("log.keep=0", "it must be at least 1"),
        ("mask.per_image=0", "it must be at least 1"),
        ("mask.per_image=65", "it must be at most 64"),
        ("optim.target_layers=0", "it must be at least 1"),
        ("optim.target_norm=batch", "it must be layer or instance or position"),
        ("optim.position_noise=-1", "it must be 0 or more"),
        ("optim.position_noise=1e30", "it must be at most 10"),
        ("optim.regularizer=vicreg", "it must be variance_covariance or isotropic_gaussian"),
        ("model.predictor_context=once", "it must be repeated or shared or null"),
        ("data.crop_scale=0.5,1.5", "it must be 0 < min <= max <= 1"),
        ("mask.target_aspect=2,1", "it must be 0 < min <= max"),
        ("mask.target_aspect=1,1e308", "must be between 0.001 and 1000"),
        ("data.crop_ratio=1e-4,1", "must be between 0.001 and 1000"),
        ("optim.duration=0 epochs", "it must be more than 0"),
        ("optim.duration=1e400 epochs", "optim.duration: "),
        ("optim.warmup=2 weeks", "optim.warmup: '2 weeks' is no duration"),
        ("log.keep_every=0 steps", "it must be more than 0"),
        ("data.std=0", "data.std is [0.0]; every value must be more than 0"),
        ("data.mean=0.5,0.5", "data.mean has 2 values for images of 3 channels"),
        ("model.in_chans=4", "data.mean has 3 values for images of 4 channels"),
        ("model.name=vit_hug14_ijepa", "did you mean vit_huge14_ijepa?"),
        ("model.name=vit_huge14_ijepa.in1k", "--init vit_huge14_ijepa.in1k"),
        ("optim.batch_size=1000", "mask.cut=128 does not divide optim.batch_size=1000"),
        ("mask.cut=0", "mask.cut is 0; it must be at least 1, or global"),
    ],
)
def test_values_that_no_run_can_use_are_refused(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load(change)


def test_sizes_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match=r"multiple of model\.patch_size=16; 208 is one"):
        load("model.img_size=220", "model.patch_size=16")
    with pytest.raises(ValueError, match=r"multiple of model\.num_heads=7"):
        load("model.embed_dim=48", "model.num_heads=7")
    with pytest.raises(ValueError, match=r"mask\.cut=2 or more"):
        load("optim.regularizer_weight=1", "mask.cut=1")
    with pytest.raises(ValueError, match=r"regularizer_weight needs the 128 images"):
        load("optim.regularizer_weight=1", "machine.micro_batch_size=64")
    with pytest.raises(ValueError, match=r"target_norm=position compares the images of mask.cut"):
        load("optim.target_norm=position", "mask.cut=1")
    with pytest.raises(ValueError, match=r"target_norm=position needs the 128 images"):
        load("optim.target_norm=position", "machine.micro_batch_size=64")


def test_changes_from_python_leave_the_settings_as_they_were():
    before = PretrainConfig()
    now = settings.override(before, "seed=7", **{"optim.lr": 5e-4, "mask.target_scale": [0.1, 0.2]})
    assert before == PretrainConfig()
    assert (now.seed, now.optim.lr, now.mask.target_scale) == (7, 5e-4, (0.1, 0.2))
    assert replace(now.optim, lr=1e-3) == before.optim
    with pytest.raises(ValueError, match=r"optim\.lr"):
        settings.override(before, **{"optim.lrs": 5e-4})


def test_settings_made_in_python_are_checked_too():
    settings.check(
        PretrainConfig(optim=OptimConfig(lr=np.float64(1e-3)), data=DataConfig(mean=[0.5]))
    )
    for wrong, words in (
        (OptimConfig(lr="5e-4"), "optim.lr is '5e-4'; it must be a number"),
        (OptimConfig(loss="l1"), "optim.loss is 'l1'; it must be smooth_l1 or l2"),
        (OptimConfig(lr=math.nan), "optim.lr is nan; it must be a number"),
        (OptimConfig(duration=300), "optim.duration is 300; it must be a duration such as"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            settings.check(PretrainConfig(optim=wrong))
    config = PretrainConfig(optim=OptimConfig(lr=np.float32(0.5)), data=DataConfig(mean=[0.5]))
    assert settings.parse(settings.dump(config), "x").optim.lr == 0.5


def test_own_file_builds_on_a_recipe(tmp_path):
    path = write(
        tmp_path, "recipe: nano_scenes\nseed: 3\noptim:\n  lr: 5e-4\nmask:\nlog: {keep: 5}\n"
    )
    config = settings.load_config(path, ["optim.lr=6e-4"])
    assert settings.differences(load(recipe="nano_scenes"), config, result_only=False) == [
        "seed: 0 then, 3 now",
        "optim.lr: 0.0004 then, 0.0006 now",
        "log.keep: 2 then, 5 now",
    ]
    assert settings.load_config(write(tmp_path, "seed: 3\n")) == replace(PretrainConfig(), seed=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lrr: 1}", "there is no setting optim.lrr"),
        ("optim: {lr: 1, lr: 2}", "lr is given twice"),
        ("optim: 3", "optim is a section"),
        ("optim: [", "is no YAML file"),
        ("- 3", "must hold names and values"),
        ("1: 2", "must hold names and values"),
        ("recipe: nano_scene", "did you mean nano_scenes?"),
        ("recipe: [1]", "no recipe and no file"),
        ("seed: !!python/name:os.system", "is no YAML file"),
    ],
)
def test_broken_files_are_named(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"own\.yaml") as refused:
        settings.load_config(path)
    assert words in str(refused.value)


def test_names_that_are_neither_recipe_nor_file(tmp_path):
    with pytest.raises(ValueError, match="did you mean vith14_in1k"):
        settings.load_config("vith14-in1k")
    with pytest.raises(ValueError, match="there is no file"):
        settings.load_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        settings.load_config(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text file"):
        settings.load_config(tmp_path / "image.yaml")


def test_dump_names_every_setting():
    tree = yaml.safe_load(settings.dump(load("optim.lr=5e-4", "model.img_size=196")))
    assert list(tree) == ["seed", "model", "data", "mask", "optim", "log", "machine"]
    assert tree["optim"]["lr"] == 5e-4
    assert tree["model"]["img_size"] == 196
    assert tree["data"]["crop_ratio"] == [3 / 4, 4 / 3]
    for name, section in tree.items():
        own = getattr(PretrainConfig(), name)
        assert not is_dataclass(own) or [field.name for field in fields(own)] == list(section)


def test_differences_leave_out_what_may_change():
    before = load()
    now = load("machine.workers=3", "log.keep=9", "data.max_broken=0.5", "data.held_out=0")
    assert settings.differences(before, now) == ["data.held_out: 512 then, 0 now"]
    assert len(settings.differences(before, now, result_only=False)) == 4
    assert settings.differences(before, load()) == []


def test_explained_settings_are_the_settings_with_their_meaning():
    config = load("optim.lr=3e-4", recipe="nano_scenes")
    text = settings.explained(config)
    assert settings.parse(text, "text") == config
    assert "# `cut` says which images share the length of their contexts" in text
