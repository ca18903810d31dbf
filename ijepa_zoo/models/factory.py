"""create_model and create_ijepa: from a name, folder or repository to networks with weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from ..errors import CheckpointError, FetchError, SettingsError, option
from ..weights import load, registry
from ..weights.read import FOLDER_PREFIX, HUB_PREFIX, Networks, find_timm_config, open_checkpoint
from .encoder import as_encoder, check_encoder
from .jepa import IJepa
from .predictor import PREDICTORS, Predictor

TIMM_PREFIX = "timm:"
_DEFAULT_PREDICTOR = {"embed_dim": 384, "depth": 6}


def list_models(
    filter: str | list[str] = "",
    pretrained: bool = False,
) -> list[str]:
    """Names of the I-JEPA models.

    Args:
        filter: Wildcard pattern, or several, as in ``timm.list_models``.
        pretrained: True for the names with released weights, with their tags.
    """
    names: list[str] = timm.list_models(filter, pretrained=pretrained)
    return [name for name in names if name.split(".")[0] in registry.ARCHITECTURES]


def create_model(
    name: str,
    pretrained: bool = True,
    *,
    checkpoint: str | Path | Networks | None = None,
    network: str | None = None,
    **kwargs: Any,
) -> Any:
    """Create an I-JEPA encoder, by default with released weights of the target encoder.

    Differs from ``timm.create_model`` in the default of ``pretrained``, and in folders, which give
    an encoder of this package.

    Args:
        name: 'vit_huge14_ijepa', with a tag 'vit_huge14_ijepa.in1k_context', or a source that also
            gives the architecture: 'local-dir:FOLDER' or 'hf-hub:REPO[@REVISION]' of an export of
            this package, a transformers folder or a timm folder.
        pretrained: False for random initialization.
        checkpoint: Your own weights: an official .pth.tar, a state dict as training scripts save it
            (.pth, .pt, .ckpt, .safetensors), a transformers, timm or native folder, or
            'hf-hub:REPO'.
        network: 'target_encoder' (the default, which the paper evaluates) or 'encoder' (the context
            encoder), if the weights have both.
        **kwargs: timm's arguments: num_classes, global_pool, in_chans, img_size, dynamic_img_size,
            drop_path_rate, features_only, out_indices, embed_dim, depth, num_heads, mlp_ratio,
            patch_size, device, dtype, cache_dir, ...

    Returns:
        :class:`~ijepa_zoo.models.encoder.IJepaEncoder` in training mode, as timm's (call
        ``.eval()``), or timm's feature wrapper with ``features_only=True``; for a classifier
        folder, a :class:`~ijepa_zoo.models.classifier.Classifier`.

    Raises:
        CheckpointError: The weights do not exist or do not fit.
        FetchError: They cannot be fetched.
    """
    if name.startswith(FOLDER_PREFIX):
        fixed = {"checkpoint": checkpoint, "network": network, **kwargs}
        if (classifier := _open_classifier(name, fixed)) is not None:
            return classifier
    name, kwargs, source = _read_name(name, kwargs)
    multi_label, cfg = False, kwargs.get("pretrained_cfg")  # or a tag, or timm's PretrainedCfg
    if isinstance(cfg, Mapping):
        multi_label = cfg.get("multi_label", False)
        kwargs["pretrained_cfg"] = {k: v for k, v in cfg.items() if k != "multi_label"}
    if checkpoint is None and source is not None and source.is_other_vit:
        model = as_encoder(timm.create_model(name, pretrained=False, **kwargs))
        if pretrained:
            _load(model, source, source.choose(network))
    else:
        if checkpoint is None and pretrained:
            checkpoint = source
        model = timm.create_model(
            name, pretrained=pretrained, checkpoint=checkpoint, network=network, **kwargs
        )
        for key in ("checkpoint", "network"):  # timm's save_for_hf would record our paths
            getattr(model, "_model_args", {}).pop(key, None)
    model.multi_label = multi_label  # timm does not know it
    return model


def _open_classifier(name: str, kwargs: Mapping[str, Any]) -> nn.Module | None:
    """The classifier of a folder that `save_classifier` wrote; None for other folders."""
    from .classifier import load_classifier, read_classifier_config  # it imports this module

    folder = name.removeprefix(FOLDER_PREFIX)
    if read_classifier_config(folder) is None:
        return None
    if given := [key for key, value in kwargs.items() if value is not None]:
        raise SettingsError(
            f"{folder} is a classifier, whose encoder is fixed: leave {', '.join(given)} out"
        )
    return load_classifier(folder)


def _read_name(name: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any], Networks | None]:
    """Name and arguments for timm, and the folder or repository; ``kwargs`` override its own."""
    if name.startswith((HUB_PREFIX, FOLDER_PREFIX)):
        source = open_checkpoint(name, kwargs.get("cache_dir"))
        own = dict(source.args)
        if source.pretrained_cfg:
            own["pretrained_cfg"] = dict(source.pretrained_cfg)
        return source.model or registry.CUSTOM, {**own, **kwargs}, source
    if registry.is_ijepa(name):
        return name, dict(kwargs), None
    if Path(name).exists():
        raise SettingsError(f"{name!r} is a path: write 'local-dir:{name}' to load it")
    raise SettingsError(
        f"{name!r} is not an I-JEPA model: use one of {', '.join(registry.ARCHITECTURES)}, "
        "'local-dir:FOLDER' or 'hf-hub:REPO', or timm.create_model for other models"
    )


def create_named_model(
    name: str,
    pretrained: bool = True,
    *,
    checkpoint: str | None = None,
    network: str | None = None,
    **kwargs: Any,
) -> Any:
    """Create a model of this package or of timm, as users name it on the command line.

    ``name`` is as for :func:`create_model`, or a folder without ``local-dir:`` before it, or any
    model of timm, with or without ``timm:`` before it; 'timm:local-dir:FOLDER' is a folder that
    timm opens. Models of timm have no classifier.
    """
    if is_own_model(name):
        name = f"{FOLDER_PREFIX}{name}" if Path(name).is_dir() else name
        is_known = registry.is_ijepa(name) or Path(name).exists()
        if not is_known and not name.startswith((HUB_PREFIX, FOLDER_PREFIX)):
            raise SettingsError(
                f"there is no model {name!r}: see `ijepa-zoo list` and "
                f"timm.list_models('{name[:8]}*'), or name a folder"
            )
        return create_model(name, pretrained, checkpoint=checkpoint, network=network, **kwargs)
    if checkpoint or network:
        given = f"{option('checkpoint')} nor {option('network')}"
        raise SettingsError(f"{name!r} is timm's, and takes neither {given}")
    name = name.removeprefix(TIMM_PREFIX)
    return create_timm_model(name, pretrained=pretrained, num_classes=0, **kwargs)


def is_own_model(name: str) -> bool:
    """Whether :func:`create_named_model` opens it with this package, not with timm."""
    if name.startswith((TIMM_PREFIX, "hf_hub:")):  # timm's spelling
        return False
    is_ours = registry.is_ijepa(name) or not timm.is_model(name.partition(".")[0])
    return is_ours or Path(name).is_dir()


def create_timm_model(name: str, **kwargs: Any) -> nn.Module:
    """timm's `create_model`, with our errors."""
    try:
        return timm.create_model(name, **kwargs)
    except OSError as error:  # of the Hub too
        raise FetchError(
            f"the weights of {name!r} cannot be fetched ({error}): check the network, or give a "
            "folder that timm has saved, timm:local-dir:FOLDER"
        ) from error
    except RuntimeError as error:  # no such model, tag or weights
        raise SettingsError(
            f"timm cannot create {name!r} ({error}): see `ijepa-zoo list` and "
            f"timm.list_pretrained('{name[:8]}*')"
        ) from error


