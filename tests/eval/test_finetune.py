"""Fine-tuning: recipes, updates against a plain loop, resumed runs, the saved model."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from small_probe import OPTIONS, break_files, the_one

import ijepa_zoo
from ijepa_zoo.data import open_images
from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import DataError, RunError, SettingsError
from ijepa_zoo.eval import EvalConfig, EvalModel, evaluate_finetune, find_task
from ijepa_zoo.eval.batches import TrainBatches
from ijepa_zoo.eval.finetune import (
    FEW_LABELS,
    FULL,
    FineTuneRecipe,
    FineTuning,
    few_labels_recipe,
    rand_augment,
)
from ijepa_zoo.eval.probe import Probe
from ijepa_zoo.eval.runs import EpochState
from ijepa_zoo.eval.sets import EvalSet
from ijepa_zoo.eval.tasks import CROP
from ijepa_zoo.models.factory import create_model

SMALL = {"embed_dim": 24, "depth": 4, "num_heads": 2}
LR = 2e-2  # of a batch of 8
QUICK = FineTuneRecipe(epochs=3, lr=LR * 32, batch_size=8, warmup_epochs=1, layer_decay=0.9)
# Layers above each: of the model's four blocks, the final norm belongs to the last one.
ABOVE = {"head": 0, "norm": 1, "patch_embed": 5} | {f"blocks.{k}": 4 - k for k in range(4)}
PLAIN = replace(
    QUICK, mixup=0.0, cutmix=0.0, drop_path=0.0, label_smoothing=0.0, random_erasing=0.0
)


def _model():
    torch.manual_seed(0)
    return create_model("vit_nano8_64_ijepa", pretrained=False, img_size=32, **SMALL)


def _labeled(count=24):
    """Two classes, dark and bright."""
    labels = np.arange(count) % 2
    noise = np.random.default_rng(0).integers(0, 60, (count, 40, 40, 3))
    images = open_images((noise + 150 * labels[:, None, None, None]).astype(np.uint8))
    return EvalSet(images, labels.astype(np.int64), {0: "dark", 1: "bright"}, "train")


def _layers_above(name):
    return next(above for layer, above in ABOVE.items() if name.startswith(f"{layer}."))


def _training(recipe=QUICK, network=None, **more):
    train, none, task = _labeled(), np.arange(0), find_task("classes")
    config = EvalConfig(model=None, data=None, workers=0)
    probe = Probe(config, Distributed(), task, task.protocol, train, train, none, none)
    network = network or _model()
    return FineTuning(network, EvalModel(network, "small"), probe, recipe, **more)


class _Bar:
    disable = True

    def update(self, count): ...
    def set_postfix(self, **shown): ...


def test_recipes_are_the_papers():
    shared = {"epochs": 50, "layer_decay": 0.75, "label_smoothing": 0.1, "min_lr": 1e-6}
    full = {"batch_size": 528, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.25, "lr": 1e-4}
    full |= {"weight_decay": 0.04, "random_erasing": 0.25}
    few = {"batch_size": 512, "mixup": 0, "cutmix": 0, "drop_path": 0, "random_erasing": 0}
    assert vars(FULL).items() >= (shared | full).items()
    assert vars(FEW_LABELS).items() >= (shared | few).items()
    assert FEW_LABELS.lr * FEW_LABELS.batch_size / 256 == pytest.approx(3e-5)
    assert FULL.auto_augment == FEW_LABELS.auto_augment == "rand-m9-mstd0.5-inc1"
    huge, large = (torch.nn.Module() for _ in range(2))
    huge.embed_dim, large.embed_dim = 1280, 1024
    assert few_labels_recipe(huge).weight_decay == 0.4
    assert few_labels_recipe(large).weight_decay == 0.05


def test_learning_rates_of_layers_and_steps():
    """MAE's schedule (`util/lr_sched.py`) times layer_decay ** (layers above)."""
    recipe = replace(PLAIN, epochs=10, warmup_epochs=2, min_lr=1e-4, lr=1e-2 * 32)
    training = _training(recipe)
    assert (training.batches.steps, training.batches.batch_size) == (3, 8)
    for step in (0, 3, 6, 7, 20, 29):
        training.scheduler.step_update(step)
        epoch = step / 3
        if epoch < 2:
            expected = 1e-2 * epoch / 2
        else:
            expected = 1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (epoch - 2) / 8))
        rates = {p: g["lr"] for g in training.optimizer.param_groups for p in g["params"]}
        for name, parameter in training.model.named_parameters():
            assert rates[parameter] == pytest.approx(expected * 0.9 ** _layers_above(name)), name
    decays = {p: g["weight_decay"] for g in training.optimizer.param_groups for p in g["params"]}
    for _, parameter in training.model.named_parameters():
        assert decays[parameter] == (0.04 if parameter.ndim > 1 else 0)


