"""Checkpoint formats: tensor names of other libraries' files <-> timm's.

Pure functions on dictionaries. Unknown formats and names are refused, and each direction is the
exact inverse of the other.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, SettingsError, some
from .registry import NETWORKS

_log = logging.getLogger(__name__)

State = dict[str, Tensor]
UNLABELED = "unlabeled"  # key of a network when the file does not say which one it is

_DISTRIBUTED_PREFIX = "module."  # DistributedDataParallel's, in every official file
# Inserted into names by torch's wrappers.
_WRAPPED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Keys under which training scripts save a state dict; the first one present is taken.
_STATE_KEYS = (
    *("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "module"),
    *("teacher", "net", "network", "weights"),
)

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
_HEADS = ("head.weight", "head.bias", "classifier.weight", "classifier.bias")
_QKV = ("query", "key", "value")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
# Every network has one of these tensors; the text before it is the prefix of all its names.
_ANCHORS = (
    *("patch_embed.proj.weight", _TRANSFORMERS["patch_embed.proj.weight"]),
    "predictor_embed.weight",
)


def find_networks(content: Mapping[str, Any], origin: str) -> dict[str, tuple[State, str]]:
    """The networks in a checkpoint: tensors with timm's parameter names, and the format.

    Accepts official files, ``IJepa.state_dict()``, one network's state dict, and any of them
    under a key such as ``state_dict`` and with prefixes such as ``module.``, ``_orig_mod.`` or the
    attribute names of a LightningModule. Formats are 'official', 'timm' and 'transformers'; the
    key of a network that the file does not name is 'unlabeled'.
    """
    named = {key: content[key] for key in NETWORKS if isinstance(content.get(key), Mapping)}
    if named:
        is_official = set(named) == set(NETWORKS)
        found = {}
        for network, state in named.items():
            ((_, (tensors, known)),) = _split(state, f"{origin} ({network})").items()
            found[network] = tensors, "official" if is_official else known
        return found
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if all(_prefix(key) is None for key in tensors):
        keys = [key for key in _STATE_KEYS if isinstance(content.get(key), Mapping)]
        if not keys:
            raise CheckpointError(
                f"{origin} is not an I-JEPA checkpoint of a known format: it has "
                f"{some(map(str, content)) or 'nothing'}; known are official files (encoder, "
                "predictor, target_encoder), timm state dicts (pos_embed, blocks.0., ...), "
                "transformers folders and exports of this package"
            )
        level = logging.WARNING if len(keys) > 1 else logging.INFO
        _log.log(level, "%s has %s: %r is used", origin, " and ".join(map(repr, keys)), keys[0])
        return find_networks(content[keys[0]], f"{origin} ({keys[0]})")
    return _split(tensors, origin)


def _split(state: Mapping[str, Any], origin: str) -> dict[str, tuple[State, str]]:
    """The networks of a flat state dict, by the prefixes of their names."""
    plain: State = {}
    for full_name, value in state.items():
        name = _WRAPPED.sub("", str(full_name))
        if name in plain:
            raise CheckpointError(f"{origin} has {name} twice, also as {full_name}")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{origin}: {name} is {type(value).__name__}, not a tensor")
        plain[name] = value
    prefixes = [prefix for prefix in map(_prefix, plain) if prefix is not None]
    if not prefixes:
        raise CheckpointError(
            f"{origin} is not one of the networks of I-JEPA: it has {some(plain) or 'nothing'}"
        )
    networks = [prefix.rstrip(".").rpartition(".")[2] for prefix in prefixes]
    if len(prefixes) == 1 and networks[0] != "target_encoder":
        networks = [UNLABELED]  # any encoder may be called "encoder" in somebody's module
    elif len(set(networks)) < len(networks) or not set(networks) <= set(NETWORKS):
        raise CheckpointError(
            f"{origin} has several networks, named {some(map(repr, prefixes))}: save the one to "
            "load alone, for example torch.save(model.state_dict(), FILE)"
        )
    found: dict[str, tuple[State, str]] = {}
    used: set[str] = set()
    for prefix, network in zip(prefixes, networks):
        own = {name[len(prefix) :]: name for name in plain if name.startswith(prefix)}
        if prefix and len(prefixes) == 1:  # the classifier of transformers has no prefix
            own |= {name: name for name in plain if name in _HEADS}
        used.update(own.values())
        tensors = {name: plain[full_name] for name, full_name in own.items()}
        found[network] = _to_timm(tensors, origin)
    rest = plain.keys() - used
    twice = {name for name in rest if any(name in state for state, _ in found.values())}
    if twice:
        raise CheckpointError(
            f"{origin} has {some(twice)} beside the same names with the prefix {prefixes[0]!r}: "
            "remove those that should not be loaded"
        )
    if rest:
        _log.warning("%s: %s are not used", origin, some(rest))
    removed = {prefix for prefix in prefixes if prefix}
    removed |= {match[0] for name in state for match in _WRAPPED.finditer(str(name))}
    if removed:
        _log.info("%s: prefixes %s are removed", origin, some(map(repr, removed)))
    return found


def _prefix(name: str) -> str | None:
    """Prefix of an anchor; None for other tensors."""
    for anchor in _ANCHORS:
        if name == anchor or name.endswith(f".{anchor}"):
            return name.removesuffix(anchor)
    return None


def _to_timm(state: State, origin: str) -> tuple[State, str]:
    if _TRANSFORMERS["pos_embed"] in state:
        return from_transformers(state, origin), "transformers"
    if "pos_embed" in state or "predictor_embed.weight" in state:
        return state, "timm"
    raise CheckpointError(f"{origin} has no pos_embed: it is not an encoder of I-JEPA")


def to_official(state: Mapping[str, Tensor]) -> State:
    """Prefix every name with ``module.``, as in the official repository's files."""
    return {_DISTRIBUTED_PREFIX + name: tensor for name, tensor in state.items()}


