"""The kNN probe: votes against plain Python, columns that it reads, any number of processes."""

import json
import math
from pathlib import Path

import pytest
import several_processes
import timm
import torch
import torch.nn.functional as F
from small_probe import TASK, encoder, features_of, pixels_of, write_pictures

from ijepa_zoo.eval import evaluate_knn, evaluate_linear, features
from ijepa_zoo.eval.sets import open_task, split_off_val
from ijepa_zoo.metrics import knn_predict

CLASSES = 4


def data(n=150, m=60, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, width, generator=generator)
    labels = torch.randint(CLASSES, (n + m,), generator=generator)
    rows = centers[labels] * 0.6 + torch.randn(n + m, width, generator=generator)
    rows *= torch.rand(n + m, 1, generator=generator) * 9 + 1  # lengths must not matter
    return F.normalize(rows[:n], dim=1), labels[:n], rows[n:], labels[n:]


def vote(train, labels, query, k, temperature):
    """The classifier of the papers, one query at a time in plain Python."""

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    nearest = sorted(((cosine(query, x), y) for x, y in zip(train, labels)), reverse=True)[:k]
    votes = {}
    for similarity, label in nearest:
        votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
    return sorted(votes, key=votes.get, reverse=True)


@pytest.mark.parametrize(("query_block", "bank_block"), [(1024, 16384), (7, 11)])
def test_votes_equal_one_query_at_a_time(query_block, bank_block):
    bank, labels, queries, answers = data()
    ks, temperatures = (20, 1, 5, 150), (0.07, 1.0)
    blocks = {"query_block": query_block, "bank_block": bank_block}
    options = {"ks": ks, "temperatures": temperatures, "num_classes": CLASSES, **blocks}
    found = knn_predict(bank, labels, queries, top=2, **options)
    rows, lists = bank.double().tolist(), queries.double().tolist()
    settings = [(k, temperature) for k in ks for temperature in temperatures]
    for i, setting in enumerate(settings):
        for j, query in enumerate(lists):
            expected = vote(rows, labels.tolist(), query, *setting)[:2]
            assert found[i, j, : len(expected)].tolist() == expected, setting
    right = (found[..., 0] == answers).sum(dim=1)
    assert len(right.unique()) > 3, "the settings must matter for this test to mean something"


def test_votes_of_a_small_temperature_do_not_underflow():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.5]]), dim=1)
    found = knn_predict(
        bank, torch.tensor([1, 0]), -bank[:1], ks=[2], temperatures=[1e-3], num_classes=2
    )
    assert found.item() == 0, "exp(-1 / 0.001) is 0; the nearer of two far ones decides"


def test_probe_equals_a_plain_computation(tmp_path):
    pictures, model = write_pictures(tmp_path / "pictures"), encoder()
    result = evaluate_knn(TASK, model, pictures, tmp_path / "out", device="cpu", workers=0)
    fit, choose = split_off_val(open_task(TASK, pictures)[0], 0)
    images, labels = pixels_of(pictures, "train")
    tests, answers = pixels_of(pictures, "test")
    x, z = (features_of(model, pixels)["last"] for pixels in (images, tests))

    def accuracy(near, classes, queries, truth, k, temperature):
        found = [
            vote(near.tolist(), classes.tolist(), query, int(k), temperature)[0]
            for query in queries.tolist()
        ]
        return 100 * float((torch.tensor(found) == truth).float().mean())

    for head in result.heads:
        setting = [float(part.split("=")[1]) for part in head.name.split()]
        expected = accuracy(x[fit], labels[fit], x[choose], labels[choose], *setting)
        assert head.val == pytest.approx(expected)
    setting = [float(part.split("=")[1]) for part in result.chosen.split()]
    assert result.value == pytest.approx(accuracy(x, labels, z, answers, *setting))
    about = {"pool": "avg", "layers": [3], "precision": "float32"}
    assert result.protocol.items() >= about.items()
    assert result.metrics["mean per-class accuracy"] == pytest.approx(result.value)


def test_a_model_that_uses_its_class_token_is_evaluated_on_it(tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    common = (TASK, model, pictures, tmp_path / "out")
    results = [
        evaluate_knn(*common, device="cpu", workers=0, pool=pool)
        for pool in ("auto", "avg", "cls_avg")
    ]
    assert [result.protocol["pool"] for result in results] == ["cls", "avg", "cls_avg"]
    assert len([*tmp_path.glob("out/*/result.json")]) == 3


def test_only_the_columns_in_use_are_gathered(tmp_path, monkeypatch):
    """Of `last4` in the cache, which the linear probe made, `last` is read."""
    pictures = write_pictures(tmp_path / "pictures")
    common = (TASK, encoder(), pictures, tmp_path / "out")
    options = {"device": "cpu", "workers": 0}
    evaluate_linear(*common, cached=True, **options)
    monkeypatch.setattr(features.BlockFeatures, "encode", None)
    banks = []

    def recorded(bank, *args, **kwargs):
        banks.append(bank)
        return knn_predict(bank, *args, **kwargs)

    monkeypatch.setattr("ijepa_zoo.eval.knn.knn_predict", recorded)
    evaluate_knn(*common, **options)
    assert [tuple(bank.shape) for bank in banks] == [(32, 48), (36, 48)]
    assert all(bank.untyped_storage().nbytes() == 4 * bank.numel() for bank in banks)


@pytest.mark.parametrize("world", [3, 7])
def test_any_number_of_processes_gives_the_accuracy_of_one(tmp_path, world):
    pictures = write_pictures(tmp_path / "pictures")
    script = """
        import sys
        sys.path.insert(0, sys.argv[3])
        import small_probe
        from ijepa_zoo.eval import evaluate_knn
        evaluate_knn(small_probe.TASK, small_probe.encoder(), *sys.argv[1:3], device="cpu",
                     workers=0)
    """
    several_processes.run(script, world, pictures, tmp_path / "many", Path(__file__).parent)
    one = evaluate_knn(TASK, encoder(), pictures, tmp_path / "one", device="cpu", workers=0)
    (file,) = tmp_path.glob("many/small-knn-*/result.json")
    many = json.loads(file.read_bytes())
    assert many["value"] == one.value
    assert [h["val"] for h in many["heads"]] == [h.val for h in one.heads]
