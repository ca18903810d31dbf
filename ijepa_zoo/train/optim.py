"""AdamW with the official parameter groups, and its rates as functions of the step.

The rates are those of the official schedulers (facebookresearch/ijepa, `src/utils/schedulers.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..errors import SettingsError
from .config import OptimConfig, steps_of

# Parameters of other ViTs without weight decay, as in timm (reg_token only in later versions).
_NOT_DECAYED = ("pos_embed", "cls_token", "reg_token")


@dataclass(frozen=True)
class Schedule:
    """Learning rate, weight decay and momentum of every step of a run."""

    steps: int
    epoch_steps: int
    warmup_steps: int
    horizon: int  # steps times `schedule_scale`; later steps have the final rates
    optim: OptimConfig

    @classmethod
    def of(cls, optim: OptimConfig, images: int) -> Schedule:
        """The schedule for a training set of `images` images."""
        if images < optim.batch_size:
            raise SettingsError(
                f"{images} training images are fewer than optim.batch_size={optim.batch_size}: "
                "lower it (mask.group_size must divide it) or data.held_out"
            )
        size = {"batch_size": optim.batch_size, "images": images}
        steps = steps_of(optim.duration, **size)
        warmup = steps_of(optim.warmup, **size)
        horizon = math.floor(steps * optim.schedule_scale)
        if min(steps, horizon) < 1 or warmup > horizon:
            raise SettingsError(
                f"optim.duration={optim.duration} is {steps} steps, the schedules run over "
                f"{horizon}, and optim.warmup={optim.warmup} is {warmup}: use a duration of at "
                "least one step and a warm-up that is not longer than the schedules"
            )
        return cls(steps, images // optim.batch_size, warmup, horizon, optim)

    def rates(self, step: int) -> dict[str, float]:
        """`lr`, `weight_decay` and `momentum` of the update after `step` updates.

        The official schedulers of the first two advance before an update, that of the momentum
        after it.
        """
        optim, done = self.optim, step + 1
        if done < self.warmup_steps:
            lr = optim.start_lr + done / self.warmup_steps * (optim.lr - optim.start_lr)
        else:
            decline = max(1, self.horizon - self.warmup_steps)
            lr = _cosine(optim.lr, optim.final_lr, (done - self.warmup_steps) / decline)
        decay = _cosine if optim.weight_decay_schedule == "cosine" else _linear
        return {
            "lr": lr,
            "weight_decay": decay(
                optim.weight_decay, optim.final_weight_decay, done / self.horizon
            ),
            "momentum": _linear(optim.momentum, optim.final_momentum, step / self.horizon),
        }


def _cosine(first: float, final: float, progress: float) -> float:
    return final + (first - final) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def _linear(first: float, final: float, progress: float) -> float:
    return first + min(progress, 1.0) * (final - first)


def make_optimizer(encoder: nn.Module, predictor: nn.Module) -> torch.optim.AdamW:
    """AdamW with the four official groups: encoder, predictor; then those without weight decay.

    The latter are biases and 1-D parameters of both, and learned positions, class and register
    tokens of other ViTs. The state is created here instead of by the first update, so a checkpoint
    has the same names at every step.
    """
    groups = [
        {
            "params": [p for n, p in net.named_parameters() if _decayed(n, p) is flag],
            "decayed": flag,
        }
        for flag in (True, False)
        for net in (encoder, predictor)
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
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


def gradient_norms(optimizer: torch.optim.AdamW) -> Tensor:
    """L2 norms of the gradients of encoder and predictor, `[2]`, on the device.

    With sharded networks every process must call this; all get the same.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    networks = (groups[0] + groups[2], groups[1] + groups[3])
    return torch.stack([total_norm([p.grad for p in n if p.grad is not None]) for n in networks])


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all tensors together; with sharded ones every process must call this."""
    norm: Any = get_total_norm([tensor.detach() for tensor in tensors])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clip_gradients(optimizer: torch.optim.AdamW, max_norm: float, norms: Tensor) -> None:
    """As torch.nn.utils.clip_grad_norm_ of all gradients together, without its synchronization."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    clip_grads_with_norm_(parameters, max_norm, torch.linalg.vector_norm(norms))


def step_if_finite(optimizer: torch.optim.AdamW, norms: Tensor) -> None:
    """Update the parameters, unless a gradient is not finite; the device decides."""
    # Fused optimizers read this attribute, by which torch's GradScaler skips updates.
    optimizer.found_inf = (~norms.isfinite()).any().float()  # type: ignore[attr-defined]
    optimizer.step()


def _decayed(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and "bias" not in name and name not in _NOT_DECAYED
