"""Fine-tuning: recipes, updates against a plain loop, resumed runs, the saved model."""

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from small_probe import OPTIONS, save, the_one
from timm.layers import DropPath

import ijepa_zoo
from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import DataError, RunError, SettingsError
from ijepa_zoo.eval import EvalConfig, EvalModel, evaluate_finetune, find_task
from ijepa_zoo.eval.finetune import (
    FEW_LABELS,
    FULL,
    FineTuneRecipe,
    FineTuning,
    few_labels_recipe,
)
from ijepa_zoo.eval.probe import open_probe
from ijepa_zoo.models.factory import create_model

LR = 2e-2  # of a batch of 8
QUICK = FineTuneRecipe(epochs=3, lr=LR * 32, batch_size=8, warmup_epochs=1, layer_decay=0.9)
PLAIN = replace(
    QUICK, mixup=0.0, cutmix=0.0, drop_path=0.0, label_smoothing=0.0, random_erasing=0.0
)
# Layers above each: of the model's four blocks, the final norm belongs to the last one.
ABOVE = {"head": 0, "norm": 1, "patch_embed": 5} | {f"blocks.{k}": 4 - k for k in range(4)}


def network_of(img_size=32, **sizes):
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 4, "num_heads": 2, **sizes}
    return create_model("vit_nano8_64_ijepa", pretrained=False, img_size=img_size, **sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images of each class for training, dark and bright, and five for testing."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    classes = product([("train", 10), ("test", 5)], [("dark", 0), ("bright", 150)])
    for (split, count), (name, level) in classes:
        for n in range(count):
            pixels = rng.integers(level, level + 60, (36, 40, 3)).astype(np.uint8)
            save(pixels, root / split / name / f"{n}.png")
    return root


@pytest.fixture
def training_of(folder):
    def make(recipe=QUICK, network=None, **more):
        model = EvalModel(network or network_of(), "small")
        config = EvalConfig(task="classes", model=model, data=folder, workers=0)
        probe = open_probe(config, Distributed(), model)
        return FineTuning(model.model, model, probe, recipe, **more)

    return make


def test_recipes_are_the_papers():
    augment = ("rand-m9-mstd0.5-inc1", 0.25)
    papers = ({"vit_huge16_448_ijepa.in1k": 87.1},
              {"vit_huge14_ijepa.in1k": 73.3, "vit_huge16_448_ijepa.in1k": 77.3})  # fmt: skip
    full = (50, 1e-4, 528, 0.04, 0.75, 0.25, 0.8, 1.0, 0.1, *augment, 5.0, 1e-6, papers[0])
    few = (50, 3e-5 / 2, 512, 0.4, 0.75, 0, 0, 0, 0.1, augment[0], 0, 5.0, 1e-6, papers[1])
    assert (FineTuneRecipe(*full), FineTuneRecipe(*few)) == (FULL, FEW_LABELS)
    networks = [SimpleNamespace(embed_dim=width) for width in (1280, 1024)]
    decays = [few_labels_recipe(network).weight_decay for network in networks]
    assert decays == [0.4, 0.05]


def test_large_images_are_tested_whole_and_drop_path_grows_over_the_depth(training_of):
    for size, resized in ((224, (256, 256)), (448, (448, 448))):
        training = training_of(replace(PLAIN, drop_path=0.3), network_of(size, patch_size=32))
        assert training.transform.resize_to((size, size)) == resized
    found, expected = (
        [module.drop_prob for module in network.modules() if isinstance(module, DropPath)]
        for network in (training.model, network_of(drop_path_rate=0.3))
    )
    assert found == pytest.approx(expected)
    assert len(expected) == 6


@pytest.mark.parametrize(("micro_batch_size", "parts"), [(32, 1), (2, 4)])
def test_updates_are_those_of_a_plain_loop(tmp_path, training_of, micro_batch_size, parts):
    """The whole training again with torch alone, from the same batches, in pieces or not."""
    training = training_of(PLAIN, micro_batch_size=micro_batch_size)
    start = {k: v.clone() for k, v in training.model.state_dict().items()}
    training.bar = MagicMock()
    training.run(tmp_path)
    assert training.batches.parts == parts
    other = training_of(PLAIN)
    other.model.load_state_dict(start)
    model, named = other.model.train(), dict(other.model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.04 if p.ndim > 1 else 0.0} for p in named.values()]
    )
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    for step in range(6):  # two an epoch
        share = 0.5 * (1 + math.cos(math.pi * (step - 2) / 4))  # MAE's schedule
        lr = LR * step / 2 if step < 2 else 1e-6 + (LR - 1e-6) * share
        for group, name in zip(optimizer.param_groups, named):
            above = next(n for layer, n in ABOVE.items() if name.startswith(f"{layer}."))
            group["lr"] = lr * 0.9**above
        pixels, labels = other.batches[step]
        optimizer.zero_grad()
        F.cross_entropy(model((pixels / 255 - mean) / std), labels).backward()
        optimizer.step()
    for name, tensor in training.model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=2e-4, rtol=1e-3)


