import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.models.predictor import Predictor

CONTEXT = torch.tensor([[0, 1, 4, 5, 8], [2, 3, 6, 7, 11]])
TARGETS = torch.tensor(
    [[[10, 11], [14, 15], [2, 3]], [[0, 1], [4, 5], [12, 13]]]
)  # 3 blocks of 2 patches on a grid of 4 x 4


def _ijepa(**kwargs):
    ijepa = ijepa_zoo.create_ijepa(
        "vit_tiny16_ijepa",
        pretrained=False,
        **{"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3},
        **{"predictor_embed_dim": 24, "predictor_depth": 2},
        **kwargs,
    )
    with torch.no_grad():  # std 0.02 makes a nearly linear network: stir it
        for parameter in ijepa.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return ijepa


def _images():
    return torch.randn(2, 3, 64, 64)


# --- predictor ------------------------------------------------------------------------------


@torch.no_grad()
def test_every_target_block_is_predicted_on_its_own():
    ijepa, images = _ijepa().eval(), _images()
    together = ijepa.predict(images, CONTEXT, TARGETS)
    assert together.shape == (2, 3, 2, 48)
    other = TARGETS.clone()
    other[:, 1] = torch.tensor([[6, 7], [9, 10]])
    changed = ijepa.predict(images, CONTEXT, other)
    assert_close(changed[:, [0, 2]], together[:, [0, 2]])
    assert (changed[:, 1] - together[:, 1]).abs().max() > 0.01
    for block in range(3):
        alone = ijepa.predict(images, CONTEXT, TARGETS[:, block : block + 1])
        assert_close(alone[:, 0], together[:, block])


@torch.no_grad()
def test_patches_of_one_block_see_each_other():
    ijepa, images = _ijepa().eval(), _images()
    pair = ijepa.predict(images, CONTEXT, TARGETS[:, :1])
    single = ijepa.predict(images, CONTEXT, TARGETS[:, :1, :1])
    assert (pair[:, :, :1] - single).abs().max() > 1e-3


@torch.no_grad()
def test_prediction_follows_the_order_of_targets_and_not_that_of_the_context():
    ijepa, images = _ijepa().eval(), _images()
    wanted = ijepa.predict(images, CONTEXT, TARGETS)
    shuffled = CONTEXT[:, [3, 0, 4, 1, 2]]
    assert_close(ijepa.predict(images, shuffled, TARGETS), wanted, rtol=1e-4, atol=1e-5)
    flipped = ijepa.predict(images, CONTEXT, TARGETS.flip(-1))
    assert_close(flipped, wanted.flip(-2), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prediction_depends_on_context_tokens_and_on_where_they_are():
    ijepa = _ijepa().eval()
    tokens = torch.randn(2, 5, 48)
    wanted = ijepa.predictor(tokens, CONTEXT, TARGETS)
    other = ijepa.predictor(torch.randn(2, 5, 48), CONTEXT, TARGETS)
    assert (other - wanted).abs().max() > 0.01
    moved = ijepa.predictor(tokens, (CONTEXT + 1) % 16, TARGETS)
    assert (moved - wanted).abs().max() > 0.01


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="predictor_embed_dim 32 must be divisible by num_heads 3"):
        Predictor((4, 4), 48, predictor_embed_dim=32, num_heads=3)


@torch.no_grad()
def test_predictor_runs_in_half_precision_and_under_autocast():
    ijepa, images = _ijepa().eval(), _images()
    wanted = ijepa.predict(images, CONTEXT, TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(ijepa.predict(images, CONTEXT, TARGETS).float(), wanted, rtol=0.2, atol=0.5)
    half = copy.deepcopy(ijepa).to(torch.bfloat16).predict(images.bfloat16(), CONTEXT, TARGETS)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), wanted, rtol=0.2, atol=0.5)


# --- objective ------------------------------------------------------------------------------


