"""Logistic regression: against scikit-learn, and few labels."""

import numpy as np
import pytest
import torch
from sklearn import datasets
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from small_probe import OPTIONS, TASK, encoder, features_of, pixels_of

from ijepa_zoo.errors import DataError, SettingsError
from ijepa_zoo.eval import evaluate_logreg
from ijepa_zoo.eval.logreg import CS, draw_per_class, fit_logistic
from ijepa_zoo.eval.sets import listed_rows, open_task


def digits():
    """8 x 8 images of handwritten digits: 700 for training and 300 for testing."""
    x, y = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:1000]
    features, labels = torch.tensor(x)[order] / 16, torch.tensor(y)[order]
    return features[:700], labels[:700], features[700:], labels[700:]


def scikit_learn(features, labels, c):
    model = LogisticRegression(C=c, solver="newton-cg", tol=1e-8, max_iter=10_000)
    return model.fit(features.numpy(), labels.numpy())


@pytest.mark.parametrize("c", [1e-4, 1.0, 100.0])
def test_equals_scikit_learn_on_digits(c):
    train, labels, test, answers = digits()
    mine = fit_logistic(train, labels, c, 10, tolerance=1e-7)
    theirs = scikit_learn(train, labels, c)
    assert mine.converged
    expected = torch.from_numpy(theirs.decision_function(test.numpy()))
    found = mine.logits(test)  # a bias that is equal for all classes changes nothing
    centered = (logits - logits.mean(dim=1, keepdim=True) for logits in (found, expected))
    torch.testing.assert_close(*centered, rtol=0, atol=1e-2)
    accuracy = float((found.argmax(1) == answers).double().mean())
    assert accuracy == theirs.score(test.numpy(), answers.numpy())
    single = fit_logistic(train.float(), labels, c, 10)
    assert single.objective == pytest.approx(mine.objective, rel=1e-3)
    assert not fit_logistic(train, labels, c, 12, max_iterations=3).converged
    warm = fit_logistic(train, labels, c, 10, start=fit_logistic(train, labels, c / 3, 10))
    assert warm.objective == pytest.approx(mine.objective, rel=1e-3)


@pytest.mark.parametrize("c", [0.01, 10.0])
def test_several_labels_equal_scikit_learn(c):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 6)) * [1, 5, 0.1, 1, 1, 1] + 2
    y = (x @ rng.normal(size=(6, 4)) + rng.normal(size=(120, 4)) > 1).astype(np.uint8)
    theirs = OneVsRestClassifier(LogisticRegression(C=c, tol=1e-10, max_iter=10_000)).fit(x, y)
    mine = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), c, 4, tolerance=1e-9)
    assert mine.converged
    for k, estimator in enumerate(theirs.estimators_):
        assert mine.weight[k].numpy() == pytest.approx(estimator.coef_[0], abs=1e-5)
        assert float(mine.bias[k]) == pytest.approx(estimator.intercept_[0], abs=1e-4)


def test_probe_equals_scikit_learn_on_the_listed_images(pictures, tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("\n".join(f"class{kind}/{n}.png" for kind in range(3) for n in range(8)))
    result = evaluate_logreg(TASK, encoder(), pictures, tmp_path, list=file, **OPTIONS)
    assert sum(result.images.values()) == 24 + 21
    assert (len(result.heads), min(CS), max(CS)) == (90, 1e-6, 1e5)
    assert "24 of 36" in " ".join(result.notes)
    rows = listed_rows(open_task(TASK, pictures)[0], file)
    name, c = result.chosen.split(" C=")
    (x, labels), (z, answers) = (
        (features_of(images, name), classes)
        for images, classes in (pixels_of(pictures / split) for split in ("train", "test"))
    )
    exact = min(CS, key=lambda value: abs(value - float(c)))
    theirs = scikit_learn(x[rows].double(), labels[rows], exact)
    assert result.value == pytest.approx(100 * theirs.score(z.numpy(), answers.numpy()), abs=5)
    file.write_text("class0/1.png\nclass0/2.png")
    with pytest.raises(DataError, match="one class"):
        evaluate_logreg(TASK, encoder(), pictures, tmp_path, list=file, **OPTIONS)


def test_images_per_class_are_drawn_by_the_seed(pictures, tmp_path):
    labels = np.repeat([2, 0, 1], [9, 4, 7])
    rows = draw_per_class(labels, 5, 0)
    assert np.bincount(labels[rows]).tolist() == [4, 5, 5]
    assert (np.diff(rows) > 0).all()
    assert rows.tolist() != draw_per_class(labels, 5, 1).tolist()
    args, options = (TASK, encoder(), pictures, tmp_path), {"cs": (0.1, 1.0), **OPTIONS}
    few = evaluate_logreg(*args, per_class=4, **options)
    assert (few.protocol["per_class"], few.images["train"] + few.images["val"]) == (4, 12)
    with pytest.raises(SettingsError, match="--per-class"):
        evaluate_logreg(*args, per_class=1, list="x", **options)
