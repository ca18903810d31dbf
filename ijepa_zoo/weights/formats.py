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

# Inserted into names by torch's wrappers.
_WRAPPED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Keys under which training scripts save a state dict; the first one present is taken.
_STATE_KEYS = (
    "state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "module",
    "teacher", "net", "network", "weights",
)  # fmt: skip

# Layers of timm and of transformers, where one may be several; # is the number of a block.
_LAYERS: dict[str, tuple[str, ...]] = {
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "blocks.#.norm1": ("encoder.layer.#.layernorm_before",),
    "blocks.#.attn.qkv": tuple(
        f"encoder.layer.#.attention.attention.{part}" for part in ("query", "key", "value")
    ),
    "blocks.#.attn.proj": ("encoder.layer.#.attention.output.dense",),
    "blocks.#.norm2": ("encoder.layer.#.layernorm_after",),
    "blocks.#.mlp.fc1": ("encoder.layer.#.intermediate.dense",),
    "blocks.#.mlp.fc2": ("encoder.layer.#.output.dense",),
    "norm": ("layernorm",),
    "head": ("classifier",),
}
_TRANSFORMERS = {"pos_embed": ("embeddings.position_embeddings",)} | {
    f"{ours}.{kind}": tuple(f"{theirs}.{kind}" for theirs in layers)
    for ours, layers in _LAYERS.items()
    for kind in ("weight", "bias")
}
_TIMM = {theirs: ours for ours, parts in _TRANSFORMERS.items() for theirs in parts}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_HEADS = ("head.weight", "head.bias", "classifier.weight", "classifier.bias")
# Every network has one of these tensors; the text before it is the prefix of all its names.
_ANCHORS = (
    "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight",
    "predictor_embed.weight",
)  # fmt: skip


def find_networks(content: Mapping[str, Any], origin: str) -> dict[str, State]:
    """The networks in a checkpoint: tensors with timm's parameter names.

    Accepts official files, ``IJepa.state_dict()``, one network's state dict, and any of them
    under a key such as ``state_dict`` and with prefixes such as ``module.``, ``_orig_mod.`` or the
    attribute names of a LightningModule. The key of a network that the file does not name is
    'unlabeled'.
    """
    named = {key: content[key] for key in NETWORKS if isinstance(content.get(key), Mapping)}
    if named:
        found = {}
        for network, state in named.items():
            (found[network],) = _split(state, f"{origin} ({network})").values()
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


def _split(state: Mapping[str, Any], origin: str) -> dict[str, State]:
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
    found: dict[str, State] = {}
    rest = dict(plain)
    for prefix, network in zip(prefixes, networks):
        own = {name: rest.pop(name) for name in [*rest] if name.startswith(prefix)}
        if prefix and len(prefixes) == 1:  # the classifier of transformers has no prefix
            own |= {name: rest.pop(name) for name in _HEADS if name in rest}
        tensors = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
        found[network] = _to_timm(tensors, origin)
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


def _to_timm(state: State, origin: str) -> State:
    if "embeddings.position_embeddings" in state:
        return from_transformers(state, origin)
    if "pos_embed" in state or "predictor_embed.weight" in state:
        return state
    raise CheckpointError(f"{origin} has no pos_embed: it is not an encoder of I-JEPA")


def from_transformers(state: Mapping[str, Tensor], origin: str) -> State:
    """Names of transformers' ``IJepaModel`` or ``IJepaForImageClassification`` to timm's.

    Query, key and value are stacked into timm's ``attn.qkv``.
    """
    out: State = {}
    for name in state:
        pattern, number = _parse(name, _TIMM, origin)
        ours = _TIMM[pattern].replace("#", number)
        if ours in out:  # with another of its parts
            continue
        parts = [part.replace("#", number) for part in _TRANSFORMERS[_TIMM[pattern]]]
        if absent := set(parts) - state.keys():
            raise CheckpointError(f"{origin} lacks {some(absent)} beside {name}")
        tensors = [state[part] for part in parts]
        out[ours] = torch.cat(tensors) if len(parts) > 1 else tensors[0]
    return out


def to_transformers(state: Mapping[str, Tensor], origin: str) -> State:
    """timm's names to those of transformers' ``IJepaModel``.

    With a classifier, to those of ``IJepaForImageClassification``: body prefixed with ``ijepa.``.
    """
    out: State = {}
    body = "ijepa." if "head.weight" in state else ""
    for name, tensor in state.items():
        pattern, number = _parse(name, _TRANSFORMERS, origin)
        prefix = "" if pattern.startswith("head.") else body
        parts = _TRANSFORMERS[pattern]
        for part, chunk in zip(parts, tensor.chunk(len(parts)), strict=True):
            out[prefix + part.replace("#", number)] = chunk.contiguous()
    return out


def _parse(name: str, known: Mapping[str, Any], origin: str) -> tuple[str, str]:
    """A name with # for the number of its block, and that number."""
    number = _NUMBER.search(name)
    pattern = _NUMBER.sub("#", name)
    if pattern not in known:
        raise CheckpointError(f"{origin}: IJepaModel of transformers has no {name}")
    return pattern, number[0] if number else ""


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
