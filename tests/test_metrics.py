"""Metrics of features, against scikit-learn and worked examples."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from ijepa_zoo.metrics import knn_accuracy, linear_accuracy, mean_cosine, rankme, spread


def labeled_features(n=60, width=7, classes=3):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (n,), generator=generator)
    centers = torch.randn(classes, width, generator=generator)
    return centers[labels] + torch.randn(n, width, generator=generator), labels


def test_rankme_of_known_spectra():
    basis = torch.linalg.qr(torch.randn(50, 8, dtype=torch.float64))[0]
    assert rankme(basis) == pytest.approx(8, rel=1e-4)
    assert rankme(basis[:, :1] * torch.ones(1, 8)) == pytest.approx(1, abs=1e-4)
    singular = np.array([4.0, 2.0, 1.0, 1.0])
    p = singular / singular.sum()
    expected = np.exp(-(p * np.log(p)).sum())
    assert rankme(basis[:, :4] * torch.from_numpy(singular)) == pytest.approx(expected, rel=1e-4)
    for shape in ((3,), (1, 4), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"\[n, D\]"):
            rankme(torch.ones(shape))


def test_spread_and_mean_cosine():
    assert spread(torch.ones(2, 4)) == 0
    assert spread(torch.randn(4000, 32)) == pytest.approx(1, abs=0.02)
    assert spread(torch.randn(4000, 32) + 5) < 0.25
    features, _ = labeled_features(n=9)
    expected = cosine_similarity(features)[~np.eye(9, dtype=bool)].mean()
    assert mean_cosine(features) == pytest.approx(expected, abs=1e-6)
    assert mean_cosine(torch.ones(5, 3)) == pytest.approx(1)


@pytest.mark.parametrize("n", [60, 12])
def test_knn_is_that_of_scikit_learn(n):
    features, labels = labeled_features(n)
    features += 5  # all neighbors are about as near
    theirs = KNeighborsClassifier(
        min(20, n - 1), weights=lambda d: np.exp(-d / 0.07), metric="cosine"
    )
    found = cross_val_predict(theirs, features.double(), labels, cv=LeaveOneOut())
    expected = pytest.approx(100 * (found == labels.numpy()).mean())
    assert 40 < knn_accuracy(features, labels) < 100
    assert knn_accuracy(features, labels) == expected
    assert knn_accuracy(features, 10 * labels + 5) == expected


def test_linear_classifier_is_the_ridge_of_scikit_learn():
    features, labels = labeled_features(n=31)
    features += 3  # the mean counts
    x, classes = features.double().numpy(), labels.numpy()
    order = np.argsort(classes, kind="stable")
    correct = 0
    for train, test in ((order[0::2], order[1::2]), (order[1::2], order[0::2])):
        eigenvalues = np.linalg.svd(x[train] - x[train].mean(0), compute_uv=False) ** 2
        strengths = [10.0**e * eigenvalues.mean() for e in range(-5, 2)]
        ridge = RidgeCV(strengths).fit(x[train], np.eye(3)[classes[train]])
        correct += (ridge.predict(x[test]).argmax(1) == classes[test]).sum()
    assert 40 < linear_accuracy(features, labels) < 100
    assert linear_accuracy(features, labels) == pytest.approx(100 * correct / 31)
