"""Any ViT by its name: encoders of this package, timm's models, folders, runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.transforms import transform_config
from ..encode import model_name, weights_fingerprint
from ..errors import SettingsError, option
from ..features import FeatureExtractor
from ..models.classifier import ENCODER, Classifier, read_classifier_config
from ..models.factory import create_named_model, is_own_model
from ..seeds import Stream, fold
from ..weights.read import FOLDER_PREFIX, HUB_PREFIX


@dataclass(frozen=True)
class EvalModel:
    """A model that is evaluated.

    Attributes:
        model: The network.
        name: Its name in tables.
        paper_name: The name of its weights in the registry or in timm, to look up the paper's
            value; None for other weights.
        source: The name that `open_model` was called with, None for a user's own object.
        img_size: The image size that it was called with.
        is_random: Whether it has random weights.
    """

    model: nn.Module
    name: str
    paper_name: str | None = None
    source: str | None = None
    img_size: int | tuple[int, int] | None = None
    is_random: bool = False

    @property
    def in_chans(self) -> int:
        """Channels of its images."""
        return int(transform_config(self.model)["input_size"][0])

    def describe(self) -> dict[str, Any]:
        """The model as results record it."""
        return {
            "name": self.name,
            "architecture": model_name(self.model),
            "weights": getattr(self.model, "weights_origin", None)
            or (f"timm's {self.paper_name}" if self.paper_name else "not from a checkpoint"),
            "weights_hash": weights_fingerprint(self.model),
            "image_size": list(transform_config(self.model)["input_size"][1:]),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def untrained(self, seed: int) -> EvalModel:
        """The same architecture with random weights."""
        assert self.source is not None, "it has no name"
        return open_model(self.source, random=True, seed=seed, img_size=self.img_size)


def open_model(
    name: str,
    *,
    random: bool = False,
    seed: int = 0,
    checkpoint: str | None = None,
    network: str | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> EvalModel:
    """Create the model that a user names, in evaluation mode.

    Args:
        name: A model of this package (`vit_huge14_ijepa.in1k`), any timm name
            (`vit_small_patch14_dinov2.lvd142m`, with or without `timm:` before it), a folder, among
            them those of pretraining runs, `local-dir:FOLDER` or `hf-hub:REPO`, or a folder that
            timm has saved, `timm:local-dir:FOLDER`.
        random: The same architecture with random weights instead of its own.
        seed: Decides the random weights.
        checkpoint: See :func:`ijepa_zoo.create_model`.
        network: See there.
        img_size: Image size in pixels; None for the model's own.

    Raises:
        SettingsError: There is no such model, or it is not a ViT.
        CheckpointError: The weights do not exist or do not fit.
        FetchError: They cannot be fetched.
    """
    if random and (checkpoint or network):
        raise SettingsError(f"{option('random')} takes neither {option('checkpoint')} nor network")
    if random and (about := read_classifier_config(name.removeprefix(FOLDER_PREFIX))):
        encoder = about["encoder"]  # the architecture without its head
        name = os.path.join(name, ENCODER) if encoder == ENCODER else encoder
    kwargs: dict[str, Any] = {"img_size": img_size} if img_size else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, Stream.EVAL_INIT))
        if not is_own_model(name):
            with torch.device("meta"):  # refuse what is not a ViT before weights are fetched
                FeatureExtractor(create_named_model(name, pretrained=False), "last4", pool="avg")
        kwargs |= {"checkpoint": checkpoint, "network": network}
        model = create_named_model(name, pretrained=not random, **kwargs)
    model = (model.encoder if isinstance(model, Classifier) else model).eval()
    if random:
        shown = f"{name}, random weights"
        return EvalModel(model, shown, source=name, img_size=img_size, is_random=True)
    is_path = FOLDER_PREFIX in name or HUB_PREFIX in name or os.path.isdir(name)
    if is_path or checkpoint or network == "encoder":
        shown = ", ".join([name, *filter(None, (checkpoint, network))])
        return EvalModel(model, shown, source=name, img_size=img_size)
    cfg = model.pretrained_cfg
    released = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else None
    return EvalModel(model, released or name, released, name, img_size)
