"""The same numbers as the published code, from weights and images of a closed formula."""

import json

import pytest
import torch
from closed_formula import recorded_ijepa, recorded_images
from safetensors.torch import load_file

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "step.json").read_text()), load_file(golden / "step.safetensors")


@pytest.fixture(scope="module")
def ijepa(recorded):
    return recorded_ijepa(recorded[0]["config"])


@pytest.fixture(scope="module")
def images(recorded):
    return recorded_images(recorded[0]["config"])


def _relative(ours, published):
    assert ours.shape == published.shape
    return ((ours - published).norm() / published.norm()).item()


def test_positions(recorded, ijepa):
    arrays = recorded[1]
    assert _relative(ijepa.encoder.pos_embed, arrays["encoder_pos_embed"]) < 1e-6
    positions = ijepa.predictor.predictor_pos_embed
    assert _relative(positions, arrays["predictor_pos_embed"]) < 1e-6


@torch.no_grad()
def test_tokens_of_all_patches_and_of_the_context(recorded, ijepa, images):
    arrays = recorded[1]
    assert _relative(ijepa.encoder.encode(images), arrays["encoder_tokens"]) < TOLERANCE
    context = ijepa.encoder.encode(images, arrays["context_indices"])
    assert _relative(context, arrays["encoder_context_tokens"]) < TOLERANCE


@torch.no_grad()
def test_output_of_every_block(recorded, ijepa, images):
    outputs = ijepa.encoder.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    published = recorded[1]["encoder_block_outputs"]
    assert len(outputs) == len(published)
    for ours, theirs in zip(outputs, published, strict=True):
        assert _relative(ours, theirs) < TOLERANCE


@torch.no_grad()
def test_predictions_and_targets(recorded, ijepa, images):
    arrays = recorded[1]
    context, targets = arrays["context_indices"], arrays["target_indices"]
    predictions = ijepa.predict(images, context, targets)
    assert _relative(predictions, arrays["predictions"]) < TOLERANCE
    assert _relative(ijepa.target_tokens(images, targets), arrays["targets"]) < TOLERANCE


def test_loss_and_the_norm_of_every_gradient(recorded, ijepa, images):
    step, arrays = recorded
    loss = ijepa(images, arrays["context_indices"], arrays["target_indices"])
    assert loss.item() == pytest.approx(step["loss"], rel=TOLERANCE)
    ijepa.zero_grad(set_to_none=True)
    loss.backward()
    norms = {
        f"{network}.{name}": parameter.grad.norm().item()
        for network in ("encoder", "predictor")
        for name, parameter in getattr(ijepa, network).named_parameters()
    }
    assert norms.keys() == step["grad_norms"].keys()
    for name, norm in norms.items():
        assert norm == pytest.approx(step["grad_norms"][name], rel=TOLERANCE), name
