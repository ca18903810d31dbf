import math

import pytest
import torch

from ijepa_zoo.eval.knn import knn_correct


def data(n=150, m=60, width=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.randint(classes, (n + m,), generator=generator)
    features = centres[labels] * 0.6 + torch.randn(n + m, width, generator=generator)
    features *= torch.rand(n + m, 1, generator=generator) * 9 + 1  # lengths must not matter
    return features[:n], labels[:n], features[n:], labels[n:]


def vote(train, labels, query, k, temperature):
    """The classifier of the papers, one query at a time in plain Python."""

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    nearest = sorted(((cosine(query, x), y) for x, y in zip(train, labels)), reverse=True)[:k]
    votes = {}
    for similarity, label in nearest:
        votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
    return max(votes, key=votes.get)


def test_grid_equals_one_query_at_a_time():
    train, labels, queries, answers = data()
    ks, temperatures = (20, 1, 5, 150), (0.07, 1.0)
    found = knn_correct(train, labels, queries, answers, ks=ks, temperatures=temperatures)
    rows, queries_as_lists = train.double().tolist(), queries.double().tolist()
    for i, k in enumerate(ks):
        for j, temperature in enumerate(temperatures):
            right = sum(
                vote(rows, labels.tolist(), query, k, temperature) == answer
                for query, answer in zip(queries_as_lists, answers.tolist())
            )
            assert found[i, j] == right, (k, temperature)
    assert len(found.unique()) > 3, "the grid must matter for this test to mean something"


@pytest.mark.parametrize(("query_block", "train_block"), [(7, 11), (60, 150), (1, 149)])
def test_blocks_change_nothing(query_block, train_block):
    ks, temperatures = (1, 7, 40), (0.01, 0.1)
    whole = knn_correct(*data(), ks=ks, temperatures=temperatures)
    blocks = knn_correct(
        *data(), ks=ks, temperatures=temperatures, query_block=query_block, train_block=train_block
    )
    assert blocks.equal(whole)


def test_votes_of_a_small_temperature_do_not_underflow():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.5]])
    right = knn_correct(
        train, torch.tensor([1, 0]), -train[:1], torch.tensor([0]), ks=[2], temperatures=[1e-3]
    )
    assert right.item() == 1, "exp(-1 / 0.001) is 0; the nearer of two far ones decides"


def test_padding_is_never_right():
    train, labels, queries, answers = data()
    options = {"ks": [5], "temperatures": [0.1]}
    padded = torch.cat([queries, torch.zeros(5, 6)]), torch.cat([answers, torch.full((5,), -1)])
    assert knn_correct(train, labels, *padded, **options).equal(
        knn_correct(train, labels, queries, answers, **options)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": [20, 151]}, "k is 151; with 150 training images use 1 to 150"),
        ({"ks": [0]}, "k is 0"),
        ({"ks": []}, "at least one k"),
        ({"temperatures": [0.0]}, "temperature 0.0 must be above 0"),
        ({"train": torch.full((150, 6), torch.nan)}, "training features of 150 of 150 .* NaN"),
        ({"queries": torch.zeros(60, 5)}, "6 training and 5 query features"),
        ({"queries": torch.zeros(0, 6), "query_labels": torch.zeros(0)}, "n above 0"),
        ({"train_labels": torch.zeros(3)}, r"shape \(150, 6\) and labels \(3,\)"),
        ({"train_labels": torch.full((150,), -1)}, "training label -1"),
    ],
)
def test_bad_input_is_refused(changes, message):
    names = ("train", "train_labels", "queries", "query_labels")
    arguments = dict(zip(names, data())) | {"ks": [5], "temperatures": [0.1]} | changes
    with pytest.raises(ValueError, match=message):
        knn_correct(**arguments)