@pytest.mark.parametrize(("size", "resized"), [(224, (256, 256)), (448, (448, 448))])
def test_the_test_crop_of_large_images_is_whole(size, resized):
    sizes = SMALL | {"img_size": size, "patch_size": 32}
    network = create_model("vit_nano8_64_ijepa", pretrained=False, **sizes)
    assert _training(network=network).transform.resize_to((size, size)) == resized


def test_drop_path_grows_over_the_depth():
    def rates(network):
        return [m.drop_prob for m in network.modules() if isinstance(m, timm.layers.DropPath)]

    expected = create_model("vit_nano8_64_ijepa", pretrained=False, drop_path_rate=0.3, **SMALL)
    training = _training(replace(PLAIN, drop_path=0.3))
    assert rates(training.model) == pytest.approx(rates(expected))
    assert len(rates(expected)) == 6
    assert rates(_training(PLAIN, network=training.model).model) == []


def test_updates_are_those_of_a_plain_loop(tmp_path):
    """The whole training again with torch alone, from the same batches."""
    training = _training(PLAIN)
    start = {k: v.clone() for k, v in training.model.state_dict().items()}
    training.run(EpochState(tmp_path / "state.pt"), _Bar())
    other = _training(PLAIN)
    other.model.load_state_dict(start)
    model, batches = other.model.train(), other.batches
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.04 if p.ndim > 1 else 0.0} for p in named.values()]
    )
    mean = torch.tensor(model.pretrained_cfg["mean"]).view(3, 1, 1)
    std = torch.tensor(model.pretrained_cfg["std"]).view(3, 1, 1)
    for step in range(9):
        if step < 3:
            lr = 2e-2 * step / 3
        else:
            lr = 1e-6 + (2e-2 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (step - 3) / 6))
        for group, name in zip(optimizer.param_groups, named):
            group["lr"] = lr * 0.9 ** _layers_above(name)
        batch = batches[step]
        optimizer.zero_grad()
        F.cross_entropy(model((batch.images / 255 - mean) / std), batch.labels).backward()
        optimizer.step()
    for name, tensor in training.model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_pieces_of_a_batch_give_the_same_gradients(tmp_path):
    whole, pieces = _training(PLAIN), _training(PLAIN, micro_batch_size=2)
    for number, training in enumerate((whole, pieces)):
        training.run(EpochState(tmp_path / f"{number}.pt"), _Bar())
    assert (whole.batches.parts, pieces.batches.parts) == (1, 4)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-4)
    for one, other in zip(whole.model.parameters(), pieces.model.parameters()):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_mixup_goes_into_images_and_targets(monkeypatch):
    training = _training(replace(QUICK, drop_path=0.0, cutmix=0.0, random_erasing=0.0))
    seen, original = [], training.mixup

    def spy(images, labels):
        seen.append((images.clone(), *original(images, labels)))
        return seen[0][1:]

    training.mixup = spy
    batch = training.batches[0]
    loss = training.backward(batch, 0, 0)
    (images, mixed, target) = seen[0]
    hard = F.one_hot(batch.labels, 2).float()
    lam = float((target - hard.flip(0)).abs().max())
    assert 0 < lam < 1
    torch.testing.assert_close(target, hard * lam + hard.flip(0) * (1 - lam))
    torch.testing.assert_close(mixed, images * lam + images.flip(0) * (1 - lam))
    training.model.zero_grad()
    smooth = target * 0.9 + 0.05
    expected = -(smooth * training.model(mixed).log_softmax(1)).sum(1).mean()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-4)


def test_augmentation_is_a_function_of_seed_epoch_step_and_place():
    augment = rand_augment("rand-m9-mstd0.5-inc1", (32, 32), (0.5, 0.5, 0.5))

    def batches(**more):
        settings = {"seed": 0, "augment": augment, "unit": 2, **more}
        return TrainBatches(_labeled(), np.arange(24), CROP, (32, 32), 8, **settings)

    state = np.random.get_state()[1].copy()
    whole = batches()[4].images
    assert not torch.equal(whole, batches(augment=None)[4].images)
    assert torch.equal(batches()[4].images, whole)
    parts = batches(micro=4)
    assert torch.equal(torch.cat([parts[8].images, parts[9].images]), whole)
    shared = [batches(rank=r, world=3)[4].images for r in range(3)]
    assert [len(images) for images in shared] == [2, 2, 4]
    assert torch.equal(torch.cat(shared), whole)
    assert not torch.equal(batches(seed=1)[4].images, whole)
    assert (np.random.get_state()[1] == state).all()


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    for split, count in (("train", 10), ("test", 5)):
        for name, level in (("dark", 30), ("bright", 200)):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (40, 36), (level + n, level, level)).save(place / f"{n}.png")
    return tmp_path / "data"


def _run(folder, out, network=None, **more):
    arguments = {"recipe": replace(PLAIN, epochs=4), "skip_broken": True, **OPTIONS, **more}
    return evaluate_finetune(
        "classes", EvalModel(network or _model(), "small"), folder, out, **arguments
    )