def from_transformers(state: Mapping[str, Tensor], origin: str) -> State:
    """Names of transformers' ``IJepaModel`` or ``IJepaForImageClassification`` to timm's.

    Query, key and value are stacked into timm's ``attn.qkv``.
    """
    inverse = {theirs: ours for ours, theirs in _TRANSFORMERS.items()}
    inverse_block = {theirs: ours for ours, theirs in _TRANSFORMERS_BLOCK.items()}
    out: State = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        layer = _LAYER.fullmatch(name)
        if name in inverse:
            out[inverse[name]] = tensor
        elif layer and layer[2] in inverse_block:
            out[f"blocks.{layer[1]}.{inverse_block[layer[2]]}.{layer[3]}"] = tensor
        elif layer and layer[2].removeprefix("attention.attention.") in _QKV:
            target = f"blocks.{layer[1]}.attn.qkv.{layer[3]}"
            qkv.setdefault(target, {})[layer[2].rpartition(".")[2]] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{origin}: IJepaModel of transformers has no {some(unknown)}")
    for name, parts in qkv.items():
        if set(parts) != set(_QKV):
            raise CheckpointError(f"{origin} lacks a query, key or value of {name}")
        out[name] = torch.cat([parts[part] for part in _QKV])
    return out


def to_transformers(state: Mapping[str, Tensor], origin: str) -> State:
    """timm's names to those of transformers' ``IJepaModel``.

    With a classifier, to those of ``IJepaForImageClassification``: body prefixed with ``ijepa.``.
    """
    out: State = {}
    prefix = "ijepa." if "head.weight" in state else ""
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
        raise CheckpointError(f"{origin}: IJepaModel of transformers has no {some(unknown)}")
    return out


# In the order of the safetensors package, so that every tensor is aligned.
_SAFETENSORS_NAMES: dict[torch.dtype, str] = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> tuple[bytes, dict[str, int]]:
    """Header of a safetensors file, and the byte at which each tensor starts.

    The safetensors package writes only tensors that are all in memory, with its metadata in random
    order. This gives the same bytes every time; tensors are stored by dtype, then by name, as the
    package does. Format: https://github.com/huggingface/safetensors#format
    """
    ranks = {dtype: rank for rank, dtype in enumerate(_SAFETENSORS_NAMES)}
    for name, (dtype, _) in tensors.items():
        if dtype not in ranks:
            raise SettingsError(f"{name} has dtype {dtype}, which safetensors files cannot hold")
    described: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda t: (ranks[t[1][0]], t[0])):
        starts[name] = end
        end += math.prod(shape) * dtype.itemsize
        described[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}
