"""What a run starts from: random networks, or weights and optimizer state of an earlier one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import CheckpointError, SettingsError
from ..models.factory import create_ijepa
from ..models.jepa import IJepa
from ..seeds import Stream, fold
from ..weights import catalog, load
from ..weights.layouts import some
from .config import PretrainConfig
from .parallel import copy_whole
from .regularizers import IsotropicGaussian, VarianceCovariance


def build_networks(config: PretrainConfig, init: str | Path | None = None) -> IJepa:
    """The three networks of a run, on the CPU.

    Args:
        config: Settings.
        init: None for the recipe's random initialisation (a function of `config.seed`), the name
            of released weights with its tag, or a checkpoint (see `create_ijepa`). Positions,
            patches and input channels of another size are resampled.

    Raises:
        CheckpointError: `init` does not hold all three networks, or they do not fit.
        ValueError: The settings make no model.
    """
    network = {k: v for k, v in asdict(config.model).items() if k != "name" and v is not None}
    optim = config.optim
    regularizer = None
    if optim.regularizer_weight:
        known = {"variance_covariance": VarianceCovariance, "isotropic_gaussian": IsotropicGaussian}
        regularizer = known[optim.regularizer](optim.regularizer_weight, optim.regularizer_over)
    name, checkpoint = _weights(config.model.name, init)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(config.seed, Stream.INIT))
        try:
            model = create_ijepa(
                name,
                pretrained=init is not None,
                checkpoint=checkpoint,
                regularizer=regularizer,
                loss=optim.loss,
                target_layers=optim.target_layers,
                target_norm=optim.target_norm,
                position_noise=optim.position_noise,
                **network,
            )
        except ValueError as error:  # with the name that the setting has
            raise SettingsError(
                re.sub(r"^target_layers", "optim.target_layers", str(error))
            ) from error
    channels = model.encoder.patch_embed.proj.in_channels
    for key in ("mean", "std"):
        values = getattr(config.data, key)
        if len(values) not in (1, channels):
            raise SettingsError(
                f"data.{key} has {len(values)} values for images of {channels} channels: give one "
                "value for all, or one for each"
            )
    for encoder in (model.encoder, model.target_encoder):  # features are made with the same
        mean, std = (
            tuple(v) * (channels if len(v) == 1 else 1) for v in (config.data.mean, config.data.std)
        )
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": mean, "std": std}
    return model


def starting_optimizer(config: PretrainConfig, init: str | Path) -> Mapping[str, torch.Tensor]:
    """Optimizer tensors of `init` by name: `encoder.norm.weight.exp_avg` and so on.

    Raises:
        CheckpointError: `init` holds no optimizer state.
    """
    name, checkpoint = _weights(config.model.name, init)
    model, _, tag = name.partition(".")
    networks = load.resolve(
        model, checkpoint=checkpoint, pretrained_cfg=tag or None, cache_dir=None
    ).networks
    if networks.training is None:
        raise CheckpointError(
            f"{networks.origin} holds no optimizer state: leave --resume-optimizer out, or name an "
            "official .pth.tar file or an export that has it"
        )
    training = networks.training()
    scalars = training.plain.get(
        "scalars", {}
    )  # old versions of torch counted steps in plain numbers
    return {**training.optimizer, **{k: torch.tensor(float(v)) for k, v in scalars.items()}}


def fill_optimizer(tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Copy optimizer tensors into a run's own, which have the prefix `optimizer.`.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    mine = {name.removeprefix("optimizer."): value for name, value in own.items()}
    missing = mine.keys() - tensors.keys()
    if missing:
        raise CheckpointError(f"the optimizer state lacks {some(missing)}")
    for name, value in mine.items():
        if tensors[name].shape != value.shape:
            raise CheckpointError(
                f"optimizer state {name} has shape {list(tensors[name].shape)}, the network needs "
                f"{list(value.shape)}: leave --resume-optimizer out for networks of another size"
            )
    for name, value in mine.items():
        copy_whole(tensors[name], value)


def _weights(model: str, init: str | Path | None) -> tuple[str, str | Path | None]:
    """Name and checkpoint for `create_ijepa`: a name with a tag is in the catalogue."""
    if init is None:
        return model, None
    known = {record.name for record in catalog.checkpoints()}
    if str(init) not in known:
        return model, init
    if str(init).partition(".")[0] != model:
        raise CheckpointError(
            f"{init} are weights of another model than {model}: use model.name="
            f"{str(init).partition('.')[0]}"
        )
    return str(init), None
