"""AdamW with the published parameter groups."""

from __future__ import annotations

import torch
from torch import nn


def make_optimizer(encoder: nn.Module, predictor: nn.Module) -> torch.optim.AdamW:
    """AdamW (betas 0.9 and 0.999, eps 1e-8) over context encoder and predictor.

    The four groups stand in the published order (encoder, predictor; then biases and 1-D
    parameters of both, which have no weight decay), so optimizer states keep their indices.
    Learning rate and weight decay are set before every update by `set_rates`. The state is made
    here and not by the first update, so a checkpoint has the same names at every step.

    Args:
        encoder: Context encoder.
        predictor: Predictor.

    Returns:
        The optimizer; its groups carry a `decayed` flag.
    """
    groups = [
        {
            "params": [p for n, p in net.named_parameters() if _decayed(n, p) is flag],
            "decayed": flag,
        }
        for flag in (True, False)
        for net in (encoder, predictor)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set the rates of the next update; groups that are not `decayed` keep no weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def _decayed(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and "bias" not in name
