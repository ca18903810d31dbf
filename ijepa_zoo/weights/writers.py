"""What goes into an exported folder, for each library that is to load it."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import CheckpointError
from . import catalog, layouts
from .bundle import Bundle
from .card import model_card
from .layouts import State
from .networks import LABEL_KEY, UNLABELLED

OFFICIAL_FILE = "ijepa-latest.pth.tar"
OTHERS = "networks"  # folder of a native export's further networks
WRITTEN = frozenset({"config.json", "preprocessor_config.json", "README.md", "model.safetensors"})
WRITTEN |= {OFFICIAL_FILE, OTHERS}  # every name at the top level of an export
_STOCK = {ours: theirs for theirs, ours in layouts.STOCK_TIMM.items()}


def _save(
    state: Mapping[str, torch.Tensor], path: Path, network: str, dtype: torch.dtype | None
) -> None:
    def ready(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().cpu()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        return tensor.contiguous()

    metadata = {"format": "pt"} | ({"network": network} if network in catalog.NETWORKS else {})
    tensors = {name: ready(tensor) for name, tensor in state.items()}
    with _said(path, _nbytes(tensors)):
        save_file(tensors, path, metadata=metadata)


@contextmanager
def _said(path: Path, size: int) -> Iterator[None]:
    """Around writing a file: an error says what the file takes and what is free without it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        path.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        text = f"{_reason(error)}: {path.name} takes {size:,} bytes, {free:,} are free"
        raise OSError(None, text, str(path)) from error


