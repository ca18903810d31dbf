"""The settings of a pretraining run: those that decide its result, and those of the machine.

Recipes (`recipes/*.yaml`) and `--config` files are read into these classes by `settings`. All
defaults are the published ViT-H/14 run on ImageNet-1k.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from ..errors import SettingsError
from . import schedules

Precision = Literal["fp32", "bf16", "fp8"]
Range = tuple[float, float]
_DURATION = re.compile(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(steps?|epochs?|images?)")


@dataclass(frozen=True)
class ModelConfig:
    """The networks; None stands for the model's own value.

    `name` is a registered model or `local-dir:` / `hf-hub:` (see `create_ijepa`), without a tag:
    weights to start from are a matter of `pretrain(init=...)`. `predictor_context` is `repeated`,
    as published, or `shared`: the context passes once for all targets, which costs less and is
    another method.
    """

    name: str = "vit_huge14_ijepa"
    img_size: int | None = None
    patch_size: int | None = None
    in_chans: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    predictor_embed_dim: int | None = None
    predictor_depth: int | None = None
    predictor_context: Literal["repeated", "shared"] | None = None


@dataclass(frozen=True)
class DataConfig:
    """How an image becomes an input.

    `crop_scale` and `crop_ratio` are those of torchvision's RandomResizedCrop. `mean` and `std`
    have one value for each channel, or one for all. `held_out` images are never trained on and
    feed the monitors. The run stops when more than the share `max_broken` of the images that it
    wanted to read could not be decoded; this share may change when the run is resumed.
    `value_range` are the values that become black and white in images and arrays of more than 8
    bits, and `bands` the bands or pages of image files that become the channels, from 0.
    """

    crop_scale: Range = (0.3, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    horizontal_flip: bool = False
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    held_out: int = 512
    max_broken: float = 0.01
    value_range: Range | None = None
    bands: tuple[int, ...] | None = None


@dataclass(frozen=True)
class MaskConfig:
    """Multi-block masks, see `MultiBlockMasks`.

    `cut` says which images share the length of their contexts, which is that of the shortest: a
    number of images (the published runs had as many on a GPU), or `global` for the whole batch.
    It belongs to the recipe, so results depend neither on the number of processes nor on
    gradient accumulation. With `per_image` above 1 every image has so many contexts with targets
    of their own, which share the target encoder's pass; the published number is 1.
    """

    mode: Literal["published", "unbiased"] = "published"
    cut: int | Literal["global"] = 128
    per_image: int = 1
    num_targets: int = 4
    target_scale: Range = (0.15, 0.2)
    target_aspect: Range = (0.75, 1.5)
    context_scale: Range = (0.85, 1.0)
    min_keep: int = 10
    allow_overlap: bool = False


@dataclass(frozen=True)
class OptimConfig:
    """Loss, optimizer and schedules.

    Durations are written `300 epochs`, `187500 steps` or `1e8 images`. `batch_size` is that of a
    step, over all processes and accumulated parts. The schedules run over `schedule_scale` times
    `duration` (`ipe_scale` of the published code). `loss`: `smooth_l1` is the published code's,
    `l2` the paper's text. Targets are the mean over the target encoder's last `target_layers`
    blocks, each normalised as `target_norm` says; the published code takes the last and normalises
    by `layer`. `position_noise` blurs the positions of the mask tokens (StoP; 0 is the published
    predictor). `IJepa` describes all three. `regularizer_weight` adds `VarianceCovariance` or
    `IsotropicGaussian` over `regularizer_over`; 0 is the published loss. It and
    `target_norm=position` are computed for each group of `mask.cut` images. `precision`: `bf16` is
    autocast; `fp8` is the same with the matrix products of the encoders' blocks in float8, which
    needs torchao and a GPU of compute capability 8.9 or more, is meant for widths above 1,000 with
    `machine.compile`, and is emulated on a CPU.
    """

    batch_size: int = 2048
    duration: str = "300 epochs"
    warmup: str = "40 epochs"
    schedule_scale: float = 1.0
    start_lr: float = 2e-4
    lr: float = 1e-3
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    weight_decay_schedule: Literal["cosine", "linear"] = "cosine"
    momentum: float = 0.996
    final_momentum: float = 1.0
    loss: Literal["smooth_l1", "l2"] = "smooth_l1"
    target_layers: int = 1
    target_norm: Literal["layer", "instance", "position"] = "layer"
    position_noise: float = 0.0
    regularizer: Literal["variance_covariance", "isotropic_gaussian"] = "variance_covariance"
    regularizer_weight: float = 0.0
    regularizer_over: Literal["images", "tokens", "residuals"] = "images"
    precision: Precision = "bf16"


@dataclass(frozen=True)
class LogConfig:
    """What is written how often; free to change at any time.

    `log_every` and `monitor_every` are steps. `save_every` is a duration; the newest `keep`
    checkpoints stay, and with `keep_every` (a duration) also those at its multiples.
    """

    log_every: int = 10
    monitor_every: int = 500
    save_every: str = "1 epoch"
    keep: int = 2
    keep_every: str | None = None


@dataclass(frozen=True)
class MachineConfig:
    """How the work is done; free to change at any time, results stay the same up to rounding.

    `micro_batch_size`: images of one forward pass of one process; None for as many as fit into
    `mask.cut` and the process's share of the batch. `workers`: loader processes of each training
    process; None for its share of the machine's cores. `timeout`: seconds after which a process
    that does not answer ends the run. `threads`: those of a process's computation on a CPU; None
    for torch's own choice.
    """

    device: str = "auto"
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    micro_batch_size: int | None = None
    workers: int | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    timeout: float = 600.0
    threads: int | None = None


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run. `log` and `machine` may change when it is resumed, the rest may not."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)


def steps_of(duration: str, *, batch_size: int, images: int) -> int:
    """Steps of a duration, rounded to the nearest.

    Args:
        duration: `300 epochs`, `187500 steps` or `1e8 images`.
        batch_size: Images per step.
        images: Images of the training set; an epoch is `images // batch_size` steps, the rest is
            left out as in the published code (another rest in every epoch).

    Raises:
        ValueError: `duration` is written in another way.
    """
    found = _DURATION.fullmatch(duration.strip())
    if not found or math.isinf(float(found[1])):
        raise SettingsError(
            f"{duration!r} is no duration; write for example '300 epochs', '1000 steps' or "
            "'1e8 images'"
        )
    amount, unit = float(found[1]), found[2].rstrip("s")
    per_unit = {"step": 1.0, "epoch": images // batch_size, "image": 1 / batch_size}[unit]
    return round(amount * per_unit)


def micro_batch_size(config: PretrainConfig, world: int) -> int:
    """Images of one forward pass of one of `world` processes.

    The largest number that divides both the process's share of the batch and `mask.cut`, and is
    not above `machine.micro_batch_size`.

    Raises:
        ValueError: The batch cannot be shared out, or the regularizer would see other images.
    """
    batch = config.optim.batch_size
    if batch % world:
        raise SettingsError(
            f"optim.batch_size={batch} cannot be shared by {world} processes: use "
            f"{batch // world * world or world} or {(batch // world + 1) * world}"
        )
    share = batch // world
    cut = batch if config.mask.cut == "global" else min(config.mask.cut, batch)
    if batch % cut:
        raise SettingsError(f"mask.cut={cut} does not divide optim.batch_size={batch}")
    most = config.machine.micro_batch_size or share
    together = math.gcd(share, cut)
    size = max(n for n in range(1, min(most, together) + 1) if together % n == 0)
    by_group = config.optim.target_norm == "position"
    if (config.optim.regularizer_weight or by_group) and size != cut:
        setting = "optim.target_norm=position" if by_group else "optim.regularizer_weight"
        raise SettingsError(
            f"{setting} needs the {cut} images of mask.cut in one forward pass, "
            f"here they would be {size}: use mask.cut={size}, which is another run, or other "
            "numbers of processes and machine.micro_batch_size"
        )
    return size


@dataclass(frozen=True)
class Schedule:
    """The rates of every step of a run, as pure functions of the step.

    Attributes:
        steps: Updates of the whole run.
        epoch_steps: Updates of an epoch.
        warmup_steps: Updates during which the learning rate rises.
        horizon: Updates over which the rates run; `steps` times `schedule_scale`.
        optim: The settings.
    """

    steps: int
    epoch_steps: int
    warmup_steps: int
    horizon: int
    optim: OptimConfig

    @classmethod
    def of(cls, optim: OptimConfig, images: int) -> Schedule:
        """The schedule for a training set of `images` images.

        Raises:
            ValueError: There are fewer images than a batch has, or a duration does not fit.
        """
        if images < optim.batch_size:
            raise SettingsError(
                f"{images} training images are fewer than a batch: lower optim.batch_size (now "
                f"{optim.batch_size}; mask.cut must divide it) or data.held_out, the number of "
                "images that are kept for the monitors"
            )
        size = {"batch_size": optim.batch_size, "images": images}
        steps = steps_of(optim.duration, **size)
        warmup = steps_of(optim.warmup, **size)
        horizon = math.floor(steps * optim.schedule_scale)
        if min(steps, horizon) < 1 or warmup > horizon:
            raise SettingsError(
                f"optim.duration={optim.duration!r} is {steps} steps (schedules run over "
                f"{horizon}) and optim.warmup={optim.warmup!r} is {warmup}: the duration must be "
                "at least one step, the warm-up no longer than the schedules, for example "
                f"optim.warmup='{horizon // 10} steps'"
            )
        return cls(steps, images // optim.batch_size, warmup, horizon, optim)

    def rates(self, step: int) -> dict[str, float]:
        """Learning rate, weight decay and momentum of the update after `step` updates."""
        optim = self.optim
        ends = {"first": optim.weight_decay, "final": optim.final_weight_decay}
        if optim.weight_decay_schedule == "cosine":
            decay = schedules.cosine(step, horizon=self.horizon, **ends)
        else:
            decay = schedules.linear(step + 1, horizon=self.horizon, **ends)
        return {
            "lr": schedules.warmup_cosine(
                step,
                start=optim.start_lr,
                peak=optim.lr,
                final=optim.final_lr,
                warmup_steps=self.warmup_steps,
                horizon=self.horizon,
            ),
            "weight_decay": decay,
            "momentum": schedules.linear(
                step, first=optim.momentum, final=optim.final_momentum, horizon=self.horizon
            ),
        }
