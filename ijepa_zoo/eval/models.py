"""Any ViT by its name: encoders of this package, timm's models, folders, runs."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from ..data.transforms import transform_config
from ..encode import model_name, weights_fingerprint
from ..errors import CheckpointError, SettingsError
from ..features import FeatureExtractor
from ..models.factory import create_model
from ..models.predictor import PREDICTORS
from ..seeds import Stream, fold
from ..weights.registry import checkpoints, find
from .timm_weights import weights_within_reach
from .words import option

_TIMM, _FOLDER = "timm:", "local-dir:"
_SOURCES = (_FOLDER, "hf-hub:")
_LARGEST = 4096  # pixels of a side
_NAMELESS = "a baseline with random weights needs the model's name instead of the model"


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        model: The network.
        name: What tables call it.
        paper_name: The name of its weights in the catalogue or in timm, by which the paper's
            figure is looked up; None where they are others.
        given: What `open_model` was called with to make it, None for a user's own object.
        img_size: The image size that it was called with.
    """

    model: nn.Module
    name: str
    paper_name: str | None = None
    given: str | None = None
    img_size: int | tuple[int, int] | None = None

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

    def untrained(self, seed: int) -> Subject:
        """The same architecture with random weights.

        Raises:
            ValueError: The model was not made by its name.
        """
        if self.given is None:
            raise SettingsError(_NAMELESS)
        return open_model(self.given, random=True, seed=seed, img_size=self.img_size)


def as_subject(
    model: str | nn.Module | Subject, *, random: bool = False, seed: int = 0, **options: Any
) -> Subject:
    """The model that a name, with the options of `open_model`, or an object stands for."""
    if isinstance(model, str):
        return open_model(model, random=random, seed=seed, **options)
    return model if isinstance(model, Subject) else Subject(model, model_name(model))


def check_model(
    model: str | nn.Module | Subject,
    *,
    baseline: bool = False,
    random: bool = False,
    **options: Any,
) -> int:
    """Refuse what `as_subject` or `Subject.untrained` would, before any work.

    Returns:
        Channels of the images that the model takes.

    Raises:
        ValueError: No model is called that, or an option does not hold for it.
        TypeError: It is no ViT.
    """
    if random and baseline:
        raise SettingsError(
            f"{option('random')} is the baseline itself: leave {option('baseline')} out"
        )
    if isinstance(model, str):
        source, ours = _check_options(model, random, **options)
        with torch.device("meta"):
            made = create_model if ours else _timm_model
            return int(transform_config(made(source, pretrained=False))["input_size"][0])
    given = [name for name, value in options.items() if value is not None]
    given += ["random"] if random else []
    if given:
        raise SettingsError(f"{', '.join(given)} hold for a model that is named: leave them out")
    if baseline and (not isinstance(model, Subject) or model.given is None):
        raise SettingsError(_NAMELESS)
    network = model.model if isinstance(model, Subject) else model
    return int(transform_config(network)["input_size"][0])


def open_model(
    name: str,
    *,
    random: bool = False,
    seed: int = 0,
    checkpoint: str | None = None,
    network: str | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> Subject:
    """Make the model that a user names.

    Args:
        name: A model of this package (`vit_huge14_ijepa.in1k`), any timm name
            (`vit_small_patch14_dinov2.lvd142m`, with or without `timm:` before it), a folder, among
            them those of pretraining runs, `local-dir:FOLDER` or `hf-hub:REPO`, or a folder that
            timm has saved, `timm:local-dir:FOLDER`.
        random: The same architecture with random weights instead of its own.
        seed: Decides the random weights.
        checkpoint: See :func:`ijepa_zoo.create_model`.
        network: See :func:`ijepa_zoo.create_model`.
        img_size: Image size in pixels; None for the model's own.

    Raises:
        ValueError: No model is called that.
        TypeError: It is no ViT.
        CheckpointError: The weights do not exist or do not fit.
        FetchError: They cannot be fetched.
    """
    source, ours = _check_options(name, random, checkpoint, network, img_size)
    size: dict[str, Any] = {"img_size": img_size} if img_size else {}
    overlay = {} if ours or random else weights_within_reach(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, Stream.EVAL_INIT))
        if ours:
            own: dict[str, Any] = {} if random else {"checkpoint": checkpoint, "network": network}
            model = create_model(source, pretrained=not random, **own, **size)
        else:
            model = _timm_model(source, pretrained=not random, num_classes=0, **size, **overlay)
    model.eval()
    _refuse_broken(model, name)
    if random:
        return Subject(model, f"{name}, random weights", given=name, img_size=img_size)
    cfg = model.pretrained_cfg
    released = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else None
    if source.startswith(_SOURCES) or checkpoint or network == "encoder":
        extra = [str(given) for given in (checkpoint, network) if given]
        return Subject(model, ", ".join([name, *extra]), given=name, img_size=img_size)
    return Subject(model, released or name, released, name, img_size)


