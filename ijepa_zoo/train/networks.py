"""What a run starts from: random networks, or weights of an earlier one."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import timm
import torch

from ..errors import CheckpointError, SettingsError
from ..models.factory import create_ijepa
from ..models.jepa import IJepa
from ..seeds import Stream, fold
from ..weights import load, registry
from ..weights.formats import State
from ..weights.read import Networks
from .config import PretrainConfig
from .regularizers import IsotropicGaussian, VarianceCovariance

_log = logging.getLogger(__name__)


def build_networks(config: PretrainConfig, init: str | Path | None = None) -> IJepa:
    """The three networks of a run, on the CPU.

    Args:
        config: Settings.
        init: None for random initialization (a function of `config.seed`), the name of released
            weights with its tag, a checkpoint (see `create_ijepa`), or the name of a plain ViT of
            timm. If there is no predictor, both encoders start from the one encoder, and the
            predictor is new. A class token is dropped. Positions, patches and input channels of
            another size are resampled.

    Raises:
        CheckpointError: `init` does not fit the model.
        SettingsError: The settings do not describe a model.
    """
    network = config.model.model_dump(exclude={"name"}, exclude_none=True)
    optim = config.optim
    regularizer = None
    if optim.regularizer_weight:
        known = {"variance_covariance": VarianceCovariance, "isotropic_gaussian": IsotropicGaussian}
        regularizer = known[optim.regularizer](optim.regularizer_weight, optim.regularizer_over)
    name, checkpoint = _weights(config.model.name, init)
    encoder = _encoder_alone(name, checkpoint, init)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(config.seed, Stream.INIT))
        try:
            model = create_ijepa(
                name if encoder is None else config.model.name,
                pretrained=init is not None and encoder is None,
                checkpoint=checkpoint if encoder is None else None,
                regularizer=regularizer,
                loss=optim.loss,
                target_layers=optim.target_layers,
                position_noise=optim.position_noise,
                **network,
            )
        except ValueError as error:  # with the name that the setting has
            raise SettingsError(
                re.sub(r"^target_layers", "optim.target_layers", str(error))
            ) from error
    if encoder is not None:
        _start_from(model, *encoder)
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
    if init is None or _is_other_vit(init):
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


def _is_other_vit(init: str | Path | None) -> bool:
    """Whether this is the name of a model of timm, not one of ours."""
    name = str(init).partition(".")[0]
    return timm.is_model(name) and name not in registry.ARCHITECTURES


def _encoder_alone(
    name: str, checkpoint: str | Path | None, init: str | Path | None
) -> tuple[State, Networks] | None:
    """Tensors of an encoder that comes without a predictor; None for all three networks."""
    if init is None:
        return None
    if _is_other_vit(init):
        vit = timm.create_model(str(init), pretrained=True, num_classes=0)
        networks = Networks(f"timm's {init}", {}, "timm")
        return load.drop_class_token(vit.state_dict(), networks.origin), networks
    model, _, tag = name.partition(".")
    networks = load.resolve(model, checkpoint=checkpoint, pretrained_cfg=tag or None).networks
    if "predictor" in networks.states:
        return None
    state = networks.states[networks.choose(None)]()
    return load.drop_class_token(state, networks.origin), networks


def _start_from(model: IJepa, state: State, networks: Networks) -> None:
    """Load one encoder into both; the predictor stays as it was initialized."""
    _log.warning("both encoders start from %s; the predictor is new", networks.origin)
    for encoder in (model.encoder, model.target_encoder):
        fitted = load.fit(state, encoder, networks.origin, networks.grid_size)
        load.check(encoder, fitted, networks.origin)
        encoder.load_state_dict(fitted)
