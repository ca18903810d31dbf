"""The attentive probe."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_probe import OPTIONS, TASK, encoder, normalized, pixels_of

from ijepa_zoo import FeatureExtractor
from ijepa_zoo.eval import evaluate_attentive
from ijepa_zoo.eval.attentive import ATTENTIVE
from ijepa_zoo.eval.sets import open_task, split_classes
from ijepa_zoo.models.classifier import AttentiveHead
from ijepa_zoo.seeds import Stream, fold

HEADS = {"epochs": 3, "lrs": (3e-3, 1e-3), "wds": (0.1,), **OPTIONS}


@torch.no_grad()
def tokens_of(images):
    maps = FeatureExtractor(encoder(), "last", pool=None)(normalized(images))
    return maps.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("cached", [False, True])
def test_heads_equal_adamw_alone_on_the_extractors_tokens(pictures, tmp_path, cached):
    result = evaluate_attentive(TASK, encoder(), pictures, tmp_path, cached=cached, **HEADS)
    assert result.protocol["optimizer"] == "adamw"
    fit, choose = split_classes(open_task(TASK, pictures)[0].targets, 0.1, 0)
    images, labels = pixels_of(pictures, "train")
    tests, answers = pixels_of(pictures, "test")
    x, z = tokens_of(images), tokens_of(tests)
    for found, lr in zip(result.heads, HEADS["lrs"]):
        torch.manual_seed(fold(0, Stream.EVAL_INIT))
        head = AttentiveHead(48, 3, num_heads=3)
        decayed = [p for p in head.parameters() if p.ndim > 1]
        free = [p for p in head.parameters() if p.ndim == 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
        )
        for epoch in range(3):
            for group in optimizer.param_groups:
                group["lr"] = lr * ATTENTIVE.with_epochs(3).lr_scale(epoch, 1, len(fit))
            loss = F.cross_entropy(head(x[fit]), labels[fit])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert found.loss == pytest.approx(float(loss.detach()), abs=1e-4)
        kept = (head(x[choose]).argmax(1) == labels[choose]).float().mean()
        assert found.val == pytest.approx(100 * float(kept))
        if found.name == result.chosen:
            right = (head(z).argmax(1) == answers).float().mean()
            assert result.value == pytest.approx(100 * float(right))


def test_tokens_in_half_precision_are_cached_in_half_precision(pictures, tmp_path):
    options = {**HEADS, "batch_size": 16, "precision": "bfloat16"}
    online, cached = (
        evaluate_attentive(TASK, encoder(), pictures, tmp_path, **options, cached=cached)
        for cached in (False, True)
    )
    for found, expected in zip(cached.heads, online.heads):
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        assert found.val == expected.val
    kept = {np.load(file, mmap_mode="r").dtype.name for file in tmp_path.glob("cache/*/rows.npy")}
    assert kept == {"float16"}