def test_bright_is_told_from_dark_and_the_given_model_stays_as_it_was(folder, tmp_path):
    network = _model()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    result = _run(folder, tmp_path / "out", network)
    assert result.value == 100
    assert result.interval[0] < 100
    assert result.images == {"train": 20, "test": 10}
    assert result.protocol["layer_decay"] == 0.9
    assert result.data["test"]["most_frequent"] == 50
    assert result.notes == []
    assert result.metrics["mean per-class accuracy"] == 100
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert network.num_classes == 0


def test_a_killed_run_resumes_with_the_same_numbers(folder, tmp_path, monkeypatch):
    break_files([folder / "train" / "dark" / "3.png", folder / "test" / "dark" / "4.png"])
    recipe = replace(QUICK, drop_path=0.2, batch_size=20)
    expected = _run(folder, tmp_path / "whole", recipe=recipe)
    original = EpochState.save

    def kill(self, state):
        original(self, state)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EpochState, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            _run(folder, tmp_path / "killed", recipe=recipe)
    result = _run(folder, tmp_path / "killed", recipe=recipe)
    assert (result.heads, result.value) == (expected.heads, expected.value)
    assert result.images == expected.images == {"train": 19, "test": 9}
    assert result.notes == expected.notes
    assert "train/dark/3.png" in result.notes[-1]
    assert "test/dark/4.png" in result.notes[-1]
    found = the_one(tmp_path / "killed", "*/result.json").parent
    assert sorted(p.name for p in found.iterdir()) == [".lock", "model", "result.json"]


def test_a_loss_that_is_not_finite_ends_the_run_before_the_state_is_written(folder, tmp_path):
    with pytest.raises(RunError, match="precision"):
        _run(folder, tmp_path / "out", recipe=replace(PLAIN, lr=1e30))
    assert not list((tmp_path / "out").glob("*/result.json"))


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"precision": "half"}, SettingsError, "half"),
        ({"epochs": 0}, SettingsError, "epochs"),
        ({"batch_size": 1}, SettingsError, "batch_size"),
        ({"baseline": True}, SettingsError, "baseline"),
        ({"network": torch.nn.Linear(2, 2)}, SettingsError, "Linear"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, tmp_path, options, error, named):
    with pytest.raises(error, match=named):
        _run(folder, tmp_path, **options)
    with pytest.raises(DataError, match="eval count"):
        evaluate_finetune("count", EvalModel(_model(), "small"), "scenes:8000,4000", tmp_path)


@pytest.mark.parametrize("timm_model", [False, True])
def test_the_trained_classifier_is_kept(folder, tmp_path, timm_model):
    model = _model()
    if timm_model:
        sizes = {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 4}
        model = timm.create_model("vit_tiny_patch16_224", **sizes)
    _run(folder, tmp_path, model, epochs=1)
    saved = the_one(tmp_path, "*/model")
    source = f"local-dir:{saved}"
    stock = timm.create_model(source, pretrained=True).eval()
    ours = ijepa_zoo.create_model(source).eval()
    for opened in (stock, ours):
        assert list(opened.pretrained_cfg["label_names"]) == ["bright", "dark"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(stock(images), ours(images))
    assert json.loads((saved / "config.json").read_text())["num_classes"] == 2


@pytest.mark.parametrize(
    ("follows", "change"),
    [(True, {}), (False, {"epochs": 2}), (False, {"batch_size": 10}), (False, {"size": 64})],
)
def test_the_papers_accuracy_is_beside_its_recipe_alone(
    folder, tmp_path, monkeypatch, follows, change
):
    published = replace(PLAIN, epochs=1, warmup_epochs=0, batch_size=20, paper={"weights": 87.1})
    monkeypatch.setattr("ijepa_zoo.eval.finetune.FULL", published)
    network, size = _model(), change.get("size", 32)
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, size, size)}
    task = replace(find_task("imagenet1k"), num_classes=None)
    options = {key: value for key, value in change.items() if key != "size"} | OPTIONS
    model = EvalModel(network, "small", "weights")
    result = evaluate_finetune(task, model, folder, tmp_path / "out", **options)
    assert result.paper == (87.1 if follows else None)
    assert any("not comparable" in note for note in result.notes) != follows


def test_few_labels_are_those_of_a_list(folder, tmp_path):
    names = [f"{name}/{n}.png" for name in ("dark", "bright") for n in (1, 4, 5)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    result = _run(folder, tmp_path, list=tmp_path / "list.txt", recipe=None, epochs=1)
    assert result.images["train"] == 6
    assert result.method == "finetune-list"
    recipe = few_labels_recipe(_model())
    assert {key: result.protocol[key] for key in ("lr", "weight_decay", "mixup")} == {
        "lr": recipe.lr, "weight_decay": 0.05, "mixup": 0,
    }  # fmt: skip
    assert result.protocol["list"] == "list.txt"
