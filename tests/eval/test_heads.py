import threading

import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import nn

from ijepa_zoo.eval.heads import HeadGrid, HeadSpec

WIDTHS = {"last": 12, "last4": 48}
CLASSES = 5


def grid_of(lrs=(0.5, 0.05), decays=(5e-4, 0.0)):
    return [
        HeadSpec(representation, bn, lr, wd)
        for lr in lrs
        for representation in ("last4", "last")
        for bn in (True, False)
        for wd in decays
    ]


def batches(steps, size=32, seed=0):
    """Features with unequal means and scales, that labels depend on."""
    generator = torch.Generator().manual_seed(seed)
    centres = {r: torch.randn(CLASSES, w, generator=generator) for r, w in WIDTHS.items()}
    scales = {r: torch.rand(w, generator=generator) + 0.2 for r, w in WIDTHS.items()}
    for _ in range(steps):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        features = {
            r: (centres[r][labels] + 1 + torch.randn(size, w, generator=generator)) * scales[r]
            for r, w in WIDTHS.items()
        }
        yield features, labels


def lr_scale(step):
    return 1.0 if step < 25 else 0.1


def assert_same_head(mine, other):
    expected = other.eval().state_dict()
    for name, tensor in mine.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def train_alone(head, spec, optimizer, penalty=0.0):
    """The head trained by torch's autograd and an ordinary optimizer; also its first losses."""
    head.train()
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    linear = head if isinstance(head, nn.Linear) else head[1]
    for step, (features, labels) in enumerate(batches(40)):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * lr_scale(step)
        loss = F.cross_entropy(head(features[spec.representation]), labels)
        losses.append(float(loss.detach()))
        squares = linear.weight.square().sum() + linear.bias.square().sum()
        optimizer.zero_grad()
        (loss + penalty / 2 * squares).backward()
        optimizer.step()
    return losses


def split(head):
    """Parameters of the linear layer, and of BatchNorm."""
    if isinstance(head, nn.Linear):
        return [head.weight, head.bias], []
    return [head[1].weight, head[1].bias], [head[0].weight, head[0].bias]


@pytest.mark.parametrize("nesterov", [True, False])
def test_every_head_equals_torch_sgd_alone(nesterov):
    specs = grid_of()
    grid = HeadGrid(specs, WIDTHS, CLASSES, momentum=0.9, nesterov=nesterov, seed=3)
    alone = [grid.head(i) for i in range(len(specs))]
    losses = torch.stack(
        [grid.update(x, y, lr_scale(step)) for step, (x, y) in enumerate(batches(40))]
    )
    features, labels = next(batches(1, size=200, seed=1))
    logits, correct = grid.logits(features), grid.correct(features, labels)
    for i, (spec, head) in enumerate(zip(specs, alone)):
        decayed, free = split(head)
        groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": free}]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.SGD(groups, lr=spec.lr, momentum=0.9, nesterov=nesterov)
        expected = train_alone(head, spec, optimizer)
        torch.testing.assert_close(losses[:, i], torch.tensor(expected), rtol=0, atol=1e-5)
        assert_same_head(grid.head(i), head)
        outside = head.eval()(features[spec.representation])
        torch.testing.assert_close(logits[i], outside, rtol=1e-5, atol=1e-4)
        assert correct[i] == (outside.argmax(1) == labels).sum()
    trained = torch.stack([parameter.std() for parameter in logits])
    assert len(set(trained.tolist())) == len(specs), "no two heads are the same"


def test_every_head_equals_timms_lars_alone():
    """Weight decay is in the loss here: timm's own is not part of the step whose length counts."""
    specs = grid_of(lrs=(6.4, 0.64))
    grid = HeadGrid(specs, WIDTHS, CLASSES, optimizer="lars", momentum=0.9, seed=3)
    alone = [grid.head(i) for i in range(len(specs))]
    for step, (features, labels) in enumerate(batches(40)):
        grid.update(features, labels, lr_scale(step))
    for i, (spec, head) in enumerate(zip(specs, alone)):
        (weight, bias), free = split(head)
        start = weight.detach().clone()
        groups = [{"params": [weight], "always_adapt": True}, {"params": [bias, *free]}]
        optimizer = Lars(groups, lr=spec.lr, momentum=0.9, trust_coeff=0.001)
        train_alone(head, spec, optimizer, spec.weight_decay)
        assert_same_head(grid.head(i), head)
        assert (weight - start).abs().max() > 1e-3


