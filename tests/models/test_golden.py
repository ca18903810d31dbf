"""The same numbers as the published code, from weights and images of a closed formula."""

import json
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ijepa_zoo

TOLERANCE = 2e-5


def _wave(name, shape, scale, offset=0.0):
    k = np.arange(int(np.prod(shape)), dtype=np.float64)
    phase = zlib.crc32(name.encode()) % 1000
    values = offset + scale * np.sin(0.7 * k + 0.013 * k * (k % 7) + phase)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def _fill(network, prefix):
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            norm = "norm" in name and name.endswith(".weight")
            scale, offset = (0.1, 1.0) if norm else (0.05, 0.0)
            parameter.copy_(_wave(f"{prefix}.{name}", parameter.shape, scale, offset))


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "step.json").read_text()), load_file(golden / "step.safetensors")


@pytest.fixture(scope="module")
def ijepa(recorded):
    size = recorded[0]["config"]
    model = ijepa_zoo.create_ijepa(
        "vit_tiny16_ijepa",
        pretrained=False,
        img_size=size["img"],
        patch_size=size["patch"],
        embed_dim=size["dim"],
        depth=size["depth"],
        num_heads=size["heads"],
        mlp_ratio=size["mlp"],
        predictor_embed_dim=size["pdim"],
        predictor_depth=size["pdepth"],
    )
    _fill(model.encoder, "encoder")
    _fill(model.predictor, "predictor")
    model.target_encoder.load_state_dict(model.encoder.state_dict())
    return model


@pytest.fixture(scope="module")
def images(recorded):
    size = recorded[0]["config"]
    return _wave("images0", (size["batch"], 3, size["img"], size["img"]), 1.0)


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
