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
WIDTH = 24


def make(depth, context="repeated", fused=True):
    torch.manual_seed(depth)
    predictor = Predictor((4, 4), 48, WIDTH, depth, 3, context=context)
    with torch.no_grad():  # std 0.02 makes a nearly linear network
        for parameter in predictor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for block in predictor.predictor_blocks:
        block.attn.fused_attn = fused
    return predictor


def embed(predictor, tokens):
    positions = predictor.predictor_pos_embed[0]
    hidden = predictor.mask_token + positions[TARGETS]
    return predictor.predictor_embed(tokens) + positions[CONTEXT], hidden


def one_sequence_per_target_block(predictor, blocks, tokens):
    known, hidden = embed(predictor, tokens)
    predicted = []
    for number in range(TARGETS.shape[1]):
        x = torch.cat([known, hidden[:, number]], dim=1)
        for block in blocks:
            x = block(x)
        predicted.append(x[:, CONTEXT.shape[1] :])
    return predictor.predictor_proj(predictor.predictor_norm(torch.stack(predicted, dim=1)))


def one_masked_sequence(predictor, blocks, tokens):
    """Context and all target blocks in one sequence, with an attention mask."""
    known, hidden = embed(predictor, tokens)
    length = CONTEXT.shape[1]
    owner = torch.cat([torch.full((length,), -1), torch.arange(3).repeat_interleave(2)])
    mask = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
    x = torch.cat([known, hidden.flatten(1, 2)], dim=1)
    for block in blocks:
        x = block(x, attn_mask=mask[None, None].expand(2, 1, -1, -1))
    return predictor.predictor_proj(predictor.predictor_norm(x[:, length:])).view(2, 3, 2, 48)


def gradients(predicted, tokens, *modules):
    weights = torch.arange(predicted.numel()).view_as(predicted).sin()
    (predicted * weights).sum().backward()
    named = {"tokens": tokens.grad}
    for prefix, module in modules:
        named |= {prefix + n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return named


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    ("context", "reference"),
    [("repeated", one_sequence_per_target_block), ("shared", one_masked_sequence)],
)
def test_predictions_and_gradients_equal_those_of_plain_blocks(context, reference, depth, fused):
    ours, tokens = make(depth, context, fused), torch.randn(2, 5, 48, requires_grad=True)
    theirs, other = make(depth, context), tokens.detach().clone().requires_grad_()
    blocks = nn.ModuleList(Block(WIDTH, 3, qkv_bias=True) for _ in range(depth))
    blocks.load_state_dict(ours.predictor_blocks.state_dict())
    predicted, expected = ours(tokens, CONTEXT, TARGETS), reference(theirs, blocks, other)
    assert expected.abs().mean() > 0.1
    assert_close(predicted, expected, rtol=1e-4, atol=1e-5)
    found = gradients(predicted, tokens, ("", ours))
    wanted = gradients(expected, other, ("", theirs), ("predictor_blocks.", blocks))
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
    predictor, tokens, noise = make(1), torch.randn(2, 5, 48), torch.zeros(16, 48)
    predictor.predictor_embed.bias.zero_()
    plain, noise[10] = predictor(tokens, CONTEXT, TARGETS), torch.randn(48)
    found = predictor(tokens, CONTEXT, TARGETS, noise)
    predictor.predictor_pos_embed[0, 10] += predictor.predictor_embed(noise[10])
    assert_close(found, predictor(tokens, CONTEXT, TARGETS))
    assert not torch.allclose(found[0, 0], plain[0, 0])
    assert torch.equal(found[0, 1:], plain[0, 1:])  # position 10 is in the first block alone


@pytest.mark.parametrize("shift", [-16, 16])
def test_indices_outside_the_grid_are_refused(shift):
    for context, targets in ((CONTEXT, TARGETS + shift), (CONTEXT + shift, TARGETS)):
        with pytest.raises((IndexError, RuntimeError)):
            make(1)(torch.randn(2, 5, 48), context, targets)


@pytest.mark.parametrize(
    ("context", "targets"),
    [(CONTEXT[:, :4], TARGETS), (CONTEXT, TARGETS[0]), (CONTEXT, TARGETS[:1])],
)
def test_indices_of_other_shapes_are_refused(context, targets):
    with pytest.raises(SettingsError, match="targets"):
        make(1)(torch.randn(2, 5, 48), context, targets)


@pytest.mark.parametrize(
    "arguments", [{"predictor_embed_dim": 32}, {"depth": 0}, {"context": "once"}], ids=str
)
def test_impossible_arguments_are_refused(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(SettingsError, match=f"{name}.*{value}"):
        Predictor((4, 4), 48, **arguments)
