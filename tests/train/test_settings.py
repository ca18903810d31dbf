"""Recipes, files and `key=value` changes become settings; what cannot be meant is refused."""

import re
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_zoo.errors import SettingsError
from ijepa_zoo.train import PretrainConfig, describe_config, load_config, override, recipe_table
from ijepa_zoo.train.config import micro_batch_size, named_values, parse_config, steps_of
from ijepa_zoo.train.folder import differences

NAMES = list(named_values(PretrainConfig()))


def load(*changes, recipe="vith14_in1k"):
    return load_config(recipe, changes)


@pytest.mark.parametrize(("name", "purpose"), recipe_table())
def test_every_recipe_survives_being_written(name, purpose):
    config = load_config(name)
    text = describe_config(config)
    assert parse_config(text, "config.yaml") == config
    assert len(purpose) > 20
    for setting in NAMES:
        assert re.search(rf"# .*\n *{setting.rpartition('.')[2]}: ", text)


def test_recipes_of_the_paper():
    """The table of the paper and the official configurations, written out."""
    h14 = {
        "data.crop_scale": (0.3, 1.0), "data.crop_ratio": (3 / 4, 4 / 3),
        "data.horizontal_flip": False, "data.mean": (0.485, 0.456, 0.406),
        "data.std": (0.229, 0.224, 0.225), "mask.mode": "published", "mask.num_targets": 4,
        "mask.target_scale": (0.15, 0.2), "mask.target_aspect": (0.75, 1.5),
        "mask.context_scale": (0.85, 1.0), "mask.min_keep": 10, "mask.allow_overlap": False,
        "optim.batch_size": 2048, "optim.schedule_scale": 1.0, "optim.start_lr": 2e-4,
        "optim.lr": 1e-3, "optim.final_lr": 1e-6, "optim.weight_decay": 0.04,
        "optim.final_weight_decay": 0.4, "optim.weight_decay_schedule": "cosine",
        "optim.momentum": 0.996, "optim.final_momentum": 1.0, "optim.loss": "smooth_l1",
        "optim.regularizer_weight": 0.0, "optim.precision": "bf16",
    }  # fmt: skip
    assert named_values(PretrainConfig()).items() >= h14.items()
    table = {
        "vith14_in1k": ("vit_huge14_ijepa", 128, "300 epochs", "40 epochs"),
        "vith16_448_in1k": ("vit_huge16_448_ijepa", 16, "300 epochs", "40 epochs"),
        "vith14_in22k": ("vit_huge14_ijepa", 32, "66 epochs", "3 epochs"),
        "vitg16_in22k": ("vit_giant16_ijepa", 16, "44 epochs", "3 epochs"),
        "vitl16_in1k": ("vit_large16_ijepa", 128, "600 epochs", "40 epochs"),
        "vitb16_in1k": ("vit_base16_ijepa", 128, "600 epochs", "40 epochs"),
    }
    names = ("model.name", "mask.group_size", "optim.duration", "optim.warmup")
    for name, values in table.items():
        expected = override(PretrainConfig(), **dict(zip(names, values)))
        assert differences(expected, load_config(name)) == []
    changed = [line.split(":")[0] for line in differences(load(), load(recipe="vith14_in1k_paper"))]
    paper = ["optim.warmup", "optim.start_lr", "optim.weight_decay_schedule", "optim.loss"]
    assert changed == paper


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("optim.lr=5e-4", 5e-4),  # text to PyYAML
        ("optim.duration=1e8 images", "1e8 images"),
        ("mask.target_scale=0.1,0.2", (0.1, 0.2)),
        ("data.mean=0.5", (0.5,)),
        ("mask.group_size=global", "global"),
        ("model.img_size=null", None),
        ("model.img_size=256,512", (256, 512)),
        ("runtime.compile=true", True),
        ("log.to=wandb", ("wandb",)),
    ],
)
def test_changes_on_the_command_line(change, value):
    found = named_values(load(change))[change.partition("=")[0]]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("lr=5e-4", "optim.lr"),
        ("machine.workers=3", "runtime.workers"),  # its name in version 0.1
        ("optim.lr=fast", "optim.lr is 'fast'"),
        ("optim.lr=true", "optim.lr is True"),
        ("data.crop_scale=1,0.3", "data.crop_scale is '1,0.3': The first number"),
        ("data.crop_scale=0.5,1.5", "data.crop_scale is '0.5,1.5'"),
        ("data.crop_scale=0.3", "data.crop_scale is 0.3: Input should be two numbers such as"),
        ("optim.duration=300 lessons", "'300 epochs'"),
        ("optim.duration=20", "'300 epochs'"),
        ("model.name=vit_hug14_ijepa", "vit_huge14_ijepa"),
        ("model.name=vit_huge14_ijepa.in1k", "--init"),
        ("optim.batch_size=1000", "mask.group_size=128"),
        ("fast", "fast=VALUE"),
    ],
)
def test_what_is_unknown_or_wrong_is_refused(change, named):
    with pytest.raises(SettingsError, match=re.escape(named)):
        load(change)


def test_micro_batches_divide_group_and_share():
    config = load("optim.batch_size=96", "mask.group_size=48", "runtime.micro_batch_size=20")
    assert micro_batch_size(config, world=1) == 16
    assert micro_batch_size(config, world=8) == 12
    with pytest.raises(SettingsError, match="7"):
        micro_batch_size(config, world=7)
    with pytest.raises(SettingsError, match=r"mask\.group_size=64"):  # the term needs a whole group
        load("optim.regularizer_weight=1", "runtime.micro_batch_size=64")
    load("optim.regularizer_weight=1", "mask.group_size=1")


def test_durations_in_steps():
    durations = {"7 steps": 7, "1 step": 1, "2.5 epochs": 25, "1e2 images": 10, "96 images": 10}
    assert {d: steps_of(d, batch_size=10, images=109) for d in durations} == durations


def test_own_file_builds_on_a_recipe_and_broken_ones_are_named(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("recipe: custom_small\nseed: 3\noptim:\n  lr: 5e-4\nmask:\nlog: {keep: 5}\n")
    config = load_config(path, ["optim.lr=6e-4"])
    assert config.log.keep == 5
    assert differences(load(recipe="custom_small"), config) == [
        "seed: 0 then, 3 now",
        "optim.lr: 0.0004 then, 0.0006 now",
    ]
    path.write_text("seed: 3\n")
    assert load_config(path) == PretrainConfig(seed=3)
    for text, named in (("optim: {lrr: 1}", "optim.lrr"), ("optim: [", "own.yaml"),
                        ("optim: {lr: 1}\nseed: 1\noptim: {}", "optim is given twice"),
                        ("optim: {lr: 1, lr: 2}", "lr is given twice"),
                        ("recipe: custom_smal", "custom_small")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(SettingsError, match=re.escape(named)):
            load_config(path)
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from([*NAMES, "optim", "x", "", "a.b.c", "recipe", "meta.x"]),
    st.text(max_size=6) | st.sampled_from(["!!bool x", "&a [*a]", "[[", "<<: ", "1e400", "1:30"]),
)
def test_any_text_is_a_setting_or_refused(name, text):
    for parse in (
        lambda: override(PretrainConfig(), f"{name}={text}"),
        lambda: parse_config(f"{name}: {text}", "file"),
    ):
        with suppress(SettingsError):
            assert isinstance(parse(), PretrainConfig)
