"""Which values of the settings no run can use."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from ..errors import SettingsError
from ..models.predictor import PREDICTORS
from .config import DataConfig, ModelConfig, PretrainConfig, micro_batch_size, steps_of
from .values import DURATIONS, convert, named_values, setting_types, shown, wanted

_LEAST_ONE = (
    *(f"model.{name}" for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth")),
    *(f"model.{name}" for name in ("num_heads", "predictor_embed_dim", "predictor_depth")),
    *(
        "mask.per_image",
        "mask.num_targets",
        "optim.batch_size",
        "optim.target_layers",
        "log.log_every",
        "log.monitor_every",
        "log.keep",
    ),
    *("machine.micro_batch_size", "machine.threads"),
)
_POSITIVE = ("model.mlp_ratio", "optim.lr", "optim.schedule_scale", "machine.timeout")
_NOT_NEGATIVE = (
    *("data.held_out", "mask.min_keep", "optim.start_lr", "optim.final_lr"),
    *("optim.weight_decay", "optim.final_weight_decay", "optim.regularizer_weight"),
    *("optim.position_noise", "machine.workers"),
)
_SHARES = ("data.max_broken", "optim.momentum", "optim.final_momentum")
_NUMBERS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (_LEAST_ONE, lambda value: value >= 1, "at least 1"),
    (_POSITIVE, lambda value: value > 0, "more than 0"),
    (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    (_SHARES, lambda value: 0 <= value <= 1, "between 0 and 1"),
)
_RANGES = (
    *("data.crop_scale", "data.crop_ratio"),
    *("mask.target_scale", "mask.target_aspect", "mask.context_scale"),
)
_RATIOS = ("data.crop_ratio", "mask.target_aspect")  # the other ranges are parts of an area
_RATIO_BOUNDS = 1e-3, 1e3  # longer boxes have no pixels, and their sides no finite numbers
_MOST_MASKS = 64  # of an image; more is a slip of the pen that would take all memory
_MOST_NOISE = 10.0  # standard deviations; tokens have about one
_NO_NAMES = ("local-dir:", "hf-hub:")


def check(config: PretrainConfig) -> None:
    """Refuse settings that no run can use, whatever the images are.

    Raises:
        ValueError: The setting, its value and what to write instead.
    """
    values = dict(named_values(config))
    for name, value in values.items():
        _check_type(name, value)
    for names, fits, words in _NUMBERS:
        for name in names:
            if values[name] is not None and not fits(values[name]):
                raise SettingsError(f"{name} is {shown(values[name])}; it must be {words}")
    for name in _RANGES:
        low, high = values[name]
        if not 0 < low <= high or (high > 1 and name not in _RATIOS):
            bound = "" if name in _RATIOS else " <= 1"
            raise SettingsError(
                f"{name} is {shown(values[name])}; it must be 0 < min <= max{bound}"
            )
    for name in _RATIOS:
        if values[name][0] < _RATIO_BOUNDS[0] or values[name][1] > _RATIO_BOUNDS[1]:
            raise SettingsError(
                f"{name} is {shown(values[name])}; both must be between {_RATIO_BOUNDS[0]:g} and "
                f"{_RATIO_BOUNDS[1]:g}"
            )
    _check_model(config.model)
    _check_channels(config.data, config.model)
    _check_durations(values)
    _check_cut(config)
    if config.optim.position_noise > _MOST_NOISE:
        raise SettingsError(
            f"optim.position_noise is {config.optim.position_noise:g}; it must be at most "
            f"{_MOST_NOISE:g} (StoP's is 0.25)"
        )
    if config.mask.per_image > _MOST_MASKS:
        raise SettingsError(
            f"mask.per_image is {config.mask.per_image}; it must be at most {_MOST_MASKS}: every "
            "mask of an image costs a pass of its own through context encoder and predictor"
        )


def _check_type(name: str, value: Any) -> None:
    """Files are converted when they are read; this is for settings that Python code made."""
    try:
        converted = convert(value, setting_types()[name])
    except ValueError:
        fits = False
    else:
        fits = isinstance(converted, str) == isinstance(value, str)  # no number written as text
    if not fits:
        raise SettingsError(f"{name} is {value!r}; it must be {wanted(name)}")


def _check_model(model: ModelConfig) -> None:
    if not model.name.startswith(_NO_NAMES):
        name, _, tag = model.name.partition(".")
        if name not in PREDICTORS:
            near = difflib.get_close_matches(name, PREDICTORS, n=1)
            hint = f"did you mean {near[0]}? All" if near else "there"
            raise SettingsError(f"model.name is {name}; {hint} are: {', '.join(PREDICTORS)}")
        if tag:
            raise SettingsError(
                f"model.name is {model.name}; write {name} without a tag, and name weights to "
                f"start from with --init {model.name}"
            )
    for whole, part in (("img_size", "patch_size"), ("embed_dim", "num_heads")):
        size, divisor = getattr(model, whole), getattr(model, part)
        if size and divisor and size % divisor:
            near_size = max(size // divisor, 1) * divisor
            raise SettingsError(
                f"model.{whole} is {size}, no multiple of model.{part}={divisor}; {near_size} is "
                "one"
            )


def _check_channels(data: DataConfig, model: ModelConfig) -> None:
    channels = model.in_chans
    if channels is None and not model.name.startswith(_NO_NAMES):
        channels = 3
    for name in ("mean", "std"):
        given = getattr(data, name)
        if channels and len(given) not in (1, channels):
            raise SettingsError(
                f"data.{name} has {len(given)} values for images of {channels} channels "
                f"(model.in_chans); give 1 or {channels}"
            )
    if min(data.std) <= 0:
        raise SettingsError(f"data.std is {shown(data.std)}; every value must be more than 0")


def _check_durations(values: dict[str, Any]) -> None:
    for name in DURATIONS:
        if values[name] is None:
            continue
        try:
            most = steps_of(values[name], batch_size=1, images=10**12)
        except (ValueError, OverflowError) as error:
            raise SettingsError(f"{name}: {error}") from None
        if not most and name != "optim.warmup":
            raise SettingsError(f"{name} is {values[name]!r}; it must be more than 0")


def _check_cut(config: PretrainConfig) -> None:
    mask, optim = config.mask, config.optim
    if mask.cut != "global" and mask.cut < 1:
        raise SettingsError(f"mask.cut is {mask.cut}; it must be at least 1, or global")
    group = optim.batch_size if mask.cut == "global" else min(mask.cut, optim.batch_size)
    by_images = {
        "optim.regularizer_over=images": optim.regularizer_weight > 0
        and optim.regularizer_over == "images",
        "optim.target_norm=position": optim.target_norm == "position",
    }
    for setting in (name for name, used in by_images.items() if used and group < 2):
        raise SettingsError(
            f"{setting} compares the images of mask.cut, of which there is one; "
            "use mask.cut=2 or more"
        )
    micro_batch_size(config, world=1)
