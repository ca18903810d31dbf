"""The predictor's own blocks against timm's plain blocks over whole sequences."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError
from ijepa_zoo.models.predictor import Predictor

CONTEXT = torch.tensor([[0, 1, 4, 5, 8], [2, 3, 6, 7, 11]])
TARGETS = torch.tensor([[[10, 11], [14, 15], [2, 3]], [[0, 1], [4, 5], [12, 13]]])
WIDTH = 24


def predictor(depth, context="repeated", fused=True):
    torch.manual_seed(depth)
    made = Predictor((4, 4), 48, WIDTH, depth, 3, context=context)
    with torch.no_grad():  # std 0.02 makes a nearly linear network: stir it
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for block in made.predictor_blocks:
        block.attn.fused_attn = fused
    return made


def plain_blocks(made):
    """timm's blocks with the weights of a predictor."""
    blocks = nn.ModuleList(Block(WIDTH, 3, qkv_bias=True) for _ in made.predictor_blocks)
    blocks.load_state_dict(made.predictor_blocks.state_dict())
    return blocks


def embedded(made, tokens):
    positions = made.predictor_pos_embed[0]
    return made.predictor_embed(tokens) + positions[CONTEXT], made.mask_token + positions[TARGETS]


def one_sequence_a_block(made, blocks, tokens):
    """Every target block by itself, every token through every layer of every block."""
    known, hidden = embedded(made, tokens)
    answers = []
    for number in range(TARGETS.shape[1]):
        x = torch.cat([known, hidden[:, number]], dim=1)
        for block in blocks:
            x = block(x)
        answers.append(made.predictor_proj(made.predictor_norm(x))[:, CONTEXT.shape[1] :])
    return torch.stack(answers, dim=1)


def one_masked_sequence(made, blocks, tokens):
    """Context and all target blocks in one sequence, with who may see whom as attention mask."""
    known, hidden = embedded(made, tokens)
    length = CONTEXT.shape[1]
    owner = torch.cat([torch.full((length,), -1), torch.arange(3).repeat_interleave(2)])
    sees = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
    x = torch.cat([known, hidden.flatten(1, 2)], dim=1)
    for block in blocks:
        x = block(x, attn_mask=sees[None, None].expand(2, 1, -1, -1))
    return made.predictor_proj(made.predictor_norm(x))[:, length:].view(2, 3, 2, 48)


def gradients(answers, tokens, *modules):
    """Gradients by parameter name; of several modules together, blocks under their own names."""
    weights = torch.arange(answers.numel()).view_as(answers).sin()
    (answers * weights).sum().backward()
    named = {}
    for prefix, module in modules:
        named |= {prefix + n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {**named, "tokens": tokens.grad}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    ("context", "reference"),
    [("repeated", one_sequence_a_block), ("shared", one_masked_sequence)],
)
def test_predictions_and_gradients_are_those_of_plain_blocks(context, reference, depth, fused):
    made, tokens = predictor(depth, context, fused), torch.randn(2, 5, 48, requires_grad=True)
    twin, blocks = predictor(depth, context), plain_blocks(made)
    other = tokens.detach().clone().requires_grad_()
    found, wanted = made(tokens, CONTEXT, TARGETS), reference(twin, blocks, other)
    assert found.abs().mean() > 0.1
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    theirs = gradients(wanted, other, ("", twin), ("predictor_blocks.", blocks))
    ours = gradients(found, tokens, ("", made))
    assert ours.keys() == theirs.keys()
    assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_positions_gather_their_gradients_in_float32():
    made = predictor(2)
    tokens = torch.randn(64, 5, 48)
    context = CONTEXT[:1].expand(64, -1)
    targets = TARGETS[:1].expand(64, -1, -1)  # 64 tokens of every position
    made(tokens, context, targets).square().mean().backward()
    wanted = made.predictor_blocks[0].attn.qkv.weight.grad.clone()
    made.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = made(tokens, context, targets).float().square().mean()
    loss.backward()
    found = made.predictor_blocks[0].attn.qkv.weight.grad
    assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.999


def test_shared_context_is_another_predictor_with_the_same_parameters():
    one, other = predictor(2), predictor(2, "shared")
    other.load_state_dict(one.state_dict())
    tokens = torch.randn(2, 5, 48)
    found = other(tokens, CONTEXT, TARGETS)
    assert found.shape == (2, 3, 2, 48)
    assert (found - one(tokens, CONTEXT, TARGETS)).abs().max() > 0.01


def test_unknown_context_is_refused():
    with pytest.raises(ValueError, match="context must be 'repeated' or 'shared', got 'once'"):
        Predictor((4, 4), 48, WIDTH, 2, 3, context="once")


def test_shared_context_is_remembered_by_an_export_and_refused_by_official_files(tmp_path):
    size = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 32, "patch_size": 8}
    size |= {"predictor_embed_dim": 24, "predictor_depth": 2}
    made = ijepa_zoo.create_ijepa(
        "vit_nano8_64_ijepa", pretrained=False, predictor_context="shared", **size
    )
    folder = ijepa_zoo.export(made, tmp_path / "native")
    again = ijepa_zoo.create_ijepa(f"local-dir:{folder}")
    assert again.predictor.context == "shared"
    fresh = ijepa_zoo.create_ijepa(f"local-dir:{folder}", pretrained=False)
    assert fresh.predictor.context == "shared"
    other = ijepa_zoo.create_ijepa(f"local-dir:{folder}", predictor_context="repeated")
    assert other.predictor.context == "repeated"
    copied = ijepa_zoo.export(folder, tmp_path / "copy")
    assert ijepa_zoo.create_ijepa(f"local-dir:{copied}").predictor.context == "shared"
    with pytest.raises(CheckpointError, match="context='shared', which the published code"):
        ijepa_zoo.export(folder, tmp_path / "official", "official")
