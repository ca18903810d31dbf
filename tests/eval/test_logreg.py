"""Logistic regression: against scikit-learn, few labels, several processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import several_processes
import torch
from small_probe import TASK, encoder, features_of, pixels_of, write_pictures

from ijepa_zoo.errors import DataError, SettingsError
from ijepa_zoo.eval import evaluate_logreg
from ijepa_zoo.eval.logreg import CS, draw_per_class, fit_logistic
from ijepa_zoo.eval.sets import listed_rows, open_task

datasets = pytest.importorskip("sklearn.datasets")
linear_model = pytest.importorskip("sklearn.linear_model")


def digits(dtype=torch.float32):
    """8 x 8 images of handwritten digits: 1297 for training and 500 for testing."""
    x, y = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    features, labels = torch.tensor(x, dtype=dtype)[order] / 16, torch.tensor(y)[order]
    return features[:1297], labels[:1297], features[1297:], labels[1297:]


def scikit_learn(features, labels, c):
    model = linear_model.LogisticRegression(C=c, solver="newton-cg", tol=1e-9, max_iter=10_000)
    return model.fit(features.numpy(), labels.numpy())


@pytest.mark.parametrize("c", [1e-4, 1.0, 100.0])
def test_equals_scikit_learn_on_digits(c):
    train, labels, test, answers = digits(torch.float64)
    mine = fit_logistic(train, labels, c, 10, tolerance=1e-7)
    theirs = scikit_learn(train, labels, c)
    assert mine.converged
    expected = torch.from_numpy(theirs.decision_function(test.numpy()))
    found = mine.logits(test)  # a bias that is equal for all classes changes nothing
    centered = (logits - logits.mean(dim=1, keepdim=True) for logits in (found, expected))
    torch.testing.assert_close(*centered, rtol=0, atol=1e-2)
    accuracy = float((mine.logits(test).argmax(1) == answers).double().mean())
    assert accuracy == theirs.score(test.numpy(), answers.numpy())
    single = fit_logistic(train.float(), labels, c, 10)
    assert single.objective == pytest.approx(mine.objective, rel=1e-3)
    warm = fit_logistic(train, labels, c, 10, start=fit_logistic(train, labels, c / 3, 10))
    assert warm.objective == pytest.approx(mine.objective, rel=1e-3)


def test_shares_of_two_processes_give_the_same_classifier():
    train, labels, *_ = digits(torch.float64)
    whole = fit_logistic(train, labels, 1.0, 10, tolerance=1e-7)
    script = """
        import sys
        sys.path.insert(0, sys.argv[2])
        import torch
        import test_logreg as t
        from ijepa_zoo.distributed import init_distributed
        train, labels, *_ = t.digits(torch.float64)
        with init_distributed("cpu") as distributed:
            mine = slice(distributed.rank, None, distributed.world_size)
            found = t.fit_logistic(train[mine], labels[mine], 1.0, 10, tolerance=1e-7,
                                   all_reduce=distributed.all_reduce)
        expected = torch.load(sys.argv[1])
        torch.testing.assert_close(found.weight, expected, rtol=0, atol=1e-4)
    """
    path = Path(several_processes.tempfile.mkstemp(suffix=".pt")[1])
    torch.save(whole.weight, path)
    several_processes.run(script, 2, path, Path(__file__).parent)
    path.unlink()


def test_too_few_iterations_and_classes_without_images():
    train, labels, *_ = digits()
    assert not fit_logistic(train, labels, 1.0, 10, max_iterations=3).converged
    train = torch.cat([train, torch.full((len(train), 1), 3.0)], dim=1)
    fitted = fit_logistic(train, labels, 1.0, 12)
    assert fitted.weight.shape == (12, 65)
    assert (fitted.logits(train).argmax(1) == labels).double().mean() > 0.97


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def write_list(folder, lines):
    path = folder / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_probe_equals_scikit_learn_on_the_listed_images(pictures, tmp_path):
    names = [f"class{kind}/{number}.png" for kind in range(3) for number in range(8)]
    files = write_list(tmp_path, names)
    model = encoder()
    options = {"device": "cpu", "workers": 0}
    result = evaluate_logreg(TASK, model, pictures, tmp_path / "out", list=files, **options)
    assert sum(result.images.values()) == 24 + 21
    assert len(result.heads) == 90
    assert min(CS) == 1e-6
    assert max(CS) == 1e5
    images, labels = pixels_of(pictures, "train")
    rows = listed_rows(open_task(TASK, pictures)[0], files)
    tests, answers = pixels_of(pictures, "test")
    name, c = result.chosen.split(" C=")
    x, z = (features_of(model, pixels)[name] for pixels in (images, tests))
    exact = min(CS, key=lambda value: abs(value - float(c)))
    theirs = scikit_learn(x[rows].double(), labels[rows], exact)
    assert result.value == pytest.approx(100 * theirs.score(z.numpy(), answers.numpy()), abs=5)
    assert any("24 of 36 training images, 8 of each" in note for note in result.notes)


def test_images_per_class_are_drawn_by_the_seed(pictures, tmp_path):
    labels = np.repeat([2, 0, 1], [9, 4, 7])
    rows = draw_per_class(labels, 5, 0)
    assert np.bincount(labels[rows]).tolist() == [4, 5, 5]
    assert (np.diff(rows) > 0).all()
    assert rows.tolist() != draw_per_class(labels, 5, 1).tolist()
    options = {"device": "cpu", "workers": 0, "cs": (0.1, 1.0)}
    result = evaluate_logreg(TASK, encoder(), pictures, tmp_path, per_class=4, **options)
    assert result.protocol["per_class"] == 4
    assert result.images["train"] + result.images["val"] == 12
    everything = evaluate_logreg(TASK, encoder(), pictures, tmp_path, **options)
    assert everything.images["train"] + everything.images["val"] == 36
    assert len([*tmp_path.glob("small-logreg-*/result.json")]) == 2
    with pytest.raises(DataError, match="--select-on-test"):
        evaluate_logreg(TASK, encoder(), pictures, tmp_path, per_class=1, **options)
    with pytest.raises(SettingsError, match="--per-class"):
        evaluate_logreg(TASK, encoder(), pictures, tmp_path, per_class=1, list="x", **options)


def test_lists_that_do_not_fit_are_refused(pictures, tmp_path):
    train, _ = open_task(TASK, pictures)
    rows = listed_rows(train, write_list(tmp_path, ["class1/3.png", "", "class0/1.png "]))
    assert [train.images.name(row).split("/")[-2] for row in rows] == ["class0", "class1"]
    for lines, named in (
        (["class0/1.png", "class0/99.png"], "class0/99.png"),
        (["", " "], "is empty"),
        (["3.png"], "CLASS/NAME"),
    ):
        with pytest.raises(DataError, match=named):
            listed_rows(train, write_list(tmp_path, lines))
    with pytest.raises(DataError, match=r"nothing\.txt"):
        listed_rows(train, tmp_path / "nothing.txt")
    one = write_list(tmp_path, [f"class0/{number}.png" for number in range(8)])
    with pytest.raises(DataError, match="one class"):
        evaluate_logreg(TASK, encoder(), pictures, tmp_path, list=one, device="cpu", workers=0)


def test_processes_give_the_accuracy_of_one(pictures, tmp_path):
    script = """
        import sys
        sys.path.insert(0, sys.argv[3])
        import small_probe
        from ijepa_zoo.eval import evaluate_logreg
        evaluate_logreg(small_probe.TASK, small_probe.encoder(), *sys.argv[1:3], device="cpu",
                        workers=0, cs=(0.01, 1.0, 10.0))
    """
    several_processes.run(script, 3, pictures, tmp_path / "many", Path(__file__).parent)
    options = {"device": "cpu", "workers": 0, "cs": (0.01, 1.0, 10.0)}
    one = evaluate_logreg(TASK, encoder(), pictures, tmp_path / "one", **options)
    (file,) = tmp_path.glob("many/small-logreg-*/result.json")
    many = json.loads(file.read_bytes())
    assert many["value"] == one.value
    assert [h["val"] for h in many["heads"]] == [h.val for h in one.heads]