def create_encoder(name: str, **kwargs: Any) -> Any:
    """Create an encoder to pretrain, with random weights: a ViT with the method ``encode``.

    ``name`` is as for :func:`create_model`, or a ViT of timm by its name, folder or repository.
    Such a ViT keeps its architecture, except that its final norm precedes the pooling over patches
    and that it has no classifier or attention pooling.
    """
    if not is_other_vit(name):
        return create_model(name, pretrained=False, **kwargs)
    if name.startswith((HUB_PREFIX, FOLDER_PREFIX)):
        config = find_timm_config(name, kwargs.get("cache_dir")) or {}
        size = config.get("pretrained_cfg", {}).get("input_size")
        own = {"in_chans": size[0], "img_size": size[1:]} if size else {}
        name, kwargs = config["architecture"], {**own, **config.get("model_args", {}), **kwargs}
    with torch.device("meta"):  # other networks do not take all arguments
        check_encoder(timm.create_model(name, pretrained=False))
    kwargs |= {"num_classes": 0, "global_pool": "avg", "fc_norm": False}
    try:
        return as_encoder(timm.create_model(name, pretrained=False, **kwargs))
    except AssertionError as error:  # timm's way to refuse sizes
        raise SettingsError(f"{name} cannot have these sizes: {error}") from error


