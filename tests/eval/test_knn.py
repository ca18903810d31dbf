"""The kNN probe: votes against plain Python, settings, and the class token."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_probe import OPTIONS, TASK, encoder, features_of, pixels_of, write_pictures

from ijepa_zoo.eval import evaluate_knn
from ijepa_zoo.eval.knn import KS, TEMPERATURES
from ijepa_zoo.eval.sets import open_task, split_classes
from ijepa_zoo.metrics import knn_predict


def vote(train, labels, query, k, temperature):
    """The classifier of the papers, one query at a time in plain Python."""
    similarities = F.cosine_similarity(train.double(), query.double(), dim=1).tolist()
    nearest = sorted(zip(similarities, labels.tolist()), reverse=True)[:k]
    votes = {}
    for similarity, label in nearest:
        votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
    return sorted(votes, key=votes.get, reverse=True)


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from([3, 1024]), st.sampled_from([5, 16384]))
def test_votes_equal_one_query_at_a_time(seed, query_block, bank_block):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(4, 6, generator=generator)
    labels = torch.randint(4, (60,), generator=generator)
    rows = centers[labels] * 0.6 + torch.randn(60, 6, generator=generator)
    rows *= torch.rand(60, 1, generator=generator) * 9 + 1  # lengths must not matter
    bank, queries = F.normalize(rows[:50], dim=1), rows[50:]
    ks, temperatures = (20, 1, 50), (0.07, 1.0)
    blocks = {"query_block": query_block, "bank_block": bank_block}
    options = {"ks": ks, "temperatures": temperatures, "num_classes": 4, **blocks}
    found = knn_predict(bank, labels[:50], queries, top=2, **options)
    for i, setting in enumerate((k, t) for k in ks for t in temperatures):
        for j, query in enumerate(queries):
            expected = vote(bank, labels[:50], query, *setting)[:2]
            assert found[i, j, : len(expected)].tolist() == expected


def test_votes_of_a_small_temperature_do_not_underflow():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.5]]), dim=1)
    options = {"ks": [2], "temperatures": [1e-3], "num_classes": 2}
    found = knn_predict(bank, torch.tensor([1, 0]), -bank[:1], **options)
    assert found.item() == 0, "exp(-1 / 0.001) is 0; the nearer of two far ones decides"


@pytest.mark.parametrize("on_test", [False, True])
def test_probe_equals_a_plain_computation(pictures, tmp_path, on_test):
    result = evaluate_knn(TASK, encoder(), pictures, tmp_path, select_on_test=on_test, **OPTIONS)
    fit, choose = split_classes(open_task(TASK, pictures)[0].targets, 0.1, 0)
    images, labels = pixels_of(pictures, "train")
    tests, answers = pixels_of(pictures, "test")
    x, z = (features_of(encoder(), pixels)["last"] for pixels in (images, tests))

    def accuracy(near, classes, queries, truth, name):
        k, temperature = (float(part.split("=")[1]) for part in name.split())
        found = [vote(near, classes, query, int(k), temperature)[0] for query in queries]
        return 100 * float((torch.tensor(found) == truth).float().mean())

    neighbors = [k for k in KS if k <= (36 if on_test else len(fit))]
    names = [f"k={k} T={t:g}" for k in neighbors for t in TEMPERATURES]
    assert [head.name for head in result.heads] == names
    for head in result.heads:
        if on_test:
            assert head.test == pytest.approx(accuracy(x, labels, z, answers, head.name))
        else:
            expected = accuracy(x[fit], labels[fit], x[choose], labels[choose], head.name)
            assert head.val == pytest.approx(expected)
    assert result.value == pytest.approx(accuracy(x, labels, z, answers, result.chosen))
    about = {"pool": "avg", "layers": [3], "precision": "float32"}
    about |= {"test_transform": "bilinear resize to 32x32", "ks": [10, 20, 50, 100, 200]}
    about |= {"temperatures": [0.02, 0.04, 0.07, 0.1, 0.2]}
    assert result.protocol.items() >= about.items()


@pytest.mark.parametrize(("train", "ks"), [(3, {"k=6"}), (10, {"k=10", "k=20"})])
def test_as_few_images_as_neighbors(tmp_path, train, ks):
    few = write_pictures(tmp_path / "few", train=train, test=2, classes=2)
    result = evaluate_knn(TASK, encoder(), few, tmp_path, select_on_test=True, **OPTIONS)
    assert {head.name.split()[0] for head in result.heads} == ks


def test_a_model_that_uses_its_class_token_is_evaluated_on_it(pictures, tmp_path):
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    pools = {
        pool: evaluate_knn(TASK, model, pictures, tmp_path, pool=pool, **OPTIONS).protocol["pool"]
        for pool in ("auto", "cls_avg")
    }
    assert pools == {"auto": "cls", "cls_avg": "cls_avg"}