def test_lars_step_by_hand():
    grid = HeadGrid([HeadSpec("a", False, 2.0, 0.5)], {"a": 1}, 2, optimizer="lars")
    state = grid.state_dict()
    state["a.linear.weight"].copy_(torch.tensor([[[3.0], [4.0]]]))
    state["a.linear.bias"].copy_(torch.tensor([[-2.0, -3.0]]))
    grid.update({"a": torch.ones(1, 1)}, torch.tensor([0]), 1.0)
    # both logits are 1, so the gradients of weights and biases are -0.5 and 0.5; weight decay
    # makes the weights' (1, 2.5) and the biases' (-1.5, -1); the ratio is 0.001 * 5 / |(1, 2.5)|
    ratio = 0.005 / 7.25**0.5
    expected = torch.tensor([[[3 - 2 * ratio], [4 - 5 * ratio]]])
    torch.testing.assert_close(state["a.linear.weight"], expected)
    torch.testing.assert_close(state["a.linear.bias"], torch.tensor([[1.0, -1.0]]))


def test_weights_of_zero_take_the_plain_step():
    grid = HeadGrid([HeadSpec("a", False, 1.0, 0.0)], {"a": 1}, 2, optimizer="lars")
    grid.state_dict()["a.linear.weight"].zero_()
    grid.state_dict()["a.linear.bias"].zero_()
    grid.update({"a": torch.ones(1, 1)}, torch.tensor([0]), 1.0)
    torch.testing.assert_close(
        grid.state_dict()["a.linear.weight"], torch.tensor([[[0.5], [-0.5]]])
    )


def test_first_weights_are_those_of_torchs_linear_layer_and_of_the_seed():
    spec = HeadSpec("x", False, 0.1, 0.0)
    heads = [
        HeadGrid(specs, {"x": 4096, "y": 8}, 100, seed=seed).head(0)
        for specs, seed in (([spec], 1), ([spec, HeadSpec("y", True, 1.0, 0.0)], 1), ([spec], 2))
    ]
    torch.manual_seed(0)
    usual = nn.Linear(4096, 100)
    for mine, theirs in ((heads[0].weight, usual.weight), (heads[0].bias, usual.bias)):
        assert float(mine.detach().abs().max()) == pytest.approx(1 / 64, rel=0.03)
        assert float((mine.std() / theirs.std()).detach()) == pytest.approx(1, abs=0.15)
    assert heads[0].weight.equal(heads[1].weight), "of no other head"
    assert not heads[0].weight.equal(heads[2].weight)


def shared(shares, grids, batch):
    """An update with one batch cut into shares, one for each grid, which exchange their sums."""
    barrier, box = threading.Barrier(len(grids)), {}

    def total_of(rank):
        def total(tensor):
            box[rank] = tensor.clone()
            barrier.wait(10)
            result = sum(box[r] for r in sorted(box))
            barrier.wait(10)
            return result

        return total

    errors = []

    def work(rank, rows):
        grids[rank]._total = total_of(rank)
        features, labels = batch
        try:
            grids[rank].update({r: x[rows] for r, x in features.items()}, labels[rows], 1.0)
        except ValueError as error:
            errors.append(str(error))

    parts = torch.arange(len(batch[1])).split(shares)
    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_shares_of_any_size_give_the_weights_of_the_whole_batch(optimizer):
    whole, *parts = (
        HeadGrid(grid_of(decays=(5e-4,)), WIDTHS, CLASSES, optimizer=optimizer) for _ in range(4)
    )
    for batch in batches(5):
        whole.update(*batch, 1.0)
        assert not shared([20, 12, 0], parts, batch)
    for part in parts:
        for name, tensor in part.state_dict().items():
            torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=0, atol=1e-6)


def test_all_processes_refuse_a_batch_that_is_bad_on_one():
    grids = [HeadGrid(grid_of(), WIDTHS, CLASSES) for _ in range(2)]
    features, labels = next(batches(1))
    features["last4"][3, 7] = torch.nan
    errors = shared([16, 16], grids, (features, labels))
    assert len(errors) == 2
    assert all("'last4' of 1 of 32 images are NaN" in error for error in errors)