@torch.no_grad()
def test_targets_are_normalised_tokens_of_the_whole_image_cut_at_their_indices():
    ijepa, images = _ijepa(), _images()
    tokens = ijepa.target_encoder.forward_features(images)
    centred = tokens - tokens.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    targets = ijepa.target_tokens(images, TARGETS)
    assert targets.shape == (2, 3, 2, 48)
    for image in range(2):
        for block in range(3):
            for place in range(2):
                wanted = normalised[image, TARGETS[image, block, place]]
                assert_close(targets[image, block, place], wanted, rtol=1e-4, atol=1e-5)


def test_loss_is_the_mean_smooth_l1_of_predictions_and_targets():
    ijepa, images = _ijepa(), _images()
    error = (ijepa.predict(images, CONTEXT, TARGETS) - ijepa.target_tokens(images, TARGETS)).abs()
    assert (error < 1).any()
    assert (error > 1).any()
    by_hand = torch.where(error < 1, 0.5 * error.square(), error - 0.5).mean()
    assert_close(ijepa(images, CONTEXT, TARGETS), by_hand)


def test_gradient_reaches_every_parameter_of_encoder_and_predictor_and_no_other():
    ijepa, images = _ijepa(), _images()
    ijepa(images, CONTEXT, TARGETS).backward()
    for name, parameter in ijepa.named_parameters():
        if name.startswith("target_encoder."):
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_target_encoder_starts_as_an_independent_copy_and_stays_in_evaluation_mode():
    ijepa = _ijepa(drop_path_rate=0.5).train()
    assert ijepa.encoder.training
    assert ijepa.predictor.training
    assert not any(module.training for module in ijepa.target_encoder.modules())
    images = _images()
    tokens = ijepa.target_tokens(images, TARGETS)
    assert_close(ijepa.target_tokens(images, TARGETS), tokens, rtol=0, atol=0)  # no drop path
    fresh = ijepa_zoo.create_ijepa(
        "vit_nano8_64_ijepa", pretrained=False, embed_dim=16, predictor_embed_dim=16, depth=1
    )
    assert_close(dict(fresh.encoder.state_dict()), dict(fresh.target_encoder.state_dict()))
    with torch.no_grad():
        fresh.encoder.norm.bias.fill_(3.0)
    assert (fresh.target_encoder.norm.bias == 0).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.996, 1.0])
def test_update_moves_every_target_parameter_by_the_formula(momentum):
    ijepa = _ijepa()
    old = {name: p.clone() for name, p in ijepa.target_encoder.named_parameters()}
    encoder = {name: p.clone() for name, p in ijepa.encoder.named_parameters()}
    positions = ijepa.target_encoder.pos_embed.clone()
    ijepa.update_target(momentum)
    assert encoder.keys() == old.keys()
    for name, parameter in ijepa.target_encoder.named_parameters():
        wanted = momentum * old[name].double() + (1 - momentum) * encoder[name].double()
        assert_close(parameter.double(), wanted, rtol=1e-5, atol=1e-6)
        assert not parameter.requires_grad
    assert torch.equal(ijepa.target_encoder.pos_embed, positions)
    for name, parameter in ijepa.encoder.named_parameters():
        assert torch.equal(parameter, encoder[name])


