"""Recipes, files and `key=value` changes become settings; what cannot be meant is refused."""

import random
import re

import numpy as np
import pydantic
import pytest

from ijepa_zoo.errors import SettingsError
from ijepa_zoo.train.config import (
    DataConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RuntimeConfig,
    describe_config,
    differences,
    dump_config,
    load_config,
    micro_batch_size,
    named_values,
    override,
    parse_config,
    recipe_table,
    steps_of,
)

NAMES = list(named_values(PretrainConfig()))


def load(*changes, recipe="vith14_in1k"):
    return load_config(recipe, changes)


def write(folder, text):
    path = folder / "own.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("name", "purpose"), recipe_table())
def test_every_recipe_survives_being_written(name, purpose):
    config = load_config(name)
    assert parse_config(dump_config(config), "config.yaml") == config
    assert parse_config(describe_config(config), "config.yaml") == config
    assert len(purpose) > 20


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
        assert load_config(name) == PretrainConfig(
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
    assert load_config("vith14_in1k") == PretrainConfig()
    assert differences(load(), load(recipe="vith14_in1k_paper")) == [
        "optim.warmup: 40 epochs then, 15 epochs now",
        "optim.start_lr: 0.0002 then, 0.0001 now",
        "optim.weight_decay_schedule: cosine then, linear now",
        "optim.loss: smooth_l1 then, l2 now",
    ]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("optim.lr=5e-4", 5e-4),  # text to PyYAML
        ("optim.lr=1", 1.0),
        ("optim.duration=1e8 images", "1e8 images"),
        ("mask.target_scale=0.1,0.2", (0.1, 0.2)),
        ("mask.target_scale=[1e-1, 0.2]", (0.1, 0.2)),
        ("data.mean=0.5", (0.5,)),
        ("mask.group_size=global", "global"),
        ("mask.group_size=64", 64),
        ("model.img_size=null", None),
        ("model.img_size=448", 448),
        ("model.img_size=256,512", (256, 512)),
        ("runtime.compile=true", True),
        ("log.to=wandb", ("csv", "wandb")),
    ],
)
def test_changes_on_the_command_line(change, value):
    found = named_values(load(change))[change.partition("=")[0]]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.lrr=3", "optim.lr"),
        ("lr=5e-4", "optim.lr"),
        ("log.xyz=1", "log.monitor_every"),
        ("optim=3", "optim.lr"),
        ("xyz=1", "optim.lr"),
        ("machine.workers=3", "runtime.workers"),  # names of version 0.1
        ("mask.cut=3", "mask.group_size"),
        ("optim.lr=fast", "optim.lr is 'fast'"),
        ("optim.lr=", "optim.lr is None"),
        ("optim.lr=nan", "optim.lr is 'nan'"),
        ("optim.lr=.inf", "optim.lr is inf"),
        ("optim.lr=0", "optim.lr is 0"),
        ("optim.lr=true", "optim.lr is True"),
        ("optim.batch_size=true", "optim.batch_size is True"),
        ("optim.batch_size=2.5", "optim.batch_size is 2.5"),
        ("optim.loss=l1", "'smooth_l1' or 'l2'"),
        ("log.to=csv,file", "'tensorboard'"),
        ("mask.group_size=all", "'global'"),
        ("data.crop_scale=0.3", "data.crop_scale is 0.3"),
        ("data.crop_scale=0.5,1.5", "data.crop_scale is '0.5,1.5'"),
        ("mask.target_aspect=2,1", "mask.target_aspect is '2,1'"),
        ("optim.duration=300", "'300 epochs'"),
        ("model.name=vit_hug14_ijepa", "vit_huge14_ijepa"),
        ("model.name=vit_huge14_ijepa.in1k", "--init"),
        ("model.img_size=64,64,64", "model.img_size is '64,64,64'"),
        ("optim.batch_size=1000", "mask.group_size=128"),
        ("fast", "fast=VALUE"),
    ],
)
def test_what_is_unknown_or_wrong_is_refused(change, words):
    with pytest.raises(SettingsError, match=re.escape(words)):
        load(change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("mask.group_size=1", "mask.group_size=2"),
        ("runtime.micro_batch_size=64", "runtime.micro_batch_size"),
    ],
)
def test_the_regularizer_needs_a_whole_group(change, words):
    with pytest.raises(SettingsError, match=words):
        load("optim.regularizer_weight=1", change)


def test_micro_batches_divide_group_and_share():
    config = load("optim.batch_size=96", "mask.group_size=48", "runtime.micro_batch_size=20")
    assert micro_batch_size(config, world=1) == 16
    assert micro_batch_size(config, world=8) == 12
    with pytest.raises(SettingsError, match="use 91 or 98"):
        micro_batch_size(config, world=7)


