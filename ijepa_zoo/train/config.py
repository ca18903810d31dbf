"""The settings that decide the result of a pretraining run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from . import schedules


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides the result of a run.

    The defaults are the published ImageNet-1k recipe in steps: 300 epochs of 625 steps, 40 of them
    warm-up. `network` holds further arguments of `create_ijepa`, e.g. `{"embed_dim": 96}`.
    `regularizer_weight` adds `VarianceCovariance` over `regularizer_over`; 0 is the published loss.
    `precision="bf16"` runs the networks under autocast; weights stay in float32.
    """

    model: str
    network: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = 187_500
    batch_size: int = 2048
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    mask_mode: Literal["published", "unbiased"] = "published"
    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_keep: int = 10
    warmup_steps: int = 25_000
    start_lr: float = 2e-4
    lr: float = 1e-3
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    momentum: float = 0.996
    final_momentum: float = 1.0
    regularizer_weight: float = 0.0
    regularizer_over: Literal["images", "tokens", "residuals"] = "images"
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        """Refuse values that no run can use."""
        if min(self.steps, self.batch_size) < 1 or not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"steps={self.steps}, batch_size={self.batch_size}, "
                f"warmup_steps={self.warmup_steps}: the first two must be at least 1, the last "
                "between 0 and steps"
            )
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}; it must be 'fp32' or 'bf16'")

    def rates(self, step: int) -> dict[str, float]:
        """Learning rate, weight decay and momentum of the update after `step` updates."""
        return {
            "lr": schedules.warmup_cosine(
                step,
                start=self.start_lr,
                peak=self.lr,
                final=self.final_lr,
                warmup_steps=self.warmup_steps,
                horizon=self.steps,
            ),
            "weight_decay": schedules.cosine(
                step,
                first=self.weight_decay,
                final=self.final_weight_decay,
                horizon=self.steps,
            ),
            "momentum": schedules.linear(
                step, first=self.momentum, final=self.final_momentum, horizon=self.steps
            ),
        }
