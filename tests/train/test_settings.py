"""Recipes, files and `key=value` changes become settings; what cannot be meant is refused."""

import random
import re
from pathlib import Path

import numpy as np
import pydantic
import pytest
import yaml

import ijepa_zoo
from ijepa_zoo.errors import SettingsError
from ijepa_zoo.train import settings
from ijepa_zoo.train.config import (
    DataConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RuntimeConfig,
    micro_batch_size,
)

RECIPES = Path(ijepa_zoo.__file__).parent / "train" / "recipes"


def load(*changes, recipe="vith14_in1k"):
    return settings.load_config(recipe, changes)


def write(folder, text):
    path = folder / "own.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", settings.recipes())
def test_every_recipe_survives_being_written(name):
    config = settings.load_config(name)
    for text in (settings.dump(config), settings.explained(config)):
        assert settings.parse(text, "config.yaml") == config
    assert 20 < len(dict(settings.recipe_table())[name]) < 90
    assert "ardware" in (RECIPES / f"{name}.yaml").read_text()


def test_recipes_of_the_paper():
    """The table of the paper and the official configurations, written out."""
    table = {
        "vith14_in1k": ("vit_huge14_ijepa", 128, "300 epochs", "40 epochs"),
        "vith16_448_in1k": ("vit_huge16_448_ijepa", 16, "300 epochs", "40 epochs"),
        "vith14_in22k": ("vit_huge14_ijepa", 32, "66 epochs", "3 epochs"),
        "vitg16_in22k": ("vit_giant16_ijepa", 16, "44 epochs", "3 epochs"),
        "vitl16_in1k": ("vit_large16_ijepa", 128, "600 epochs", "40 epochs"),
        "vitb16_in1k": ("vit_base16_ijepa", 128, "600 epochs", "40 epochs"),
    }
    for name, (model, group_size, duration, warmup) in table.items():
        parallel = "fsdp2" if name == "vitg16_in22k" else "ddp"
        assert settings.load_config(name) == PretrainConfig(
            model=ModelConfig(name=model),
            data=DataConfig(
                crop_scale=(0.3, 1.0), crop_ratio=(3 / 4, 4 / 3), horizontal_flip=False,
                mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), held_out=512,
            ),
            mask=MaskConfig(
                mode="published", group_size=group_size, num_targets=4, target_scale=(0.15, 0.2),
                target_aspect=(0.75, 1.5), context_scale=(0.85, 1.0), min_keep=10,
                allow_overlap=False,
            ),
            optim=OptimConfig(
                batch_size=2048, duration=duration, warmup=warmup, schedule_scale=1.0,
                start_lr=2e-4, lr=1e-3, final_lr=1e-6, weight_decay=0.04, final_weight_decay=0.4,
                weight_decay_schedule="cosine", momentum=0.996, final_momentum=1.0,
                loss="smooth_l1", regularizer_weight=0.0, precision="bf16",
            ),
            runtime=RuntimeConfig(parallel=parallel),
        )  # fmt: skip
    assert settings.load_config("vith14_in1k") == PretrainConfig()
    assert settings.differences(load(), load(recipe="vith14_in1k_paper")) == [
        "optim.warmup: 40 epochs then, 15 epochs now",
        "optim.start_lr: 0.0002 then, 0.0001 now",
        "optim.weight_decay_schedule: cosine then, linear now",
        "optim.loss: smooth_l1 then, l2 now",
    ]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("optim.lr=5e-4", 5e-4),  # PyYAML reads these three as text
        ("optim.lr=1e8", 1e8),
        ("optim.batch_size=4.096e3", 4096),
        ("optim.lr=1", 1.0),
        ("optim.duration=1e8 images", "1e8 images"),
        ("mask.target_scale=0.1,0.2", (0.1, 0.2)),
        ("mask.target_scale=[0.1, 0.2]", (0.1, 0.2)),
        ("mask.target_scale=(1e-1, 2e-1)", (0.1, 0.2)),
        ("data.mean=0.5", (0.5,)),
        ("mask.group_size=global", "global"),
        ("mask.group_size=64", 64),
        ("model.img_size=null", None),
        ("model.img_size=448", 448),
        ("model.img_size=256,512", (256, 512)),
        ("model.img_size=[256, 512]", (256, 512)),
        ("log.keep_every=50 epochs", "50 epochs"),
        ("runtime.compile=true", True),
        ("data.horizontal_flip=yes", True),
    ],
)
def test_changes_on_the_command_line(change, value):
    section, name = change.partition("=")[0].split(".")
    found = getattr(getattr(load(change), section), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.lrr=3", "did you mean optim.lr?"),
        ("lr=5e-4", "did you mean optim.lr?"),
        ("machine.workers=3", "runtime"),
        ("mask.cut=3", "mask.group_size"),
        ("log.xyz=1", "log_every, monitor_every"),
        ("optim=3", "optim.NAME"),
        ("optim.lr=fast", "optim.lr is 'fast'"),
        ("optim.lr=", "optim.lr is None"),
        ("optim.lr=nan", "optim.lr is 'nan'"),
        ("optim.lr=.inf", "optim.lr is inf"),
        ("optim.lr=0", "optim.lr is 0"),
        ("optim.lr=true", "optim.lr is True"),
        ("optim.batch_size=true", "optim.batch_size is True"),
        ("optim.batch_size=2.5", "optim.batch_size is 2.5"),
        ("optim.loss=l1", "'smooth_l1' or 'l2'"),
        ("mask.group_size=all", "'global'"),
        ("data.crop_scale=0.3", "data.crop_scale is 0.3"),
        ("data.crop_scale=0.5,1.5", "data.crop_scale is '1.5'"),
        ("mask.target_aspect=2,1", "mask.target_aspect is ['2', '1']"),
        ("optim.duration=300", "'300 epochs'"),
        ("model.name=vit_hug14_ijepa", "did you mean vit_huge14_ijepa?"),
        ("model.name=vit_huge14_ijepa.in1k", "--init"),
        ("model.img_size=[64]", "model.img_size is [64]"),
        ("model.img_size=64,64,64", "model.img_size is '64,64,64'"),
        ("model.img_size=64,0", "model.img_size is '0'"),
        ("model.img_size=64,2.5", "model.img_size is '2.5'"),
        ("model.in_chans=4", "data.mean has 3 values"),
        ("optim.batch_size=1000", "mask.group_size=128"),
        ("fast", "write fast=VALUE"),
    ],
)
def test_what_is_unknown_or_wrong_is_refused(change, words):
    with pytest.raises(SettingsError, match=re.escape(words)):
        load(change)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.img_size=220", "model.patch_size=16"], "model.patch_size=16"),
        (["model.img_size=224,220", "model.patch_size=16"], "model.img_size=224,220"),
        (["model.embed_dim=48", "model.num_heads=7"], "model.num_heads=7"),
        (["optim.regularizer_weight=1", "mask.group_size=1"], "mask.group_size=2"),
        (["optim.regularizer_weight=1", "runtime.micro_batch_size=64"], "the 128 images"),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(changes, words):
    with pytest.raises(SettingsError, match=re.escape(words)):
        load(*changes)


