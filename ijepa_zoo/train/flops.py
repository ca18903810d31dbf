"""FLOPs of a training step, and peak rates of GPUs."""

from __future__ import annotations

import re

import torch

from ..masks import MultiBlockMasks
from .config import PretrainConfig, override
from .data import mask_sampler
from .networks import build_networks

_STEPS = 127  # whose masks are compared

# Dense peaks in TFLOP/s of TF32 (where there is none: float32), bf16 and fp8 products with float32
# accumulation, from NVIDIA's data sheets, which double most of them for sparse matrices.
_PEAKS: dict[str, tuple[float, float | None, float | None]] = {
    r"B200": (1100, 2250, 4500),
    r"H200 NVL|H100 NVL": (417.5, 835, 1670),
    r"H100 PCIe": (378, 756, 1513),
    r"H200|H100": (494.5, 989, 1979),
    r"A100": (156, 312, None),
    r"L40S": (183, 362, 733),
    r"L4": (60, 121, 242),
    r"RTX 4090(?! D)": (82.6, 165.2, 330.3),
    r"V100-SXM\d": (15.7, None, None),
    r"V100-PCIE": (14, None, None),
    r"T4": (8.1, None, None),
}
Masks = tuple[torch.Tensor, torch.Tensor]  # context [b, K] and targets [b, M, L]


def flops_per_image(config: PretrainConfig) -> int:
    """FLOPs of the loss and the gradients of one image, with masks of typical size.

    Matrix products, convolutions and attention count, a multiplication and an addition as two;
    recomputation and the regularizer do not.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build_networks(override(config, **{"optim.regularizer_weight": 0.0}))
    embed, per_image = model.encoder.patch_embed, config.mask.per_image
    sampler = mask_sampler(config.mask, embed.grid_size)
    masks, _ = typical_and_largest(sampler, config.group_size * per_image, config.seed)
    images = torch.zeros(1, embed.proj.in_channels, *embed.img_size, device="meta")
    context, targets = (part[:per_image].to("meta") for part in masks)
    with FlopCounterMode(display=False) as counter:
        model(images, context, targets).backward()
    return counter.get_total_flops()


def typical_and_largest(masks: MultiBlockMasks, images: int, seed: int) -> tuple[Masks, Masks]:
    """Masks of median and of largest lengths among 127 steps, for `images` that share one."""
    drawn = [masks.sample(images, seed=seed, step=step) for step in range(_STEPS)]
    contexts = sorted((context for context, _ in drawn), key=lambda context: context.shape[1])
    targets = sorted((targets for _, targets in drawn), key=lambda targets: targets.shape[2])
    middle = _STEPS // 2
    return (contexts[middle], targets[middle]), (contexts[-1], targets[-1])


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of matrix products in FLOP/s, from a GPU's data sheet; None if it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name or "Laptop" in name:  # a part of the GPU, or a lower clock
        return None
    column = ("fp32", "bf16", "fp8").index(precision)
    for pattern, peaks in _PEAKS.items():
        if re.search(rf"\b(?:{pattern})\b", name):
            peak = peaks[column]
            return None if peak is None else 1e12 * peak
    return None