def is_other_vit(name: str | Path) -> bool:
    """Whether this is a model of timm, or a folder or repository of one, and not I-JEPA's."""
    if str(name).startswith((HUB_PREFIX, FOLDER_PREFIX)) or Path(name).is_dir():
        return find_timm_config(name) is not None
    return timm.is_model(str(name)) and not registry.is_ijepa(str(name))


def _load(vit: Any, networks: Networks, network: str) -> Any:
    """Load one network of a checkpoint into an encoder that is constructed already."""
    load.check_architecture(vit, networks.args, networks.origin)
    state = load.fit(networks.states[network](), vit, networks.origin, networks.grid_size)
    load.check(vit, state, networks.origin)
    vit.load_state_dict(state, strict=False)  # a classifier may be new
    load.record_source(vit, networks, network)
    return vit


def create_ijepa(
    name: str,
    pretrained: bool = True,
    *,
    predictor_embed_dim: int | None = None,
    predictor_depth: int | None = None,
    checkpoint: str | Path | Networks | None = None,
    regularizer: nn.Module | None = None,
    loss: Literal["smooth_l1", "l2"] = "smooth_l1",
    **encoder_kwargs: Any,
) -> IJepa:
    """Create all three networks, to predict hidden regions or to continue pretraining.

    Args:
        name: As for :func:`create_model`, or for :func:`create_encoder` without weights or with a
            ``checkpoint``.
        pretrained: False for random initialization.
        predictor_embed_dim: Width of the predictor; default: that of the weights, else
            384 as in the paper.
        predictor_depth: Blocks of the predictor; default: that of the weights, else the paper's.
        checkpoint: Your own weights, of all three networks.
        regularizer: See :class:`ijepa_zoo.IJepa`.
        loss: See there.
        **encoder_kwargs: timm's arguments of the encoder.

    Raises:
        CheckpointError: The weights lack one of the three networks, or do not fit.
    """
    if encoder_kwargs.get("features_only") or "network" in encoder_kwargs:
        raise SettingsError("create_ijepa makes all networks: leave features_only and network out")
    source, cache_dir = None, encoder_kwargs.get("cache_dir")
    if not (is_other := is_other_vit(name)):
        name, encoder_kwargs, source = _read_name(name, encoder_kwargs)
    elif pretrained and checkpoint is None and name.startswith((HUB_PREFIX, FOLDER_PREFIX)):
        source = open_checkpoint(name, cache_dir)
    if checkpoint is None and pretrained:
        checkpoint = source
    model, _, tag = name.partition(".")
    objective: dict[str, Any] = {"regularizer": regularizer, "loss": loss}
    sizes = {"embed_dim": predictor_embed_dim, "depth": predictor_depth}
    asked = {key: value for key, value in sizes.items() if value is not None}
    size = PREDICTORS.get(model, _DEFAULT_PREDICTOR)
    if not pretrained and checkpoint is None:
        encoder = create_encoder(name, **encoder_kwargs)
        device = next(encoder.parameters()).device
        own = source.predictor if source else {}
        return IJepa(encoder, _predictor(encoder, {**size, **own, **asked}, device), **objective)
    networks = load.resolve(model, checkpoint, pretrained_cfg=tag or None, cache_dir=cache_dir)
    absent = [network for network in registry.NETWORKS if network not in networks.states]
    if absent:
        complete = [c.name for c in registry.checkpoints() if len(c.networks) == 3]
        raise CheckpointError(
            f"{networks.origin} has no {' and no '.join(absent)}: create_ijepa needs all three "
            f"networks, as {', '.join(complete)} have them"
        )
    made = {
        network: _load(create_encoder(name, **encoder_kwargs), networks, network)
        if is_other
        else create_model(name, network=network, checkpoint=networks, **encoder_kwargs)
        for network in ("encoder", "target_encoder")
    }
    encoder = made["encoder"]
    predictor = _predictor(encoder, {**size, **networks.predictor, **asked}, torch.device("meta"))
    state = load.fit_predictor(
        networks.states["predictor"](), predictor, networks.origin, networks.grid_size
    )
    load.assign(predictor, state, networks.origin, next(encoder.parameters()).device)
    return IJepa(encoder, predictor, made["target_encoder"], **objective)


def _predictor(encoder: Any, size: Mapping[str, int], device: torch.device) -> Predictor:
    return Predictor(
        tuple(encoder.patch_embed.grid_size),
        encoder.embed_dim,
        predictor_embed_dim=size["embed_dim"],
        depth=size["depth"],
        num_heads=load.num_heads(encoder),
        device=device,
        dtype=next(encoder.parameters()).dtype,
    )
