"""The closed formula behind every recorded weight and image (written down with the numbers)."""

import zlib

import numpy as np
import torch

import ijepa_zoo


def wave(name, shape, scale, offset=0.0):
    """`offset + scale * sin(0.7 k + 0.013 k (k mod 7) + crc32(name) % 1000)`, in C order."""
    k = np.arange(int(np.prod(shape)), dtype=np.float64)
    phase = zlib.crc32(name.encode()) % 1000
    values = offset + scale * np.sin(0.7 * k + 0.013 * k * (k % 7) + phase)
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(shape))


def recorded_ijepa(size):
    """The three networks that the numbers were recorded with; `size` is `config` of step.json."""
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
    for network in ("encoder", "predictor"):
        for name, parameter in getattr(model, network).named_parameters():
            norm = "norm" in name and name.endswith(".weight")
            scale, offset = (0.1, 1.0) if norm else (0.05, 0.0)
            parameter.data.copy_(wave(f"{network}.{name}", parameter.shape, scale, offset))
    model.target_encoder.load_state_dict(model.encoder.state_dict())
    return model


def recorded_images(size, step=0):
    return wave(f"images{step}", (size["batch"], 3, size["img"], size["img"]), 1.0)
