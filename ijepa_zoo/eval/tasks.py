"""What is measured: the paper's probes as data, their protocols and the paper's figures.

Sources: the I-JEPA paper (arXiv 2301.08243, section 5, 6 and appendix A.1) and VISSL's
configurations `benchmark/linear_image_classification` for `vit_*_no_cls`, which it used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import DataError

_BASE_BATCH = 256  # images that learning rates are given for

_H14, _H16 = "vit_huge14_ijepa.in1k", "vit_huge16_448_ijepa.in1k"
_H14_22K, _G16_22K = "vit_huge14_ijepa.in22k", "vit_giant16_ijepa.in22k"


@dataclass(frozen=True)
class View:
    """How an image becomes the model's input; pixels for a model of any size."""

    shape: Literal["crop", "square"]
    filter: Literal["bicubic", "bilinear"]
    whole: bool = False

    def describe(self, size: tuple[int, int], *, train: bool) -> str:
        """The view in words, for results and as a key of cached features."""
        shown = f"{size[0]}x{size[1]}"
        if self.shape == "square":
            return f"{self.filter} resize to {shown}{', random flip' if train else ''}"
        if train:
            return f"{self.filter} random resized crop {shown}, scale 0.08-1, random flip"
        height, width = self.resize_to(size)
        return f"{self.filter} resize to {height}x{width}, centre crop {shown}"

    def timm_config(self) -> dict[str, Any]:
        """The fixed view as entries of timm's data config."""
        if self.shape == "square":
            return {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": self.filter}
        crop_pct = 1.0 if self.whole else 0.875
        return {"crop_pct": crop_pct, "crop_mode": "center", "interpolation": self.filter}

    def resize_to(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the image before the center crop: 224 -> 256."""
        return size if self.whole else (size[0] * 8 // 7, size[1] * 8 // 7)


@dataclass(frozen=True)
class Protocol:
    """How the heads of a linear probe are trained.

    Attributes:
        epochs: Passes over the training images.
        optimizer: 'sgd' (Nesterov) or 'lars' (no Nesterov), both with momentum 0.9, or 'adamw'.
        lrs: Learning rates of the grid, per global batch of 256 images.
        weight_decays: Weight decays of the grid.
        batch_size: Images of a step, of all processes together.
        schedule: 'step' divides the rate by 10 at the milestones, 'cosine' lowers it to `floor`.
        milestones: Epochs at which 'step' does.
        floor: What 'cosine' ends at, as a share of the first rate.
        view: The transforms.
        momentum: Of the optimizer.
        per_step: Whether the rate changes with every step, not every epoch.
    """

    epochs: int
    view: View
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    lrs: tuple[float, ...] = (0.01,)
    weight_decays: tuple[float, ...] = (5e-4,)
    batch_size: int = 256
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[int, ...] = ()
    floor: float = 0.01
    momentum: float = 0.9
    per_step: bool = False

    @property
    def nesterov(self) -> bool:
        """Whether the momentum is Nesterov's."""
        return self.optimizer == "sgd"

    def scale(self, epoch: float) -> float:
        """Share of the first learning rate at `epoch`, counted from 0, with parts of epochs."""
        if self.schedule == "step":
            return 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        cosine = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.floor + (1 - self.floor) * cosine

    def lr_scale(self, epoch: float, batch_size: int | None = None) -> float:
        """What each learning rate of `lrs` is multiplied with; rates grow with the batch size."""
        return self.scale(epoch) * (batch_size or self.batch_size) / _BASE_BATCH

    def with_epochs(self, epochs: int) -> Protocol:
        """The same schedule stretched or shortened to another number of epochs."""
        moved = tuple(round(m * epochs / self.epochs) for m in self.milestones)
        return replace(self, epochs=epochs, milestones=moved)


@dataclass(frozen=True)
class Task:
    """One probe.

    Attributes:
        name: Its name on the command line.
        title: What tables call it.
        kind: What is classified: the 'classes' of a data set, or the 'count' of objects or the
            'distance' class of the nearest one in CLEVR's scenes.
        num_classes: Classes of the data set; None for any number.
        protocol: How its heads are trained.
        paper: The paper's accuracies in percent, by the name of the weights.
        views: Transforms that VISSL's file of an architecture has instead, by its name.
    """

    name: str
    title: str
    kind: Literal["classes", "count", "distance"]
    num_classes: int | None
    protocol: Protocol
    paper: Mapping[str, float] = field(default_factory=dict, hash=False)
    views: Mapping[str, View] = field(default_factory=dict, hash=False)

    def of_model(self, name: str) -> Task:
        """The task with the transforms of a model that is named."""
        view = self.views.get(name.partition(".")[0], self.protocol.view)
        return replace(self, protocol=replace(self.protocol, view=view))


_CROP = View("crop", "bicubic")
_CROP_BILINEAR = View("crop", "bilinear")  # VISSL names no filter here: torchvision's default
_OF_G16 = {"vit_giant16_ijepa": _CROP}  # the filter of its files
_SQUARE = View("square", "bilinear")
_TRANSFER = Protocol(28, _CROP, milestones=(8, 16, 24))
# VISSL's file for H/14. Its file for 448 px has SGD, 28 epochs, batches of 256 and learning rates
# 0.01 and 0.001; the paper's text has LARS for all models, as here.
_IMAGENET = Protocol(
    50,
    _CROP,
    optimizer="lars",
    lrs=(0.1, 0.01),
    weight_decays=(5e-4, 0.0),
    batch_size=16384,
    milestones=(15, 30, 45),
)


def _paper(**figures: float) -> Mapping[str, float]:
    names = {"h14": _H14, "h16_448": _H16, "h14_22k": _H14_22K, "g16_22k": _G16_22K}
    return {names[key]: figure for key, figure in figures.items()}


_ALL = (
    Task(
        *("imagenet1k", "ImageNet-1k", "classes", 1000),
        protocol=_IMAGENET,
        paper=_paper(h14=79.3, h16_448=81.1),
    ),
    Task(
        *("cifar100", "CIFAR-100", "classes", 100),
        protocol=_TRANSFER,
        paper=_paper(h14=87.5, h14_22k=89.5, g16_22k=89.5),
    ),
    Task("cifar10", "CIFAR-10", "classes", 10, _TRANSFER),
    Task(
        *("places205", "Places205", "classes", 205),
        protocol=Protocol(14, _CROP_BILINEAR, milestones=(4, 8, 12)),
        paper=_paper(h14=58.4, h14_22k=57.8, g16_22k=59.1),
        views=_OF_G16,
    ),
    Task(
        *("inat18", "iNaturalist 2018", "classes", 8142),
        protocol=Protocol(84, _CROP_BILINEAR, milestones=(24, 48, 72)),
        paper=_paper(h14=47.6, h14_22k=50.5, g16_22k=55.3),
        views=_OF_G16,
    ),
    Task("classes", "classes", "classes", None, _TRANSFER),
    Task(
        *("count", "Clevr/Count", "count", 8),
        protocol=Protocol(50, _SQUARE, schedule="cosine"),
        paper=_paper(h14=86.7, h14_22k=88.6, g16_22k=86.7),
    ),
    Task(
        *("depth", "Clevr/Dist", "distance", 6),
        protocol=Protocol(100, _SQUARE, schedule="cosine"),
        paper=_paper(h14=72.4, h14_22k=75.0, g16_22k=73.0),
    ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


def find_task(name: str) -> Task:
    """The task of a name; 'classes' is any data set with labels, with CIFAR-100's protocol.

    Raises:
        DataError: There is no such task.
    """
    if name in TASKS:
        return TASKS[name]
    raise DataError(f"there is no task {name!r}: choose one of {', '.join(TASKS)}")