def _reason(error: BaseException) -> str:
    """The system's words; torch's own have them as context, safetensors' have their number."""
    for cause in (error, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    number = re.search(r"(?:os error|code:) (\d+)", str(error))
    return os.strerror(int(number[1])) if number else str(error)


def _nbytes(content: Any) -> int:
    """Bytes of all tensors in nested tables and lists."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(map(_nbytes, content.values()))
    return sum(map(_nbytes, content)) if isinstance(content, list | tuple) else 0


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def timm_config(bundle: Bundle) -> dict[str, Any]:
    """config.json of a timm folder: a stock architecture plus all the arguments that matter."""
    if bundle.norm_eps != 1e-6:
        raise CheckpointError(
            f"{bundle.origin} has LayerNorm epsilon {bundle.norm_eps}, which a timm folder cannot "
            "say: timm would build it with 1e-6; export to transformers instead"
        )
    preprocessing = dict(bundle.preprocessing)
    return {
        "architecture": _STOCK.get(bundle.model, "vit_base_patch16_gap_224"),
        "num_classes": bundle.args["num_classes"],
        "num_features": bundle.args["embed_dim"],
        "global_pool": bundle.args["global_pool"],
        "model_args": dict(bundle.args),
        "pretrained_cfg": {
            "tag": "ijepa",
            "custom_load": False,
            "fixed_input_size": True,
            "num_classes": bundle.args["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "pool_size": None,
            **preprocessing,
            **({"license": bundle.license.lower()} if bundle.license else {}),
        },
    }


def write_timm(
    bundle: Bundle, folder: Path, network: str | None, dtype: torch.dtype | None
) -> None:
    """One encoder as stock timm loads it."""
    chosen = bundle.choose(network)
    config = timm_config(bundle)
    if chosen != UNLABELLED:
        config[LABEL_KEY] = chosen
    _save(bundle.states[chosen], folder / "model.safetensors", chosen, dtype)
    _write_json(folder / "config.json", config)
    (folder / "README.md").write_text(model_card(bundle, "timm", chosen), encoding="utf-8")


def write_native(
    bundle: Bundle, folder: Path, network: str | None, dtype: torch.dtype | None
) -> None:
    """All networks at hand; model.safetensors and config.json also make a timm folder."""
    if UNLABELLED in bundle.states:
        raise CheckpointError(
            f"{bundle.origin} does not say which network it holds: give network (--network) "
            "encoder, the context encoder, or target_encoder"
        )
    chosen = bundle.choose(network)
    if network is not None:
        bundle_states: Mapping[str, State] = {chosen: bundle.states[chosen]}
    else:
        bundle_states = bundle.states
    # below the top level: timm up to 1.0.27 trips over a second .safetensors file beside the model
    files = {name: f"{OTHERS}/{name}.safetensors" for name in bundle_states}
    files[chosen] = "model.safetensors"
    (folder / OTHERS).mkdir()
    for name, file in files.items():
        _save(bundle_states[name], folder / file, name, dtype)
    ours: dict[str, Any] = {
        "format": 1,
        "model": bundle.model,
        "networks": files,
        "predictor": dict(bundle.predictor) if "predictor" in files else {},
        "norm_eps": bundle.norm_eps,
        "license": bundle.license,
        "origin": Path(bundle.origin).name,
    }
    if bundle.training is not None:
        ours |= {"optimizer": f"{OTHERS}/optimizer.safetensors"}
        ours |= {"training": dict(bundle.training.plain)}
        _save(bundle.training.optimizer, folder / ours["optimizer"], "", None)
    config = timm_config(bundle) if bundle.norm_eps == 1e-6 else {"model_args": dict(bundle.args)}
    config.setdefault("pretrained_cfg", dict(bundle.preprocessing))
    _write_json(folder / "config.json", {**config, "ijepa_zoo": ours})
    (folder / "README.md").write_text(model_card(bundle, "native", chosen), encoding="utf-8")


def write_transformers(
    bundle: Bundle, folder: Path, network: str | None, dtype: torch.dtype | None
) -> None:
    """One encoder as transformers' ``IJepaModel`` loads it, with the right preprocessing."""
    chosen = bundle.choose(network)
    state = layouts.to_transformers(bundle.states[chosen], bundle.origin)
    args, classes = bundle.args, bundle.args["num_classes"]
    if classes and args["global_pool"] != "avg":
        raise CheckpointError(
            f"transformers' classifier reads the mean of the patches, that of {bundle.origin} "
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
        "layer_norm_eps": bundle.norm_eps,
        "image_size": _square(args["img_size"]),
        "patch_size": _square(args["patch_size"]),
        "num_channels": args["in_chans"],
        "qkv_bias": args["qkv_bias"],
        "dtype": "float32",  # in memory, whatever the file's: half precision is the user's choice
    }
    if classes:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(classes)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(classes)}
    if chosen != UNLABELLED:
        config[LABEL_KEY] = chosen
    _save(state, folder / "model.safetensors", chosen, dtype)
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", image_processor(bundle.preprocessing))
    card = model_card(bundle, "transformers", chosen)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _square(size: list[int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else size


def image_processor(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Our eval transform in transformers' words: resize the short side, centre crop, normalise.

    Raises:
        CheckpointError: If the image size is not square: no processor resizes as timm does then.
    """
    height, width = preprocessing["input_size"][-2:]
    if height != width:
        raise CheckpointError(
            f"transformers cannot say how images become {height}x{width}: only square images "
            "can be exported to it; export to timm instead"
        )
    filters = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": int(min(height, width) / preprocessing["crop_pct"])},
        "resample": filters[preprocessing["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
    }


def write_official(
    bundle: Bundle, folder: Path, network: str | None, dtype: torch.dtype | None
) -> None:
    """The published code's checkpoint file, optimizer included; fresh where there is none."""
    if network is not None:
        raise CheckpointError(
            "an official file holds all three networks: leave network (--network) out"
        )
    absent = [name for name in layouts.OFFICIAL_NETWORKS if name not in bundle.states]
    if absent:
        raise CheckpointError(
            f"an official file holds all three networks, but {bundle.origin} has no "
            f"{' and no '.join(absent)}"
        )

    if "context" in bundle.predictor:
        raise CheckpointError(
            f"the predictor of {bundle.origin} has context='{bundle.predictor['context']}', which "
            "the published code does not know: use the native layout"
        )

    def cast(state: State) -> State:
        return {key: t.detach().cpu().to(dtype or t.dtype) for key, t in state.items()}

    states = {name: cast(bundle.states[name]) for name in layouts.OFFICIAL_NETWORKS}
    content: dict[str, Any] = {name: layouts.to_official(state) for name, state in states.items()}
    groups = layouts.official_parameter_groups(states["encoder"], states["predictor"])
    if bundle.training is not None:
        plain = bundle.training.plain
        content["opt"] = layouts.optimizer_to_official(bundle.training.optimizer, plain, groups)
        content |= plain["rest"]
    else:
        content |= _fresh_training(groups)
    path = folder / OFFICIAL_FILE
    # given a path, torch says nothing of the system's reason
    with _said(path, _nbytes(content)), path.open("wb") as file:
        torch.save(content, file)


def _fresh_training(groups: list[list[str]]) -> dict[str, Any]:
    """Optimizer, scaler and counters of a run at step 0, as the published code saves them."""
    parameters = [
        [torch.nn.Parameter(torch.empty(0, device="meta")) for _ in group] for group in groups
    ]
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in parameters[:2]]
        + [{"params": g, "WD_exclude": True, "weight_decay": 0} for g in parameters[2:]]
    )
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5}
    return {
        "opt": optimizer.state_dict(),
        "scaler": {**scaler, "growth_interval": 2000, "_growth_tracker": 0},
        "epoch": 0,
        "loss": 0.0,
        "batch_size": 0,
        "world_size": 1,
        "lr": 1e-3,
    }
