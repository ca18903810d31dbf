import torch
from torch import nn

from ijepa_zoo.train.optim import make_optimizer, set_rates


def networks():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    predictor = nn.ModuleDict({"proj": nn.Linear(3, 4)})
    predictor.register_parameter("mask_token", nn.Parameter(torch.ones(1, 1, 3)))
    return encoder, predictor


def test_groups_stand_in_the_published_order():
    encoder, predictor = networks()
    groups = make_optimizer(encoder, predictor).param_groups
    assert [group["decayed"] for group in groups] == [True, True, False, False]
    shapes = [[tuple(p.shape) for p in group["params"]] for group in groups]
    assert shapes == [[(3, 4)], [(1, 1, 3), (4, 3)], [(3,), (3,), (3,)], [(4,)]]


def test_decay_is_decoupled_and_spares_biases_and_norms():
    encoder, predictor = networks()
    optimizer = make_optimizer(encoder, predictor)
    before = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    for parameter in [*encoder.parameters(), *predictor.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    set_rates(optimizer, lr=0.1, weight_decay=0.5)
    optimizer.step()
    after = dict(encoder.named_parameters())
    assert torch.allclose(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after[name], before[name])


def test_first_update_has_the_size_of_the_learning_rate():
    encoder, predictor = networks()
    optimizer = make_optimizer(encoder, predictor)
    before = encoder[0].weight.detach().clone()
    for parameter in [*encoder.parameters(), *predictor.parameters()]:
        parameter.grad = torch.full_like(parameter, -2.0)
    set_rates(optimizer, lr=0.01, weight_decay=0.0)
    optimizer.step()
    assert torch.allclose(encoder[0].weight, before + 0.01, atol=1e-6)
