"""The files of an exported folder, for each library that loads it."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import CheckpointError, RunError
from . import configs, formats, registry
from .formats import UNLABELED, State
from .read import LABEL_KEY, OFFICIAL_FILE, Networks

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
    except SafetensorError as error:
        raise RunError(f"{path.name} cannot be written: {error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _timm_config(networks: Networks) -> dict[str, Any]:
    """config.json of a timm folder."""
    classes = networks.args["num_classes"]
    license = {"license": networks.license.lower()} if networks.license else {}
    cfg = dict(networks.pretrained_cfg)
    labels: dict[str, Any] = {k: cfg.pop(k) for k in ("label_names", "multi_label") if k in cfg}
    return {
        "architecture": networks.model
        if networks.is_other_vit
        else registry.timm_name(networks.model),
        "num_classes": classes,
        **labels,
        "num_features": networks.args["embed_dim"],
        "global_pool": networks.args["global_pool"],
        "model_args": dict(networks.args),
        "pretrained_cfg": {
            "tag": "ijepa",
            "custom_load": False,
            "fixed_input_size": True,
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "pool_size": None,
            **cfg,
            **license,
        },
    }


def _write_timm(
    networks: Networks, folder: Path, network: str | None, dtype: torch.dtype | None
) -> None:
    """Write one encoder that timm loads without this package."""
    if networks.norm_eps != 1e-6:
        raise CheckpointError(
            f"{networks.origin} has LayerNorm epsilon {networks.norm_eps}, timm builds 1e-6: "
            "export to transformers instead"
        )
    chosen = networks.choose(network)
    config = _timm_config(networks)
    if chosen != UNLABELED:
        config[LABEL_KEY] = chosen
    save_tensors(networks.states[chosen](), folder / "model.safetensors", dtype)
    write_json(folder / "config.json", config)
    _write_card(networks, folder, "timm", chosen)


def _write_native(
    networks: Networks, folder: Path, network: str | None, dtype: torch.dtype | None
) -> None:
    """Write all networks; model.safetensors and config.json are also a timm folder."""
    chosen = networks.choose(network)
    written = list(networks.states) if network is None else [chosen]
    # Below the top level: timm up to 1.0.27 fails on a second .safetensors file beside the model.
    files = {name: f"{_OTHERS}/{name}.safetensors" for name in written}
    files[chosen] = "model.safetensors"
    if len(files) > 1:
        (folder / _OTHERS).mkdir()
    for name, file in files.items():
        save_tensors(networks.states[name](), folder / file, dtype)
    ours = {
        "format": 1,
        "model": networks.model,
        "networks": files,
        "predictor": dict(networks.predictor) if "predictor" in files else {},
        "norm_eps": networks.norm_eps,
        "license": networks.license,
        "origin": networks.origin.rsplit("/", 1)[-1],
    }
    config = _timm_config(networks)
    if networks.norm_eps != 1e-6:  # timm would build it with 1e-6 silently
        config = {key: config[key] for key in ("model_args", "pretrained_cfg")}
    write_json(folder / "config.json", {**config, "ijepa_zoo": ours})
    _write_card(networks, folder, "native", chosen)


def _write_transformers(
    networks: Networks, folder: Path, network: str | None, dtype: torch.dtype | None
) -> None:
    """Write one encoder for transformers' ``IJepaModel``, with its preprocessing."""
    _refuse_other_vit(networks)
    chosen = networks.choose(network)
    state = formats.to_transformers(networks.states[chosen](), networks.origin)
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
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": networks.norm_eps,
        "image_size": _square(args["img_size"]),
        "patch_size": _square(args["patch_size"]),
        "num_channels": args["in_chans"],
        "qkv_bias": args["qkv_bias"],
        "dtype": "float32",  # in memory, whatever the file's
        LABEL_KEY: chosen,
        **({"license": networks.license} if networks.license else {}),
    }
    if classes:
        names = networks.pretrained_cfg.get("label_names") or [f"LABEL_{i}" for i in range(classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    save_tensors(state, folder / "model.safetensors", dtype)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", _image_processor(networks.pretrained_cfg))
    _write_card(networks, folder, "transformers", chosen)


def _refuse_other_vit(networks: Networks) -> None:
    if networks.is_other_vit:
        raise CheckpointError(
            f"the encoders are timm's {networks.model}, which only the formats native and timm "
            "express: use one of them"
        )


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
    _refuse_other_vit(networks)
    absent = [name for name in registry.NETWORKS if name not in networks.states]
    if network is not None or absent:
        raise CheckpointError(
            f"an official file has all three networks: {networks.origin} has "
            f"{', '.join(networks.states)}" + (f", and network={network}" if network else "")
        )
    if "context" in networks.predictor:
        raise CheckpointError(
            f"the predictor of {networks.origin} has context='shared', which the official "
            "repository lacks: export to native instead"
        )
    content: dict[str, Any] = {"epoch": 0}
    for network, read in networks.states.items():
        content[network] = {  # trained with DistributedDataParallel
            f"module.{name}": tensor.detach().to("cpu", dtype or tensor.dtype)
            for name, tensor in read().items()
        }
    try:
        torch.save(content, folder / OFFICIAL_FILE)
    except RuntimeError as error:  # torch's error for a full disk
        reason = str(error).splitlines()[0]
        raise RunError(f"{OFFICIAL_FILE} cannot be written: {reason}") from error


_NETWORK = {
    "target_encoder": "The **target encoder** of I-JEPA, which the paper evaluates",
    "encoder": "The **context encoder** of I-JEPA (the paper evaluates the target encoder)",
}
_USAGE = {
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)',
    "native": (
        "import ijepa_zoo  # for all networks; timm alone loads model.safetensors\n\n"
        'model = ijepa_zoo.create_model("local-dir:FOLDER")'
    ),
    "transformers": (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        'processor = AutoImageProcessor.from_pretrained("FOLDER")\n'
        'model = AutoModel.from_pretrained("FOLDER")\n'
        "features = model(**processor(image, return_tensors='pt')).last_hidden_state.mean(1)"
    ),
}
_CLASSIFIER_USAGE = (
    "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
    'processor = AutoImageProcessor.from_pretrained("FOLDER")\n'
    'model = AutoModelForImageClassification.from_pretrained("FOLDER")\n'
    "logits = model(**processor(image, return_tensors='pt')).logits"
)
_CARD = """\
---
{license_line}library_name: {library}
pipeline_tag: {pipeline}
tags:
- i-jepa
- self-supervised-learning
---
# {model}

{what} ([paper](https://arxiv.org/abs/2301.08243)). Source: {origin}. License: {license}.

```python
{usage}
```

Features: tokens after the final LayerNorm, averaged over the patches.
"""


def _write_card(networks: Networks, folder: Path, to: str, network: str) -> None:
    """README.md with the Hub's metadata."""
    classes = networks.args["num_classes"]
    what = _NETWORK.get(network, "An encoder of I-JEPA; its source did not say which network it is")
    usage = _USAGE[to]
    if classes:
        what = f"An encoder of I-JEPA with a classifier of {classes} classes"
        usage = _CLASSIFIER_USAGE if to == "transformers" else usage
    card = _CARD.format(
        license_line=f"license: {networks.license.lower()}\n" if networks.license else "",
        library="transformers" if to == "transformers" else "timm",
        pipeline="image-classification" if classes else "image-feature-extraction",
        model=networks.model,
        what=what,
        origin=networks.origin.rsplit("/", 1)[-1],
        license=networks.license or "unknown; that of the source, if any",
        usage=usage,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


WRITERS: dict[str, Callable[[Networks, Path, str | None, torch.dtype | None], None]] = {
    "native": _write_native,
    "timm": _write_timm,
    "transformers": _write_transformers,
    "official": _write_official,
}
