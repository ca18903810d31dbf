"""Encoders of the size of the official test file, its networks, and a comparison of transforms."""

import numpy as np
import pytest
import torch
from PIL import Image

import ijepa_zoo


@pytest.fixture
def state(official):
    """The target encoder of the official file, in our names."""
    content = torch.load(official, weights_only=True)["target_encoder"]
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


@pytest.fixture
def create(tiny):
    """Creates an encoder of that file's size, from a checkpoint."""

    def create(checkpoint, **kwargs):
        return ijepa_zoo.create_model(
            "vit_tiny16_ijepa", checkpoint=checkpoint, **{**tiny, **kwargs}
        )

    return create


@pytest.fixture
def stir():
    """Makes a network nonlinear, which std 0.02 hardly is."""

    @torch.no_grad()
    def stir(model):
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return stir


@pytest.fixture
def encoder(create, stir):
    """Creates an encoder with random weights."""
    return lambda **kwargs: stir(create(None, pretrained=False, **kwargs))


@pytest.fixture
def check_pixels():
    """Checks that a transform gives the pixels of a model's own, but for rounding."""
    coarse = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((300, 200), Image.Resampling.BICUBIC)

    def check(model, transform):
        difference = (ijepa_zoo.create_transform(model)(image) - transform(image)).abs()
        assert difference.max() < 2.5 / 255 / 0.224  # two gray levels
        assert difference.mean() < 0.005

    return check
