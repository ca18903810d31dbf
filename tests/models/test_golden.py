"""Numbers recorded from the official repository, with weights and images of a closed formula."""

import json

import pytest
import torch
from closed_formula import recorded_ijepa, recorded_images
from safetensors.torch import load_file

# Relative. Rounding is below 3e-7. Another epsilon in the LayerNorms of the encoder, the predictor
# or the targets (1e-5 for 1e-6, or the reverse) changes an output by at least 2.4e-6.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def recorded(golden):
    """Numbers, arrays, networks and images."""
    step, arrays = (
        json.loads((golden / "step.json").read_text()),
        load_file(golden / "step.safetensors"),
    )
    return step, arrays, recorded_ijepa(step["config"]), recorded_images(step["config"])


def check(ours, recorded):
    assert ours.shape == recorded.shape
    assert (ours - recorded).norm() / recorded.norm() < TOLERANCE


@torch.no_grad()
def test_every_output(recorded):
    _, arrays, ijepa, images = recorded
    context, targets = arrays["context_indices"], arrays["target_indices"]
    check(ijepa.encoder.pos_embed, arrays["encoder_pos_embed"])
    check(ijepa.predictor.predictor_pos_embed, arrays["predictor_pos_embed"])
    check(ijepa.encoder.encode(images), arrays["encoder_tokens"])
    check(ijepa.encoder.encode(images, context), arrays["encoder_context_tokens"])
    check(ijepa.predict(images, context, targets), arrays["predictions"])
    check(ijepa.target_tokens(images, targets), arrays["targets"])
    blocks = ijepa.encoder.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    for ours, theirs in zip(blocks, arrays["encoder_block_outputs"], strict=True):
        check(ours, theirs)


def test_loss_and_the_norm_of_every_gradient(recorded):
    step, arrays, ijepa, images = recorded
    loss = ijepa(images, arrays["context_indices"], arrays["target_indices"])
    loss.backward()
    assert loss.item() == pytest.approx(step["loss"], rel=TOLERANCE)
    norms = {
        f"{network}.{name}": parameter.grad.norm().item()
        for network in ("encoder", "predictor")
        for name, parameter in getattr(ijepa, network).named_parameters()
    }
    assert norms == pytest.approx(step["grad_norms"], rel=TOLERANCE)
