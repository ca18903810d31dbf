"""A training step as the benches time it, by this package's trainer.

A step is what happens between two batches: networks forward and backward, AdamW, moving average.
The batches lie in main memory, as a loader hands them over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ..data.image_sets import open_images
from ..processes import Processes
from ..train import PretrainConfig
from ..train.batches import Batch, normalise
from ..train.config import Precision
from ..train.optim import set_rates
from ..train.parallel import accumulate, autocast
from ..train.settings import check, override
from ..train.start import build_networks
from ..train.trainer import Trainer
from .timing import Work, finish

BATCHES = 4  # that take turns; their masks differ in length, as in a run
STEPS, WARMUP = 100_000, 10_000  # of the schedules: a bench stays in the warm-up
_LEAST_SIDE = 7  # patches
_SMALL_GRID = 196  # patches below which the recipes keep fewer context patches


@dataclass(frozen=True)
class StepSettings:
    """What a step is done with; the names are those of `train`."""

    model: str = "vit_tiny16_ijepa"
    img_size: int | None = None
    batch_size: int = 16
    precision: Precision = "fp32"
    device: str = "auto"
    compile: bool = False
    predictor_context: str | None = None

    def config(self, world: int = 1) -> PretrainConfig:
        """The settings of a run with such steps; rates and masks are the published recipe's.

        Args:
            world: Processes, with `batch_size` images each.

        Raises:
            ValueError: A setting is unknown or impossible.
        """
        chosen: dict[str, Any] = {
            "model.name": self.model,
            "model.img_size": self.img_size,
            "data.held_out": 0,
            "mask.cut": "global",
            "optim.batch_size": self.batch_size * world,
            "optim.duration": f"{STEPS} steps",
            "optim.warmup": f"{WARMUP} steps",
            "optim.precision": self.precision,
            "machine.device": self.device,
            "machine.compile": self.compile,
            "machine.workers": 0,
        }
        if self.predictor_context is not None:
            chosen["model.predictor_context"] = self.predictor_context
        config = override(PretrainConfig(), **chosen)
        with torch.device("meta"):
            embed = build_networks(config).encoder.patch_embed
        if min(embed.grid_size) < _LEAST_SIDE:
            raise ValueError(
                f"images of {embed.img_size[0]} pixels have too few patches of "
                f"{embed.patch_size[0]} for masks: use img_size={_LEAST_SIDE * embed.patch_size[0]}"
                " or more"
            )
        if math.prod(embed.grid_size) < _SMALL_GRID:
            config = override(config, **{"mask.min_keep": 4})
        check(config)
        return config


class Step(Protocol):
    """Updates, one after another."""

    device: torch.device

    def update(self) -> float:
        """Do the next update; returns its loss."""

    def phases(self) -> Iterator[str]:
        """Do the next update, and give the name of each phase when it is done."""


class OurStep:
    """Updates by the trainer.

    Args:
        settings: See `StepSettings`.
        processes: Those that share the work; one by default.
    """

    def __init__(self, settings: StepSettings, processes: Processes | None = None) -> None:
        config = settings.config(processes.world if processes else 1)
        self.trainer = Trainer(config, open_images(_noise(config)), processes)
        self.device = self.trainer.processes.device
        self.batches = [self.trainer.data.micro_batch(step, 0) for step in range(BATCHES)]
        if self.device.type == "cuda":
            self.batches = [batch.pin_memory() for batch in self.batches]

    def update(self) -> float:
        """Do the next update; returns its loss."""
        return self.trainer.update([self._batch()]).figures["loss"]

    def passes(self, exchange: bool) -> None:
        """Forward and backward pass of the next update's batch, whose gradients are dropped.

        Args:
            exchange: Whether the processes exchange the gradients.
        """
        trainer = self.trainer
        with accumulate(trainer.module, exchange):
            torch.autograd.backward(trainer.loss(self._batch()))
        trainer.optimizer.zero_grad()

    def phases(self) -> Iterator[str]:
        """The parts of `Trainer.update`, one after another."""
        trainer, model, device = self.trainer, self.trainer.model, self.device
        data, batch = trainer.config.data, self._batch()
        rates = trainer.schedule.rates(trainer.step)
        precision = partial(autocast, device, trainer.config.optim.precision)
        pixels, context, targets = (
            part.to(device, non_blocking=True)
            for part in (batch.images, batch.context, batch.targets)
        )
        images = normalise(pixels, data.mean, data.std)
        yield "input"
        with precision():
            truth = model.target_tokens(images, targets)
        yield "target forward"
        with precision():
            tokens = model.encoder.encode(images, context)
        yield "context forward"
        with precision():
            loss = F.smooth_l1_loss(model.predictor(tokens, context, targets), truth)
        yield "predictor forward"
        torch.autograd.backward(loss)
        yield "backward"
        set_rates(trainer.optimizer, lr=rates["lr"], weight_decay=rates["weight_decay"])
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        yield "optimizer"
        model.update_target(rates["momentum"])
        trainer.step += 1
        yield "moving average"

    def _batch(self) -> Batch:
        return self.batches[self.trainer.step % BATCHES]


def updating(step: Step) -> Work:
    """Work that is the next update, to the end."""

    def update() -> None:
        step.update()
        finish(step.device)

    return update


def _noise(config: PretrainConfig) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images of the batches; what they show costs nothing."""
    with torch.device("meta"):
        embed = build_networks(config).encoder.patch_embed
    shape = (config.optim.batch_size, *embed.img_size, embed.proj.in_channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
