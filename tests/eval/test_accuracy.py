"""Counts of correct answers, against plain loops."""

from types import SimpleNamespace

import pytest
import torch

from ijepa_zoo.distributed import Distributed
from ijepa_zoo.eval.accuracy import best_head, count_correct, likeliest

CLASSES = 8


def test_counts_equal_a_plain_computation():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 90, CLASSES, generator=generator)
    labels = torch.randint(CLASSES - 1, (90,), generator=generator)  # one class has no image
    logits[1, torch.arange(90), labels] += 1  # the best head
    logits[2, :, 4] = torch.nan  # diverged
    probe = SimpleNamespace(num_classes=CLASSES, distributed=Distributed())
    source = SimpleNamespace(device=torch.device("cpu"), split=lambda rows: {"rows": rows})
    batches = [(torch.arange(90)[rows], labels[rows]) for rows in (slice(0, 50), slice(50, 90))]
    counts = count_correct(
        probe, source, batches, lambda features: likeliest(logits[:, features["rows"]]), 3
    )
    right = [logits[head].argmax(1) == labels for head in range(2)]
    expected = [100 * float(found.double().mean()) for found in right]
    assert counts.values() == pytest.approx([*expected, 0])
    assert counts.total == 90
    assert best_head(counts) == 1
    ranked = logits[0].argsort(dim=1, descending=True)[:, :5]
    five = 100 * float((ranked == labels[:, None]).any(1).double().mean())
    classes = [float(right[0][labels == k].double().mean()) for k in range(CLASSES - 1)]
    assert counts.others() == pytest.approx(
        {"mean per-class accuracy": 100 * sum(classes) / len(classes), "top-5 accuracy": five}
    )