def test_mixup_goes_into_images_and_targets(training_of):
    recipe = replace(QUICK, drop_path=0.0, random_erasing=0.0, cutmix=0.0)
    training = training_of(recipe)
    mixed, mixup = [], training.mixup
    training.mixup = lambda *batch: mixed.extend(mixup(*batch)) or mixed
    loss = training.backward(training.batches[0], 0, 0, 0)
    images, target = mixed
    assert ((target > 0) & (target < 1)).any()
    smooth = target * 0.9 + 0.05
    expected = -(smooth * training.model(images).log_softmax(1)).sum(1).mean()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-4)


def run(data, out, network=None, task="classes", **more):
    arguments = {"recipe": replace(PLAIN, epochs=4), "skip_broken": True, **OPTIONS, **more}
    model = EvalModel(network or network_of(), "small", "weights")
    return evaluate_finetune(task, model, data, out, **arguments)


@pytest.mark.parametrize("timm_model", [False, True])
def test_the_trained_classifier_is_kept_and_the_given_model_stays_as_it_was(
    folder, tmp_path, timm_model
):
    network = network_of()
    if timm_model:
        sizes = {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 4, "num_classes": 0}
        network = timm.create_model("vit_tiny_patch16_224", **sizes)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    result = run(folder, tmp_path, network)
    assert result.value == result.metrics["mean per-class accuracy"] == 100
    assert (result.images, result.notes) == ({"train": 20, "test": 10}, [])
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert network.num_classes == 0
    saved = the_one(tmp_path, "*/model")
    stock = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    ours = ijepa_zoo.create_model(f"local-dir:{saved}").eval()
    for opened in (stock, ours):
        assert list(opened.pretrained_cfg["label_names"]) == ["bright", "dark"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(stock(images), ours(images))


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"precision": "half"}, SettingsError, "half"),
        ({"epochs": 0}, SettingsError, "epochs"),
        ({"batch_size": 1}, SettingsError, "batch_size"),
        ({"baseline": True}, SettingsError, "baseline"),
        ({"task": "count"}, DataError, "eval count"),
        ({"network": torch.nn.Linear(2, 2)}, SettingsError, "Linear"),
        ({"recipe": replace(PLAIN, lr=1e30)}, RunError, "precision"),  # the loss is not finite
    ],
)
def test_options_that_do_not_fit_are_refused(folder, tmp_path, options, error, named):
    with pytest.raises(error, match=named):
        run(folder, tmp_path, **options)


@pytest.mark.parametrize("change", [{}, {"epochs": 2}, {"batch_size": 10}, {"size": 64}])
def test_the_papers_accuracy_is_beside_its_recipe_alone(folder, tmp_path, monkeypatch, change):
    published = replace(PLAIN, epochs=1, warmup_epochs=0, batch_size=20, paper={"weights": 87.1})
    monkeypatch.setattr("ijepa_zoo.eval.finetune.FULL", published)
    network, size = network_of(), change.get("size", 32)
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, size, size)}
    options = {key: value for key, value in change.items() if key != "size"}
    task = replace(find_task("imagenet1k"), num_classes=None)
    result = run(folder, tmp_path, network, task, recipe=None, **options)
    assert result.paper == (None if change else 87.1)
    assert any("not comparable" in note for note in result.notes) == bool(change)


def test_few_labels_are_those_of_a_list(folder, tmp_path):
    names = [f"{name}/{n}.png" for name in ("dark", "bright") for n in (1, 4, 5)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    result = run(folder, tmp_path, list=tmp_path / "list.txt", recipe=None, epochs=1)
    assert (result.images["train"], result.method) == (6, "finetune-list")
    recipe = {"lr": FEW_LABELS.lr, "weight_decay": 0.05, "mixup": 0, "list": "list.txt"}
    assert result.protocol.items() >= recipe.items()


def test_images_of_four_channels_train_without_randaugment(tmp_path):
    rng = np.random.default_rng(0)
    for split, name, n in product(("train", "test"), ("dark", "bright"), range(5)):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        level = 150 * (name == "bright")
        np.save(folder / f"{n}.npy", rng.integers(level, level + 60, (32, 32, 4), np.uint8))
    result = run(tmp_path / "data", tmp_path, network_of(in_chans=4))
    assert result.value == 100
    assert any("RandAugment" in note for note in result.notes)
