"""Counting the operations of a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..models.jepa import IJepa


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one image (a multiplication and an addition are two).

    Attributes:
        target: Forward pass of the target encoder.
        context_forward: Forward pass of the context encoder.
        context_backward: Its backward pass.
        predictor: Both passes of the predictor.
    """

    target: int
    context_forward: int
    context_backward: int
    predictor: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.target + self.context_forward + self.context_backward + self.predictor


def flops_per_image(
    model: IJepa, context_tokens: int, targets: int, target_tokens: int, per_image: int = 1
) -> Flops:
    """Count the operations of one image's loss and gradients.

    Only the products of matrices, convolutions and attention count, as is usual.

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
    kept: list[torch.Tensor] = []
    forward = _count(lambda: kept.append(model.encoder.encode(images, context)))
    backward = _count(kept[0].sum().backward)
    tokens = kept[0].detach().requires_grad_()
    predictor = _count(lambda: model.predictor(tokens, context, blocks).sum().backward())
    model.zero_grad()
    return Flops(target, forward, backward, predictor)


def _count(work: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
