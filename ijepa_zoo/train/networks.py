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
from ..weights.formats import UNLABELED, State
from ..weights.read import FOLDER_PREFIX, Networks, find_timm_config, open_checkpoint
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
    weights = None if init is None else _open(config.model.name, init)
    alone = weights is not None and "predictor" not in weights.states
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(config.seed, Stream.INIT))
        model = create_ijepa(
            config.model.name,
            pretrained=False,
            checkpoint=None if alone else weights,
            regularizer=regularizer,
            loss=optim.loss,
            **network,
        )
    if weights is not None:
        if alone:
            _start_from(model, config.model.name, weights)
        else:
            _check_predictor(config, model.predictor, weights.origin)
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
    if weights is not None:
        _compare_normalization(model.encoder.pretrained_cfg, weights)
    return model


def _check_predictor(config: PretrainConfig, predictor: Predictor, origin: str) -> None:
    """Refuse the predictor of weights that the settings, from which a run resumes, do not give."""
    with torch.device("meta"):
        expected = build_networks(config).predictor
    if (sizes := _sizes(predictor)) != _sizes(expected):
        raise SettingsError(f"the predictor of {origin} is another one: use {sizes}")


def _sizes(predictor: Predictor) -> str:
    return (
        f"model.predictor_embed_dim={predictor.predictor_embed.out_features} "
        f"model.predictor_depth={len(predictor.predictor_blocks)}"
    )


def _compare_normalization(ours: Mapping[str, Any], networks: Networks) -> None:
    """Warn if weights were trained with another normalization of pixels."""
    for key in ("mean", "std"):
        before = tuple(networks.preprocessing.get(key) or ())
        if len(before) == len(ours[key]) and before != ours[key]:
            values = ",".join(map(str, before))
            _log.warning("%s had another %s: use data.%s=%s", networks.origin, key, key, values)


def _open(model: str, init: str | Path) -> Networks:
    """The weights to start from; released ones are refused before they are downloaded."""
    if is_other_vit(init) and "ijepa_zoo" not in (find_timm_config(init) or {}):
        source = f"{FOLDER_PREFIX}{init}" if Path(init).is_dir() else str(init)
        vit: Any = create_timm_model(source, pretrained=True, num_classes=0)
        check_encoder(vit)
        return Networks(
            f"timm's {init}",
            {UNLABELED: lambda: _without_pooling(vit.state_dict())},
            args={"num_heads": load.num_heads(vit)},
            pretrained_cfg=vit.pretrained_cfg,
        )
    if str(init) not in {checkpoint.name for checkpoint in registry.checkpoints()}:
        return open_checkpoint(init)
    name, _, tag = str(init).partition(".")
    if name != model:
        raise CheckpointError(
            f"{init} are weights of another model than {model}: use model.name={name}"
        )
    return load.resolve(name, pretrained_cfg=tag)


def _without_pooling(state: State) -> State:
    """Tensors of a ViT of timm that pools tokens and then normalizes, or pools by attention."""
    return {
        re.sub(r"^fc_norm\.", "norm.", name): tensor
        for name, tensor in state.items()
        if not name.startswith("attn_pool.")
    }


def _start_from(model: IJepa, name: str, weights: Networks) -> None:
    """Load one encoder into both; the predictor stays as it was initialized."""
    _log.warning("both encoders start from %s; the predictor is new", weights.origin)
    load.check_architecture(model.encoder, weights.args, weights.origin)
    state = weights.states[weights.choose(None)]()
    if not is_other_vit(name):
        state = load.drop_class_token(state, weights.origin)
    fitted = load.fit(state, model.encoder, weights.origin, weights.grid_size)
    load.check(model.encoder, fitted, weights.origin)
    for encoder in (model.encoder, model.target_encoder):
        encoder.load_state_dict(fitted)