class _Spread(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen = None

    def forward(self, tokens):
        self.seen = tokens
        return self.scale * tokens.square().mean()


def test_regularizer_sees_the_context_tokens_and_its_value_is_added():
    regularizer = _Spread()
    ijepa, images = _ijepa(regularizer=regularizer), _images()
    loss = ijepa(images, CONTEXT, TARGETS)
    tokens = ijepa.encoder.encode(images, CONTEXT)
    assert_close(regularizer.seen, tokens)
    extra = regularizer.scale * tokens.square().mean()
    ijepa.regularizer = None
    plain = ijepa(images, CONTEXT, TARGETS)
    assert_close(loss, plain + extra)
    gradients = [torch.autograd.grad(value, ijepa.encoder.norm.bias)[0] for value in (loss, plain)]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


def test_indices_are_not_counted_from_the_end():
    ijepa, images = _ijepa(), _images()
    for context, targets in ((CONTEXT, TARGETS - 16), (CONTEXT - 16, TARGETS)):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            ijepa.predict(images, context, targets)


def test_empty_target_blocks_give_no_predictions():
    assert _ijepa().predict(_images(), CONTEXT, TARGETS[:, :, :0]).shape == (2, 3, 0, 48)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_outside_its_range_leaves_the_target_as_it_is(momentum):
    ijepa = _ijepa()
    before = ijepa.target_encoder.norm.weight.clone()
    with pytest.raises(ValueError, match="momentum"):
        ijepa.update_target(momentum)
    assert torch.equal(ijepa.target_encoder.norm.weight, before)


# --- several masks per image, targets of several layers ---------------------------------------


def test_several_masks_of_an_image_are_as_several_copies_of_it():
    ijepa, images = _ijepa(), _images()
    other = (torch.tensor([[1, 2, 3, 9, 12], [0, 4, 8, 12, 13]]), TARGETS.flip(0))
    # rows of an image follow each other
    context = torch.stack([CONTEXT, other[0]], dim=1).flatten(0, 1)
    targets = torch.stack([TARGETS, other[1]], dim=1).flatten(0, 1)
    together = ijepa(images, context, targets)
    copies = (ijepa(images, CONTEXT, TARGETS) + ijepa(images, *other)) / 2
    assert_close(together, copies)
    found = ijepa.predict(images, context, targets)
    assert found.shape == (4, 3, 2, 48)
    assert_close(found[0::2], ijepa.predict(images, CONTEXT, TARGETS))
    assert_close(found[1::2], ijepa.predict(images, *other))


@torch.no_grad()
def test_targets_of_several_layers_are_their_normalised_mean():
    ijepa, images = _ijepa(target_layers=2), _images()
    model, outputs = ijepa.target_encoder, []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    last = model.forward_features(images)
    first = model.norm(outputs[0])
    normalised = [
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        for x in (first, last)
    ]
    found = ijepa.target_tokens(images, TARGETS)
    wanted = (normalised[0] + normalised[1]) / 2
    assert_close(found[1, 2, 0], wanted[1, 12], rtol=1e-4, atol=1e-5)
    assert_close(found[0, 1, 1], wanted[0, 15], rtol=1e-4, atol=1e-5)


def test_more_target_layers_than_blocks_are_refused():
    with pytest.raises(ValueError, match="target_layers must lie within 1 and 2, the encoder's"):
        _ijepa(target_layers=3)


@torch.no_grad()
def test_noise_moves_the_mask_tokens_of_a_position_as_the_embedding_moves_tokens():
    """By hand: the same as another mask token where all positions get the same noise."""
    ijepa, images = _ijepa().eval(), _images()
    predictor = ijepa.predictor
    tokens = ijepa.encoder.encode(images, CONTEXT)
    noise = torch.randn(48).expand(16, 48)
    found = predictor(tokens, CONTEXT, TARGETS, noise)
    shift = predictor.predictor_embed.weight @ noise[0] + predictor.predictor_embed.bias
    predictor.mask_token += shift
    assert_close(found, predictor(tokens, CONTEXT, TARGETS))


@torch.no_grad()
def test_noise_is_drawn_anew_in_every_update_and_for_every_position():
    ijepa, images = _ijepa(position_noise=0.25), _images()
    calm = _ijepa()
    calm.load_state_dict(ijepa.state_dict())
    seen = []
    hook = ijepa.predictor.register_forward_hook(lambda _, given, __: seen.append(given[3]))
    for ijepa.noise_seed in (0, 1, 1):
        last = ijepa(images, CONTEXT, TARGETS)
    hook.remove()
    assert seen[0].shape == (16, 48)
    assert_close(seen[1], seen[2], rtol=0, atol=0)
    assert not torch.equal(seen[0], seen[1])
    assert 0.2 < seen[0].std() < 0.3
    assert seen[0].std(dim=0).min() > 0.05
    assert last != calm(images, CONTEXT, TARGETS)
    assert_close(
        ijepa.predict(images, CONTEXT, TARGETS), calm.predict(images, CONTEXT, TARGETS)
    )  # outside training there is none


def test_negative_noise_is_refused():
    with pytest.raises(ValueError, match="position_noise must be 0"):
        _ijepa(position_noise=-1)
