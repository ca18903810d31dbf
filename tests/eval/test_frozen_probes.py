"""Linear, attentive and kNN probes as a whole: against plain code, after a kill, on bad input."""

import copy
import json
import math
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import timm
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
from ijepa_zoo.eval.heads import HeadSpec, make_grid
from ijepa_zoo.eval.knn import KS, TEMPERATURES
from ijepa_zoo.eval.sets import open_task, split_classes
from ijepa_zoo.models.classifier import AttentiveHead
from ijepa_zoo.seeds import Stream, fold

BOTH = pytest.mark.parametrize("cached", [False, True])
NANO = "vit_nano8_64_ijepa"


@pytest.fixture
def evaluate(pictures, tmp_path):
    def run(model=None, probe=evaluate_linear, out=tmp_path / "out", **kwargs):
        options = {"task": TASK, "data": pictures, **OPTIONS, **kwargs}
        return probe(model=model or encoder(), out=out, **options)

    return run


@pytest.fixture(scope="module")
def parts(pictures):
    """Pixels and labels of the images that are fitted to, that choose, and that test."""
    rows = split_classes(open_task(TASK, pictures)[0].targets, 0.1, 0)
    (images, labels), test = (pixels_of(pictures / split) for split in ("train", "test"))
    return [(images[part], labels[part]) for part in rows] + [test]


def data_of(parts, layers, pool="auto"):
    return [(features_of(images, layers, pool), labels) for images, labels in parts]


def accuracy(head, features, labels):
    return 100 * float((head(features).argmax(1) == labels).float().mean())


def trained_alone(head, optimizer, features, labels, scales):
    """The head trained on all images at once; returns the last loss."""
    rates = [group["lr"] for group in optimizer.param_groups]
    head.train()
    for scale in scales:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * len(labels) / 256 * scale
        loss = F.cross_entropy(head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    return float(loss.detach())


def assert_head(result, found, loss, head, data):
    _, val, test = data
    assert found.loss == pytest.approx(loss, abs=2e-4)
    assert found.val == pytest.approx(accuracy(head, *val), abs=1e-3)
    if found.name == result.chosen:
        assert found.test == result.value == pytest.approx(accuracy(head, *test), abs=1e-3)
        assert found.val == max(head.val for head in result.heads)
    else:
        assert found.test is None


@BOTH
def test_linear_heads_are_those_of_sgd_on_the_extractors_features(
    evaluate, parts, monkeypatch, cached
):
    tested, testing = [], OnlineLoader.testing
    monkeypatch.setattr(OnlineLoader, "testing", lambda self: tested.append(1) or testing(self))
    result = evaluate(cached=cached)
    assert len(tested) == 1, "the test set is read once"
    assert list(result.images.values()) == [len(labels) for _, labels in parts]
    data = {name: data_of(parts, name) for name in ("last", "last4")}
    specs = [HeadSpec(*v, 5e-4) for v in product(data, ("linear", "bn"), PROTOCOL.lrs)]
    grid = make_grid(specs, {"last": 48, "last4": 192}, 3, PROTOCOL, 0)
    for found, spec, start in zip(result.heads, grid.specs, grid.heads, strict=True):
        head, own = copy.deepcopy(start), data[spec.representation]
        groups = [{"params": head.linear.parameters(), "weight_decay": spec.weight_decay}]
        groups += [{"params": p} for p in head.norm.parameters()]
        optimizer = torch.optim.SGD(groups, lr=spec.lr, momentum=0.9, nesterov=True)
        scales = [0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3)]
        loss = trained_alone(head, optimizer, *own[0], scales)
        assert found.name == spec.name
        assert_head(result, found, loss, head, own)


@BOTH
def test_attentive_heads_are_those_of_adamw_on_the_extractors_tokens(evaluate, parts, cached):
    options = {"epochs": 3, "lrs": (3e-3, 1e-3), "wds": (0.1,), "cached": cached}
    result = evaluate(probe=evaluate_attentive, **options)
    maps = data_of(parts, "last", None)
    data = [(found.flatten(2).transpose(1, 2), labels) for found, labels in maps]
    for found, lr in zip(result.heads, options["lrs"]):
        torch.manual_seed(fold(0, Stream.EVAL_INIT))
        head = AttentiveHead(48, 3, num_heads=3)
        groups = [{"params": p, "weight_decay": 0.1 * (p.ndim > 1)} for p in head.parameters()]
        scales = [0.5 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3)]
        loss = trained_alone(head, torch.optim.AdamW(groups, lr=lr), *data[0], scales)
        assert_head(result, found, loss, head, data)


def voting(bank, labels, k, temperature):
    """The classifier of the papers, one query at a time in plain Python."""

    def classify(queries):
        votes = torch.zeros(len(queries), 3, dtype=torch.float64)
        for row, query in zip(votes, queries):
            similarities = F.cosine_similarity(bank.double(), query.double(), dim=1).tolist()
            for similarity, label in sorted(zip(similarities, labels.tolist()))[-k:]:
                row[label] += math.exp(similarity / temperature)
        return votes

    return classify


