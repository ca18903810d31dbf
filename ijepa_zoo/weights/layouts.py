"""Tensor names of other people's files <-> ours (timm's), as pure functions on dictionaries.

Nothing is guessed: a set of names is one of the known layouts as a whole or refused, every name is
accounted for, and the inverse of each direction gives back the same tensors.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

State = dict[str, Tensor]

STOCK_TIMM = {  # stock timm's name of the same network -> ours
    "vit_huge_patch14_gap_224": "vit_huge14_ijepa",
    "vit_huge_patch16_gap_448": "vit_huge16_448_ijepa",
    "vit_giant_patch16_gap_224": "vit_giant16_ijepa",
}
OFFICIAL_NETWORKS = ("encoder", "predictor", "target_encoder")
OFFICIAL_PREFIX = "module."
TRANSFORMERS_PREFIX = "ijepa."


_TRANSFORMERS = {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
}
_TRANSFORMERS_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")
_STAGES = (
    *("mask_token", "pos_embed", "predictor_pos_embed", "patch_embed.", "predictor_embed."),
    *("blocks.", "predictor_blocks.", "norm.", "predictor_norm.", "predictor_proj."),
)
_LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few names, for an error message."""
    listed = sorted(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def recognise(content: Mapping[str, Any], origin: str) -> str:
    """Name the layout of a checkpoint's top level.

    Args:
        content: The loaded dictionary, or one with the same keys.
        origin: The file, for the error message.

    Returns:
        'official' (three networks), 'official_network' (one of them), 'transformers' or 'timm'.

    Raises:
        CheckpointError: If it is none of them.
    """
    names = set(content)
    if set(OFFICIAL_NETWORKS) <= names:
        return "official"
    if names and all(name.startswith(OFFICIAL_PREFIX) for name in names):
        return "official_network"
    if {name.removeprefix(TRANSFORMERS_PREFIX) for name in names} >= {
        _TRANSFORMERS["pos_embed"],
        _TRANSFORMERS["patch_embed.proj.weight"],
    }:
        return "transformers"
    if {"pos_embed", "patch_embed.proj.weight"} <= names:
        return "timm"
    raise CheckpointError(
        f"{origin} is no I-JEPA checkpoint of a known layout: it holds {some(names) or 'nothing'}. "
        "Known are official files (encoder, predictor, target_encoder), transformers folders "
        "(embeddings.position_embeddings, ...), timm state dicts (pos_embed, blocks.0. ...) and "
        "exports of this package"
    )


def to_timm(state: Mapping[str, Tensor], layout: str, origin: str) -> State:
    """Rename one network's tensors from a recognised layout to ours.

    Args:
        state: Tensors under the layout's names.
        layout: What :func:`recognise` said; 'official' means one network of such a file.
        origin: The file, for error messages.

    Raises:
        CheckpointError: If a name has no counterpart, or something is no tensor.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{origin} holds a {type(state).__name__} where tensors should be")
    strange = [
        str(name)
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise CheckpointError(f"{origin} holds values that are no tensors: {some(strange)}")
    if layout in ("official", "official_network"):
        return from_official(state)
    if layout == "transformers":
        return from_transformers(state, origin)
    return dict(state)


def from_official(state: Mapping[str, Tensor]) -> State:
    """Strip the ``module.`` that DistributedDataParallel puts before every name."""
    return {name.removeprefix(OFFICIAL_PREFIX): tensor for name, tensor in state.items()}


def to_official(state: Mapping[str, Tensor]) -> State:
    """Put ``module.`` before every name, in the order of the published code's modules."""
    return {OFFICIAL_PREFIX + name: state[name] for name in sorted(state, key=published_order)}


def published_order(name: str) -> tuple[int, int, int, bool]:
    """Sort key that gives one network's names in the order of the published code's modules.

    The published optimizer numbers parameters in that order; safetensors files do not keep it.
    """
    stage = next((i for i, prefix in enumerate(_STAGES) if name.startswith(prefix)), len(_STAGES))
    block = re.match(r"(?:predictor_)?blocks\.(\d+)\.(.+)\.", name)
    layer = _LAYERS.index(block[2]) if block and block[2] in _LAYERS else 0
    return stage, int(block[1]) if block else 0, layer, name.endswith("bias")


def from_transformers(state: Mapping[str, Tensor], origin: str) -> State:
    """transformers' file layout (``IJepaModel``, ``IJepaForImageClassification``) to ours.

    Query, key and value are stacked into timm's ``attn.qkv``.

    Raises:
        CheckpointError: If a tensor has no counterpart, or a query, key or value is missing.
    """
    inverse = {theirs: ours for ours, theirs in _TRANSFORMERS.items()}
    inverse_block = {theirs: ours for ours, theirs in _TRANSFORMERS_BLOCK.items()}
    out: State = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for full_name, tensor in state.items():
        name = full_name.removeprefix(TRANSFORMERS_PREFIX)
        layer = _LAYER.fullmatch(name)
        if name in inverse:
            out[inverse[name]] = tensor
        elif layer and layer[2] in inverse_block:
            out[f"blocks.{layer[1]}.{inverse_block[layer[2]]}.{layer[3]}"] = tensor
        elif layer and layer[2].removeprefix("attention.attention.") in _QKV:
            target = f"blocks.{layer[1]}.attn.qkv.{layer[3]}"
            qkv.setdefault(target, {})[layer[2].rpartition(".")[2]] = tensor
        else:
            unknown.append(full_name)
    broken = [name for name, parts in qkv.items() if set(parts) != set(_QKV)]
    if unknown or broken:
        raise CheckpointError(
            f"{origin} is almost in transformers' I-JEPA layout, but "
            + (f"has tensors without counterpart: {some(unknown)}" if unknown else "")
            + (f"lacks a query, key or value of {some(broken)}" if broken else "")
        )
    for name, parts in qkv.items():
        out[name] = torch.cat([parts[part] for part in _QKV])
    return out


def to_transformers(state: Mapping[str, Tensor], origin: str) -> State:
    """Our names to transformers' file layout, which ``IJepaModel.from_pretrained`` reads.

    A classifier becomes that of ``IJepaForImageClassification``, whose body has the prefix
    ``ijepa.``.

    Raises:
        CheckpointError: If a tensor has no counterpart in ``IJepaModel``.
    """
    out: State = {}
    prefix = TRANSFORMERS_PREFIX if "head.weight" in state else ""
    unknown: list[str] = []
    for name, tensor in state.items():
        block = _BLOCK.fullmatch(name)
        if name in _TRANSFORMERS:
            body = "" if name.startswith("head.") else prefix
            out[body + _TRANSFORMERS[name]] = tensor
        elif block and block[2] == "attn.qkv":
            for part, chunk in zip(_QKV, tensor.chunk(3), strict=True):
                key = f"{prefix}encoder.layer.{block[1]}.attention.attention.{part}.{block[3]}"
                out[key] = chunk.contiguous()
        elif block and block[2] in _TRANSFORMERS_BLOCK:
            key = f"{prefix}encoder.layer.{block[1]}.{_TRANSFORMERS_BLOCK[block[2]]}.{block[3]}"
            out[key] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{origin}: transformers' IJepaModel has no place for {some(unknown)}"
        )
    return out


