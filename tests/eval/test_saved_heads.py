"""The chosen head as a classifier folder: its logits, its accuracy, and other test sets.

Images have one label, or several; metrics are compared with scikit-learn's.
"""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, average_precision_score
from small_probe import OPTIONS, TASK, encoder, save, the_one, write_pictures

import ijepa_zoo.eval
from ijepa_zoo.errors import CheckpointError, DataError
from ijepa_zoo.eval import evaluate_head, evaluate_knn, evaluate_logreg
from ijepa_zoo.eval.sets import open_task

NAMES = ["blue", "green", "red"]
HEADS = {"lrs": (0.5,), "wds": (0.0,), "epochs": 2, "batch_size": 8}
PROBES = {
    "linear": {"cached": True, "select_on_test": True, **HEADS},
    "attentive": {**HEADS, "lrs": (1e-3,)},
    "logreg": {"cs": (0.1, 1.0)},
    "finetune": {"epochs": 2, "batch_size": 10},
}


def write_labeled(folder, train=30, test=20):
    """Images with bright channels, and a CSV with the names of those channels."""
    rng = np.random.default_rng(0)
    lines = ["path,label,split"]
    for number in range(train + test):
        bright = rng.random(3) < 0.4
        pixels = rng.integers(0, 120, (44, 60, 3)) + 90 * bright
        save(pixels.astype(np.uint8), folder / f"{number:02}.png")
        names = [name for name, found in zip(["red", "green", "blue"], bright) if found]
        lines.append(f"{number:02}.png,{';'.join(names)},{'train' if number < train else 'test'}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return write_labeled(tmp_path_factory.mktemp("multi") / "pictures")


def test_sets_of_several_labels(labels, tmp_path):
    train, test = open_task(TASK, labels)
    assert train.class_names == test.class_names == NAMES
    assert (train.targets.shape, test.targets.shape) == ((30, 3), (20, 3))
    other = labels.with_name("other.csv")
    other.write_text("path,label\n40.png,red;white\n41.png,white\n42.png,\n")
    tested = open_task(TASK, labels, test=other)[1]
    assert tested.targets.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert "2 of 3" in " ".join(tested.notes)
    other.write_text("path,label\n41.png,\n42.png,white;black\n")
    with pytest.raises(DataError, match="other"):
        open_task(TASK, labels, test=other)
    for probe, options in ((evaluate_knn, {}), (evaluate_logreg, {"per_class": 2})):
        with pytest.raises(DataError, match="one class"):
            probe(TASK, encoder(), labels, tmp_path, **options, **OPTIONS)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("several", [False, True])
def test_the_saved_classifier_has_the_metric_of_the_result(labels, tmp_path, probe, several):
    """Images of another size: resized to 8/7 of the model's size, then cut."""
    with labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    data, names = labels, [row["label"] for row in rows]
    if not several:
        names = ["red" if "red" in name else "green" for name in names]
        lines = [f"{r['path']},{name},{r['split']}" for r, name in zip(rows, names)]
        data = labels.with_name("one_label.csv")
        data.write_text("\n".join(["path,label,split", *lines]))
    evaluate = getattr(ijepa_zoo.eval, f"evaluate_{probe}")
    result = evaluate("classes", encoder(), data, tmp_path, **PROBES[probe], **OPTIONS)
    folder = the_one(tmp_path, "*/model")
    model = ijepa_zoo.create_model(f"local-dir:{folder}").eval()
    transform = ijepa_zoo.create_transform(model)
    assert "36" in repr(transform)
    images = [transform(Image.open(labels.parent / row["path"])) for row in rows[30:]]
    with torch.inference_mode():
        logits = model(torch.stack(images))
    if several:
        answers = np.array([[kind in name.split(";") for kind in NAMES] for name in names[30:]])
        expected = average_precision_score(answers, logits.sigmoid().numpy(), average="macro")
        assert (result.metric, result.interval) == ("mean average precision", None)
        assert result.data["test"]["labels_per_image"] == round(answers.sum() / 20, 2)
    else:
        expected = accuracy_score([name == "red" for name in names[30:]], logits.argmax(1).numpy())
    assert result.value == pytest.approx(100 * expected, abs=0.1)
    assert model.multi_label == several
    if probe != "finetune":
        values = {head.name: head.val or head.test for head in result.heads}
        assert values[result.chosen] == max(values.values())
        assert json.loads((folder / "config.json").read_bytes())["chosen"] == result.chosen
        again = evaluate_head(folder, data, tmp_path, **OPTIONS)
        assert (again.value, again.metric) == (result.value, result.metric)


@pytest.mark.parametrize("with_encoder", [False, True])
def test_a_named_encoder_is_a_reference_and_another_head_another_result(
    pictures, tmp_path, with_encoder
):
    options = {"cs": (1.0,), "with_encoder": with_encoder, **OPTIONS}
    evaluate_logreg("classes", "vit_nano8_64_ijepa", pictures, tmp_path, **options)
    folder = the_one(tmp_path, "*/model")
    assert (folder / "encoder").is_dir() is with_encoder
    first = evaluate_head(folder, pictures, tmp_path, **OPTIONS)
    tensors = {name: -tensor for name, tensor in load_file(folder / "head.safetensors").items()}
    save_file(tensors, folder / "head.safetensors")
    assert evaluate_head(folder, pictures, tmp_path, **OPTIONS).value != first.value


def test_a_head_on_the_encoder_of_a_classifier_opens(pictures, tmp_path):
    options = {"data": pictures, "cs": (1.0,), **OPTIONS}
    evaluate_logreg("classes", "vit_nano8_64_ijepa", out=tmp_path / "first", **options)
    classifier = str(the_one(tmp_path / "first", "*/model"))
    result = evaluate_logreg("classes", classifier, out=tmp_path / "second", **options)
    again = evaluate_head(the_one(tmp_path / "second", "*/model"), pictures, tmp_path, **OPTIONS)
    assert again.value == result.value


def test_data_without_a_test_part_are_tested_on_what_was_not_trained(tmp_path):
    whole = write_pictures(tmp_path / "whole") / "train"
    result = evaluate_logreg("classes", encoder(), whole, tmp_path, cs=(1.0,), **OPTIONS)
    again = evaluate_head(the_one(tmp_path, "*/model"), whole, tmp_path, **OPTIONS)
    assert (again.value, again.images["test"]) == (result.value, result.images["test"])
    other = shutil.copytree(whole, tmp_path / "other")
    next(other.rglob("*.png")).unlink()
    again = evaluate_head(the_one(tmp_path, "*/model"), other, tmp_path, **OPTIONS)
    assert "no test part" in " ".join(again.notes)
    few = {"cs": (1.0,), "per_class": 5}
    result = evaluate_logreg("classes", encoder(), whole, tmp_path / "few", **few, **OPTIONS)
    again = evaluate_head(the_one(tmp_path / "few", "*/model"), whole, tmp_path, **OPTIONS)
    assert again.images["test"] == result.images["test"]


def test_test_sets_of_other_classes_and_labels(pictures, labels, tmp_path):
    options = {"cs": (1.0,), **OPTIONS}
    evaluate_logreg(TASK, encoder(), pictures, tmp_path / "one", **options)
    evaluate_logreg(TASK, encoder(), labels, tmp_path / "several", **options)
    one, several = (the_one(tmp_path, f"{name}/*/model") for name in ("one", "several"))
    other = write_pictures(tmp_path / "other", train=1, test=4, classes=5) / "test"
    result = evaluate_head(one, other, tmp_path, **OPTIONS)
    assert result.images == {"test": 12}
    assert "8 of 20" in " ".join(result.notes)
    table = labels.with_name("one.csv")
    table.write_text("path,label\n30.png,red\n31.png,white\n32.png,blue\n33.png,red\n")
    assert evaluate_head(several, table, tmp_path, **OPTIONS).images == {"test": 4}
    table.write_text("path,label\n30.png,white\n")
    for head, data, error, named in (
        (one, table, DataError, "class0"),
        (several, table, DataError, "red"),
        (one, labels, DataError, "several"),
        (other, pictures, CheckpointError, "other"),
    ):
        with pytest.raises(error, match=named):
            evaluate_head(head, data, tmp_path, **OPTIONS)
