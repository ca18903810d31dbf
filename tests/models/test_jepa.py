"""The objective: targets, loss, gradients and the update of the target encoder."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import SettingsError
from ijepa_zoo.seeds import standard_normal

CONTEXT = torch.tensor([[0, 1, 4, 5, 8], [2, 3, 6, 7, 11]])
TARGETS = torch.tensor([[[10, 11], [14, 15], [2, 3]], [[0, 1], [4, 5], [12, 13]]])
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(tiny, tiny_predictor):
    def create(stir=0.2, **kwargs):
        size = {**tiny, **tiny_predictor, **kwargs}
        ijepa = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", pretrained=False, **size)
        with torch.no_grad():  # std 0.02 makes a nearly linear network
            for parameter in ijepa.parameters():
                parameter.add_(torch.randn_like(parameter) * stir)
        return ijepa

    return create


@pytest.mark.parametrize("layers", [1, 2])
def test_targets_are_the_mean_of_normalized_layers_of_the_whole_image(make, layers):
    ijepa = make(target_layers=layers)
    outputs = ijepa.target_encoder.forward_intermediates(
        IMAGES, norm=True, output_fmt="NLC", intermediates_only=True
    )
    tokens = torch.stack(outputs[-layers:])
    centered = tokens - tokens.mean(-1, keepdim=True)
    mean = (centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()).mean(0)
    expected = torch.stack([mean[image][TARGETS[image]] for image in range(2)])
    assert_close(ijepa.target_tokens(IMAGES, TARGETS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["smooth_l1", "l2"])
def test_loss_and_gradients(make, loss):
    ijepa = make(loss=loss)
    error = (ijepa.predict(IMAGES, CONTEXT, TARGETS) - ijepa.target_tokens(IMAGES, TARGETS)).abs()
    assert error.min() < 1 < error.max()
    smooth = torch.where(error < 1, 0.5 * error.square(), error - 0.5)
    found = ijepa(IMAGES, CONTEXT, TARGETS)
    assert_close(found, (smooth if loss == "smooth_l1" else error.square()).mean())
    found.backward()
    for name, parameter in ijepa.named_parameters():
        if name.startswith("target_encoder."):
            assert not parameter.requires_grad, name
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_regularizer_of_the_context_tokens_and_noise_of_positions_are_added(make):
    class Regularizer(nn.Module):
        def forward(self, tokens):
            return 2 * tokens.square().mean()

    ijepa = make(regularizer=Regularizer(), position_noise=0.25)
    ijepa.noise_seed = 5
    tokens, truth = ijepa.encoder.encode(IMAGES, CONTEXT), ijepa.target_tokens(IMAGES, TARGETS)
    noise = 0.25 * standard_normal((16, 48), 5, IMAGES.device)
    plain = F.smooth_l1_loss(ijepa.predictor(tokens, CONTEXT, TARGETS, noise), truth)
    loss = ijepa(IMAGES, CONTEXT, TARGETS)
    assert_close(loss, plain + 2 * tokens.square().mean())
    bias = ijepa.encoder.norm.bias
    assert not torch.equal(*(torch.autograd.grad(value, bias)[0] for value in (loss, plain)))


def test_target_encoder_starts_as_a_copy_and_stays_in_evaluation_mode(make):
    ijepa = make(stir=0, drop_path_rate=0.5).train()
    assert ijepa.encoder.training
    assert not any(module.training for module in ijepa.target_encoder.modules())
    for name, parameter in ijepa.encoder.named_parameters():
        target = ijepa.target_encoder.get_parameter(name)
        assert torch.equal(target, parameter)
        assert target.data_ptr() != parameter.data_ptr()


@pytest.mark.parametrize("momentum", [0.0, 0.996, 1.0])
def test_update_of_the_target_encoder(make, momentum):
    ijepa = make()
    old = {name: tensor.clone() for name, tensor in ijepa.state_dict().items()}
    ijepa.update_target(momentum)
    for name, parameter in ijepa.state_dict().items():
        expected = old[name]
        if name.startswith("target_encoder."):
            own = old[name.removeprefix("target_")]
            expected = momentum * expected + (1 - momentum) * own
        assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_several_masks_of_an_image_equal_several_copies_of_it(make):
    ijepa = make()
    other = torch.tensor([[1, 2, 3, 9, 12], [0, 4, 8, 12, 13]]), TARGETS.flip(0)
    context = torch.stack([CONTEXT, other[0]], dim=1).flatten(0, 1)  # rows of an image are adjacent
    targets = torch.stack([TARGETS, other[1]], dim=1).flatten(0, 1)
    copies = (ijepa(IMAGES, CONTEXT, TARGETS) + ijepa(IMAGES, *other)) / 2
    assert_close(ijepa(IMAGES, context, targets), copies)


def test_momentum_outside_its_range_is_refused(make):
    with pytest.raises(SettingsError, match=r"momentum.*1\.1"):
        make().update_target(1.1)
