"""The registry: sizes of the registered models, and released weights (checkpoints.json)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

NETWORKS = ("target_encoder", "encoder", "predictor")

# timm arguments of the registered models.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_nano8_64_ijepa": {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    "vit_tiny16_ijepa": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small16_ijepa": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base16_ijepa": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large16_ijepa": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge14_ijepa": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
    "vit_huge16_448_ijepa": {"patch_size": 16, "embed_dim": 1280, "depth": 32, "num_heads": 16},
    "vit_giant16_ijepa": {
        **{"patch_size": 16, "embed_dim": 1408, "depth": 40, "num_heads": 16},
        "mlp_ratio": 48 / 11,
    },
}
CUSTOM = "vit_custom_ijepa"  # an encoder of other sizes
_TIMM_NAMES = {  # timm's name of the same network -> ours
    "vit_base_patch16_gap_224": "vit_base16_ijepa",
    "vit_huge_patch14_gap_224": "vit_huge14_ijepa",
    "vit_huge_patch16_gap_448": "vit_huge16_448_ijepa",
    "vit_giant_patch16_gap_224": "vit_giant16_ijepa",
}


@dataclass(frozen=True)
class Source:
    """Location of released weights: exactly one of a URL, a Hub repository or a packaged folder."""

    url: str | None = None
    hf_hub_id: str | None = None  # with ``revision`` and ``filename``
    revision: str | None = None
    filename: str | None = None
    folder: str | None = None  # inside this package
    gigabytes: float | None = None  # its size, rounded
    # of each network (official files: of the fetched tensor bytes), if known
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """One entry of the registry."""

    model: str
    tag: str
    network: str  # that ``create_model`` loads
    networks: tuple[str, ...]  # all in the source
    source: Source
    format: str  # official, transformers or native
    license: str  # SPDX
    input_size: tuple[int, int, int]  # channels, height, width of pretraining
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float  # side of the center crop relative to the resized image
    interpolation: str
    data: str  # of pretraining
    epochs: float
    predictor: Mapping[str, int] = field(default_factory=dict)  # ``embed_dim`` and ``depth``
    check: Mapping[str, Any] = field(default_factory=dict)  # expected outputs, for tests
    metrics: Mapping[str, Any] = field(default_factory=dict)  # measured quality
    note: str = ""  # terms of the data, if they restrict its use

    @property
    def name(self) -> str:
        """``model.tag``, as ``create_model`` takes it."""
        return f"{self.model}.{self.tag}"

    @property
    def preprocessing(self) -> dict[str, Any]:
        """timm's names for the evaluation transform."""
        keys = ("input_size", "mean", "std", "crop_pct", "interpolation")
        return {key: getattr(self, key) for key in keys}


@cache
def checkpoints() -> tuple[Checkpoint, ...]:
    """All entries in the order of the file; the first entry of a model is its default."""
    package = Path(__file__).resolve().parent.parent
    file = package / "checkpoints.json"  # in a wheel; in a checkout one folder up
    if not file.is_file():
        file = package.parent / file.name
    found = []
    for entry in json.loads(file.read_text(encoding="utf-8"))["checkpoints"]:
        for key in ("networks", "input_size", "mean", "std"):
            entry[key] = tuple(entry[key])
        found.append(Checkpoint(**{**entry, "source": Source(**entry["source"])}))
    return tuple(found)


def find(model: str, tag: str | None = None) -> Checkpoint | None:
    """The entry of a model and tag, or the model's default entry without a tag."""
    for checkpoint in checkpoints():
        if checkpoint.model == model and tag in (None, "", checkpoint.tag):
            return checkpoint
    return None


def entrypoint_args(architecture: str) -> dict[str, Any]:
    """Default timm arguments of an architecture."""
    if architecture == "vit_base_patch16_gap_224":  # timm's has 16 heads
        return {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 16}
    return dict(ARCHITECTURES.get(registered_name(architecture) or CUSTOM, {}))


def registered_name(architecture: str) -> str | None:
    """Registered name of an architecture given by our name or timm's; None for other networks."""
    name = _TIMM_NAMES.get(architecture, architecture)
    return name if name in (*ARCHITECTURES, CUSTOM) else None


def is_ijepa(name: str) -> bool:
    """Whether a registered name, with or without a tag, is that of an I-JEPA encoder."""
    return name.partition(".")[0] in (*ARCHITECTURES, CUSTOM)


def model_name(args: Mapping[str, Any], architecture: str | None = None) -> str:
    """The registered name of an encoder with these timm arguments, else :data:`CUSTOM`.

    ``architecture`` is preferred among names of the same sizes.
    """
    named = registered_name(architecture or "")
    side = args.get("img_size", 224)
    large = max(side) > 224 if isinstance(side, list | tuple) else side > 224
    candidates = [named, *(("vit_huge16_448_ijepa",) if large else ()), *ARCHITECTURES]
    for name in candidates:
        if name in ARCHITECTURES and _sizes(ARCHITECTURES[name]) == _sizes(args):
            return name
    return CUSTOM


def timm_name(model: str | None) -> str:
    """timm's architecture that becomes this model with the right ``model_args``."""
    return {ours: theirs for theirs, ours in _TIMM_NAMES.items()}.get(
        model or "", "vit_base_patch16_gap_224"
    )


def _sizes(args: Mapping[str, Any]) -> tuple[Any, ...]:
    patch = args.get("patch_size", 16)
    width = args.get("embed_dim", 768)
    return (
        tuple(patch) if isinstance(patch, list | tuple) else (patch, patch),
        width,
        args.get("depth", 12),
        args.get("num_heads", 12),
        int(width * args.get("mlp_ratio", 4.0)),
    )
