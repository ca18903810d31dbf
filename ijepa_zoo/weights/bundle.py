"""What an export writes: networks with their description, from modules or straight from files."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import resolve_model_data_config
from timm.layers import DropPath, LayerNorm
from timm.models import is_model
from torch import nn

from ..errors import CheckpointError, SettingsError
from ..models.encoder import IJepaEncoder
from ..models.factory import create_model
from ..models.jepa import IJepa
from ..models.predictor import Predictor
from . import catalog, load, read
from .config import mlp_ratio
from .layouts import State, some
from .networks import UNLABELLED, Networks, Training


@dataclass(frozen=True)
class Bundle:
    """Networks of one model, ready to be written in any layout.

    Attributes:
        model: Registered model name.
        origin: Where the weights come from, in words.
        states: Tensors per network, in our names.
        args: timm arguments that build the encoder.
        norm_eps: Epsilon of its LayerNorms.
        preprocessing: timm's input_size, mean, std, crop_pct, interpolation.
        predictor: ``embed_dim`` and ``depth`` of the predictor, if there is one, and its
            ``context`` if that is not the published one.
        license: Licence of the weights, if known.
        training: Optimizer state and counters, if there are any.
    """

    model: str
    origin: str
    states: Mapping[str, State]
    args: Mapping[str, Any]
    norm_eps: float
    preprocessing: Mapping[str, Any]
    predictor: Mapping[str, Any]
    license: str | None = None
    training: Training | None = None

    def choose(self, network: str | None) -> str:
        """The network that a single-network layout gets.

        Raises:
            CheckpointError: If it is not there.
        """
        if network is None:
            return "target_encoder" if "target_encoder" in self.states else next(iter(self.states))
        if network not in self.states:
            raise CheckpointError(f"{self.origin} holds {', '.join(self.states)}, but no {network}")
        return network


def encoder_args(encoder: IJepaEncoder) -> dict[str, Any]:
    """timm arguments that build an encoder of the same shapes."""
    block = encoder.blocks[0]
    return {
        "img_size": list(encoder.patch_embed.img_size),
        "patch_size": list(encoder.patch_embed.patch_size),
        "in_chans": encoder.patch_embed.proj.in_channels,
        "num_classes": encoder.num_classes,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": mlp_ratio(block.mlp.fc1.out_features, encoder.embed_dim),
        "qkv_bias": block.attn.qkv.bias is not None,
        "class_token": False,
        "global_pool": encoder.global_pool,
        "fc_norm": False,
    }


def predictor_args(predictor: Predictor) -> dict[str, Any]:
    """Width and depth of a predictor, and its `context` if that is not the published one."""
    other = {} if predictor.context == "repeated" else {"context": predictor.context}
    return {
        "embed_dim": predictor.mask_token.shape[-1],
        "depth": len(predictor.predictor_blocks),
        **other,
    }


def _check_plain(encoder: IJepaEncoder) -> None:
    """Refuse an encoder that :func:`encoder_args` does not build again."""
    eps = getattr(encoder.norm, "eps", 1e-6)
    twin = IJepaEncoder(
        **{**encoder_args(encoder), "norm_layer": partial(LayerNorm, eps=eps)},
        device="meta",
        weight_init="skip",
    )
    inert = (nn.Identity, nn.Dropout, DropPath)  # no part in what an evaluated model computes
    kinds = [
        {
            nn.LayerNorm if isinstance(part, nn.LayerNorm) else type(part)
            for part in model.modules()
            if not isinstance(part, inert)
        }
        for model in (encoder, twin)
    ]
    differs = encoder.state_dict().keys() ^ twin.state_dict().keys()
    differs |= {kind.__name__ for kind in kinds[0] ^ kinds[1]}
    if differs:
        raise CheckpointError(
            "the model to export is no plain I-JEPA encoder, and no layout can say how it differs: "
            f"by {some(differs)}"
        )


def _describe(encoder: IJepaEncoder) -> dict[str, Any]:
    _check_plain(encoder)
    config = resolve_model_data_config(encoder)
    config["input_size"] = [encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size]
    wanted = ("input_size", "mean", "std", "crop_pct", "interpolation")
    return {
        "model": encoder.pretrained_cfg["architecture"],
        "args": encoder_args(encoder),
        "norm_eps": encoder.norm.eps,
        "preprocessing": {
            key: list(config[key]) if isinstance(config[key], tuple) else config[key]
            for key in wanted
        },
    }


def from_module(module: IJepa | IJepaEncoder, network: str | None = None) -> Bundle:
    """Bundle of a model in memory.

    Args:
        module: All three networks, or one encoder.
        network: Which network a single encoder is: 'target_encoder' (default) or 'encoder'.
    """
    if isinstance(module, IJepa):
        states = {name: dict(getattr(module, name).state_dict()) for name in catalog.NETWORKS}
        return Bundle(
            origin=f"an IJepa module ({module.encoder.pretrained_cfg['architecture']})",
            states=states,
            predictor=predictor_args(module.predictor),
            **_describe(module.encoder),
        )
    if not isinstance(module, IJepaEncoder):
        raise SettingsError(f"export takes an IJepa or IJepaEncoder, got {type(module).__name__}")
    return Bundle(
        origin=f"an encoder ({module.pretrained_cfg['architecture']})",
        states={network or "target_encoder": dict(module.state_dict())},
        predictor={},
        **_describe(module),
    )


def from_source(
    source: str | Path,
    model: str | None = None,
    network: str | None = None,
    single: bool = False,
    cache_dir: str | Path | None = None,
    **encoder_kwargs: Any,
) -> Bundle:
    """Bundle of a checkpoint, straight from its file: tensors keep their data type.

    Args:
        source: Name of released weights ('vit_huge14_ijepa.in1k'), a file, a folder, or
            'hf-hub:REPO'.
        model: Registered model that a file or transformers folder belongs to.
        network: Read this network only; and what an unlabelled file is said to hold.
        single: Read one network only, by default the target encoder.
        cache_dir: Cache of fetched files.
        **encoder_kwargs: timm arguments of the encoder where they differ from the model's.

    Raises:
        CheckpointError: If the architecture is unknown or the tensors do not fit it.
    """
    text, record = str(source), _record(source)
    name, _, tag = text.partition(".")
    if record is None and is_model(name) and not Path(text).exists():
        load.resolve(name, pretrained_cfg=tag or None)  # says that there are no such weights
    networks = (
        read.open_record(record, cache_dir) if record else read.open_checkpoint(text, cache_dir)
    )
    model = model or networks.model
    if model is None and not networks.args:
        raise CheckpointError(
            f"{text} does not say which network it is: give the model, for example "
            "--model vit_huge14_ijepa"
        )
    known = {key: value for key, value in networks.args.items() if key != "norm_eps"}
    known = {**known, **encoder_kwargs}
    if networks.pretrained_cfg:
        known.setdefault("pretrained_cfg", dict(networks.pretrained_cfg))
    if network is None and single:
        network = networks.choose(None, record.network if record else "target_encoder")
    states = _read_states(networks, network)
    for state in states.values():
        if "head.weight" in state:
            known.setdefault("num_classes", len(state["head.weight"]))
    template = create_model(
        record.name if record else model or "vit_base16_ijepa",
        pretrained=False,
        device="meta",
        weight_init="skip",
        **known,
    )
    for key, state in states.items():
        if key != "predictor":
            load.check(template, state, networks.origin)
    described = _describe(template)
    described["norm_eps"] = networks.args.get("norm_eps", 1e-6)
    training = networks.training() if networks.training and network is None else None
    return Bundle(
        origin=networks.origin,
        states=states,
        predictor=_predictor_size(states.get("predictor"), networks.predictor),
        license=networks.license,
        training=training,
        **described,
    )


def _record(source: str | Path) -> catalog.Checkpoint | None:
    name, _, tag = str(source).partition(".")
    return catalog.find(name, tag)


def local_source(source: str | Path) -> Path | None:
    """The file or folder that a source names; None for released weights and the Hub."""
    text = str(source)
    if _record(source) is not None or text.startswith(read.HUB_PREFIX):
        return None
    return Path(text.removeprefix(read.FOLDER_PREFIX)).expanduser()


def _read_states(networks: Networks, network: str | None) -> dict[str, State]:
    if UNLABELLED in networks.states:  # the caller's word for what the file does not say
        return {network or UNLABELLED: networks.states[UNLABELLED]()}
    wanted = list(networks.states) if network is None else [networks.choose(network)]
    return {key: networks.states[key]() for key in wanted}


def _predictor_size(state: State | None, said: Mapping[str, Any]) -> dict[str, Any]:
    if state is None:
        return {}
    blocks = {key.split(".")[1] for key in state if key.startswith("predictor_blocks.")}
    return {**said, "embed_dim": state["mask_token"].shape[-1], "depth": len(blocks)}
