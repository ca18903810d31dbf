"""The linear probe as a whole: against torch.optim, after a kill, on bad input."""

import copy
import json
import math
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_probe import (
    OPTIONS,
    PROTOCOL,
    TASK,
    break_files,
    encoder,
    features_of,
    pixels_of,
    save,
    write_pictures,
)

import ijepa_zoo
from ijepa_zoo.errors import DataError, RunError, SettingsError
from ijepa_zoo.eval import EvalModel, evaluate_attentive, evaluate_knn, evaluate_linear
from ijepa_zoo.eval.features import OnlineLoader
from ijepa_zoo.eval.heads import Grid, HeadSpec, make_grid
from ijepa_zoo.eval.sets import open_task, split_classes

BOTH = pytest.mark.parametrize("cached", [False, True])


@pytest.fixture
def evaluate(pictures, tmp_path):
    def run(model=None, out=tmp_path / "out", task=TASK, data=pictures, **kwargs):
        options = {"skip_broken": True, **OPTIONS, **kwargs}
        return evaluate_linear(task, model or encoder(), data, out, **options)

    return run


def trained_alone(head, x, y, lr, weight_decay):
    """torch.optim.SGD on the whole training set at once; returns the last loss."""
    groups = [{"params": head.linear.parameters(), "weight_decay": weight_decay}]
    groups += [{"params": p} for p in head.norm.parameters()]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    head.train()
    for epoch in range(PROTOCOL.epochs):
        share = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * epoch / PROTOCOL.epochs))
        for group in optimizer.param_groups:
            group["lr"] = lr * len(x) / 256 * share
        loss = F.cross_entropy(head(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    return float(loss.detach())


@BOTH
def test_metrics_are_those_of_torch_optim_on_the_extractors_features(
    evaluate, pictures, monkeypatch, cached
):
    tested, testing = [], OnlineLoader.testing
    monkeypatch.setattr(OnlineLoader, "testing", lambda self: tested.append(1) or testing(self))
    result = evaluate(cached=cached)
    fit, choose = split_classes(open_task(TASK, pictures)[0].targets, 0.1, 0)
    images, labels = pixels_of(pictures, "train")
    tests, answers = pixels_of(pictures, "test")
    x, z = (features_of(encoder(), pixels) for pixels in (images, tests))
    kinds = product(x, ("linear", "bn"), PROTOCOL.lrs)
    specs = [HeadSpec(name, kind, lr, 5e-4) for name, kind, lr in kinds]
    grid = make_grid(specs, {n: v.shape[1] for n, v in x.items()}, 3, PROTOCOL, 0)
    assert [h.name for h in result.heads] == grid.names
    assert result.images == {"train": len(fit), "val": 36 - len(fit), "test": 21}
    for found, spec, start in zip(result.heads, grid.specs, grid.heads, strict=True):
        head, name = copy.deepcopy(start), spec.representation
        loss = trained_alone(head, x[name][fit], labels[fit], spec.lr, spec.weight_decay)
        kept = 100 * float((head(x[name][choose]).argmax(1) == labels[choose]).float().mean())
        assert found.loss == pytest.approx(loss, abs=2e-4)
        assert found.val == pytest.approx(kept, abs=1e-3)
        if found.name == result.chosen:
            test = 100 * float((head(z[name]).argmax(1) == answers).float().mean())
            assert found.test == result.value == pytest.approx(test, abs=1e-3)
            assert found.val == max(head.val for head in result.heads)
        else:
            assert found.test is None
    assert len(tested) == 1, "the test set is read once"


def test_cached_features_with_flips_are_the_protocol_where_nothing_is_cropped(evaluate, tmp_path):
    """Pictures that flips do change; the same draws decide online and cached."""
    folder = write_pictures(tmp_path / "own", train=20)
    for file in folder.rglob("*.png"):
        pixels = np.array(Image.open(file))
        pixels[:, :16] //= 3
        save(pixels, file)
    steps = {"data": folder, "batch_size": 16}
    online, cached = (evaluate(cached=c, **steps) for c in (False, True))
    for one, other in zip(online.heads, cached.heads):
        assert one.loss == pytest.approx(other.loss, abs=1e-4)
    assert online.value == pytest.approx(cached.value)
    assert online.protocol["features"] != cached.protocol["features"]


@pytest.mark.parametrize("probe", [evaluate_linear, evaluate_attentive])
@BOTH
def test_a_killed_run_resumes_exactly(pictures, tmp_path, monkeypatch, probe, cached):
    options = {"batch_size": 15, "epochs": 3, "cached": cached, "lrs": (1e-3,), "wds": (0.1,)}
    options |= {"skip_broken": True, **OPTIONS}
    data = shutil.copytree(pictures, tmp_path / "copy")
    break_files([data / "train" / "class1" / "5.png"])
    whole = probe(TASK, encoder(), data, tmp_path / "whole", **options)
    step, calls = Grid.step, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 6:  # of two steps an epoch: in the last one
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Grid, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        probe(TASK, encoder(), data, tmp_path / "killed", **options)
    assert len(list(tmp_path.glob("killed/*/state.pt"))) == 1
    resumed = probe(TASK, encoder(), data, tmp_path / "killed", **options)
    assert len(calls) == 6 + 2
    assert (resumed.heads, resumed.value) == (whole.heads, whole.value)
    assert (resumed.notes, resumed.images) == (whole.notes, whole.images)
    assert "class1/5.png" in " ".join(whole.notes)
    assert not list(tmp_path.glob("killed/*/state.pt"))


def test_a_finished_evaluation_is_not_repeated(evaluate, monkeypatch):
    first = evaluate()
    monkeypatch.setattr("ijepa_zoo.eval.linear.train_and_choose", None)
    assert evaluate() == first
    for change in ({"seed": 1}, {"model": encoder(1)}, {"lrs": (0.1,)}, {"cached": True}):
        with pytest.raises(TypeError, match="NoneType"):
            evaluate(**change)


@BOTH
def test_broken_images_are_named_and_count_nowhere(evaluate, pictures, tmp_path, cached):
    folder = shutil.copytree(pictures, tmp_path / "copy")
    break_files([folder / "test" / "class0" / "3.png", folder / "train" / "class1" / "5.png"])
    result = evaluate(data=folder, cached=cached, select_on_test=True)
    assert result.images == {"train": 35, "test": 20}
    assert result.value == max(head.test for head in result.heads)
    assert result.interval[0] < result.value < result.interval[1]
    assert round(result.value * 20 / 100, 6).is_integer()
    assert "2 (" in result.notes[-1]
    assert all(f"{name}.png" in result.notes[-1] for name in ("class0/3", "class1/5"))
    with pytest.raises(DataError, match=r"class./\d\.png"):
        evaluate(data=folder, cached=cached, skip_broken=False)
    break_files((folder / "test").rglob("*.png"))
    with pytest.raises(DataError):
        evaluate(data=folder, cached=cached)


def test_training_images_of_which_none_can_choose_are_refused(evaluate, tmp_path):
    few = write_pictures(tmp_path / "few", train=1, test=2)
    for probe in (evaluate_linear, evaluate_knn):
        with pytest.raises(DataError, match="--select-on-test"):
            probe(TASK, encoder(), few, tmp_path / "out", **OPTIONS)
    assert evaluate(data=few, select_on_test=True).images == {"train": 3, "test": 6}


def test_baselines_have_values_and_rows_of_their_own(evaluate, tmp_path):
    options = {"epochs": 1, "cached": True, "baseline": True}
    result = evaluate("vit_nano8_64_ijepa", task="classes", **options)
    names = {"vit_nano8_64_ijepa, random weights", "raw pixels"}
    assert result.baselines.keys() == names
    files = [json.loads(file.read_bytes()) for file in tmp_path.glob("out/*/result.json")]
    found = {content["model"]["name"]: content for content in files}
    assert found.keys() == names | {"vit_nano8_64_ijepa.photos"}
    assert found["vit_nano8_64_ijepa.photos"]["baselines"] == result.baselines
    for name in names:
        assert found[name]["value"] == result.baselines[name]
        assert found[name]["model"]["weights_hash"] != result.model["weights_hash"]
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 4
    assert "random crops" in " ".join(result.notes)
    for folder in tmp_path.glob("out/*/model"):  # the head on random weights opens too
        assert ijepa_zoo.create_model(f"local-dir:{folder}").num_classes == 3


def test_images_of_16_bits_are_read_with_their_range(evaluate, tmp_path):
    rng = np.random.default_rng(0)
    for part, kind, number in product(("train", "test"), range(2), range(12)):
        pixels = rng.integers(0, 4096 // (1 + kind), (32, 32)).astype(np.uint16)
        save(pixels, tmp_path / "deep" / part / str(kind) / f"{number}.png")
    ranges = ((0, 4095), (0, 1000))
    found = [evaluate(data=tmp_path / "deep", value_range=limits).heads for limits in ranges]
    assert found[0] != found[1]


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels(tmp_path, channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 16, 16, channels), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(40) % 2)
    folder = ijepa_zoo.export(encoder(in_chans=channels), tmp_path / "export")
    args = ("classes", str(folder), str(tmp_path / "data.npz"), tmp_path / "out")
    assert "raw pixels" in evaluate_knn(*args, baseline=True, **OPTIONS).baselines


@BOTH
def test_features_that_are_not_finite_are_refused(evaluate, cached):
    model = encoder()
    model.norm.weight.data[3] = torch.nan
    with pytest.raises(RunError, match="NaN"):
        evaluate(model=model, cached=cached)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lrs": (0.0,)}, "--lrs"),
        ({"lrs": (float("inf"),)}, "--lrs"),
        ({"wds": (-1.0,)}, "--wds"),
        ({"batch_size": 1}, "--batch-size"),
        ({"model": encoder(depth=2)}, "2 blocks"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear"),
    ],
)
def test_options_and_models_that_do_not_fit_are_refused(evaluate, options, named):
    with pytest.raises(SettingsError, match=named):
        evaluate(**options)


def test_the_papers_accuracy_is_beside_its_weights_and_protocol_alone(evaluate):
    task = replace(TASK, paper={"some.weights": 86.7})
    some = EvalModel(encoder(), "a", "some.weights")
    assert evaluate(some, task=task).paper == 86.7
    assert evaluate(some, task=task, cached=True).paper == 86.7
    assert evaluate(EvalModel(encoder(1), "a", "other.weights"), task=task).paper is None
    for change in ({"epochs": 1}, {"wds": (0.0, 1e-3)}, {"select_on_test": True}):
        result = evaluate(some, task=task, **change)
        assert result.paper is None
        assert "86.7 % with another protocol" in " ".join(result.notes)
