"""One update of a pretraining run, and everything that it needs.

Data order, crops, masks and rates are functions of (seed, step). A run's state is therefore its
tensors and `step`, and a run that was stopped and resumed equals one that was not, bit for bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.datasets import ImageDataset
from ..distributed import Distributed, choose_device, copy_to_host
from ..errors import SettingsError, UserError
from ..masks import MultiBlockMasks
from ..models.jepa import IJepa
from ..seeds import Stream, fold, numpy_generator
from .config import MaskConfig, PretrainConfig, micro_batch_size
from .data import (
    Batch,
    TrainBatches,
    batch_indices,
    evaluation_images,
    loader,
    mask_sampler,
    normalize,
    split,
)
from .monitor import Monitor
from .networks import build_networks
from .optim import Schedule, clip_gradients, make_optimizer, set_rates, step_if_finite
from .parallel import accumulate, choose_kernels, in_group, parallelize
from .precision import (
    autocast,
    float8_remark,
    require_float8,
    resolve_precision,
    warn_of_emulated_bf16,
)
from .regularizers import Regularizer

_NETWORKS = ("encoder", "predictor", "target_encoder")
_SHOWN = 8  # images named in a message
_MONITORED = 512  # images of the monitors where none are held out


class NonFiniteLossError(UserError, FloatingPointError):
    """A step's loss or gradient is not finite; the weights are those before the update."""


@dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        figures: Values of the log: `loss`, rates, numbers of tokens.
        broken: Images over all processes that could not be decoded and were replaced.
        stop: Whether a process was asked to stop.
    """

    figures: dict[str, float]
    broken: int
    stop: bool


class Trainer:
    """Networks, optimizer, data and the number of updates done.

    Args:
        config: Settings.
        images: What to train on.
        distributed: The processes that share the run; one by default.
        init: Weights to start from, see `build_networks`.

    Raises:
        ValueError: The settings do not fit the images, the model, the processes or the device.
        ImportError: The precision fp8 without torchao.
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
        self.config = config = resolve_precision(config, self.distributed.device)
        if self.distributed.rank == 0:
            warn_of_emulated_bf16(config.optim.precision, self.distributed.device)
        self.step = 0
        if config.optim.precision == "fp8":
            require_float8(self.distributed.device)
        self.train_indices, self.held_out = split(len(images), config.data.held_out, config.seed)
        self.schedule = Schedule.of(config.optim, len(self.train_indices))
        self.micro_batch_size = micro_batch_size(config, self.distributed.world_size)
        self.model: IJepa = build_networks(config, init)
        embed = self.model.encoder.patch_embed
        self.image_size: tuple[int, int] = embed.img_size
        self.masks = self._masks(embed.grid_size)
        self.model.train()
        choose_kernels(self.distributed.device)
        self.module = parallelize(
            self.model, config.runtime, self.distributed, config.optim.precision
        )
        self.optimizer = make_optimizer(self.model.encoder, self.model.predictor)
        self.data = TrainBatches(
            images,
            self.train_indices,
            config,
            self.image_size,
            self.masks,
            rank=self.distributed.rank,
            world=self.distributed.world_size,
            micro=self.micro_batch_size,
        )

    def _masks(self, grid_size: tuple[int, int]) -> MultiBlockMasks:
        mask = self.config.mask
        try:
            return mask_sampler(mask, grid_size)
        except ValueError as error:  # with the names that the settings have
            named = "|".join(MaskConfig.model_fields)
            raise SettingsError(re.sub(rf"\b({named})\b", r"mask.\1", str(error))) from error

    def batches(self) -> Iterable[list[Batch]]:
        """This process's micro-batches of every step from the next one to the last."""
        workers = self.config.runtime.workers
        pinned = self.distributed.device.type == "cuda"
        return loader(self.data, self.step, self.schedule.steps, workers, pinned)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss of a micro-batch, a scalar on the device."""
        device = self.distributed.device
        data = self.config.data
        pixels, context, targets = (
            part.to(device, non_blocking=True)
            for part in (batch.images, batch.context, batch.targets)
        )
        with autocast(device, self.config.optim.precision):
            loss: torch.Tensor = self.module(
                normalize(pixels, data.mean, data.std), context, targets
            )
        return loss

    def update(self, batches: Sequence[Batch], stop: bool = False) -> Update:
        """Do one update.

        Args:
            batches: This process's micro-batches of the step.
            stop: This process was asked to stop; all processes learn of it.

        Raises:
            NonFiniteLossError: The loss of some process or the norm of the gradient is not finite.
                Weights and optimizer are those before the update, `step` is not advanced.
        """
        rates = self.schedule.rates(self.step)
        self.model.noise_seed = fold(self.config.seed, Stream.POSITIONS, self.step)
        regularizer = self.model.regularizer
        if isinstance(regularizer, Regularizer):
            regularizer.step = self.step
        self.optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        terms: list[torch.Tensor] = []
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            with accumulate(self.module, last):
                loss = self.loss(batch)
                losses.append(loss.detach())
                if isinstance(regularizer, Regularizer):
                    terms.append(regularizer.value)
                if last:  # before the backward pass: the host reads it while the device works
                    report = self._report(losses, terms, batches, stop)
                torch.autograd.backward(loss / len(batches))
        seen = report()
        micro_losses, seen = seen[:, : len(batches)], seen[:, len(batches) :]
        micro_terms, rest = seen[:, : len(terms)], seen[:, len(terms) :]
        loss_value = micro_losses.mean().item()
        if not math.isfinite(loss_value):
            raise NonFiniteLossError(self._describe(micro_losses, rates["lr"]))
        set_rates(self.optimizer, lr=rates["lr"], weight_decay=rates["weight_decay"])
        gradient_norm = clip_gradients(self.optimizer, self.config.optim.clip_grad)
        norm_report = copy_to_host(gradient_norm)  # the host reads it while the device updates
        step_if_finite(self.optimizer, gradient_norm)
        if not math.isfinite(norm := norm_report().item()):
            raise NonFiniteLossError(
                f"the gradient of step {self.step} has the norm {norm}, the loss is {loss_value}"
                + _advice(rates["lr"])
            )
        self.model.update_target(rates["momentum"])
        self.step += 1
        broken, stopped, context = rest.sum(dim=0).tolist()
        tokens = {
            "context_tokens": context / self.distributed.world_size,
            "target_tokens": float(batches[0].targets.shape[2]),
        }
        added = {"regularizer": micro_terms.mean().item()} if terms else {}
        figures = {"loss": loss_value, **rates, **tokens, **added}
        return Update(figures, int(broken), bool(stopped))

    def _report(
        self,
        losses: Sequence[torch.Tensor],
        terms: Sequence[torch.Tensor],
        batches: Sequence[Batch],
        stop: bool,
    ) -> Callable[[], torch.Tensor]:
        """What every process has seen, on its way to the host: a row of numbers for each."""
        broken = sum(len(batch.broken) for batch in batches)
        context = sum(batch.context.shape[1] for batch in batches) / len(batches)
        device = self.distributed.device
        # From pageable memory the copy would wait for the forward pass.
        rest = torch.tensor([broken, stop, context], pin_memory=device.type == "cuda")
        rest = rest.to(device, non_blocking=True)
        mine = torch.cat([torch.stack([*losses, *terms]).float(), rest])
        return copy_to_host(self.distributed.all_gather(mine.unsqueeze(0)))

    def _describe(self, losses: torch.Tensor, lr: float) -> str:
        """Which processes and images a loss that is not finite comes from."""
        bad = (~losses.isfinite()).nonzero().tolist()
        world, parts = losses.shape
        optim = self.config.optim
        places = batch_indices(
            len(self.train_indices), optim.batch_size, seed=self.config.seed, step=self.step
        )
        chosen = self.train_indices[places]
        names = [
            self.images.name(int(index))
            for rank, part in bad
            for index in chosen.reshape(world, parts, -1)[rank, part]
        ]
        ranks = ", ".join(sorted({str(rank) for rank, _ in bad}))
        shown = ", ".join(names[:_SHOWN]) + (
            f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
        )
        return (
            f"the loss of step {self.step} is {losses[tuple(bad[0])].item()} on rank {ranks} "
            f"(images {shown})" + _advice(lr)
        )

    def monitor(self) -> tuple[Monitor, list[tuple[str, str]]]:
        """Figures of the held-out images; of some training images where none are held out.

        Returns:
            The monitor, and name and reason of the images that could not be decoded.
        """
        chosen = self.held_out
        if not len(chosen):
            draw = numpy_generator(self.config.seed, Stream.HELD_OUT, 1)
            count = min(_MONITORED, len(self.train_indices))
            chosen = np.sort(draw.choice(self.train_indices, count, replace=False))
        pixels, labels, broken = evaluation_images(self.images, chosen, self.image_size)
        data, precision = self.config.data, self.config.optim.precision
        # Of the training steps' shape: a second one would be another graph, for any batch size.
        size = self.micro_batch_size
        return Monitor(pixels, labels, data.mean, data.std, size, precision), broken

    def __str__(self) -> str:
        """What the run is, in a few lines."""
        optim, runtime, schedule = self.config.optim, self.config.runtime, self.schedule
        side, patch = self.image_size, self.model.encoder.patch_embed.patch_size
        held = f"{len(self.held_out):,} others" if len(self.held_out) else "some of them"
        epochs = schedule.steps / schedule.epoch_steps
        float8 = optim.precision == "fp8"
        remark = float8_remark(self.distributed.device, runtime.compile) if float8 else ""
        if optim.precision == "fp32" and self.distributed.device.type == "cuda":
            remark = " (TF32 products)"
        lines = [
            f"{len(self.train_indices):,} images to train on, {held} for the monitors",
            f"{self.config.model.name}, images {side[0]}x{side[1]}, patches {patch[0]}x{patch[1]}",
            f"{schedule.steps:,} steps of {optim.batch_size} images ({epochs:.4g} epochs)",
            f"{self.distributed.world_size} x {self.distributed.device}, "
            f"{optim.precision}{remark}, {self.micro_batch_size} images at once"
            + (f", {runtime.parallel}" if in_group(self.distributed) else "")
            + (
                f", {(n := torch.get_num_threads())} thread{'s' * (n > 1)}"
                if self.distributed.device.type == "cpu"
                else ""
            ),
        ]
        return "\n".join(lines)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state of the run beside `step`, by name, sharing memory with it."""
        tensors = {
            f"{network}.{name}": value
            for network in _NETWORKS
            for name, value in getattr(self.model, network).state_dict().items()
        }
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors


def _advice(lr: float) -> str:
    return (
        f"; this update is not done. Lower optim.lr (now {lr:.2g}), use optim.precision=fp32, or "
        "--skip-nonfinite N to leave out N such steps"
    )