def test_micro_batches_divide_group_and_share():
    config = load("optim.batch_size=96", "mask.group_size=48", "runtime.micro_batch_size=20")
    assert micro_batch_size(config, world=1) == 16
    assert micro_batch_size(config, world=8) == 12
    with pytest.raises(SettingsError, match="not divisible by 7 processes: use 91 or 98"):
        micro_batch_size(config, world=7)


def test_changes_from_python():
    before = PretrainConfig()
    changes = {"optim.lr": np.float64(5e-4), "mask.target_scale": [0.1, 0.2]}
    now = settings.override(before, "seed=7", **changes)
    assert before == PretrainConfig()
    assert (now.seed, now.optim.lr, now.mask.target_scale) == (7, 5e-4, (0.1, 0.2))
    assert settings.parse(settings.dump(now), "x") == now
    for wrong in ({"optim.lrs": 1}, {"optim.lr": True}, {"optim.lr": None}):
        with pytest.raises(SettingsError, match=r"optim\.lr"):
            settings.override(before, **wrong)
    with pytest.raises(pydantic.ValidationError, match="lr"):
        OptimConfig(lr=-1)


def test_own_file_builds_on_a_recipe(tmp_path):
    text = "recipe: nano_scenes\nseed: 3\noptim:\n  lr: 5e-4\nmask:\nlog: {keep: 5}\n"
    config = settings.load_config(write(tmp_path, text), ["optim.lr=6e-4"])
    assert settings.differences(load(recipe="nano_scenes"), config, result_only=False) == [
        "seed: 0 then, 3 now",
        "optim.lr: 0.0004 then, 0.0006 now",
        "log.keep: 2 then, 5 now",
    ]
    assert settings.load_config(write(tmp_path, "seed: 3\n")) == PretrainConfig(seed=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lrr: 1}", "optim.lrr"),
        ("optim: {lr: 1, lr: 2}", "lr is given twice"),
        ("optim: [", "own.yaml is not YAML"),
        ("- 3", "own.yaml must hold names and values"),
        ("1: 2", "own.yaml must hold names and values"),
        ("recipe: nano_scene", "did you mean nano_scenes?"),
        ("recipe: [1]", "own.yaml"),
        ("seed: !!python/name:os.system", "own.yaml is not YAML"),
        ("seed: !!bool x", "own.yaml is not YAML"),
        ("\0", "own.yaml is not YAML"),
    ],
)
def test_broken_files_are_named(tmp_path, text, words):
    with pytest.raises(SettingsError, match=re.escape(words)):
        settings.load_config(write(tmp_path, text))


