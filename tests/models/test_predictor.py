"""The predictor's own blocks against timm's plain blocks over whole sequences."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn
from torch.testing import assert_close

from ijepa_zoo.errors import SettingsError
from ijepa_zoo.models.predictor import Predictor

CONTEXT = torch.tensor([[0, 1, 4, 5, 8], [2, 3, 6, 7, 11]])
TARGETS = torch.tensor([[[10, 11], [14, 15], [2, 3]], [[0, 1], [4, 5], [12, 13]]])
TOKENS = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))


def make(depth, context="repeated"):
    torch.manual_seed(depth)
    predictor = Predictor((4, 4), 48, 24, depth, 3, context=context)
    with torch.no_grad():  # std 0.02 makes a nearly linear network
        for parameter in predictor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return predictor


def one_sequence_per_target_block(predictor, tokens, context, targets):
    positions, mask = predictor.predictor_pos_embed[0], None
    if predictor.context == "shared":
        mask = torch.ones(1, 1, 7, 7, dtype=torch.bool)
        mask[..., :5, 5:] = False  # the context does not attend to mask tokens
    visible, predicted = predictor.predictor_embed(tokens) + positions[context], []
    for hidden in (predictor.mask_token + positions[targets]).unbind(1):
        x = torch.cat([visible, hidden], dim=1)
        for block in predictor.predictor_blocks:
            x = block(x, attn_mask=mask)
        predicted.append(x[:, 5:])
    return predictor.predictor_proj(predictor.predictor_norm(torch.stack(predicted, dim=1)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("context", ["repeated", "shared"])
def test_predictions_and_gradients_equal_those_of_plain_blocks(context, depth, fused):
    ours, theirs, tokens = (
        make(depth, context),
        make(depth, context),
        TOKENS.clone().requires_grad_(),
    )
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
    predictor, tokens = make(2), torch.randn(64, 5, 48)
    context, targets = CONTEXT[:1].expand(64, -1), TARGETS[:1].expand(64, -1, -1)
    weight = predictor.predictor_blocks[0].attn.qkv.weight
    gradients = []
    for is_half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half):
            loss = predictor(tokens, context, targets).float().square().mean()
        gradients += torch.autograd.grad(loss, weight)
    assert F.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0) > 0.999


@torch.no_grad()
def test_noise_is_embedded_and_moves_the_position_of_targets():
    predictor, noise = make(1), torch.zeros(16, 48)
    predictor.predictor_embed.bias.zero_()
    plain, noise[10] = predictor(TOKENS, CONTEXT, TARGETS), torch.randn(48)
    found = predictor(TOKENS, CONTEXT, TARGETS, noise)
    predictor.predictor_pos_embed[0, 10] += predictor.predictor_embed(noise[10])
    assert_close(found, predictor(TOKENS, CONTEXT, TARGETS))
    assert not torch.allclose(found[0, 0], plain[0, 0])
    assert torch.equal(found[0, 1:], plain[0, 1:])  # position 10 is in the first block alone


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
        make(1)(TOKENS, context, targets)
