"""The settings of a pretraining run.

All defaults are the official ViT-H/14 run on ImageNet-1k. `settings` reads recipes, files and
command lines into these models and raises SettingsError; making one in Python raises pydantic's
ValidationError.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Annotated, Any, Literal

import timm
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from ..errors import SettingsError
from ..models.predictor import PREDICTORS

_DURATION = re.compile(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(step|epoch|image)s?")
_EXTENDED = re.compile(r"(.+) (constant|cosine)")
FOLDERS = ("local-dir:", "hf-hub:")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


def _numbers(value: Any) -> Any:
    """The words `0.3,1.0` of a command line, or a single number, as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]() ").split(",")]
    return [value] if isinstance(value, (int, float)) else value


def _words(value: Any) -> Any:
    return (
        [part.strip() for part in value.strip("[]() ").split(",")]
        if isinstance(value, str)
        else value
    )


def _with_csv(value: tuple[str, ...]) -> tuple[str, ...]:
    if "csv" not in value:
        raise ValueError("csv should be among them: plots and resumed runs read log.csv")
    return tuple(dict.fromkeys(value))


def _two(value: Any) -> Any:
    numbers = _numbers(value)
    if not isinstance(numbers, (list, tuple)) or len(numbers) != 2:
        raise ValueError("input should be two numbers such as [0.5, 1.0]")
    return numbers


def _size(value: Any) -> Any:
    """One number stays one; `256,512` and a list are height and width."""
    if isinstance(value, str) and "," in value:
        value = _numbers(value)
    if isinstance(value, (list, tuple)) and len(value) != 2:
        raise ValueError("input should be one number, or height and width such as [256, 512]")
    return value


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the first number should not be greater than the second")
    return value


def _duration(value: Any) -> Any:
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if not found or float(found[1]) > 1e15:
        raise ValueError("input should be such as '300 epochs', '1000 steps' or '1e8 images'")
    return value


