import numpy as np
import pytest
import torch
import torch.nn.functional as F

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


def test_spread():
    torch.manual_seed(0)
    assert spread(torch.ones(2, 4)) == 0
    assert spread(torch.randn(4000, 32)) == pytest.approx(1, abs=0.02)
    assert spread(torch.randn(4000, 32) + 5) < 0.25


@pytest.mark.parametrize("shape", [(3,), (1, 4), (2, 3, 4)])
def test_shapes(shape):
    with pytest.raises(ValueError, match=r"\[n, D\]"):
        rankme(torch.ones(shape))


def test_mean_cosine_of_all_pairs():
    features, _ = labeled_features(n=9)
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    expected = np.mean([float(F.cosine_similarity(features[i], features[j], 0)) for i, j in pairs])
    assert mean_cosine(features) == pytest.approx(expected, abs=1e-6)
    assert mean_cosine(torch.ones(5, 3)) == pytest.approx(1)


@pytest.mark.parametrize("n", [60, 12])
def test_knn_against_a_loop(n):
    features, labels = labeled_features(n)
    features += 5  # all neighbors are about as near
    unit = (features / features.norm(dim=1, keepdim=True)).double().numpy()
    correct = 0
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: -unit[i] @ unit[j])
        votes = np.zeros(3)
        for j in others[:20]:
            votes[labels[j]] += np.exp(unit[i] @ unit[j] / 0.07)
        correct += votes.argmax() == labels[i]
    assert 40 < knn_accuracy(features, labels) < 100
    assert knn_accuracy(features, labels) == pytest.approx(100 * correct / n)
    assert knn_accuracy(features, 10 * labels + 5) == pytest.approx(100 * correct / n)


def test_linear_classifier_against_refitting():
    features, labels = labeled_features(n=31)
    features += 3  # the mean counts
    x, classes = features.double().numpy(), labels.numpy()
    y = np.eye(3)[classes]

    def predict(x, y, strength, test):
        centered, offset = x - x.mean(0), y.mean(0)
        gram = centered.T @ centered + strength * np.eye(x.shape[1])
        return (test - x.mean(0)) @ np.linalg.solve(gram, centered.T @ (y - offset)) + offset

    def left_out(x, y, strength):  # centered once, as the closed form does
        centered, target = x - x.mean(0), y - y.mean(0)
        gram = centered.T @ centered + strength * np.eye(x.shape[1])
        hat = centered @ np.linalg.solve(gram, centered.T) + 1 / len(x)
        residual = target - centered @ np.linalg.solve(gram, centered.T @ target)
        return ((residual / (1 - np.diag(hat))[:, None]) ** 2).mean()

    order = np.argsort(classes, kind="stable")
    correct = 0
    for train, test in ((order[0::2], order[1::2]), (order[1::2], order[0::2])):
        eigenvalues = np.linalg.svd(x[train] - x[train].mean(0), compute_uv=False) ** 2
        grid = [10.0**e * eigenvalues.mean() for e in range(-5, 2)]
        best = min(grid, key=lambda strength: left_out(x[train], y[train], strength))
        correct += (predict(x[train], y[train], best, x[test]).argmax(1) == classes[test]).sum()
    assert 40 < linear_accuracy(features, labels) < 100
    assert linear_accuracy(features, labels) == pytest.approx(100 * correct / 31)
