"""Several labels per image: sets and probes, against scikit-learn."""

import csv
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from small_probe import OPTIONS, SIZE, TASK, encoder, the_one

import ijepa_zoo
from ijepa_zoo.errors import DataError
from ijepa_zoo.eval import (
    evaluate_attentive,
    evaluate_finetune,
    evaluate_head,
    evaluate_knn,
    evaluate_linear,
    evaluate_logreg,
)
from ijepa_zoo.eval.sets import open_task, split_off_val

NAMES = ["blue", "green", "red"]
HEADS = {"lrs": (0.5,), "wds": (0.0,), "epochs": 2, "batch_size": 8}
PROBES = [
    (evaluate_linear, HEADS),
    (evaluate_linear, {"cached": True, "select_on_test": True, **HEADS}),
    (evaluate_attentive, {**HEADS, "lrs": (1e-3,)}),
    (evaluate_logreg, {"cs": (0.1, 1.0)}),
    (evaluate_finetune, {"epochs": 2, "batch_size": 10}),
]


def write_pictures(folder: Path, train: int = 30, test: int = 20) -> Path:
    """Images with bright channels, and a CSV with the names of those channels."""
    rng = np.random.default_rng(0)
    lines = ["path,label,split"]
    folder.mkdir()
    for number in range(train + test):
        bright = rng.random(3) < 0.4
        pixels = rng.integers(0, 120, (SIZE, SIZE, 3)) + 90 * bright
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02}.png")
        names = [name for name, found in zip(["red", "green", "blue"], bright) if found]
        lines.append(f"{number:02}.png,{';'.join(names)},{'train' if number < train else 'test'}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("multi") / "pictures")


def test_sets_of_several_labels(labels):
    train, test = open_task(TASK, labels)
    assert train.multi_label
    assert train.class_names == test.class_names == NAMES
    assert (train.targets.shape, test.targets.shape) == ((30, 3), (20, 3))
    assert train.class_sizes().tolist() == train.targets.sum(axis=0).tolist()
    fit, choose = split_off_val(train, 0)
    assert sorted([*fit, *choose]) == list(range(30))
    assert len(choose) == 3
    other = labels.with_name("other.csv")
    other.write_text("path,label\n40.png,red;white\n41.png,white\n42.png,\n")
    tested = open_task(TASK, labels, test=other)[1]
    assert tested.targets.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert "2 of 3" in " ".join(tested.notes)
    other.write_text("path,label\n41.png,\n42.png,white;black\n")
    with pytest.raises(DataError, match="other"):
        open_task(TASK, labels, test=other)


@pytest.mark.parametrize(("probe", "options"), PROBES)
def test_probes_choose_and_test_by_mean_average_precision(labels, tmp_path, probe, options):
    result = probe(TASK, encoder(), labels, tmp_path, **options, **OPTIONS)
    folder = the_one(tmp_path, "*/model")
    model = ijepa_zoo.create_model(f"local-dir:{folder}").eval()
    assert model.multi_label
    with labels.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    files = [labels.parent / row["path"] for row in rows]
    answers = np.array([[name in row["label"].split(";") for name in NAMES] for row in rows])
    images = torch.stack([ijepa_zoo.create_transform(model)(Image.open(file)) for file in files])
    with torch.inference_mode():
        probabilities = model(images).sigmoid()
    expected = 100 * average_precision_score(answers, probabilities.numpy(), average="macro")
    assert result.value == pytest.approx(expected, abs=0.1)
    assert (result.metric, result.interval) == ("mean average precision", None)
    assert result.data["test"]["labels_per_image"] == round(answers.sum() / 20, 2)
    if probe is evaluate_finetune:
        stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert stock(images).sigmoid().allclose(probabilities, atol=1e-6)
    else:
        by = "test" if options.get("select_on_test") else "val"
        values = {head.name: getattr(head, by) for head in result.heads}
        assert values[result.chosen] == max(values.values())
        again = evaluate_head(folder, labels, tmp_path, **OPTIONS)
        assert (again.value, again.metric) == (result.value, result.metric)
    table = tmp_path / "table.csv"
    ijepa_zoo.predict([*map(str, files[:3])], model, table, topk=3, **OPTIONS)
    for row, row_of in zip(csv.DictReader(table.open()), probabilities):
        found = {row[f"label{end}"]: float(row[f"probability{end}"]) for end in ("", "_2", "_3")}
        assert [found[name] for name in NAMES] == pytest.approx(row_of.tolist(), abs=1e-4)


def test_a_saved_head_and_other_labels(labels, tmp_path):
    options = {"cs": (1.0,), **OPTIONS}
    evaluate_logreg(TASK, encoder(), labels, tmp_path / "several", **options)
    head, other = the_one(tmp_path, "several/*/model"), labels.with_name("one.csv")
    other.write_text("path,label\n30.png,red\n31.png,white\n32.png,blue\n33.png,red\n")
    assert evaluate_head(head, other, tmp_path, **OPTIONS).images == {"test": 4}
    other.write_text("path,label\n30.png,white\n")
    with pytest.raises(DataError, match="red"):
        evaluate_head(head, other, tmp_path, **OPTIONS)
    lines = [f"{i:02}.png,{'red' if i % 2 else 'blue'}" for i in range(30)]
    other.write_text("\n".join(["path,label", *lines]))
    evaluate_logreg(TASK, encoder(), other, tmp_path / "one", **options)
    with pytest.raises(DataError, match="several"):
        evaluate_head(the_one(tmp_path, "one/*/model"), labels, tmp_path, **OPTIONS)


@pytest.mark.parametrize(
    ("probe", "options"), [(evaluate_knn, {}), (evaluate_logreg, {"per_class": 2})]
)
def test_probes_of_one_label_refuse_several(labels, tmp_path, probe, options):
    with pytest.raises(DataError, match="one class"):
        probe(TASK, encoder(), labels, tmp_path, **options, **OPTIONS)
