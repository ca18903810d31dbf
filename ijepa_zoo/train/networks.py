"""The initial networks of a run: random, or from weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, SettingsError
from ..models.encoder import check_encoder
from ..models.factory import create_ijepa, create_timm_model, is_other_vit
from ..models.jepa import IJepa
from ..models.predictor import Predictor
from ..seeds import Stream, fold
from ..weights import load, registry
from ..weights.formats import State
from ..weights.read import FOLDER_PREFIX, Networks, find_timm_config
from .config import PretrainConfig
from .regularizers import VarianceCovariance

_log = logging.getLogger(__name__)


def build_networks(config: PretrainConfig, init: str | Path | None = None) -> IJepa:
    """The three networks of a run, on the CPU.

    `init` is None for random initialization (a function of `config.seed`), the name of released
    weights with its tag, a checkpoint (see `create_ijepa`), or a ViT of timm: its name, or a folder
    or repository of it. If there is no predictor, both encoders start from the one encoder, and the
    predictor is new. I-JEPA models drop its class token. Positions, patches and input channels of
    another size are resampled.
    """
    network = config.model.model_dump(exclude={"name"}, exclude_none=True)
    optim = config.optim
    regularizer = None
    if optim.regularizer_weight:
        regularizer = VarianceCovariance(optim.regularizer_weight, optim.regularizer_over)
    name, checkpoint = _weights(config.model.name, init)
    encoder, networks = _encoder_alone(name, checkpoint, init) if init else (None, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(config.seed, Stream.INIT))
        model = create_ijepa(
            name if encoder is None else config.model.name,
            pretrained=networks is not None and encoder is None,
            checkpoint=checkpoint if encoder is None else None,
            regularizer=regularizer,
            loss=optim.loss,
            **network,
        )
    if networks is not None and encoder is not None:
        _start_from(model, encoder, networks)
    elif init:
        _check_predictor(config, model.predictor, init)
    channels = model.encoder.patch_embed.proj.in_channels
    for key in ("mean", "std"):
        values = getattr(config.data, key)
        if len(values) not in (1, channels):
            raise SettingsError(
                f"data.{key} has {len(values)} values for images of {channels} channels: give one "
                "value for all, or one for each"
            )
    for encoder in (model.encoder, model.target_encoder):  # for the transform of features
        mean, std = (
            tuple(v) * (channels if len(v) == 1 else 1) for v in (config.data.mean, config.data.std)
        )
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": mean, "std": std}
    if networks is not None:
        _compare_normalization(model.encoder.pretrained_cfg, networks)
    return model


def _check_predictor(config: PretrainConfig, predictor: Predictor, init: str | Path) -> None:
    """Refuse the predictor of weights that the settings, from which a run resumes, do not give."""
    with torch.device("meta"):
        expected = build_networks(config).predictor
    sizes = [
        {
            "predictor_embed_dim": network.predictor_embed.out_features,
            "predictor_depth": len(network.predictor_blocks),
        }
        for network in (predictor, expected)
    ]
    if sizes[0] != sizes[1]:
        values = " ".join(f"model.{key}={value}" for key, value in sizes[0].items())
        raise SettingsError(f"the predictor of {init} is another one: use {values}")


def _compare_normalization(ours: Mapping[str, Any], networks: Networks) -> None:
    """Warn if weights were trained with another normalization of pixels."""
    for key in ("mean", "std"):
        before = tuple(networks.preprocessing.get(key) or ())
        if len(before) == len(ours[key]) and before != ours[key]:
            values = ",".join(map(str, before))
            _log.warning("%s had another %s: use data.%s=%s", networks.origin, key, key, values)


def _weights(model: str, init: str | Path | None) -> tuple[str, str | Path | None]:
    """Name and checkpoint for `create_ijepa`; a name with a tag is in the registry."""
    if init is None or _is_stock(init):
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


def _is_stock(init: str | Path) -> bool:
    """Whether timm must load this: one of its models, or a folder of one."""
    return is_other_vit(init) and "ijepa_zoo" not in (find_timm_config(init) or {})


def _encoder_alone(
    name: str, checkpoint: str | Path | None, init: str | Path
) -> tuple[State | None, Networks]:
    """Tensors of an encoder that comes without a predictor, or None, and all that was found."""
    if _is_stock(init):
        source = f"{FOLDER_PREFIX}{init}" if Path(init).is_dir() else str(init)
        vit: Any = create_timm_model(source, pretrained=True, num_classes=0)
        check_encoder(vit)
        networks = Networks(
            f"timm's {init}",
            {},
            args={"num_heads": load.num_heads(vit)},
            pretrained_cfg=vit.pretrained_cfg,
        )
        state = _without_pooling(vit.state_dict())
    else:
        model, _, tag = name.partition(".")
        networks = load.resolve(model, checkpoint=checkpoint, pretrained_cfg=tag or None)
        if "predictor" in networks.states:
            return None, networks
        state = networks.states[networks.choose(None)]()
    if not is_other_vit(name):
        state = load.drop_class_token(state, networks.origin)
    return state, networks


def _without_pooling(state: State) -> State:
    """Tensors of a ViT of timm that pools tokens and then normalizes, or pools by attention."""
    return {
        re.sub(r"^fc_norm\.", "norm.", name): tensor
        for name, tensor in state.items()
        if not name.startswith("attn_pool.")
    }


def _start_from(model: IJepa, state: State, networks: Networks) -> None:
    """Load one encoder into both; the predictor stays as it was initialized."""
    _log.warning("both encoders start from %s; the predictor is new", networks.origin)
    load.check_architecture(model.encoder, networks.args, networks.origin)
    fitted = load.fit(state, model.encoder, networks.origin, networks.grid_size)
    load.check(model.encoder, fitted, networks.origin)
    for encoder in (model.encoder, model.target_encoder):
        encoder.load_state_dict(fitted)
