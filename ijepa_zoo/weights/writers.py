"""The files of an exported folder, for each library that loads it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import CheckpointError, RunError
from . import configs, formats, registry
from .formats import UNLABELED, State
from .read import LABEL_KEY, OFFICIAL_FILE, Networks

FORMATS = ("native", "timm", "transformers", "official")
_OTHERS = "networks"  # folder of a native export's further networks
WRITTEN = frozenset(
    {"config.json", "preprocessor_config.json", "README.md", "model.safetensors"}
    | {OFFICIAL_FILE, _OTHERS}
)


def save_tensors(state: State, path: Path, dtype: torch.dtype | None) -> None:
    """Write tensors as a safetensors file, floating-point ones in `dtype`, or in their own."""

    def ready(tensor: torch.Tensor) -> torch.Tensor:
        cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to("cpu", cast).contiguous()

    tensors = {name: ready(tensor) for name, tensor in state.items()}
    # One metadata key only: the safetensors package writes several in random order.
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # not an OSError, if the disk is full
        raise RunError(f"{path.name} cannot be written: {error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write(
    to: str, networks: Networks, folder: Path, network: str | None, dtype: torch.dtype | None
) -> None:
    """Write the files of a format into a folder."""
    if networks.is_other_vit and to not in ("native", "timm"):
        raise CheckpointError(
            f"the encoders are timm's {networks.model}, which only the formats native and timm "
            "express: use one of them"
        )
    if to == "official":
        _write_official(networks, folder, network, dtype)
        return
    chosen = networks.choose(network)
    if to == "transformers":
        _write_transformers(networks, folder, chosen, dtype)
    else:
        has_all = to == "native" and network is None
        written = list(networks.states) if has_all else [chosen]
        _write_timm(networks, folder, to, chosen, written, dtype)
    _write_card(networks, folder, to, chosen)


def _timm_config(networks: Networks) -> dict[str, Any]:
    """config.json of a timm folder."""
    cfg = dict(networks.pretrained_cfg)
    labels: dict[str, Any] = {k: cfg.pop(k) for k in ("label_names", "multi_label") if k in cfg}
    if networks.license:
        cfg["license"] = networks.license.lower()
    other = networks.model if networks.is_other_vit else None
    return {
        "architecture": other or registry.timm_name(networks.model),
        "num_classes": networks.args["num_classes"],
        **labels,
        "num_features": networks.args["embed_dim"],
        "global_pool": networks.args["global_pool"],
        "model_args": dict(networks.args),
        "pretrained_cfg": {
            "tag": "ijepa",
            "fixed_input_size": True,
            "num_classes": networks.args["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **cfg,
        },
    }


def _write_timm(
    networks: Networks,
    folder: Path,
    to: str,
    chosen: str,
    written: list[str],
    dtype: torch.dtype | None,
) -> None:
    """Write a timm folder of one network; a native one may have further networks."""
    if to == "timm" and networks.norm_eps != 1e-6:
        raise CheckpointError(
            f"{networks.origin} has LayerNorm epsilon {networks.norm_eps}, timm builds 1e-6: "
            "export to transformers instead"
        )
    # Below the top level: timm up to 1.0.27 fails on a second .safetensors file beside the model.
    files = {name: f"{_OTHERS}/{name}.safetensors" for name in written}
    files[chosen] = "model.safetensors"
    for name, file in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        save_tensors(networks.states[name](), folder / file, dtype)
    config = _timm_config(networks)
    if to == "timm" and chosen != UNLABELED:
        config[LABEL_KEY] = chosen
    elif to == "native":
        if networks.norm_eps != 1e-6:  # timm would build it with 1e-6 silently
            config = {key: config[key] for key in ("model_args", "pretrained_cfg")}
        config["ijepa_zoo"] = {
            "format": 1,
            "model": networks.model,
            "networks": files,
            "predictor": dict(networks.predictor) if "predictor" in files else {},
            "norm_eps": networks.norm_eps,
            "license": networks.license,
            "origin": networks.origin.rsplit("/", 1)[-1],
        }
    write_json(folder / "config.json", config)


def _write_transformers(
    networks: Networks, folder: Path, network: str, dtype: torch.dtype | None
) -> None:
    """Write one encoder for transformers' ``IJepaModel``, with its preprocessing."""
    state = formats.to_transformers(networks.states[network](), networks.origin)
    args, classes = networks.args, networks.args["num_classes"]
    if classes and args["global_pool"] != "avg":
        raise CheckpointError(
            f"transformers classifies by the mean of the patches, {networks.origin} by "
            f"global_pool={args['global_pool']!r}: export to timm instead"
        )
    config = {
        "architectures": ["IJepaForImageClassification" if classes else "IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": args["embed_dim"],
        "num_hidden_layers": args["depth"],
        "num_attention_heads": args["num_heads"],
        "intermediate_size": int(args["embed_dim"] * args["mlp_ratio"]),
        "hidden_act": "gelu",
        "layer_norm_eps": networks.norm_eps,
        "image_size": _square(args["img_size"]),
        "patch_size": _square(args["patch_size"]),
        "num_channels": args["in_chans"],
        "qkv_bias": args["qkv_bias"],
        "dtype": "float32",  # in memory, whatever the file's
        LABEL_KEY: network,
    }
    if networks.license:
        config["license"] = networks.license
    if classes:
        names = networks.pretrained_cfg.get("label_names") or [f"LABEL_{i}" for i in range(classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    save_tensors(state, folder / "model.safetensors", dtype)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", _image_processor(networks.pretrained_cfg))


def _square(size: list[int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else size


def _image_processor(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Our evaluation transform as transformers' preprocessor_config.json."""
    height, width = preprocessing["input_size"][-2:]
    scaled = [math.floor(side / preprocessing["crop_pct"]) for side in (height, width)]
    mode = preprocessing["crop_mode"]
    if mode == "center" and height == width:
        size = {"shortest_edge": scaled[0]}
    elif mode == "squash":
        size = {"height": scaled[0], "width": scaled[1]}
    else:
        raise CheckpointError(
            f"transformers cannot resize images to {height}x{width} with crop mode {mode!r}: "
            "export to timm instead"
        )
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": configs.FILTERS.index(preprocessing["interpolation"]),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
    }


def _write_official(
    networks: Networks, folder: Path, network: str | None, dtype: torch.dtype | None
) -> None:
    """Write all three networks as a checkpoint of the official repository, at epoch 0.

    It has no state of the optimizer: the official script logs that, and starts a fresh one.
    """
    if network is not None or set(networks.states) != set(registry.NETWORKS):
        raise CheckpointError(
            f"an official file has all three networks: {networks.origin} has "
            f"{', '.join(networks.states)}" + (f", and network={network}" if network else "")
        )
    content: dict[str, Any] = {"epoch": 0}
    for name, read in networks.states.items():
        content[name] = {  # trained with DistributedDataParallel
            f"module.{key}": tensor.detach().to("cpu", dtype or tensor.dtype)
            for key, tensor in read().items()
        }
    with (folder / OFFICIAL_FILE).open("wb") as file:  # whose errors are OSErrors
        torch.save(content, file)


_NETWORK = {
    "target_encoder": "The **target encoder** of I-JEPA, which the paper evaluates",
    "encoder": "The **context encoder** of I-JEPA (the paper evaluates the target encoder)",
    UNLABELED: "An encoder of I-JEPA; its source did not say which network it is",
}
_USAGE = {
    "timm": """\
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)""",
    "native": """\
import ijepa_zoo  # for all networks; timm alone loads model.safetensors

model = ijepa_zoo.create_model("local-dir:FOLDER")""",
    "transformers": """\
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = AutoModel.from_pretrained("FOLDER")
outputs = model(**processor(image, return_tensors="pt"))
features = outputs.last_hidden_state.mean(1)""",
    "transformers classifier": """\
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = AutoModelForImageClassification.from_pretrained("FOLDER")
logits = model(**processor(image, return_tensors="pt")).logits""",
}


def _write_card(networks: Networks, folder: Path, to: str, network: str) -> None:
    """README.md with the Hub's metadata."""
    classes, license = networks.args["num_classes"], networks.license
    what = _NETWORK[network] + (f", with {classes} classes" if classes else "")
    usage = _USAGE["transformers classifier" if classes and to == "transformers" else to]
    card = f"""\
---
{f"license: {license.lower()}" if license else "# license: unknown"}
library_name: {"transformers" if to == "transformers" else "timm"}
pipeline_tag: {"image-classification" if classes else "image-feature-extraction"}
tags:
- i-jepa
- self-supervised-learning
---
# {networks.model}

{what} ([paper](https://arxiv.org/abs/2301.08243)). Source: {networks.origin.rsplit("/", 1)[-1]}.
License: {license or "unknown; that of the source, if any"}.

```python
{usage}
```

Features: tokens after the final LayerNorm, averaged over the patches.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