def _check_options(
    name: str,
    random: bool,
    checkpoint: str | None = None,
    network: str | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> tuple[str, bool]:
    """What the model is made from, and whether this package makes it."""
    sides = img_size if isinstance(img_size, tuple) else (img_size or 1,)
    if img_size == 0 or not all(0 < side <= _LARGEST for side in sides):
        raise SettingsError(
            f"img_size is {img_size}; images of 1 to {_LARGEST} pixels a side are read"
        )
    if random and (checkpoint or network):
        raise SettingsError(
            f"{option('checkpoint')} and {option('network')} name weights, "
            f"{option('random')} takes none: leave one of them out"
        )
    source = f"local-dir:{name}" if os.path.isdir(name) else name
    ours = source.startswith(_SOURCES) or source.partition(".")[0] in PREDICTORS
    if ours and not (random or checkpoint):
        _refuse_unreleased(source)
    return (source, True) if ours else (_timm_source(source, checkpoint, network), False)


def _refuse_broken(model: nn.Module, name: str) -> None:
    """Refuse weights of which every probe would make a figure that says nothing."""
    tensors = dict(model.named_parameters())
    for tensor, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(
                f"the weights of {name} are broken: {tensor} is not finite (NaN or infinite)"
            )
    if not any(bool(value.any()) for value in tensors.values() if value.ndim > 1):
        raise CheckpointError(f"the weights of {name} are all zero: every image is alike to them")


def _refuse_unreleased(source: str) -> None:
    """Refuse a name of this package that has no weights, in the words of evaluations."""
    model, _, tag = source.partition(".")
    if source.startswith(_SOURCES) or find(model, tag or None) is not None:
        return
    known = [record.name for record in checkpoints() if record.model == model]
    raise SettingsError(
        f"there are no released weights of {source}{'; known: ' if known else ''}"
        f"{', '.join(known)}: name a file of your own, {option('checkpoint')}, or evaluate random "
        f"weights, {option('random')}"
    )


def _timm_source(name: str, checkpoint: str | None, network: str | None) -> str:
    """The name by which timm makes the model.

    Raises:
        ValueError: timm has no such model, or an option does not hold for its models.
        TypeError: It is no ViT.
    """
    source = name.removeprefix(_TIMM)
    if not source.startswith(_FOLDER) and not timm.is_model(source):
        raise SettingsError(f"no model is called {name!r}{_similar(source)}")
    if checkpoint or network:
        raise SettingsError(
            f"checkpoint and network hold for models of this package, and {name!r} is timm's: "
            "leave them out"
        )
    with torch.device("meta"):  # a look at its class, without weights
        FeatureExtractor(_timm_model(source, pretrained=False), "last4", pool="avg")
    return source


def _timm_model(source: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(source, **kwargs)
    except RuntimeError as error:  # no such tag, no weights of that name, weights that do not fit
        tags = timm.list_pretrained(f"{source.partition('.')[0]}.*") or ["none"]
        raise SettingsError(
            f"timm cannot make {source!r}: {error}. Its weights are {', '.join(tags)}"
        ) from error


def _similar(name: str) -> str:
    known = {*PREDICTORS, *timm.list_models("*vit*"), *timm.list_models("*vit*", pretrained=True)}
    near = difflib.get_close_matches(name, known, 3)
    hint = f"; similar: {', '.join(near)}" if near else ""
    return f"{hint}. Name a model of `ijepa-zoo list`, one of timm, or a folder with weights"
