"""FLOPs of a training step, of masks of typical and largest size, and peak rates of GPUs."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..masks import MultiBlockMasks
from ..models.jepa import IJepa
from .config import PretrainConfig
from .data import mask_sampler
from .networks import build_networks

_SIZES = 4096  # steps whose block sizes are compared; positions cost more
_STEPS = 32  # of them, those with the largest contexts, are drawn
_DRAWS = 16  # times each
_TYPICAL = 63  # steps whose median is the typical size

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


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one image; a multiplication and an addition are two.

    Attributes:
        target: Forward pass of the target encoder.
        context_forward: Forward pass of the context encoder.
        context_backward: Backward pass of the context encoder.
        predictor: Both passes of the predictor.
    """

    target: int
    context_forward: int
    context_backward: int
    predictor: int

    @property
    def total(self) -> int:
        """Sum of all passes."""
        return self.target + self.context_forward + self.context_backward + self.predictor


def flops_per_image(
    model: IJepa, context_tokens: int, targets: int, target_tokens: int, per_image: int = 1
) -> Flops:
    """Count the FLOPs of the loss and the gradients of one image.

    Only matrix products, convolutions and attention count, as is usual.

    Args:
        model: On any device; on `meta` nothing is computed.
        context_tokens: Tokens of the context, K.
        targets: Target blocks, M.
        target_tokens: Tokens of a target block, L.
        per_image: Contexts of an image, R.
    """
    embed = model.encoder.patch_embed
    device = next(model.parameters()).device
    images = torch.zeros(1, embed.proj.in_channels, *embed.img_size, device=device)
    context = torch.zeros(per_image, context_tokens, dtype=torch.int64, device=device)
    blocks = torch.zeros(per_image, targets, target_tokens, dtype=torch.int64, device=device)
    with torch.no_grad():
        target = _count(lambda: model.target_encoder.encode(images))
    encoded: list[torch.Tensor] = []
    forward = _count(lambda: encoded.append(model.encoder.encode(images, context)))
    backward = _count(encoded[0].sum().backward)
    tokens = encoded[0].detach().requires_grad_()
    predictor = _count(lambda: model.predictor(tokens, context, blocks).sum().backward())
    model.zero_grad()
    return Flops(target, forward, backward, predictor)


def _count(work: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def training_flops(config: PretrainConfig) -> float:
    """FLOPs of the loss and the gradients of one image with masks of typical size."""
    with torch.device("meta"):
        model = build_networks(config)
    mask = config.mask
    masks = mask_sampler(mask, model.encoder.patch_embed.grid_size)
    context, targets = typical_masks(masks, config.group_size * mask.per_image, config.seed)
    lengths = context.shape[1], mask.num_targets, targets.shape[2]
    return float(flops_per_image(model, *lengths, mask.per_image).total)


def typical_masks(masks: MultiBlockMasks, images: int, seed: int) -> Masks:
    """Context and targets of median lengths among the first steps of a run.

    Args:
        masks: Sampler.
        images: Images that share a context length, b.
        seed: The run's seed.

    Returns:
        `context` [b, K] and `targets` [b, M, L].
    """
    drawn = [masks.sample(images, seed=seed, step=step) for step in range(_TYPICAL)]
    length = statistics.median(context.shape[1] for context, _ in drawn)
    area = statistics.median(targets.shape[2] for _, targets in drawn)
    context = next(context for context, _ in drawn if context.shape[1] == length)
    return context, next(targets for _, targets in drawn if targets.shape[2] == area)


def largest_masks(masks: MultiBlockMasks, images: int, seed: int) -> Masks:
    """The longest context and the largest target blocks of any step; no step has both.

    Block sizes are those of the first 4,096 steps; of the steps that leave most patches to the
    context, positions are drawn 512 times.

    Args:
        masks: Sampler.
        images: Images that share a context length, b.
        seed: Seed of the draws.

    Returns:
        `context` [b, K] and `targets` [b, M, L].
    """
    sizes = [masks.block_sizes(step) for step in range(_SIZES)]
    areas = [(math.prod(target), math.prod(context)) for target, context in sizes]

    def context_area(step: int) -> int:
        target, context = areas[step]
        return context - (0 if masks.allow_overlap else masks.num_targets * target)

    largest = sorted(range(_SIZES), key=context_area, reverse=True)[:_STEPS]
    contexts = [
        masks.sample(images, seed=seed + draw, step=step)[0]
        for step in largest
        for draw in range(_DRAWS)
    ]
    widest = max(range(_SIZES), key=lambda step: areas[step][0])
    targets = masks.sample(images, seed=seed, step=widest)[1]
    return max(contexts, key=lambda context: context.shape[1]), targets


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of matrix products in FLOP/s, from the data sheet of a GPU.

    Args:
        device: A GPU; for others nothing is known.
        precision: `fp32` (TF32 products where the GPU has them), `bf16` or `fp8`.

    Returns:
        The peak; None if it is unknown.
    """
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
