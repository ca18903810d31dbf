"""The attentive probe."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import several_processes
import torch
import torch.nn.functional as F
from small_probe import TASK, encoder, pixels_of, write_pictures

from ijepa_zoo import FeatureExtractor
from ijepa_zoo.eval import evaluate_attentive
from ijepa_zoo.eval.attentive import ATTENTIVE
from ijepa_zoo.eval.features import BlockFeatures
from ijepa_zoo.eval.heads import Grid
from ijepa_zoo.eval.sets import open_task, split_off_val
from ijepa_zoo.models.classifier import AttentiveHead
from ijepa_zoo.seeds import Stream, fold

OPTIONS = {"epochs": 3, "lrs": (3e-3, 1e-3), "wds": (0.1,), "device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def tokens_of(model, images):
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        maps = FeatureExtractor(model, "last", pool=None)((images - mean) / std)
    return maps.flatten(2).transpose(1, 2)


def test_heads_equal_adamw_alone_on_the_extractors_tokens(pictures, tmp_path):
    result = evaluate_attentive(TASK, encoder(), pictures, tmp_path, **OPTIONS)
    fit, choose = split_off_val(open_task(TASK, pictures)[0], 0)
    images, labels = pixels_of(pictures, "train")
    tests, answers = pixels_of(pictures, "test")
    x, z = tokens_of(encoder(), images), tokens_of(encoder(), tests)
    for found, lr in zip(result.heads, OPTIONS["lrs"]):
        torch.manual_seed(fold(0, Stream.EVAL_INIT))
        head = AttentiveHead(48, 3, num_heads=3)
        decayed, free = (
            [p for p in head.parameters() if (p.ndim > 1) is big] for big in (True, False)
        )
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
        )
        for epoch in range(3):
            for group in optimizer.param_groups:
                group["lr"] = lr * len(fit) / 256 * ATTENTIVE.with_epochs(3).scale(epoch)
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
    assert result.protocol["optimizer"] == "adamw"


def test_a_killed_run_resumes_exactly(pictures, tmp_path, monkeypatch):
    task = replace(TASK, protocol=replace(TASK.protocol))
    options = {**OPTIONS, "batch_size": 16}
    whole = evaluate_attentive(task, encoder(), pictures, tmp_path / "whole", **options)
    step, calls = Grid.step, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Grid, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            evaluate_attentive(task, encoder(), pictures, tmp_path / "killed", **options)
    resumed = evaluate_attentive(task, encoder(), pictures, tmp_path / "killed", **options)
    assert resumed.heads == whole.heads


def test_cached_tokens_train_the_heads_of_online_ones(pictures, tmp_path, monkeypatch, capsys):
    options = {**OPTIONS, "batch_size": 16, "progress": True}
    online, cached = (
        evaluate_attentive(TASK, encoder(), pictures, tmp_path, **options, cached=cached)
        for cached in (False, True)
    )
    assert cached.value == online.value
    for found, expected in zip(cached.heads, online.heads):
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        assert found.val == expected.val
    assert cached.protocol["features"] == "cached"
    monkeypatch.setattr(BlockFeatures, "encode", None)
    again = evaluate_attentive(TASK, encoder(), pictures, tmp_path, cached=True, **options)
    assert again.images_per_second is not None  # the result before
    options["seed"] = 1
    other = evaluate_attentive(TASK, encoder(), pictures, tmp_path, cached=True, **options)
    assert other.images_per_second is None


def test_tokens_of_half_precision_are_kept_in_half_precision(pictures, tmp_path):
    options = {**OPTIONS, "batch_size": 16, "precision": "bfloat16"}
    online, cached = (
        evaluate_attentive(TASK, encoder(), pictures, tmp_path, **options, cached=cached)
        for cached in (False, True)
    )
    files = list(tmp_path.glob("cache/*/rows.npy"))
    assert len(files) == 3
    assert {np.load(file, mmap_mode="r").dtype for file in files} == {np.dtype("float16")}
    for found, expected in zip(cached.heads, online.heads):
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)


def test_three_processes_give_the_heads_of_one(pictures, tmp_path):
    script = """
        import sys
        sys.path.insert(0, sys.argv[3])
        import test_attentive as t
        options = {**t.OPTIONS, "batch_size": 16}
        for cached in (False, True):
            t.evaluate_attentive(t.TASK, t.encoder(), *sys.argv[1:3], cached=cached, **options)
    """
    several_processes.run(script, 3, pictures, tmp_path / "three", Path(__file__).parent)
    one = evaluate_attentive(TASK, encoder(), pictures, tmp_path, **OPTIONS, batch_size=16)
    for file in tmp_path.glob("three/*/result.json"):
        three = json.loads(file.read_bytes())
        assert three["value"] == one.value
        losses = [head.loss for head in one.heads]
        assert [head["loss"] for head in three["heads"]] == pytest.approx(losses, abs=1e-4)
