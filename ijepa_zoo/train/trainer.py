"""One training step, and everything that it needs.

Data order, crops, masks and rates are functions of (seed, step). The state of a run is therefore
its tensors and `step`, and on a CPU a run that was stopped and resumed equals one that was not, bit
for bit. On a GPU, where kernels sum in varying order, the two agree up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..data.datasets import ImageDataset
from ..distributed import Distributed, choose_device, copy_to_host
from ..errors import DataError, UserError, some
from ..models.jepa import IJepa
from ..seeds import Stream, numpy_generator
from .config import PretrainConfig, micro_batch_size
from .data import (
    Batch,
    TrainBatches,
    evaluation_images,
    mask_sampler,
    normalize,
    split,
)
from .monitor import Monitor
from .networks import build_networks
from .optim import (
    Schedule,
    clip_gradients,
    gradient_norms,
    make_optimizer,
    set_rates,
    step_if_finite,
)
from .parallel import choose_kernels, gradient_sync, in_group, parallelize
from .precision import autocast, require_float8, resolve_precision
from .regularizers import VarianceCovariance

NETWORKS = ("encoder", "predictor", "target_encoder")
_MONITORED = 512  # images of the monitor where none are held out


class NonFiniteLossError(UserError, FloatingPointError):
    """The loss or the gradient of a step is not finite; the weights are those before the step."""


@dataclass(frozen=True)
class StepResult:
    """Result of a training step."""

    metrics: dict[str, float]  # for the log: loss, rates, gradient norms before clipping, tokens
    broken: int  # images of all processes that could not be decoded and were replaced
    stop: bool  # whether a process was asked to stop


class Trainer:
    """Networks, optimizer, data and the number of steps done.

    Args:
        config: Settings.
        images: Training images.
        distributed: The processes of the run; one by default.
        init: Weights to start from, see `build_networks`.

    Raises:
        SettingsError: The settings do not fit the images, the model, the processes or the device.
        CheckpointError: `init` does not fit.
    """

    def __init__(
        self,
        config: PretrainConfig,
        images: ImageDataset,
        distributed: Distributed | None = None,
        *,
        init: str | Path | None = None,
    ) -> None:
        self.images = images
        self.distributed = distributed or Distributed(device=choose_device(config.runtime.device))
        device, precision = self.distributed.device, config.optim.precision
        self.config = config = resolve_precision(config, device)
        if precision == "fp8":
            require_float8(device)
        self.step = 0
        self.train_indices, self.held_out = split(len(images), config.data.held_out, config.seed)
        self.schedule = Schedule.of(config.optim, len(self.train_indices))
        self.micro_batch_size = size = micro_batch_size(config, self.distributed.world_size)
        self.model = self._networks(init)
        self.regularizer = cast("VarianceCovariance | None", self.model.regularizer)
        embed = self.model.encoder.patch_embed
        self.image_size: tuple[int, int] = embed.img_size
        self.masks = mask_sampler(config.mask, embed.grid_size)
        self.model.train()
        choose_kernels(device)
        self.module = parallelize(
            self.model, config.runtime, self.distributed, config.optim.precision
        )
        self.optimizer = make_optimizer(self.model.encoder, self.model.predictor)
        rank, world = self.distributed.rank, self.distributed.world_size
        self.data = TrainBatches(
            images, self.train_indices, config, self.image_size, self.masks, rank, world, size
        )

    def _networks(self, init: str | Path | None) -> IJepa:
        """Build the networks; with FSDP2 on rank 0 only, which sends the others their shards."""
        sharded = self.config.runtime.parallel == "fsdp2" and in_group()
        if sharded and not self.distributed.is_main:
            with torch.device("meta"):
                return build_networks(self.config)
        return build_networks(self.config, init)

    def batches(self) -> Iterator[list[Batch]]:
        """This process's micro-batches of every step from the next one to the last."""
        pinned = self.distributed.device.type == "cuda"
        workers = self.config.runtime.workers
        return self.data.steps(self.step, self.schedule.steps, workers, pinned)

    def train_step(self, micro_batches: Sequence[Batch], stop: bool = False) -> StepResult:
        """Update the three networks once, with this process's part of the step (see `batches`).

        The result tells all processes whether one of them was asked to `stop`. After a
        NonFiniteLossError weights and optimizer are those before the step.
        """
        rates = self.schedule.rates(self.step)
        self.optimizer.zero_grad()
        losses: list[Tensor] = []
        terms: list[Tensor] = []
        for number, batch in enumerate(micro_batches, 1):
            last = number == len(micro_batches)
            with gradient_sync(self.module, last):
                loss = self.loss(batch)
                losses.append(loss.detach())
                if self.regularizer is not None:
                    terms.append(self.regularizer.value)
                if last:  # before the backward pass: the host reads it while the device works
                    read = self._gather(losses + terms, micro_batches, stop)
                torch.autograd.backward(loss / len(micro_batches))
        gathered, (broken, stopped, context_tokens) = read()
        step_losses = gathered[:, : len(losses)]
        by_rank = step_losses.mean(dim=1)
        if not by_rank.isfinite().all():
            rank = int(by_rank.isfinite().int().argmin())
            raise _not_finite(
                f"the loss of step {self.step} is {by_rank[rank]} on rank {rank}", rates["lr"]
            )
        metrics = {"loss": step_losses.mean().item()}
        if terms:
            metrics["regularizer"] = gathered[:, len(losses) :].mean().item()
        set_rates(self.optimizer, lr=rates["lr"], weight_decay=rates["weight_decay"])
        norms = gradient_norms(self.optimizer)
        if self.config.optim.clip_grad is not None:
            clip_gradients(self.optimizer, self.config.optim.clip_grad, norms)
        read_norms = copy_to_host(norms)  # the host reads them while the device updates
        step_if_finite(self.optimizer, norms)
        grad_encoder, grad_predictor = read_norms().tolist()
        if not math.isfinite(grad_encoder + grad_predictor):
            raise _not_finite(
                f"the gradients of step {self.step} have the norms {grad_encoder} (encoder) and "
                f"{grad_predictor} (predictor)",
                rates["lr"],
            )
        self.model.update_target(rates["momentum"])
        self.step += 1
        metrics |= {
            **rates,
            "grad_encoder": grad_encoder,
            "grad_predictor": grad_predictor,
            "context_tokens": context_tokens / self.distributed.world_size,
            "target_tokens": float(micro_batches[0].targets.shape[2]),
        }
        return StepResult(metrics, int(broken), bool(stopped))

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch, a scalar on the device; see `IJepa.forward`."""
        device, data = self.distributed.device, self.config.data
        images, context, targets = (
            part.to(device, non_blocking=True)
            for part in (batch.images, batch.context, batch.targets)
        )
        with autocast(device, self.config.optim.precision):
            loss: Tensor = self.module(normalize(images, data.mean, data.std), context, targets)
        return loss

    def _gather(
        self, values: Sequence[Tensor], micro_batches: Sequence[Batch], stop: bool
    ) -> Callable[[], tuple[Tensor, list[float]]]:
        """Start a gather; the result waits for the values `[world, V]` and the summed counts."""
        broken = sum(len(batch.broken) for batch in micro_batches)
        context = sum(batch.context.shape[1] for batch in micro_batches) / len(micro_batches)
        device = self.distributed.device
        # From pageable memory the copy would wait for the forward pass.
        counts = torch.tensor([broken, stop, context], pin_memory=device.type == "cuda")
        counts = counts.to(device, non_blocking=True)
        row = torch.cat([torch.stack([*values]).float(), counts])
        wait = copy_to_host(self.distributed.all_gather(row.unsqueeze(0)))

        def read() -> tuple[Tensor, list[float]]:
            rows = wait()
            return rows[:, :-3], rows[:, -3:].sum(dim=0).tolist()

        return read

    def monitor(self) -> tuple[Monitor, list[tuple[str, str]]]:
        """Monitor of the held-out images, of some training images where none are held out.

        Every process decodes a part of them. Also name and reason of those in it that are broken.
        """
        indices = self.held_out
        if not len(indices):
            rng = numpy_generator(self.config.seed, Stream.HELD_OUT, 1)
            count = min(_MONITORED, len(self.train_indices))
            indices = np.sort(rng.choice(self.train_indices, count, replace=False))
        world = self.distributed.world_size
        indices = np.pad(indices, (0, -len(indices) % world), constant_values=-1)
        own = np.split(indices, world)[self.distributed.rank]
        channels = self.model.encoder.patch_embed.proj.in_channels
        pixels, known, broken = evaluation_images(self.images, own, (channels, *self.image_size))
        found = self.distributed.all_gather_object((int(known.sum()), broken[:1]))
        if sum(count for count, _ in found) < 2:
            reasons = some(f"{name}: {why}" for _, first in found for name, why in first)
            raise DataError(
                f"the monitors need at least two images that can be decoded ({reasons}): use "
                f"data.held_out={_MONITORED}, or repair the images"
            )
        targets = self.images.targets
        several = targets is not None and targets.ndim > 1  # per image, which monitors do not read
        labels = None if targets is None or several else torch.from_numpy(targets[own])
        data, precision = self.config.data, self.config.optim.precision
        # Batches of the shape of the training steps, which is compiled already.
        size = self.micro_batch_size
        return Monitor(pixels, known, labels, data.mean, data.std, size, precision), broken

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state by name, sharing memory: the state of the run but `step`."""
        tensors = {
            f"{network}.{name}": value
            for network in NETWORKS
            for name, value in getattr(self.model, network).state_dict().items()
        }
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def __str__(self) -> str:
        """Summary of the run in a few lines."""
        optim, runtime, device = self.config.optim, self.config.runtime, self.distributed.device
        height, width = self.image_size
        patch = self.model.encoder.patch_embed.patch_size[0]
        steps, world = self.schedule.steps, self.distributed.world_size
        parallel = f", {runtime.parallel}" if in_group() else ""
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        return (
            f"{self.config.model.name}: images of {height}x{width}, patches of {patch}x{patch}\n"
            f"{len(self.train_indices):,} training images, {len(self.held_out):,} held out\n"
            f"{steps:,} steps of {optim.batch_size} images "
            f"({steps / self.schedule.epoch_steps:.4g} epochs)\n"
            f"{world} x {device}{threads}{parallel}, {optim.precision}, micro-batches of "
            f"{self.micro_batch_size}"
        )


def _not_finite(what: str, lr: float) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"{what}; the step was not applied: resume with a lower optim.lr ({lr:.2g} in this step) "
        "in another folder (--init RUN --resume-optimizer), or use optim.precision=fp32"
    )
