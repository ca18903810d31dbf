"""Settings of a pretraining run: their schema, and how recipes, YAML and `key=value` are read.

All defaults are the official ViT-H/14 run on ImageNet-1k. The functions here raise SettingsError;
constructing a section in Python raises pydantic's ValidationError.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from ..errors import SettingsError
from ..models.predictor import PREDICTORS
from . import official

_DURATION = re.compile(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(step|epoch|image)s?", re.ASCII)
_RECIPES = Path(__file__).with_name("recipes")


def _listed(value: Any) -> Any:
    """`0.3,1.0` and single values as lists."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]() ").split(",")]
    return value if isinstance(value, (list, tuple)) else [value]


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("The first number should not be greater than the second")
    return value


def _model(name: str) -> str:
    model, _, tag = name.partition(".")
    if name.startswith(("local-dir:", "hf-hub:")):
        return name
    if model not in PREDICTORS and not timm.is_model(model):
        raise ValueError(f"this model is not registered: use one of {', '.join(PREDICTORS)}")
    if tag:
        raise ValueError(f"use {model} here and --init {name} for its weights")
    return name


def _duration(text: str) -> str:
    steps_of(text, batch_size=1, images=1)  # refuses other texts
    return text


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Area = Annotated[float, Field(gt=0, le=1)]
Listed = BeforeValidator(_listed)
AreaRange = Annotated[tuple[Area, Area], AfterValidator(_ordered), Listed]
RatioRange = Annotated[tuple[Positive, Positive], AfterValidator(_ordered), Listed]
Size = Count | Annotated[tuple[Count, Count], Listed]
ModelName = Annotated[str, AfterValidator(_model)]
Duration = Annotated[str, AfterValidator(_duration), BeforeValidator(str)]
LogTarget = Literal["csv", "tensorboard", "wandb"]
Precision = Literal["auto", "fp32", "bf16", "fp8"]


class Section(BaseModel):
    """Immutable settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("Input should not be true or false")
        return value


def _field(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


class ModelConfig(Section):
    """The networks; null stands for the model's own value."""

    name: ModelName = _field(
        "vit_huge14_ijepa", "an I-JEPA model, a ViT of timm, local-dir:FOLDER or hf-hub:REPO"
    )
    img_size: Size | None = _field(None, "height,width of images in pixels, or one number for both")
    patch_size: Count | None = _field(None, "height and width of patches in pixels")
    in_chans: Count | None = _field(None, "channels of images")
    embed_dim: Count | None = _field(None, "width of the encoders")
    depth: Count | None = _field(None, "blocks of the encoders")
    num_heads: Count | None = _field(None, "attention heads of encoders and predictor")
    mlp_ratio: float | None = _field(
        None, "hidden width of the encoders' MLPs over embed_dim", ge=0.25
    )
    predictor_embed_dim: Count | None = _field(None, "width of the predictor")
    predictor_depth: Count | None = _field(None, "blocks of the predictor")


class DataConfig(Section):
    """From an image to an input."""

    crop_scale: AreaRange = _field((0.3, 1.0), "min,max area of random crops over the image's area")
    crop_ratio: RatioRange = _field(
        (3 / 4, 4 / 3), "min,max width over height of random crops; they are stretched to img_size"
    )
    horizontal_flip: bool = _field(False, "flip half of the crops")
    mean: Annotated[tuple[float, ...], Listed] = _field(
        (0.485, 0.456, 0.406), "mean of the pixels: one value for each channel, or for all"
    )
    std: Annotated[tuple[Positive, ...], Listed] = _field(
        (0.229, 0.224, 0.225), "standard deviation of the pixels: one value for each, or for all"
    )
    held_out: Natural = _field(512, "images for the monitors, never trained on")
    max_broken: Ratio = _field(0.01, "stop above this share of broken images; may change on resume")
    value_range: Annotated[tuple[float, float], Listed] | None = _field(
        None, "values of black and white in images and arrays of more than 8 bits"
    )
    bands: Annotated[tuple[Natural, ...], Listed] | None = _field(
        None, "bands or pages of image files to use as channels, from 0"
    )