def test_resumed_training_is_the_same_to_the_last_bit():
    through, first, second = (HeadGrid(grid_of(), WIDTHS, CLASSES, seed=s) for s in (0, 0, 9))
    data = list(batches(8))
    for features, labels in data:
        through.update(features, labels, 1.0)
    for features, labels in data[:3]:
        first.update(features, labels, 1.0)
    second.load_state_dict({name: t.clone() for name, t in first.state_dict().items()})
    for features, labels in data[3:]:
        second.update(features, labels, 1.0)
    for name, tensor in through.state_dict().items():
        assert tensor.equal(second.state_dict()[name]), name


def test_state_of_other_heads_is_refused():
    grid = HeadGrid(grid_of(), WIDTHS, CLASSES)
    for other in (
        HeadGrid(grid_of(lrs=(0.5, 0.06)), WIDTHS, CLASSES),
        HeadGrid(grid_of()[:3], WIDTHS, CLASSES),
        HeadGrid(grid_of(), WIDTHS, CLASSES + 1),
    ):
        with pytest.raises(ValueError, match="the saved state is of other heads: "):
            grid.load_state_dict(other.state_dict())


def test_padding_is_never_right():
    grid = HeadGrid(grid_of(), WIDTHS, CLASSES)
    features, labels = next(batches(1))
    padded = torch.cat([labels, torch.full((6,), -1)])
    more = {r: torch.cat([x, torch.full((6, WIDTHS[r]), torch.nan)]) for r, x in features.items()}
    assert grid.correct(more, padded).equal(grid.correct(features, labels))


def test_a_head_that_diverged_has_no_right_answers_and_spoils_no_other():
    specs = [HeadSpec("last", False, lr, 0.0) for lr in (0.1, 3e38)]
    both, one = HeadGrid(specs, WIDTHS, CLASSES), HeadGrid(specs[:1], WIDTHS, CLASSES)
    for features, labels in batches(6):
        both.update(features, labels, 1.0)
        one.update(features, labels, 1.0)
    assert not both.logits(features)[1].isfinite().any()
    assert both.correct(features, labels).tolist() == [int(one.correct(features, labels)), 0]
    torch.testing.assert_close(both.head(0).weight, one.head(0).weight)


def test_bad_batches_are_refused_before_any_head_changes():
    grid = HeadGrid(grid_of(), WIDTHS, CLASSES)
    before = {name: tensor.clone() for name, tensor in grid.state_dict().items()}
    features, labels = next(batches(1))
    infinite = features | {"last": features["last"].index_fill(0, torch.tensor([2, 5]), torch.inf)}
    one = {r: x[:1] for r, x in features.items()}
    for x, y, message in (
        (infinite, labels, "'last' of 2 of 32 images are NaN or infinite"),
        (features, labels.index_fill(0, torch.tensor([1]), CLASSES), "1 of 32 labels .* 0 to 4"),
        (features, labels.index_fill(0, torch.tensor([1, 4]), -1), "2 of 32 labels"),
        (features, labels[:-1], "one label for each row"),
        (one, labels[:1], "a batch of 1 images; BatchNorm needs 2"),
        ({"last": features["last"]}, labels, r"'last4' have shape None; .* \[B, 48\]"),
        (features | {"last4": features["last"]}, labels, r"'last4' have shape \(32, 12\)"),
    ):
        with pytest.raises(ValueError, match=message):
            grid.update(x, y, 1.0)
    with pytest.raises(ValueError, match="'last' of 2 of 32 images"):
        grid.correct(infinite, labels)
    for name, tensor in grid.state_dict().items():
        assert tensor.equal(before[name]), name


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        ([], {}, "no head"),
        ([HeadSpec("last", True, 0.1, 0.0)] * 2, {}, "'last bn lr=0.1 wd=0' is in the grid twice"),
        ([HeadSpec("first", True, 0.1, 0.0)], {}, "'first', of which no width .* last, last4"),
        ([HeadSpec("last", True, -0.1, 0.0)], {}, "lr must be above 0"),
        ([HeadSpec("last", True, 0.1, -1.0)], {}, "wd 0 or more"),
        (grid_of(), {"optimizer": "adam"}, "use 'sgd' or 'lars'"),
        (grid_of(), {"optimizer": "lars", "nesterov": True}, "Nesterov"),
        (grid_of(), {"momentum": 1.0}, "momentum is 1.0"),
        (grid_of(), {"num_classes": 1}, "1 classes"),
    ],
)
def test_bad_grids_are_refused(specs, options, message):
    with pytest.raises(ValueError, match=message):
        HeadGrid(specs, WIDTHS, **{"num_classes": CLASSES, **options})