@pytest.mark.parametrize("on_test", [False, True])
def test_knn_equals_a_plain_computation(evaluate, parts, on_test):
    result = evaluate(probe=evaluate_knn, select_on_test=on_test)
    fit, val, test = data_of(parts, "last")
    everything = [torch.cat(column) for column in zip(fit, val)]
    bank, queries = (everything, test) if on_test else (fit, val)
    names = [f"k={k} T={t:g}" for k in KS if k <= len(bank[1]) for t in TEMPERATURES]
    assert [head.name for head in result.heads] == names
    for head in result.heads:
        k, temperature = (float(part.split("=")[1]) for part in head.name.split())
        found = head.test if on_test else head.val
        classify = voting(*bank, int(k), temperature)
        assert found == pytest.approx(accuracy(classify, *queries), abs=1e-3)
        if head.name == result.chosen:
            classify = voting(*everything, int(k), temperature)
            assert result.value == pytest.approx(accuracy(classify, *test), abs=1e-3)
    about = {"pool": "avg", "layers": [3], "ks": [10, 20, 50, 100, 200]}
    about |= {"temperatures": [0.02, 0.04, 0.07, 0.1, 0.2]}
    about |= {"test_transform": "bilinear resize to 32x32"}
    assert result.protocol.items() >= about.items()


@pytest.mark.parametrize(("train", "ks"), [(3, {"k=6"}), (10, {"k=10", "k=20"})])
def test_a_class_token_and_as_few_images_as_neighbors(evaluate, tmp_path, train, ks):
    few = write_pictures(tmp_path / "few", train=train, test=2, classes=2)
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    result = evaluate(model, probe=evaluate_knn, data=few, select_on_test=True)
    assert result.protocol["pool"] == "cls"
    assert {head.name.split()[0] for head in result.heads} == ks


def test_cached_features_with_flips_are_the_protocol_where_nothing_is_cropped(evaluate, tmp_path):
    """Pictures that flips do change; the same draws decide online and cached."""
    folder = write_pictures(tmp_path / "own", train=20)
    for file in folder.rglob("*.png"):
        pixels = np.array(Image.open(file))
        pixels[:, :16] //= 3
        save(pixels, file)
    online, cached = (evaluate(data=folder, batch_size=16, cached=c) for c in (False, True))
    losses = [[head.loss for head in result.heads] for result in (online, cached)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert online.protocol["features"] != cached.protocol["features"]


@BOTH
def test_broken_images_count_nowhere(evaluate, pictures, tmp_path, cached):
    data = shutil.copytree(pictures, tmp_path / "copy")
    break_files([data / "train" / "class1" / "5.png", data / "test" / "class0" / "3.png"])
    options = {"data": data, "cached": cached, "select_on_test": True}
    with pytest.raises(DataError, match=r"class./\d\.png"):
        evaluate(**options)
    result = evaluate(**options, skip_broken=True)
    assert len([*tmp_path.glob("out/*-linear-*")]) == 1  # what was trained before is not lost
    assert result.images == {"train": 35, "test": 20}
    assert result.value == max(head.test for head in result.heads)
    assert result.interval[0] < result.value < result.interval[1]
    assert all(name in result.notes[-1] for name in ("class1/5.png", "class0/3.png", " 2 ("))


def test_a_finished_evaluation_is_not_repeated(evaluate, monkeypatch):
    first = evaluate()
    monkeypatch.setattr("ijepa_zoo.eval.linear.train_and_choose", None)
    assert evaluate() == first
    for change in ({"seed": 1}, {"model": encoder(1)}, {"lrs": (0.1,)}, {"cached": True}):
        with pytest.raises(TypeError, match="NoneType"):
            evaluate(**change)


def test_baselines_have_values_and_rows_of_their_own(evaluate, tmp_path):
    options = {"task": "classes", "epochs": 1, "cached": True, "baseline": True}
    result = evaluate(NANO, **options)
    assert result.baselines.keys() == {f"{NANO}, random weights", "raw pixels"}
    files = [json.loads(file.read_bytes()) for file in tmp_path.glob("out/*/result.json")]
    found = {content["model"]["name"]: content for content in files}
    assert found.pop(f"{NANO}.photos")["baselines"] == result.baselines
    assert {name: content["value"] for name, content in found.items()} == result.baselines
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 4
    assert "random crops" in " ".join(result.notes)
    for folder in tmp_path.glob("out/*/model"):  # the head on random weights opens too
        assert ijepa_zoo.create_model(f"local-dir:{folder}").num_classes == 3


@BOTH
def test_features_and_data_that_cannot_be_used_are_refused(evaluate, tmp_path, cached):
    model = encoder()
    model.norm.weight.data[3] = torch.nan
    with pytest.raises(RunError, match="NaN"):
        evaluate(model, cached=cached)
    few = write_pictures(tmp_path / "few", train=1, test=2)
    with pytest.raises(DataError, match="--select-on-test"):
        evaluate(data=few, cached=cached)
    break_files((few / "test").rglob("*.png"))
    with pytest.raises(DataError, match="can be decoded"):
        evaluate(data=few, cached=cached, select_on_test=True, skip_broken=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lrs": (0.0,)}, "--lrs"),
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
    assert evaluate(some, task=task).paper == evaluate(some, task=task, cached=True).paper == 86.7
    assert evaluate(EvalModel(encoder(1), "a", "other.weights"), task=task).paper is None
    for change in ({"epochs": 1}, {"wds": (0.0, 1e-3)}, {"select_on_test": True}):
        result = evaluate(some, task=task, **change)
        assert result.paper is None
        assert "86.7 % with another protocol" in " ".join(result.notes)
