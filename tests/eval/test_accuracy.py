"""Accuracies and average precision, against plain loops and scikit-learn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from ijepa_zoo.distributed import Distributed
from ijepa_zoo.eval.accuracy import (
    average_precision,
    classification_loss,
    compute_metrics,
    wilson_interval,
)


def measure(logits, labels, classes):
    probe = SimpleNamespace(
        num_classes=classes, distributed=Distributed(), train=SimpleNamespace(multi_label=False)
    )
    source = SimpleNamespace(device=torch.device("cpu"), split=lambda rows: rows)
    rows = torch.arange(len(labels)).split(50)
    batches = [(part, labels[part]) for part in rows if len(part)]
    return compute_metrics(probe, source, batches, lambda part: [*logits[:, part]])


def test_accuracies_equal_a_plain_computation():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 90, 8, generator=generator)
    labels = torch.randint(6, (90,), generator=generator)  # one class has no image
    labels[0] = 6  # and another has one
    logits[1, torch.arange(90), labels] += 1  # the best head
    logits[2, :, 4] = torch.nan  # diverged
    found = measure(logits, labels, 8)
    right = [logits[head].argmax(1) == labels for head in range(2)]
    assert found.values == pytest.approx([*(100 * float(r.double().mean()) for r in right), 0])
    assert (found.images, found.best) == (90, 1)
    assert wilson_interval(8, 10) == pytest.approx((49.0162, 94.3318), abs=1e-4)  # statsmodels
    assert found.intervals[1] == wilson_interval(int(right[1].sum()), 90)
    classes = [float(right[0][labels == k].double().mean()) for k in range(7)]
    assert found.others[0]["mean per-class accuracy"] == pytest.approx(100 * sum(classes) / 7)
    top = (logits[0].argsort(dim=1, descending=True)[:, :5] == labels[:, None]).any(1).double()
    assert found.others[0]["top-5 accuracy"] == pytest.approx(100 * float(top.mean()))
    assert "top-5 accuracy" not in measure(logits[:, :, :5], labels % 5, 5).others[0]
    assert "top-5 accuracy" in measure(logits[:, :, :6], labels % 6, 6).others[0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans())
def test_average_precision_is_scikit_learns(seed, n, ties):
    rng = np.random.default_rng(seed)
    answers, scores = rng.integers(0, 2, (n, 3)), rng.normal(size=(n, 3))
    answers[:, 2] = 0
    answers[rng.integers(n), 0] = answers[rng.integers(n), 1] = 1
    scores = scores.round() if ties else scores
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(answers))
    expected = [average_precision_score(answers[:, k], scores[:, k]) for k in range(2)]
    assert found[:2].tolist() == pytest.approx(expected, abs=1e-12)
    assert found[2].isnan()
    scores[0] = np.nan  # diverged
    assert average_precision(torch.from_numpy(scores), torch.from_numpy(answers))[0] == 0


def test_the_loss_of_several_labels_is_summed_over_classes():
    logits = torch.randn(4, 3)
    answers = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.uint8)
    expected = F.binary_cross_entropy(logits.sigmoid(), answers.float(), reduction="sum") / 4
    torch.testing.assert_close(classification_loss(logits, answers), expected)