def test_durations_in_steps():
    durations = {"7 steps": 7, "1 step": 1, "2.5 epochs": 25, "1e2 images": 10, "96 images": 10}
    assert {d: steps_of(d, batch_size=10, images=109) for d in durations} == durations


def test_changes_from_python():
    before = PretrainConfig()
    changes = {"optim.lr": np.float64(5e-4), "mask.target_scale": [0.1, 0.2]}
    now = override(before, "seed=7", **changes)
    assert before == PretrainConfig()
    assert (now.seed, now.optim.lr, now.mask.target_scale) == (7, 5e-4, (0.1, 0.2))
    assert parse_config(describe_config(now), "x") == parse_config(dump_config(now), "x") == now
    for wrong in ({"optim.lrs": 1}, {"optim.lr": True}, {"optim.lr": None}):
        with pytest.raises(SettingsError, match=r"optim\.lr"):
            override(before, **wrong)
    with pytest.raises(pydantic.ValidationError, match="lr"):
        OptimConfig(lr=-1)


def test_own_file_builds_on_a_recipe(tmp_path):
    text = "recipe: nano\nseed: 3\noptim:\n  lr: 5e-4\nmask:\nlog: {keep: 5}\n"
    config = load_config(write(tmp_path, text), ["optim.lr=6e-4"])
    assert differences(load(recipe="nano"), config, result_only=False) == [
        "seed: 0 then, 3 now",
        "optim.lr: 0.0004 then, 0.0006 now",
        "log.keep: 2 then, 5 now",
    ]
    assert load_config(write(tmp_path, "seed: 3\n")) == PretrainConfig(seed=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"optim: {lrr: 1}", "optim.lrr"),
        (b"optim: {lr: 1, lr: 2}", "lr is given twice"),
        (b"optim: [", "own.yaml"),
        (b"- 3", "own.yaml"),
        (b"1: 2", "no setting 1"),
        (b"recipe: nanoo", "nano"),
        (b"recipe: [1]", "recipe"),
        (b"seed: !!python/name:os.system", "own.yaml"),
        (b"\xff\xfe\x00", "own.yaml"),
    ],
)
def test_broken_files_are_named(tmp_path, text, words):
    path = tmp_path / "own.yaml"
    path.write_bytes(text)
    with pytest.raises(SettingsError, match=re.escape(words)):
        load_config(path)


def test_names_that_are_neither_recipe_nor_file(tmp_path):
    with pytest.raises(SettingsError, match="vith14_in1k"):
        load_config("vith14-in1k")
    with pytest.raises(SettingsError, match=re.escape(str(tmp_path))):
        load_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_random_texts_are_settings_or_refused():
    rng = random.Random(0)
    names = [*NAMES, "seed", "optim", "x", "", "a.b.c", "recipe", "meta.x", "optimization.x"]
    pieces = [
        *"[]{},:#|>\"'\\\n\t\0\x85\ud800😀é=%@`!&*~?-",
        *("1", "-1", "0.5", "1e400", "-.inf", ".nan", "9" * 5000, "0x" + "f" * 5000, "1:30"),
        *("true", "null", "<<: ", "&a [*a]", "&a {x: *a}", "[" * 2000, "2020-13-45", "? ", "- "),
        *("!!bool x", "!!int ", "!!float y", "!!timestamp z", "!!binary é", "!!set {1}"),
        *("!!python/object:os.x ", "300 epochs", "1e8 images", "global", "0.3,1.0", "cpu"),
    ]
    accepted = 0
    for number in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 4)))
        if rng.random() < 0.2:
            text = "".join(chr(rng.randrange(0x3000)) for _ in range(9))
        name = rng.choice(names)
        try:
            if number % 2:
                override(PretrainConfig(), f"{name}={text}")
            else:
                parse_config(f"{name}: {text}" if rng.random() < 0.5 else text, "file")
            accepted += 1
        except SettingsError:
            pass
    assert 10 < accepted < 1000


def test_differences_leave_out_what_may_change():
    before = load()
    now = load("runtime.workers=3", "log.keep=9", "data.max_broken=0.5", "data.held_out=0")
    assert differences(before, now) == ["data.held_out: 512 then, 0 now"]
    assert len(differences(before, now, result_only=False)) == 4


def test_every_setting_is_described():
    text = describe_config(load())
    for name in NAMES:
        assert re.search(rf"# .*\n *{name.rpartition('.')[2]}: ", text)
