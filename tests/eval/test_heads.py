"""The heads of a linear probe: each as if it were trained alone."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_zoo.eval.heads import HeadSpec, make_grid
from ijepa_zoo.eval.tasks import CROP, Protocol

WIDTHS = {"last": 12, "last4": 48}


def grid_of(specs, optimizer="sgd", widths=WIDTHS, classes=5, seed=3):
    return make_grid(specs, widths, classes, replace(Protocol(1, CROP), optimizer=optimizer), seed)


def batches(steps=12, size=32):
    """Features with unequal means and scales, that labels depend on; and a learning rate."""
    generator = torch.Generator().manual_seed(0)
    centers = {name: torch.randn(5, width, generator=generator) for name, width in WIDTHS.items()}
    for step in range(steps):
        labels = torch.randint(5, (size,), generator=generator)
        noise = {name: torch.randn(size, w, generator=generator) for name, w in WIDTHS.items()}
        scales = {name: torch.linspace(0.2, 1.2, width) for name, width in WIDTHS.items()}
        features = {n: (centers[n][labels] + 1 + noise[n]) * scales[n] for n in WIDTHS}
        yield features, labels, 1.0 if step < 6 else 0.1


def test_every_head_equals_timms_lars_alone():
    """Weight decay is in the loss: timm's is not part of the step whose length counts."""
    kinds = product(WIDTHS, ("bn", "linear"), (6.4, 0.64), (5e-4, 0.0))
    grid = grid_of([HeadSpec(*kind) for kind in kinds], "lars")
    alone = copy.deepcopy(grid.heads)
    losses = torch.stack([grid.step(*batch) for batch in batches()])
    for i, (spec, head) in enumerate(zip(grid.specs, alone)):
        linear = head.linear
        groups = [{"params": [linear.weight], "always_adapt": True}]
        groups.append({"params": [linear.bias, *head.norm.parameters()]})
        optimizer = Lars(groups, momentum=0.9, trust_coeff=0.001)
        for step, (features, labels, scale) in enumerate(batches()):
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * scale
            loss = F.cross_entropy(head(features[spec.representation]), labels)
            assert float(losses[step, i]) == pytest.approx(float(loss.detach()), abs=1e-5)
            squares = linear.weight.square().sum() + linear.bias.square().sum()
            optimizer.zero_grad()
            (loss + spec.weight_decay / 2 * squares).backward()
            optimizer.step()
        for key, tensor in grid.heads[i].state_dict().items():
            torch.testing.assert_close(tensor, head.state_dict()[key], rtol=0, atol=1e-5)
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
    assert torch.cat([linear.weight.flatten(), linear.bias]).tolist() == pytest.approx(expected)


def test_first_weights_are_those_of_torchs_linear_layer_and_of_the_seed():
    spec, other = HeadSpec("x", "linear", 0.1, 0.0), HeadSpec("y", "bn", 1.0, 0.0)
    made = [([spec], 1), ([other, spec], 1), ([spec], 2)]
    widths = {"x": 4096, "y": 8}
    first, again, others = (grid_of(*m[:1], widths=widths, seed=m[1]).heads[-1] for m in made)
    for parameter in first.linear.parameters():  # uniform within 1 / sqrt(4096)
        assert float(parameter.detach().abs().max()) <= 1 / 64
    assert float(first.linear.weight.detach().std()) == pytest.approx(1 / 64 / 3**0.5, rel=0.02)
    assert first.linear.weight.equal(again.linear.weight)
    assert not first.linear.weight.equal(others.linear.weight)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_step_waits_for_no_device_and_a_head_that_diverged_spoils_no_other(optimizer):
    """Nothing is read back: on a GPU each such read would wait for all work before it."""
    specs, seen = [HeadSpec("last", "bn", lr, 0.0) for lr in (0.1, 3e38)], set()
    both, one = grid_of(specs, optimizer), grid_of(specs[:1], optimizer)

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.name())
            return function(*args, **kwargs or {})

    with Reads():
        losses = [both.step(*batch) for batch in batches()]
    assert "aten::native_batch_norm" in seen
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"} & seen
    expected = [one.step(*batch) for batch in batches()]
    assert [found[0].item() for found in losses] == pytest.approx([e.item() for e in expected])
    assert losses[-1][1].isnan()
