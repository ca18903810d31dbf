"""The objective, and the predictor's own blocks against timm's plain blocks."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import SettingsError
from ijepa_zoo.models.predictor import Predictor

CONTEXT = torch.tensor([[0, 1, 4, 5, 8], [2, 3, 6, 7, 11]])
TARGETS = torch.tensor([[[10, 11], [14, 15], [2, 3]], [[0, 1], [4, 5], [12, 13]]])
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def stir(module, deviation=0.2):
    """Make a network nonlinear, which std 0.02 hardly is."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * deviation)
    return module


@pytest.fixture
def make(tiny, tiny_predictor):
    def create(deviation=0.2, **kwargs):
        size = {**tiny, **tiny_predictor, **kwargs}
        ijepa = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", pretrained=False, **size)
        return stir(ijepa, deviation)

    return create


def make_predictor(depth):
    torch.manual_seed(depth)
    return stir(Predictor((4, 4), 48, 24, depth, 3))


def test_targets_are_normalized_tokens_of_the_whole_image(make):
    ijepa = make()
    tokens = ijepa.target_encoder.forward_features(IMAGES)
    centered = tokens - tokens.mean(-1, keepdim=True)
    normalized = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = torch.stack([normalized[image][TARGETS[image]] for image in range(2)])
    assert_close(ijepa.target_tokens(IMAGES, TARGETS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["smooth_l1", "l2"])
def test_loss_and_gradients(make, loss):
    ijepa = make(loss=loss)
    error = (ijepa.predict(IMAGES, CONTEXT, TARGETS) - ijepa.target_tokens(IMAGES, TARGETS)).abs()
    assert error.min() < 1 < error.max()
    smooth = torch.where(error < 1, 0.5 * error.square(), error - 0.5)
    found = ijepa(IMAGES, CONTEXT, TARGETS)
    assert_close(found, (smooth if loss == "smooth_l1" else error.square()).mean())
    if loss == "smooth_l1":
        by_default = ijepa_zoo.IJepa(ijepa.encoder, ijepa.predictor, ijepa.target_encoder)
        assert torch.equal(by_default(IMAGES, CONTEXT, TARGETS), found)
    found.backward()
    for name, parameter in ijepa.named_parameters():
        if name.startswith("target_encoder."):
            assert not parameter.requires_grad, name
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_regularizer_of_the_context_tokens_is_added(make):
    class Regularizer(nn.Module):
        def forward(self, tokens):
            return 2 * tokens.square().mean()

    ijepa = make(regularizer=Regularizer())
    tokens, truth = ijepa.encoder.encode(IMAGES, CONTEXT), ijepa.target_tokens(IMAGES, TARGETS)
    plain = F.smooth_l1_loss(ijepa.predictor(tokens, CONTEXT, TARGETS), truth)
    loss = ijepa(IMAGES, CONTEXT, TARGETS)
    assert_close(loss, plain + 2 * tokens.square().mean())
    bias = ijepa.encoder.norm.bias
    assert not torch.equal(*(torch.autograd.grad(value, bias)[0] for value in (loss, plain)))


def test_target_encoder_starts_as_a_copy_and_stays_in_evaluation_mode(make):
    ijepa = make(deviation=0, drop_path_rate=0.5).train()
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
    with pytest.raises(SettingsError, match=r"momentum.*1\.1"):
        ijepa.update_target(1.1)


def test_several_masks_of_an_image_equal_several_copies_of_it(make):
    ijepa = make()
    other = torch.tensor([[1, 2, 3, 9, 12], [0, 4, 8, 12, 13]]), TARGETS.flip(0)
    context = torch.stack([CONTEXT, other[0]], dim=1).flatten(0, 1)  # rows of an image are adjacent
    targets = torch.stack([TARGETS, other[1]], dim=1).flatten(0, 1)
    copies = (ijepa(IMAGES, CONTEXT, TARGETS) + ijepa(IMAGES, *other)) / 2
    assert_close(ijepa(IMAGES, context, targets), copies)


def one_sequence_per_target_block(predictor, tokens, context, targets):
    positions = predictor.predictor_pos_embed[0]
    visible, predicted = predictor.predictor_embed(tokens) + positions[context], []
    for hidden in (predictor.mask_token + positions[targets]).unbind(1):
        x = torch.cat([visible, hidden], dim=1)
        for block in predictor.predictor_blocks:
            x = block(x)
        predicted.append(x[:, 5:])
    return predictor.predictor_proj(predictor.predictor_norm(torch.stack(predicted, dim=1)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_predictions_and_gradients_equal_those_of_plain_blocks(depth, fused):
    ours, theirs = make_predictor(depth), make_predictor(depth)
    tokens = TOKENS.clone().requires_grad_()
    theirs.predictor_blocks = nn.ModuleList(Block(24, 3, qkv_bias=True) for _ in range(depth))
    theirs.load_state_dict(ours.state_dict())
    for block in ours.predictor_blocks:
        block.attn.fused_attn = fused
    predicted = ours(tokens, CONTEXT, TARGETS)
    expected = one_sequence_per_target_block(theirs, tokens, CONTEXT, TARGETS)
    assert expected.abs().mean() > 0.1
    assert_close(predicted, expected, rtol=1e-4, atol=1e-5)
    weights = torch.arange(predicted.numel()).view_as(predicted).sin()
    found = torch.autograd.grad((predicted * weights).sum(), [tokens, *ours.parameters()])
    wanted = torch.autograd.grad((expected * weights).sum(), [tokens, *theirs.parameters()])
    assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_gradients_of_repeated_positions_accumulate_in_float32():
    predictor, tokens = make_predictor(2), torch.randn(64, 5, 48)
    context, targets = CONTEXT[:1].expand(64, -1), TARGETS[:1].expand(64, -1, -1)
    weight = predictor.predictor_blocks[0].attn.qkv.weight
    gradients = []
    for is_half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half):
            loss = predictor(tokens, context, targets).float().square().mean()
        gradients += torch.autograd.grad(loss, weight)
    assert F.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0) > 0.999


@pytest.mark.parametrize(
    ("context", "targets", "error"),
    [
        (CONTEXT - 16, TARGETS, (IndexError, RuntimeError)),
        (CONTEXT + 16, TARGETS, (IndexError, RuntimeError)),
        (CONTEXT, TARGETS - 16, (IndexError, RuntimeError)),
        (CONTEXT[:, :4], TARGETS, SettingsError),
        (CONTEXT, TARGETS[0], SettingsError),
        (CONTEXT, TARGETS[:1], SettingsError),
    ],
    ids=str,
)
def test_indices_outside_the_grid_or_of_other_shapes_are_refused(context, targets, error):
    with pytest.raises(error):
        make_predictor(1)(TOKENS, context, targets)
