"""The heads of a linear probe: each as if it were trained alone."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_zoo.eval.heads import HeadSpec, make_grid
from ijepa_zoo.eval.tasks import CROP, Protocol

WIDTHS = {"last": 12, "last4": 48}
CLASSES, STEPS = 5, 12


def specs_of(lrs=(0.5, 0.05), decays=(5e-4, 0.0)):
    return [
        HeadSpec(representation, kind, lr, wd)
        for lr in lrs
        for representation in ("last4", "last")
        for kind in ("bn", "linear")
        for wd in decays
    ]


def grid_of(specs, optimizer="sgd", widths=WIDTHS, classes=CLASSES, seed=3):
    return make_grid(specs, widths, classes, replace(Protocol(1, CROP), optimizer=optimizer), seed)


def batches(steps, size=32, seed=0):
    """Features with unequal means and scales, that labels depend on."""
    generator = torch.Generator().manual_seed(seed)
    centers = {r: torch.randn(CLASSES, w, generator=generator) for r, w in WIDTHS.items()}
    scales = {r: torch.rand(w, generator=generator) + 0.2 for r, w in WIDTHS.items()}
    for _ in range(steps):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        features = {
            r: (centers[r][labels] + 1 + torch.randn(size, w, generator=generator)) * scales[r]
            for r, w in WIDTHS.items()
        }
        yield features, labels


def lr_scale(step):
    return 1.0 if step < 6 else 0.1


def assert_same_head(mine, other):
    expected = other.state_dict()
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def train_alone(head, spec, optimizer, penalty=0.0):
    """The head trained with an ordinary optimizer; returns its losses."""
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step, (features, labels) in enumerate(batches(STEPS)):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * lr_scale(step)
        loss = F.cross_entropy(head(features[spec.representation]), labels)
        losses.append(float(loss.detach()))
        squares = head.linear.weight.square().sum() + head.linear.bias.square().sum()
        optimizer.zero_grad()
        (loss + penalty / 2 * squares).backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize(("name", "lrs"), [("sgd", (0.5, 0.05)), ("lars", (6.4, 0.64))])
def test_every_head_equals_torchs_sgd_or_timms_lars_alone(name, lrs):
    grid = grid_of(specs_of(lrs=lrs), name)
    alone = copy.deepcopy(grid.heads)
    steps = enumerate(batches(STEPS))
    losses = torch.stack([grid.step(x, y, lr_scale(step)) for step, (x, y) in steps])
    for i, (spec, head) in enumerate(zip(grid.specs, alone)):
        linear, norm = head.linear, [*head.norm.parameters()]
        if name == "sgd":
            groups = [{"params": [*linear.parameters()], "weight_decay": spec.weight_decay}]
            groups += [{"params": p} for p in norm]
            optimizer = torch.optim.SGD(groups, lr=spec.lr, momentum=0.9, nesterov=True)
            expected = train_alone(head, spec, optimizer)
        else:  # timm's weight decay is not part of the step whose length counts: add it to the loss
            groups = [{"params": [linear.weight], "always_adapt": True}]
            groups.append({"params": [linear.bias, *norm]})
            optimizer = Lars(groups, lr=spec.lr, momentum=0.9, trust_coeff=0.001)
            expected = train_alone(head, spec, optimizer, spec.weight_decay)
        torch.testing.assert_close(losses[:, i], torch.tensor(expected), rtol=0, atol=1e-5)
        assert_same_head(grid.heads[i], head)
    assert len(set(losses[-1].tolist())) == len(grid.specs), "no two heads are the same"


@pytest.mark.parametrize(
    ("weight", "bias", "lr", "decay", "expected"),
    [
        # both logits are 1, so all gradients are -0.5 and 0.5; weight decay makes the weights'
        # (1, 2.5) and the biases' (-1.5, -1); the ratio is 0.001 * 5 / |(1, 2.5)|
        ((3.0, 4.0), (-2.0, -3.0), 2.0, 0.5, (3 - 0.01 / 7.25**0.5, 4 - 0.025 / 7.25**0.5, 1, -1)),
        ((0.0, 0.0), (0.0, 0.0), 1.0, 0.0, (0.5, -0.5, 0.5, -0.5)),  # no norm: the plain step
    ],
)
def test_lars_step_by_hand(weight, bias, lr, decay, expected):
    grid = grid_of([HeadSpec("a", "linear", lr, decay)], "lars", {"a": 1}, 2)
    linear = grid.heads[0].linear
    linear.load_state_dict({"weight": torch.tensor(weight)[:, None], "bias": torch.tensor(bias)})
    grid.step({"a": torch.ones(1, 1)}, torch.tensor([0]), 1.0)
    found = torch.cat([linear.weight.flatten(), linear.bias])
    assert found.tolist() == pytest.approx(expected)


def test_first_weights_are_those_of_torchs_linear_layer_and_of_the_seed():
    spec, other = HeadSpec("x", "linear", 0.1, 0.0), HeadSpec("y", "bn", 1.0, 0.0)
    first, among_others, of_other_seed = (
        grid_of(specs, widths={"x": 4096, "y": 8}, classes=100, seed=seed).heads[-1].linear
        for specs, seed in (([spec], 1), ([other, spec], 1), ([spec], 2))
    )
    usual = nn.Linear(4096, 100)
    for mine, theirs in zip(first.parameters(), usual.parameters()):
        assert float(mine.detach().abs().max()) == pytest.approx(1 / 64, rel=0.03)
        assert float((mine.std() / theirs.std()).detach()) == pytest.approx(1, abs=0.15)
    assert first.weight.equal(among_others.weight)
    assert not first.weight.equal(of_other_seed.weight)


def test_a_head_that_diverged_spoils_no_other():
    specs = [HeadSpec("last", "linear", lr, 0.0) for lr in (0.1, 3e38)]
    both, one = grid_of(specs), grid_of(specs[:1])
    for features, labels in batches(6):
        both.step(features, labels, 1.0)
        one.step(features, labels, 1.0)
    assert both.output(1, features).isnan().any()
    assert_same_head(both.heads[0], one.heads[0])


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_step_waits_for_no_device(optimizer):
    """Nothing is read back: on a GPU each such read would wait for all work before it."""
    grid, seen = grid_of(specs_of(), optimizer), set()

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.name())
            return function(*args, **kwargs or {})

    with Reads():
        for features, labels in batches(2):
            grid.step(features, labels, 1.0)
    assert "aten::native_batch_norm" in seen
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"} & seen