class MaskConfig(Section):
    """Multi-block masks."""

    mode: Literal["published", "unbiased"] = _field(
        "published",
        "published: the official sampler; unbiased: independent scale and aspect, blocks on the "
        "whole grid, long contexts cut at random",
    )
    group_size: Count | Literal["global"] = _field(
        128, "images that share a context length (official: those of a GPU); global: the batch"
    )
    per_image: Count = _field(1, "contexts of an image, each with its own targets", le=64)
    num_targets: Count = _field(4, "target blocks of a context")
    target_scale: AreaRange = _field((0.15, 0.2), "min,max area of a target over the image's")
    target_aspect: RatioRange = _field((0.75, 1.5), "min,max height over width of a target")
    context_scale: AreaRange = _field((0.85, 1.0), "min,max area of a context over the image's")
    min_keep: Natural = _field(10, "a context has more patches than this")
    allow_overlap: bool = _field(False, "keep patches of targets in the context")


class OptimConfig(Section):
    """Loss, optimizer and schedules; durations are in epochs, steps or images."""

    batch_size: Count = _field(2048, "images of a step, over all processes and accumulated parts")
    duration: Duration = _field("300 epochs", "such as 300 epochs, 1000 steps or 1e8 images")
    warmup: Duration = _field("40 epochs", "time in which the learning rate rises to lr")
    schedule_scale: Positive = _field(1.0, "schedules are this many durations long (ipe_scale)")
    start_lr: NonNegative = _field(2e-4, "learning rate before the first step")
    lr: Positive = _field(1e-3, "learning rate after the warm-up")
    final_lr: NonNegative = _field(1e-6, "learning rate at the end of the cosine schedule")
    weight_decay: NonNegative = _field(0.04, "weight decay at the start")
    final_weight_decay: NonNegative = _field(0.4, "weight decay at the end")
    weight_decay_schedule: Literal["cosine", "linear"] = _field("cosine", "curve between these two")
    momentum: Ratio = _field(0.996, "momentum of the target encoder's moving average at the start")
    final_momentum: Ratio = _field(1.0, "momentum at the end; linear in between")
    clip_grad: Positive | None = _field(
        None, "largest L2 norm of all gradients together; null: not clipped (official)"
    )
    loss: Literal["smooth_l1", "l2"] = _field("smooth_l1", "official: smooth_l1; paper's text: l2")
    regularizer_weight: NonNegative = _field(
        0.0, "weight of VICReg's variance and covariance terms; 0 is the official loss"
    )
    regularizer_over: Literal["residuals", "images"] = _field(
        "residuals", "their samples: tokens minus the mean of their image's, or these means"
    )
    precision: Precision = _field(
        "bf16",
        "auto: bf16 where the device multiplies it natively, else fp32, decided when a run starts; "
        "fp8: products of the encoders' blocks (compute capability >= 8.9, torchao, compile)",
    )


