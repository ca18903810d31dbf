"""Training depth heads on frozen patch features: protocol, epochs, resuming."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.dense import DenseData
from ..distributed import Distributed
from ..errors import RunError, SettingsError
from ..progress import progress_bar
from ..seeds import Stream, numpy_generator
from .depth_feed import DepthBatch, DepthFeed, Indices
from .depth_heads import DepthHeads, DepthHeadSpec, lr_scale
from .depth_metrics import scale_invariant_loss, valid_pixels
from .epoch_state import EpochState, checked_losses, load_optimizer
from .notes import of_all_processes

_CHOOSE_SHARE = 0.1


@dataclass(frozen=True)
class DepthProtocol:
    """Settings of the training.

    DINOv2 trains on 38,400 batches of 16, which is 25 epochs of its 24,231 images of NYU, with
    AdamW, learning rate 1e-4, weight decay 0.01, a third of the steps warm-up, then a cosine.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images of a step, over all processes.
        lrs: Learning rates of the grid.
        batch_norm: Whether BatchNorm comes before the linear layer.
        weight_decay: Of AdamW.
        bins: Depth bins.
        upsample: Factor of the bilinear upsampling of their scores.
    """

    epochs: int = 25
    batch_size: int = 16
    lrs: tuple[float, ...] = (1e-4, 1e-3)
    batch_norm: tuple[bool, ...] = (False, True)
    weight_decay: float = 0.01
    bins: int = 256
    upsample: int = 4

    def specs(self) -> list[DepthHeadSpec]:
        """The heads of the grid."""
        grid = product(("last", "last4"), self.batch_norm, self.lrs)
        return [DepthHeadSpec(*settings) for settings in grid]


NYU = DepthProtocol()
# Small pictures and few of them: fewer bins and scores, and learning rates for few steps.
SCENES = DepthProtocol(epochs=15, lrs=(5e-3, 2e-2), bins=64, upsample=2)


@dataclass
class DepthTraining:
    """Trains the heads of a grid, resumable after each epoch.

    Attributes:
        model: The frozen model.
        pairs: Training and test data.
        protocol: Settings.
        max_depth: Farther pixels do not count.
        seed: Decides split, order, flips and the heads at the start.
        precision: Of the encoder.
        workers: Loader processes.
        distributed: Those that share the work.
        epoch: Epochs done.
        seconds: Time that they took, over all sessions.
        losses: Mean loss of each head in the last epoch.
        sums: `[2, H, W]` float64: sums of the depths that were trained on, and their numbers.
        fit: Training pairs that the heads are trained on.
        choose: Those that are held out to choose a head.
    """

    model: nn.Module
    pairs: DenseData
    protocol: DepthProtocol
    max_depth: float
    seed: int
    precision: str
    workers: int
    distributed: Distributed
    epoch: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = str(self.distributed.device)
        self.feed = DepthFeed(self.pairs.train, self.model, device, self.precision, self.workers)
        order = numpy_generator(self.seed, Stream.EVAL_SPLIT, 1).permutation(len(self.pairs.train))
        held_out = max(1, round(_CHOOSE_SHARE * len(order)))
        self.choose, self.fit = np.sort(order[:held_out]), np.sort(order[held_out:])
        self.heads = DepthHeads(
            self.protocol.specs(),
            self.feed.widths,
            max_depth=self.max_depth,
            bins=self.protocol.bins,
            upsample=self.protocol.upsample,
            seed=self.seed,
            total=self.distributed.all_reduce if self.distributed.world_size > 1 else None,
        ).to(self.distributed.device)
        self.optimizer = self.heads.optimizer(self.protocol.weight_decay)
        self.sums = torch.zeros(2, *self.feed.encoder.size, dtype=torch.float64)

    def train(self, state: EpochState, cached: bool, progress: bool) -> None:
        """Train from the last finished epoch on.

        Args:
            state: Where the state of an unfinished run is, and is written to.
            cached: Keep the features of the training images in memory.
            progress: Show progress bars.

        Raises:
            RunError: The state is damaged, or of other settings.
        """
        self._resume(state)
        started = time.monotonic() - self.seconds
        show = progress and self.distributed.rank == 0
        if cached and self.epoch < self.protocol.epochs:
            # every process draws from all images, so each encodes all
            with progress_bar(show, len(self.fit), "encoding") as bar:
                for count in self.feed.store(self.fit, self.protocol.batch_size):
                    bar.update(count)
        steps = self._steps()
        total, done = steps * self.protocol.epochs, steps * self.epoch
        with progress_bar(show, total, "depth heads", "step", done) as bar:
            while self.epoch < self.protocol.epochs:
                self._train_epoch(bar)
                self.epoch += 1
                self.seconds = time.monotonic() - started
                self._save(state)

    def mean_maps(self) -> Tensor:
        """Predictions that see no image, `[2, H, W]`: the mean depth and the mean depth map.

        Means over the pixels that were trained on, mirrored images included.
        """
        sums, counts = self.distributed.all_reduce(self.sums)
        mean = sums.sum() / counts.sum()
        by_place = torch.where(counts > 0, sums / counts.clamp(min=1), mean)
        return torch.stack([torch.full_like(by_place, float(mean)), by_place]).float()

    def _steps(self) -> int:
        return max(1, len(self.fit) // self.protocol.batch_size)

    def _plan(self) -> list[tuple[Indices, Any]]:
        """This process's indices and flips of an epoch; an incomplete last batch is left out."""
        keys = (self.seed, Stream.EVAL_ORDER, self.epoch)
        order = self.fit[numpy_generator(*keys).permutation(len(self.fit))]
        flips = numpy_generator(self.seed, Stream.EVAL_AUGMENT, self.epoch).random(len(order)) < 0.5
        size, rank, world = (
            self.protocol.batch_size,
            self.distributed.rank,
            self.distributed.world_size,
        )
        parts = [slice(s * size + rank, (s + 1) * size, world) for s in range(self._steps())]
        return [(order[part], flips[part]) for part in parts]

    def _train_epoch(self, bar: Any) -> None:
        self.heads.train()
        total = torch.zeros(len(self.heads.specs), device=self.distributed.device)
        steps = self._steps() * self.protocol.epochs
        for step, batch in enumerate(self.feed.for_training(self._plan())):
            scale = lr_scale(self.epoch * self._steps() + step, steps)
            for group, spec in zip(self.optimizer.param_groups, self.heads.specs):
                group["lr"] = spec.lr * scale
            total += self._update(batch)
            bar.update()
        self.losses = (total / self._steps()).tolist()

    def _update(self, batch: DepthBatch) -> Tensor:
        """One step of all heads; returns their losses."""
        device, total = self.distributed.device, self.heads.total
        depths = batch.stacked(self.feed.encoder.size)
        valid = valid_pixels(depths, self.max_depth)
        known = torch.where(valid, depths, 0).double()
        self.sums += torch.stack([known.sum(0), valid.sum(0)])
        enough = torch.stack([valid.sum()])
        if int(enough if total is None else total(enough)) < 2:
            return torch.zeros(len(self.heads.specs), device=device)
        predicted = self.heads(batch.features)
        full = F.interpolate(predicted, depths.shape[1:], mode="bilinear")
        losses = scale_invariant_loss(full, depths.to(device), valid.to(device), total)
        self.optimizer.zero_grad()
        torch.autograd.backward(losses.sum())
        self._sum_gradients()
        self.optimizer.step()
        return losses.detach()

    def _sum_gradients(self) -> None:
        if self.heads.total is None:
            return
        gradients = [p.grad for p in self.heads.parameters() if p.grad is not None]
        flat = self.heads.total(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))

    def settings(self) -> dict[str, Any]:
        """All that decides the numbers, as plain values."""
        return {
            "protocol": asdict(self.protocol),
            "max_depth": self.max_depth,
            "seed": self.seed,
            **{k: v for k, v in self.feed.encoder.settings.items() if k != "versions"},
            "train": self.pairs.train.fingerprint,
            "test": self.pairs.test.fingerprint,
        }

    def _save(self, state: EpochState) -> None:
        sums = self.distributed.all_reduce(self.sums)
        broken = of_all_processes(self.feed.broken, self.distributed)
        if self.distributed.rank == 0:
            state.save(
                {
                    "epoch": self.epoch,
                    "seconds": self.seconds,
                    "losses": self.losses,
                    "sums": sums,
                    "broken": broken,
                    "heads": self.heads.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                }
            )
        # from now on in process 0 alone, so that later epochs add to it
        self.sums = sums if self.distributed.rank == 0 else torch.zeros_like(sums)

    def _resume(self, state: EpochState) -> None:
        found = state.load(self.protocol.epochs)
        if self.distributed.broadcast_object(found is None) != (found is None):
            raise RunError(
                f"only some processes find '{state.path}': all machines must see the folder"
            )
        if found is None:
            return
        with state.restoring():
            self.losses = checked_losses(found["losses"], len(self.heads.specs))
            self.heads.load_state_dict(found["heads"])
            load_optimizer(self.optimizer, found["optimizer"])
            if (found["sums"].shape, found["sums"].dtype) != (self.sums.shape, self.sums.dtype):
                raise SettingsError("its sums of depths are of another shape or type")
        self.epoch, self.seconds = found["epoch"], found["seconds"]
        self.feed.broken.update(found["broken"])
        if self.distributed.rank == 0:
            self.sums = found["sums"]