def _earlier_ends(value: tuple[str, ...]) -> tuple[str, ...]:
    for number, end in enumerate(value):
        duration, extend = split_end(end)
        _duration(duration)
        if (extend is not None) != (number > 0):
            raise ValueError("input should be such as ['300 epochs', '400 epochs constant']")
    return value


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Count = Annotated[Int, Field(ge=1)]
Natural = Annotated[Int, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Area = Annotated[Float, Field(gt=0, le=1)]
AreaRange = Annotated[tuple[Area, Area], AfterValidator(_ordered), BeforeValidator(_two)]
RatioRange = Annotated[tuple[Positive, Positive], AfterValidator(_ordered), BeforeValidator(_two)]
Numbers = Annotated[tuple[Float, ...], BeforeValidator(_numbers)]
PositiveNumbers = Annotated[tuple[Positive, ...], BeforeValidator(_numbers)]
Size = Annotated[tuple[Count, Count] | Count, BeforeValidator(_size)]
Duration = Annotated[str, BeforeValidator(_duration)]
EarlierEnds = Annotated[tuple[str, ...], AfterValidator(_earlier_ends), BeforeValidator(_numbers)]
LogTarget = Literal["csv", "tensorboard", "wandb"]
LogTargets = Annotated[tuple[LogTarget, ...], AfterValidator(_with_csv), BeforeValidator(_words)]
Precision = Literal["auto", "fp32", "bf16", "fp8"]


class Section(BaseModel):
    """Settings that refuse unknown names, infinity and nan, and do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _field(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


class ModelConfig(Section):
    """The networks; null stands for the model's own value."""

    name: str = _field(
        "vit_huge14_ijepa",
        "an I-JEPA model, a ViT of timm, local-dir:FOLDER or hf-hub:REPO; --init names weights",
    )
    img_size: Size | None = _field(
        None, "height and width of images in pixels, or one number for both"
    )
    patch_size: Count | None = _field(None, "height and width of patches in pixels")
    in_chans: Count | None = _field(None, "channels of images")
    embed_dim: Count | None = _field(None, "width of the encoders")
    depth: Count | None = _field(None, "blocks of the encoders")
    num_heads: Count | None = _field(None, "attention heads of encoders and predictor")
    mlp_ratio: Positive | None = _field(None, "hidden width of the encoders' MLPs over embed_dim")
    predictor_embed_dim: Count | None = _field(None, "width of the predictor")
    predictor_depth: Count | None = _field(None, "blocks of the predictor")
    predictor_context: Literal["repeated", "shared"] | None = _field(
        None,
        "repeated: the context is processed with every target block (official); shared: once for "
        "all of them, which costs less and is another method",
    )

    @field_validator("name")
    @classmethod
    def _registered(cls, name: str) -> str:
        model, dot, _ = name.partition(".")
        if name.startswith(FOLDERS):
            return name
        if model in PREDICTORS or timm.is_model(model):
            if dot:
                raise ValueError(f"use {model} here and --init {name} for its weights")
            return name
        near = difflib.get_close_matches(name, PREDICTORS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(PREDICTORS)}"
        raise ValueError(f"no such model is registered, {hint}")

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        for whole, part in (("img_size", "patch_size"), ("embed_dim", "num_heads")):
            size, divisor = getattr(self, whole), getattr(self, part)
            sides = size if isinstance(size, tuple) else (size,)
            if size and divisor and any(side % divisor for side in sides):
                shown = ",".join(map(str, sides))
                raise ValueError(
                    f"model.{whole}={shown} is not a multiple of model.{part}={divisor}"
                )
        return self


class DataConfig(Section):
    """From an image to an input."""

    crop_scale: AreaRange = _field(
        (0.3, 1.0), "share of the image's area that a random crop takes, min and max"
    )
    crop_ratio: RatioRange = _field(
        (3 / 4, 4 / 3),
        "width over height of a random crop, min and max; crops are stretched to model.img_size, "
        "so use [1.5, 2.67] for images of [256, 512]",
    )
    horizontal_flip: bool = _field(False, "flip half of the crops")
    mean: Numbers = _field(
        (0.485, 0.456, 0.406), "mean of the pixels: one value for each channel, or for all"
    )
    std: PositiveNumbers = _field(
        (0.229, 0.224, 0.225), "standard deviation of the pixels, likewise"
    )
    held_out: Natural = _field(512, "images for the monitors, never trained on")
    max_broken: Share = _field(
        0.01, "stop above this share of images that cannot be decoded; may change on resume"
    )
    value_range: Annotated[tuple[Float, Float], BeforeValidator(_two)] | None = _field(
        None, "values of black and white in images and arrays of more than 8 bits"
    )
    bands: Annotated[tuple[Natural, ...], BeforeValidator(_numbers)] | None = _field(
        None, "bands or pages of image files to use as channels, from 0"
    )


class MaskConfig(Section):
    """Multi-block masks."""

    mode: Literal["published", "unbiased"] = _field(
        "published",
        "published: the official sampler; unbiased: scale and aspect are drawn independently, "
        "blocks use the whole grid, long contexts are cut at random",
    )
    group_size: Count | Literal["global"] = _field(
        128,
        "images that share a context length, that of the shortest (official: the images of a "
        "GPU); global: the whole batch",
    )
    per_image: Count = _field(
        1, "contexts of an image, each with targets of its own; one target encoder pass", le=64
    )
    num_targets: Count = _field(4, "target blocks of a context")
    target_scale: AreaRange = _field(
        (0.15, 0.2), "share of the image's area in a target block, min and max"
    )
    target_aspect: RatioRange = _field(
        (0.75, 1.5), "height over width of a target block, min and max"
    )
    context_scale: AreaRange = _field(
        (0.85, 1.0), "share of the image's area in a context block, min and max"
    )
    min_keep: Natural = _field(10, "a context has more patches than this")
    allow_overlap: bool = _field(False, "keep patches of targets in the context")


class OptimConfig(Section):
    """Loss, optimizer and schedules; durations are in epochs, steps or images."""

    batch_size: Count = _field(2048, "images of a step, over all processes and accumulated parts")
    duration: Duration = _field(
        "300 epochs", "length of the run, such as 300 epochs, 1000 steps or 1e8 images"
    )
    extend: Literal["constant", "cosine"] | None = _field(
        None,
        "rates after the end of a run whose duration grows on resume: constant: those of its last "
        "step; cosine: the learning rate falls from there to final_lr; null: duration stays",
    )
    extended_from: EarlierEnds = _field(
        (),
        "written by an extended run: its durations before, such as ['300 epochs', '400 epochs "
        "constant']: first the one that the schedules belong to, then those of earlier extensions",
    )
    warmup: Duration = _field(
        "40 epochs", "time in which the learning rate rises from start_lr to lr"
    )
    schedule_scale: Positive = _field(
        1.0, "schedules run over this many times the duration (official: ipe_scale)"
    )
    start_lr: NonNegative = _field(2e-4, "learning rate before the first step")
    lr: Positive = _field(1e-3, "learning rate after the warm-up")
    final_lr: NonNegative = _field(1e-6, "learning rate at the end of the cosine schedule")
    weight_decay: NonNegative = _field(0.04, "weight decay at the start")
    final_weight_decay: NonNegative = _field(0.4, "weight decay at the end")
    weight_decay_schedule: Literal["cosine", "linear"] = _field(
        "cosine", "curve between weight_decay and final_weight_decay"
    )
    momentum: Share = _field(0.996, "momentum of the target encoder's moving average at the start")
    final_momentum: Share = _field(1.0, "momentum at the end; linear in between")
    clip_grad: Positive | None = _field(
        None,
        "largest L2 norm of the gradients of encoder and predictor together, which the log shows "
        "after clipping; null: not clipped (official)",
    )
    loss: Literal["smooth_l1", "l2"] = _field(
        "smooth_l1", "the official repository's is smooth_l1, the paper's text has l2"
    )
    target_layers: Count = _field(
        1, "last blocks of the target encoder whose normalized outputs are averaged"
    )
    position_noise: NonNegative = _field(
        0.0, "standard deviation of noise in the mask tokens' positions (StoP: 0.25)", le=10
    )
    regularizer: Literal["variance_covariance", "isotropic_gaussian"] = _field(
        "variance_covariance", "term of the loss against collapse (VICReg's or LeJEPA's)"
    )
    regularizer_weight: NonNegative = _field(
        0.0, "weight of the regularizer; 0 is the official loss"
    )
    regularizer_over: Literal["images", "tokens", "residuals"] = _field(
        "images",
        "samples of the regularizer: the mean of an image's tokens, every token, or every token "
        "minus that mean",
    )
    precision: Precision = _field(
        "bf16",
        "auto: bf16 where the device multiplies it natively, else fp32, decided when a run starts; "
        "fp8: float8 products in the encoders' blocks, for GPUs of compute capability >= 8.9, "
        "with torchao and runtime.compile",
    )

    @model_validator(mode="after")
    def _extended(self) -> OptimConfig:
        if self.extended_from and self.extend is None:
            raise ValueError("optim.extended_from needs optim.extend=constant or cosine")
        return self


class LogConfig(Section):
    """What is written how often; may change on resume."""

    to: LogTargets = _field(
        ("csv",),
        "where rows go: csv (log.csv, always), tensorboard and wandb (extra `log`)",
    )
    log_every: Count = _field(10, "steps of a row of the log, over which it averages")
    monitor_every: Count = _field(500, "steps between measurements on held-out images")
    save_every: Duration = _field("1 epoch", "duration between checkpoints")
    keep: Count = _field(2, "newest checkpoints that stay")
    keep_every: Duration | None = _field(None, "checkpoints at multiples of this duration stay too")


class RuntimeConfig(Section):
    """Devices and processes; may change on resume, results are equal up to rounding."""

    device: str = _field("auto", "auto, cpu, cuda or another device of torch")
    parallel: Literal["ddp", "fsdp2"] = _field("ddp", "how several processes share the networks")
    micro_batch_size: Count | None = _field(
        None, "most images of a forward pass of a process; null: as many as group_size allows"
    )
    workers: Natural | None = _field(
        None, "loader processes of each training process; null: its share of the cores"
    )
    compile: bool = _field(False, "torch.compile the blocks")
    activation_checkpointing: bool = _field(False, "recompute blocks to save memory")
    timeout: Positive = _field(600.0, "seconds to wait for another process")
    threads: Count | None = _field(None, "CPU threads of a process; null: torch's default")


class PretrainConfig(Section):
    """A pretraining run. `log` and `runtime` may change on resume, the rest may not."""

    seed: Natural = _field(0, "seed of initial weights, data order, crops and masks", lt=2**63)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    mask: MaskConfig = MaskConfig()
    optim: OptimConfig = OptimConfig()
    log: LogConfig = LogConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def group_size(self) -> int:
        """Images that share a context length, at most the batch."""
        batch, size = self.optim.batch_size, self.mask.group_size
        return batch if size == "global" else min(size, batch)

    @model_validator(mode="after")
    def _consistent(self) -> PretrainConfig:
        channels = self.model.in_chans
        if channels is None and not self.model.name.startswith(FOLDERS):
            channels = 3
        for name in ("mean", "std"):
            given = len(getattr(self.data, name))
            if channels and given not in (1, channels):
                raise ValueError(
                    f"data.{name} has {given} values for {channels} channels (model.in_chans)"
                )
        over_images = self.optim.regularizer_weight and self.optim.regularizer_over == "images"
        if over_images and self.group_size < 2:
            raise ValueError("optim.regularizer_over=images needs mask.group_size=2 or more")
        micro_batch_size(self, world=1)
        return self


def micro_batch_size(config: PretrainConfig, world: int) -> int:
    """Images of one forward pass of one of `world` processes.

    The largest number that divides both the process's share of the batch and `mask.group_size`,
    and is not above `runtime.micro_batch_size`.

    Raises:
        SettingsError: `world` or the group size does not divide the batch, or the regularizer
            would not see a whole group.
    """
    batch, group = config.optim.batch_size, config.group_size
    if batch % world:
        raise SettingsError(
            f"optim.batch_size={batch} is not divisible by {world} processes: use "
            f"{batch // world * world or world} or {(batch // world + 1) * world}"
        )
    if batch % group:
        raise SettingsError(
            f"mask.group_size={group} does not divide optim.batch_size={batch}: change one of them"
        )
    share = batch // world
    common = math.gcd(share, group)
    most = min(config.runtime.micro_batch_size or share, common)
    size = next(n for n in range(most, 0, -1) if common % n == 0)
    if config.optim.regularizer_weight and size != group:
        raise SettingsError(
            f"optim.regularizer_weight needs the {group} images of mask.group_size in one forward "
            f"pass, not {size}: use mask.group_size={size}, which changes the result, or another "
            "runtime.micro_batch_size or number of processes"
        )
    return size


def split_end(end: str) -> tuple[str, str | None]:
    """Duration and curve of an entry of `optim.extended_from`; the first entry has no curve."""
    found = _EXTENDED.fullmatch(end)
    return (found[1], found[2]) if found else (end, None)


def steps_of(duration: str, *, batch_size: int, images: int) -> int:
    """Steps of a duration, rounded to the nearest.

    Args:
        duration: `300 epochs`, `187500 steps` or `1e8 images`.
        batch_size: Images per step.
        images: Images of the training set; an epoch is `images // batch_size` steps.

    Raises:
        SettingsError: `duration` is written in another way.
    """
    found = _DURATION.fullmatch(duration.strip())
    if not found:
        raise SettingsError(f"{duration!r} is not a duration such as '300 epochs' or '1000 steps'")
    per_unit = {"step": 1.0, "epoch": images // batch_size, "image": 1 / batch_size}[found[2]]
    return round(float(found[1]) * per_unit)