def official_parameter_groups(
    encoder: Mapping[str, Tensor], predictor: Mapping[str, Tensor]
) -> list[list[str]]:
    """Parameter names in the order of the published optimizer's four groups.

    Weights of encoder and predictor, then their biases and one-dimensional parameters. Fixed
    positions count: they are parameters without gradient in the published code.

    Args:
        encoder: Tensors of the encoder, in our names.
        predictor: Tensors of the predictor.

    Returns:
        Four lists of names, each 'encoder.' or 'predictor.' + parameter name.
    """
    groups = []
    for exempt in (False, True):
        for network, state in (("encoder", encoder), ("predictor", predictor)):
            names = sorted(state, key=published_order)
            chosen = [n for n in names if ("bias" in n or state[n].ndim == 1) is exempt]
            groups.append([f"{network}.{name}" for name in chosen])
    return groups


def optimizer_from_official(
    opt: Mapping[str, Any], groups: list[list[str]], origin: str
) -> tuple[State, dict[str, Any]]:
    """The published optimizer's state by parameter name instead of by position.

    Args:
        opt: ``state_dict()`` of the AdamW of the published code.
        groups: :func:`official_parameter_groups` of its networks.
        origin: The file, for the error message.

    Returns:
        Tensors named 'encoder.<parameter>.exp_avg' and so on; and plain values: 'param_groups'
        without their parameters, 'scalars' for states that are no tensors.

    Raises:
        CheckpointError: If the groups hold other parameters than the networks.
    """
    names = [name for group in groups for name in group]
    saved = [list(group["params"]) for group in opt["param_groups"]]
    if [len(group) for group in saved] != [len(group) for group in groups] or [
        index for group in saved for index in group
    ] != list(range(len(names))):
        raise CheckpointError(
            f"{origin}: the optimizer has groups of {[len(group) for group in saved]} parameters, "
            f"the networks make groups of {[len(group) for group in groups]}"
        )
    tensors: State = {}
    scalars: dict[str, Any] = {}
    for index, state in opt["state"].items():
        for key, value in state.items():
            place = tensors if isinstance(value, Tensor) else scalars
            place[f"{names[index]}.{key}"] = value
    plain = [
        {key: value for key, value in group.items() if key != "params"}
        for group in opt["param_groups"]
    ]
    return tensors, {"param_groups": plain, "scalars": scalars}


def optimizer_to_official(
    tensors: Mapping[str, Tensor], plain: Mapping[str, Any], groups: list[list[str]]
) -> dict[str, Any]:
    """Inverse of :func:`optimizer_from_official`; ``plain`` may have been through JSON."""
    index = {name: i for i, name in enumerate(name for group in groups for name in group)}
    state: dict[int, dict[str, Any]] = {}
    for full_name, value in {**tensors, **plain["scalars"]}.items():
        name, _, key = full_name.rpartition(".")
        state.setdefault(index[name], {})[key] = value
    param_groups = []
    for group, names in zip(plain["param_groups"], groups, strict=True):
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in group.items()}
        param_groups.append({**values, "params": [index[name] for name in names]})
    return {"state": dict(sorted(state.items())), "param_groups": param_groups}
