"""Export a model or a checkpoint to a folder that another library loads, and to the Hub."""

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import DropPath, LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..errors import CheckpointError, RunError, SettingsError, some
from ..models.encoder import IJepaEncoder
from ..models.factory import create_encoder
from ..models.jepa import IJepa
from . import configs, load, registry
from .formats import UNLABELED, State
from .read import FOLDER_PREFIX, PREPROCESSING, Networks, open_checkpoint
from .writers import FORMATS, WRITTEN, write


def export(
    model: IJepa | VisionTransformer | str | Path,
    folder: str | Path,
    to: str = "native",
    *,
    network: str | None = None,
    dtype: torch.dtype | None = None,
    license: str | None = None,
    overwrite: bool = False,
    model_name: str | None = None,
    cache_dir: str | Path | None = None,
    origin: str | None = None,
    **encoder_kwargs: Any,
) -> Path:
    """Write a folder that another library loads.

    Args:
        model: A model in memory; or a name of released weights, a checkpoint file or folder, or
            'hf-hub:REPO', whose tensors are then copied unchanged.
        folder: Where to write; must not exist, unless ``overwrite``.
        to: 'native' (all networks of the source, also a timm folder), 'timm' (``timm.create_model(
            'local-dir:FOLDER')``), 'transformers' (``IJepaModel.from_pretrained``) or 'official'
            (a .pth.tar of the official repository, without an optimizer; needs all three networks).
        network: The network that a format for one network takes, default 'target_encoder'; the
            name of a single encoder, or of the network in a file that does not record it.
        dtype: Store tensors in this dtype; None keeps theirs.
        license: License of the weights (SPDX), for the model card; default: that of the source.
        overwrite: Replace an earlier export, once the new one is complete.
        model_name: Registered model name, for a file that does not record it.
        cache_dir: Cache of fetched files.
        origin: Source of the weights of a model in memory, for the model card.
        **encoder_kwargs: For a file: timm arguments of the encoder that differ from the model's.

    Returns:
        The folder.

    Raises:
        CheckpointError: The networks that the format needs are missing, or it cannot express them.
        RunError: ``folder`` exists and ``overwrite`` is false, it is not an export, or it contains
            the source.
        FetchError: Weights cannot be fetched.
    """
    if to not in FORMATS:
        raise SettingsError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    if network not in (None, "target_encoder", "encoder"):
        raise SettingsError(f"network must be 'target_encoder' or 'encoder', got {network!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise SettingsError(f"dtype must be a floating-point type, got {dtype}")
    folder = Path(folder)
    check_destination(folder, WRITTEN, overwrite)
    if isinstance(model, str | Path):
        _refuse_source(model, folder)
        only_one = to in ("timm", "transformers")
        networks = _from_source(model, model_name, network, only_one, cache_dir, encoder_kwargs)
    elif encoder_kwargs:
        raise SettingsError(
            f"{some(encoder_kwargs)}: not for a model in memory or a run: give it to create_model, "
            "which opens the export"
        )
    else:
        networks = _from_module(model, network)
    networks = replace(
        networks, license=license or networks.license, origin=origin or networks.origin
    )
    with write_folder(folder, WRITTEN, overwrite) as part:
        write(to, networks, part, network, dtype)
    return folder


def check_destination(folder: Path, written: Collection[str], overwrite: bool) -> None:
    """Refuse a folder that exists without ``overwrite``, or that has files besides ``written``."""
    if not folder.exists():
        return
    if not overwrite:
        raise RunError(f"{folder} exists: choose another name, or replace it with --overwrite")
    names = {item.name for item in folder.iterdir()} if folder.is_dir() else {"a file"}
    if names - set(written):
        raise RunError(
            f"{folder} has {some(names - set(written))}, which no export writes: choose another "
            "name"
        )


@contextmanager
def write_folder(folder: Path, written: Collection[str], overwrite: bool) -> Iterator[Path]:
    """A temporary folder, renamed to ``folder`` when complete; see :func:`check_destination`."""
    check_destination(folder, written, overwrite)
    folder = folder.resolve()  # a link stays a link
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        part = Path(scratch) / "new"
        part.mkdir()
        yield part
        for item in part.rglob("*"):  # safetensors makes files that only their owner reads
            item.chmod(0o755 if item.is_dir() else 0o644)
        check_destination(folder, written, overwrite)  # it may exist by now
        old = Path(scratch) / "old"
        try:
            if folder.exists():
                os.replace(folder, old)
            os.replace(part, folder)
        except BaseException:  # also Ctrl-C
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise


def _refuse_source(source: str | Path, folder: Path) -> None:
    """Refuse to replace a folder that contains the source."""
    path = Path(str(source).removeprefix(FOLDER_PREFIX)).expanduser().resolve()
    if path.exists() and folder.resolve() in (path, *path.parents):
        raise RunError(f"{folder} contains the source {source}: choose another name")


def check_exportable(model: nn.Module) -> None:
    """Refuse a model that :func:`export` cannot write, before long work."""
    if not isinstance(model, VisionTransformer):
        raise SettingsError(f"{type(model).__name__} is not a VisionTransformer of timm: use one")
    _describe(model, "a model in memory")


def _from_module(module: IJepa | VisionTransformer, network: str | None) -> Networks:
    if isinstance(module, IJepa):
        described = _describe(module.encoder, "an IJepa module")
        states = {name: partial(_state, getattr(module, name)) for name in registry.NETWORKS}
        return replace(
            described, states=states, predictor=_predictor_args(_state(module.predictor))
        )
    check_exportable(module)
    label = network or str(getattr(module, "weights_network", UNLABELED))
    described = _describe(module, getattr(module, "weights_origin", "an encoder in memory"))
    return replace(described, states={label: partial(_state, module)})


def _state(module: nn.Module) -> State:
    return dict(module.state_dict())


def _from_source(
    source: str | Path,
    model_name: str | None,
    network: str | None,
    only_one: bool,
    cache_dir: str | Path | None,
    encoder_kwargs: Mapping[str, Any],
) -> Networks:
    """Networks of a checkpoint, straight from its file: tensors keep their dtype."""
    text = str(source)
    name, _, tag = text.partition(".")
    if name in registry.ARCHITECTURES and not Path(text).exists():
        networks = load.resolve(name, pretrained_cfg=tag or None, cache_dir=cache_dir)
    else:
        networks = open_checkpoint(text, cache_dir)
    model_name = model_name or networks.model
    if model_name is None:
        raise CheckpointError(
            f"{text} does not name its model: give it, for example --model vit_huge14_ijepa"
        )
    if UNLABELED in networks.states:  # the caller may name it
        states = {network or UNLABELED: networks.states[UNLABELED]()}
    else:
        chosen = networks.choose(network)
        wanted = [chosen] if network or only_one else list(networks.states)
        states = {key: networks.states[key]() for key in wanted}
    args = {"device": "meta", "weight_init": "skip", **networks.args, **encoder_kwargs}
    if networks.pretrained_cfg:
        args["pretrained_cfg"] = dict(networks.pretrained_cfg)
    heads = [len(state["head.weight"]) for state in states.values() if "head.weight" in state]
    args.setdefault("num_classes", max(heads, default=0))
    template = create_encoder(model_name, **args)
    for key, state in states.items():
        if key != "predictor":
            load.check(template, state, networks.origin)
    predictor = states.get("predictor")
    return replace(
        _describe(template, networks.origin),
        states={key: partial(dict, state) for key, state in states.items()},
        norm_eps=networks.norm_eps,
        predictor=_predictor_args(predictor) if predictor else {},
        license=networks.license,
    )


def _predictor_args(state: State) -> dict[str, int]:
    blocks = {key.split(".")[1] for key in state if key.startswith("predictor_blocks.")}
    return {"embed_dim": state["mask_token"].shape[-1], "depth": len(blocks)}


def _describe(encoder: VisionTransformer, origin: str) -> Networks:
    """Metadata of an encoder, without tensors."""
    cfg = getattr(encoder, "pretrained_cfg", None) or {}
    is_ours, args = isinstance(encoder, IJepaEncoder), vit_args(encoder)
    model = str(cfg.get("architecture"))
    if is_ours:
        model = registry.model_name(args, model)
    _check_twin(encoder, model, args)
    config = resolve_model_data_config(encoder)
    config["input_size"] = [encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size]
    preprocessing: dict[str, Any] = {
        key: list(config[key]) if isinstance(config[key], tuple) else config[key]
        for key in PREPROCESSING
    }
    names = cfg.get("label_names") or ()
    if isinstance(names, Mapping):  # timm's form for names with gaps; its keys are text in JSON
        names = [names.get(i, names.get(str(i), str(i))) for i in range(encoder.num_classes)]
    if len(names) == encoder.num_classes > 0:
        preprocessing["label_names"] = list(names)
    if getattr(encoder, "multi_label", False):
        preprocessing["multi_label"] = True
    norm_eps = encoder.norm.eps if is_ours else 1e-6  # other ViTs get theirs from the name
    return Networks(origin, {}, model, args, norm_eps, pretrained_cfg=preprocessing)


def vit_args(encoder: VisionTransformer) -> dict[str, Any]:
    """timm arguments that, with its name, build an encoder of the same shapes."""
    block = encoder.blocks[0]
    args = {
        "img_size": list(encoder.patch_embed.img_size),
        "patch_size": list(encoder.patch_embed.patch_size),
        "in_chans": encoder.patch_embed.proj.in_channels,
        "num_classes": encoder.num_classes,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": load.num_heads(encoder),
        "class_token": encoder.cls_token is not None,
        "global_pool": encoder.global_pool,
        "fc_norm": not isinstance(encoder.fc_norm, nn.Identity),
    }
    if isinstance(encoder, IJepaEncoder):
        args["qkv_bias"] = block.attn.qkv.bias is not None
    else:
        args["reg_tokens"] = encoder.num_reg_tokens
        args["no_embed_class"] = encoder.no_embed_class
    if hasattr(block, "mlp") and hasattr(block.mlp, "fc1"):
        args["mlp_ratio"] = configs.mlp_ratio(block.mlp.fc1.out_features, encoder.embed_dim)
    return args


def _check_twin(encoder: VisionTransformer, name: str, args: Mapping[str, Any]) -> None:
    """Refuse a model that its name and arguments cannot rebuild, such as one with SwiGLU."""
    meta: dict[str, Any] = {"device": "meta", "weight_init": "skip"}
    if isinstance(encoder, IJepaEncoder):
        eps = getattr(encoder.norm, "eps", 1e-6)
        twin = IJepaEncoder(**args, norm_layer=partial(LayerNorm, eps=eps), **meta)
    elif timm.is_model(name):
        twin = timm.create_model(name, **args, **meta)
    else:
        raise CheckpointError(f"timm has no model {name!r}: export one that it creates by its name")
    models = (encoder, twin)
    shapes, others = ({k: v.shape for k, v in vit.state_dict().items()} for vit in models)
    differences = dict(shapes.items() ^ others.items()).keys() | _kinds(encoder) ^ _kinds(twin)
    if differences:
        raise CheckpointError(
            f"no format can express the model: it differs from {name} of these sizes by "
            f"{some(differences)}"
        )


def _kinds(model: nn.Module) -> set[str]:
    """Names of the layers that compute something in evaluation mode."""
    inactive = (nn.Identity, nn.Dropout, DropPath)
    return {
        "LayerNorm" if isinstance(part, nn.LayerNorm) else type(part).__name__
        for part in model.modules()
        if not isinstance(part, (*inactive, VisionTransformer))
    }
