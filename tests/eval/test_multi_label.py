"""Several labels per image: metrics, losses and classifiers of scikit-learn, and the probes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import several_processes
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from small_probe import SIZE, TASK, encoder

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
from ijepa_zoo.eval.accuracy import average_precision, classification_loss
from ijepa_zoo.eval.logreg import fit_logistic
from ijepa_zoo.eval.sets import open_task, split_classes, split_off_val

OPTIONS = {"device": "cpu", "workers": 0}
NAMES = ["blue", "green", "red"]
HEADS = {"lrs": (0.5,), "wds": (0.0,), "epochs": 2, "batch_size": 8}
MEAN, STD = (np.array(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
PROBES = [
    (evaluate_linear, HEADS),
    (evaluate_linear, {"cached": True, **HEADS}),
    (evaluate_attentive, {**HEADS, "lrs": (1e-3,)}),
    (evaluate_logreg, {"cs": (0.1, 1.0)}),
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


def test_a_fine_tuned_model_predicts_independent_probabilities(labels, tmp_path):
    options = {"epochs": 2, "batch_size": 10, **OPTIONS}
    result = evaluate_finetune("classes", encoder(), labels, tmp_path / "out", **options)
    assert result.metric == "mean average precision"
    (folder,) = tmp_path.glob("out/*/model")
    model = ijepa_zoo.create_model(f"local-dir:{folder}").eval()
    tests = [labels.parent / f"{number}.png" for number in range(30, 50)]
    images = torch.stack([ijepa_zoo.create_transform(model)(Image.open(file)) for file in tests])
    stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        probabilities = model(images).sigmoid()
        assert stock(images).sigmoid().allclose(probabilities, atol=1e-6)
    with labels.open() as file:
        rows = list(csv.DictReader(file))[30:]
    answers = np.array([[name in row["label"].split(";") for name in NAMES] for row in rows])
    exact = average_precision_score(answers, probabilities.numpy(), average="macro")
    assert result.value == pytest.approx(100 * exact, abs=0.1)
    table = tmp_path / "table.csv"
    ijepa_zoo.predict([*map(str, tests)], model, table, topk=3, **OPTIONS)
    for row, expected in zip(csv.DictReader(table.open()), probabilities):
        assert float(row["probability"]) == pytest.approx(float(expected.max()), abs=1e-4)


def test_average_precision_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    answers = (torch.rand(60, 7, generator=generator) < 0.3).to(torch.uint8)
    answers[:, 5], answers[:, 6] = 0, 1
    scores = torch.randn(60, 7, generator=generator)
    scores[:, 1] = (scores[:, 1] * 2).round()  # ties
    scores[:, 2] = 1.0
    expected = [average_precision_score(answers[:, k], scores[:, k]) for k in range(7) if k != 5]
    found = average_precision(scores, answers)
    assert found[5].isnan()
    assert found[[0, 1, 2, 3, 4, 6]].tolist() == pytest.approx(expected, abs=1e-12)
    scores[3] = torch.nan  # diverged
    assert average_precision(scores, answers)[:5].tolist() == [0] * 5


def test_the_loss_is_summed_over_classes():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    answers = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.uint8)
    expected = sum(
        F.binary_cross_entropy(row.sigmoid(), target.float(), reduction="sum")
        for row, target in zip(logits, answers)
    )
    torch.testing.assert_close(classification_loss(logits, answers), expected / 4)


@pytest.mark.parametrize("c", [0.01, 10.0])
def test_logistic_regressions_are_those_of_scikit_learn(c):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 6)) * [1, 5, 0.1, 1, 1, 1] + 2
    y = (x @ rng.normal(size=(6, 4)) + rng.normal(size=(120, 4)) > 1).astype(np.uint8)
    theirs = OneVsRestClassifier(LogisticRegression(C=c, tol=1e-10, max_iter=10_000)).fit(x, y)
    mine = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), c, 4, tolerance=1e-9)
    assert mine.converged
    for k, estimator in enumerate(theirs.estimators_):
        assert mine.weight[k].numpy() == pytest.approx(estimator.coef_[0], abs=1e-5)
        assert float(mine.bias[k]) == pytest.approx(estimator.intercept_[0], abs=1e-4)


def test_sets_of_several_labels(labels):
    train, test = open_task(TASK, labels)
    assert train.multi_label
    assert train.classes == test.classes == ("blue", "green", "red")
    assert (train.labels.shape, test.labels.shape) == ((30, 3), (20, 3))
    assert train.class_sizes().tolist() == train.labels.sum(axis=0).tolist()
    fit, choose = split_off_val(train, 0)
    assert sorted([*fit, *choose]) == list(range(30))
    assert len(choose) == 3
    other = labels.with_name("other.csv")
    other.write_text("path,label\n40.png,red;white\n41.png,white\n42.png,\n")
    tested = open_task(TASK, labels, test=other)[1]
    assert tested.labels.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert any("2 of 3" in note for note in tested.notes)
    assert any("'blue', 'green'" in note for note in tested.notes)
    other.write_text("path,label\n40.png,blue;red\n41.png,\n42.png,\n")
    assert open_task(TASK, labels, test=other)[1].fingerprint() != tested.fingerprint()
    other.write_text("path,label\n41.png,\n42.png,white;black\n")
    with pytest.raises(DataError, match="other"):
        open_task(TASK, labels, test=other)


def test_rare_classes_stay_in_the_first_part():
    rng = np.random.default_rng(0)
    matrix = (rng.random((400, 6)) < [0.8, 0.5, 0.2, 0.1, 0.05, 0]).astype(np.uint8)
    matrix[7] = 1  # the only image of the last class
    for seed in range(20):
        fit, choose = split_classes(matrix, 0.1, seed)
        assert 7 in fit
        assert len(choose) in (39, 40)
        assert matrix[choose][:, 4].sum() == pytest.approx(matrix[:, 4].sum() / 10, abs=2)


def scores_of(model, labels):
    """Logits of the test images, which have the size of the model, and their labels."""
    with labels.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    images = [np.asarray(Image.open(labels.parent / row["path"])) for row in rows]
    pixels = torch.from_numpy((np.stack(images) / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = model(pixels.float())
    return logits, np.array([[name in row["label"] for name in NAMES] for row in rows])


@pytest.mark.parametrize(("probe", "options"), PROBES)
def test_probes_choose_and_test_by_mean_average_precision(labels, tmp_path, probe, options):
    result = probe(TASK, encoder(), labels, tmp_path, **options, **OPTIONS)
    (folder,) = tmp_path.glob("*/model")
    assert json.loads((folder / "config.json").read_bytes())["multi_label"] is True
    model = ijepa_zoo.create_model(f"local-dir:{folder}").eval()
    logits, answers = scores_of(model, labels)
    expected = 100 * average_precision_score(answers, logits.numpy(), average="macro")
    assert result.value == pytest.approx(expected, abs=1e-3)
    assert result.metric == "mean average precision"
    assert result.interval is None
    assert max(h.val for h in result.heads) == next(
        h.val for h in result.heads if h.name == result.chosen
    )
    assert result.data["test"]["labels_per_image"] == round(answers.sum() / 20, 2)
    assert "mean average precision" in result.table()
    again = evaluate_head(folder, labels, tmp_path, **OPTIONS)
    assert (again.value, again.metric) == (result.value, result.metric)

    ijepa_zoo.predict(labels.parent, model, tmp_path / "p.csv", topk=3, **OPTIONS)
    with (tmp_path / "p.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["path"].endswith("30.png"))
    found = {row[f"label{end}"]: float(row[f"probability{end}"]) for end in ("", "_2", "_3")}
    image = ijepa_zoo.create_transform(model)(Image.open(labels.with_name("30.png")))
    with torch.inference_mode():
        logits = model(image[None])
    for name, logit in zip(NAMES, logits[0]):
        assert found[name] == pytest.approx(float(logit.sigmoid()), abs=1e-4)


def test_a_saved_head_and_other_labels(labels, tmp_path):
    options = {"cs": (1.0,), **OPTIONS}
    evaluate_logreg(TASK, encoder(), labels, tmp_path / "several", **options)
    (head,) = tmp_path.glob("several/*/model")
    other = labels.with_name("one.csv")
    other.write_text("path,label\n30.png,red\n31.png,white\n32.png,blue\n33.png,red\n")
    result = evaluate_head(head, other, tmp_path, **OPTIONS)
    assert result.images == {"test": 4}
    other.write_text("path,label\n30.png,white\n")
    with pytest.raises(DataError, match="red"):
        evaluate_head(head, other, tmp_path, **OPTIONS)
    lines = [f"{i:02}.png,{'red' if i % 2 else 'blue'}" for i in range(30)]
    other.write_text("\n".join(["path,label", *lines]))
    evaluate_logreg(TASK, encoder(), other, tmp_path / "one", **options)
    (head,) = tmp_path.glob("one/*/model")
    with pytest.raises(DataError, match="several"):
        evaluate_head(head, labels, tmp_path, **OPTIONS)


def test_the_test_set_may_choose(labels, tmp_path):
    options = {"select_on_test": True, **HEADS, **OPTIONS}
    result = evaluate_linear(TASK, encoder(), labels, tmp_path, cached=True, **options)
    assert result.value == max(h.test for h in result.heads)


def test_probes_of_one_label_refuse_several(labels, tmp_path):
    for probe, options in (
        (evaluate_knn, {}),
        (evaluate_logreg, {"per_class": 2}),
    ):
        with pytest.raises(DataError, match="one class"):
            probe(TASK, encoder(), labels, tmp_path, **options, **OPTIONS)


def test_two_processes_give_the_metrics_of_one(labels, tmp_path):
    script = """
        import sys
        sys.path.insert(0, sys.argv[3])
        import test_multi_label as t
        for probe, options in (t.PROBES[0], t.PROBES[3]):
            probe(t.TASK, t.encoder(), sys.argv[1], sys.argv[2], **options, **t.OPTIONS)
    """
    several_processes.run(script, 2, labels, tmp_path / "two", Path(__file__).parent)
    for probe, options in (PROBES[0], PROBES[3]):
        one = probe(TASK, encoder(), labels, tmp_path / "one", **options, **OPTIONS)
        (file,) = tmp_path.glob(f"two/small-{one.method}*/result.json")
        two = json.loads(file.read_bytes())
        assert two["value"] == pytest.approx(one.value, abs=1e-3)
        held_out = [h.val for h in one.heads]
        assert [h["val"] for h in two["heads"]] == pytest.approx(held_out, abs=1e-3)