class LogConfig(Section):
    """Logs, monitors and checkpoints; may change on resume."""

    to: Annotated[tuple[LogTarget, ...], Listed] = _field(
        ("csv",), "csv (log.csv, always), tensorboard, wandb (extra `log`)"
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
    workers: Natural | None = _field(None, "loaders of a process; null: its share of the cores")
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


def micro_batch_size(config: PretrainConfig, world: int) -> int:
    """Images of a forward pass of one of `world` processes: the largest number that fits.

    It divides both the process's part of the batch and `mask.group_size`.
    """
    optim, batch, group = config.optim, config.optim.batch_size, config.group_size
    if batch % world or batch % group:
        raise SettingsError(
            f"optim.batch_size={batch} must be a multiple of mask.group_size={group} and of the "
            f"number of processes, {world}"
        )
    common = math.gcd(batch // world, group)
    most = min(config.runtime.micro_batch_size or common, common)
    size = next(n for n in range(most, 0, -1) if common % n == 0)
    if optim.regularizer_weight and size != group:
        raise SettingsError(
            f"optim.regularizer_weight needs the {group} images of mask.group_size in one forward "
            f"pass, not {size}: use mask.group_size={size}, which changes the result, or another "
            "runtime.micro_batch_size or number of processes"
        )
    return size


def steps_of(duration: str, *, batch_size: int, images: int) -> int:
    """Steps of a duration such as `300 epochs`; an epoch is `images // batch_size` steps."""
    found = _DURATION.fullmatch(duration.strip())
    if not found or float(found[1]) > 1e15:
        raise SettingsError(
            f"{duration!r} is not a duration such as '300 epochs', '1000 steps' or '1e8 images'"
        )
    per_unit = {"step": 1.0, "epoch": images // batch_size, "image": 1 / batch_size}[found[2]]
    return round(float(found[1]) * per_unit)


def recipe_table() -> list[tuple[str, str]]:
    """Name and purpose, in one line, of every recipe."""
    files = sorted(_RECIPES.glob("*.yaml"))
    first_lines = [file.read_text(encoding="utf-8").partition("\n")[0] for file in files]
    return [(file.stem, line.lstrip("# ")) for file, line in zip(files, first_lines)]


def load_config(
    recipe_or_file: str | Path, overrides: Sequence[str] = (), world: int = 1
) -> PretrainConfig:
    """Settings of a run.

    Args:
        recipe_or_file: The name of a recipe (see `recipe_table`), or a YAML file: your own, which
            may start from a recipe with the line `recipe: NAME`, or one of the official repository.
        overrides: Changes, such as `optim.lr=5e-4` or `mask.target_scale=0.1,0.2`.
        world: Number of processes; the official repository's files give the batch of one of them.

    Raises:
        SettingsError: There is no such recipe or file, or a setting is unknown or wrong.
        OSError: The file cannot be read.
    """
    path = Path(recipe_or_file)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        values = _read(path.read_bytes(), str(path), world)
    else:
        values = _read_recipe(str(recipe_or_file))
    return _validate(values | _changes(overrides))


def parse_config(text: str, origin: str) -> PretrainConfig:
    """Settings from the text of a YAML file, over the defaults."""
    return _validate(_read(text, origin, world=1))


def override(config: PretrainConfig, *changes: str, **values: Any) -> PretrainConfig:
    """Settings with some of them changed.

    Args:
        config: Settings; unchanged.
        *changes: Texts as on the command line: `optim.lr=5e-4`.
        **values: Values by name: `override(config, **{"optim.lr": 5e-4})`.

    Raises:
        SettingsError: A setting is unknown or wrong.
    """
    return _validate(named_values(config) | _changes(changes) | values)


def describe_config(config: Section) -> str:
    """All settings as YAML with their descriptions as comments; `parse_config` reads it."""
    text = ""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            section = textwrap.indent(describe_config(value), "  ")
            text += f"\n# {value.__doc__}\n{name}:\n{section}"
        else:
            text += f"# {field.description}\n{name}: {json.dumps(value, ensure_ascii=False)}\n"
    return text


def named_values(config: PretrainConfig) -> dict[str, Any]:
    """Every value by its full name, such as `optim.lr`."""
    return _flat(config.model_dump(), "")


class _Loader(yaml.SafeLoader):
    """Refuses repeated names. Numbers such as `5e-4`, text in PyYAML, are read by pydantic."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value) for key, _ in node.value]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"{', '.join(sorted(repeated))} is given twice")
        return super().construct_mapping(node, deep)


def _load_yaml(text: str | bytes, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises others than YAMLError for text such as `!!bool x`
        reason = getattr(error, "problem", None) or error  # without PyYAML's lines of context
        raise SettingsError(f"{origin} is not YAML: {reason}") from None


def _read(text: str | bytes, origin: str, world: int) -> dict[str, Any]:
    """Values of a file by full name, over those of the recipe that it names."""
    values = _flat(_load_yaml(text, origin) or {}, origin)
    if official.is_official(values):
        return official.translate(values, origin, world)
    recipe = values.pop("recipe", None)
    return values if recipe is None else _read_recipe(str(recipe)) | values


def _read_recipe(name: str) -> dict[str, Any]:
    file = _RECIPES / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(recipe for recipe, _ in recipe_table())
        raise SettingsError(f"no recipe or file {name!r}: use one of {names}")
    return _read(file.read_bytes(), name, world=1)


def _flat(content: Any, origin: str) -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` as `{"optim.lr": 1}`; an empty section changes nothing."""
    if not isinstance(content, dict):
        raise SettingsError(f"{origin} should have names and values, such as `seed: 0`")
    values: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            values |= {f"{name}.{leaf}": part for leaf, part in value.items()}
        elif value is not None:
            values[str(name)] = value
    return values


def _changes(texts: Sequence[str]) -> dict[str, Any]:
    """`optim.lr=5e-4` as `{"optim.lr": 5e-4}`."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"{text!r} has no value: write {text}=VALUE")
        values[name.strip()] = _load_yaml(value, text)
    return values


def _validate(values: Mapping[str, Any]) -> PretrainConfig:
    known = named_values(PretrainConfig())
    tree: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, cutoff=0.5) or known
            raise SettingsError(f"there is no setting {name}: use one of {', '.join(near)}")
        section, _, leaf = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    try:
        config = PretrainConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][:2]))
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("missing", "too_long"):  # only pairs have a length
            reason = "Input should be two numbers such as 0.3,1.0"
        raise SettingsError(f"{name} is {values[name]!r:.80}: {reason}") from None
    micro_batch_size(config, world=1)  # before images are read
    return config
