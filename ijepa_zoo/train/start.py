"""What a run starts from: random networks, or weights of an earlier one."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import CheckpointError, SettingsError
from ..models.factory import create_ijepa
from ..models.jepa import IJepa
from ..seeds import Stream, fold
from ..weights import registry
from .config import PretrainConfig
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


def _weights(model: str, init: str | Path | None) -> tuple[str, str | Path | None]:
    """Name and checkpoint for `create_ijepa`: a name with a tag is in the registry."""
    if init is None:
        return model, None
    known = {checkpoint.name for checkpoint in registry.checkpoints()}
    if str(init) not in known:
        return model, init
    if str(init).partition(".")[0] != model:
        raise CheckpointError(
            f"{init} are weights of another model than {model}: use model.name="
            f"{str(init).partition('.')[0]}"
        )
    return str(init), None