def test_names_that_are_neither_recipe_nor_file(tmp_path):
    with pytest.raises(SettingsError, match="did you mean vith14_in1k"):
        settings.load_config("vith14-in1k")
    with pytest.raises(SettingsError, match=re.escape(str(tmp_path))):
        settings.load_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        settings.load_config(tmp_path / "none.yaml")
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"image\.yaml"):
        settings.load_config(tmp_path / "image.yaml")


def test_random_texts_are_settings_or_refused():
    rng = random.Random(0)
    names = [*settings.named_values(PretrainConfig()), "seed", "optim", "x", "", "a.b.c", "recipe"]
    pieces = [
        *(
            "1",
            "-1",
            "0.5",
            "1e400",
            "-.inf",
            ".nan",
            "9" * 5000,
            "0x",
            "0b_",
            "1:30",
            "2020-13-45",
        ),
        *(
            "true",
            "null",
            "~",
            "=",
            "<<",
            "*a",
            "&a ",
            "&a [*a]",
            "!!bool x",
            "!!int ",
            "!!float y",
        ),
        *("!!timestamp z", "!!binary é", "!!set {1}", "!!python/object:os.x ", "!", "%", "@", "`"),
        *(
            "[",
            "]",
            "{",
            "}",
            ",",
            ":",
            ": ",
            "? ",
            "- ",
            "#",
            "|",
            ">",
            '"',
            "'",
            "\\",
            "\n",
            "\t",
        ),
        *("\0", "\x85", "\ud800", "😀", "300 epochs", "1e8 images", "global", "[" * 2000, "é" * 99),
    ]
    accepted = 0
    for number in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 4)))
        name = rng.choice(names)
        try:
            if number % 2:
                settings.override(PretrainConfig(), f"{name}={text}")
            else:
                settings.parse(f"{name}: {text}" if rng.random() < 0.5 else text, "file")
            accepted += 1
        except SettingsError:
            pass
    assert 10 < accepted < 1000


def test_differences_leave_out_what_may_change():
    before = load()
    now = load("runtime.workers=3", "log.keep=9", "data.max_broken=0.5", "data.held_out=0")
    assert settings.differences(before, now) == ["data.held_out: 512 then, 0 now"]
    assert len(settings.differences(before, now, result_only=False)) == 4


def test_every_setting_is_explained():
    text = settings.explained(load())
    for name in settings.named_values(PretrainConfig()):
        assert re.search(rf"# .*\n *{name.rpartition('.')[2]}: ", text)
    assert yaml.safe_load(text)["data"]["crop_ratio"] == [3 / 4, 4 / 3]
