"""Training all weights of a model with labels; goes on after an interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..data.loading import load_in_order
from ..data.transforms import transform_config
from ..distributed import Distributed
from ..errors import RunError, SettingsError
from ..progress import skip
from ..seeds import Stream, fold
from .batches import EvalBatch, OrderedBatches
from .epoch_state import EpochState, load_optimizer
from .notes import of_all_processes
from .recipes import AugmentedBatches, FineTuneRecipe, add_head, library_seeds, set_drop_path
from .sets import EvalSet


@dataclass
class FineTuning:
    """A model, its optimizer and its data.

    Attributes:
        model: A timm ViT; its weights change.
        train: Training set.
        recipe: Settings.
        seed: Decides order, augmentation, dropped branches and the head at the start.
        distributed: Those that share the work.
        bfloat16: Compute in bfloat16; weights and optimizer stay in float32.
        micro: Images of a forward and backward pass; None for a process's whole share of a batch.
        workers: Loader processes.
        epoch: Epochs done.
        loss: Mean loss of the last one.
        seconds: Time that they took, over all sessions.
        broken: Why an image could not be decoded, by its name.
    """

    model: Any
    train: EvalSet
    recipe: FineTuneRecipe
    seed: int
    distributed: Distributed
    bfloat16: bool = False
    micro: int | None = None
    workers: int = 0
    epoch: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    broken: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from timm.data.mixup import Mixup
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        recipe, device, classes = self.recipe, self.distributed.device, len(self.train.classes)
        add_head(self.model, classes, self.seed)
        set_drop_path(self.model, recipe.drop_path)
        self.model.to(device).requires_grad_(True)
        config = transform_config(self.model)
        self.size = tuple(config["input_size"][1:])
        self.mean, self.std = (
            torch.tensor(config[key], device=device).view(-1, 1, 1) for key in ("mean", "std")
        )
        self.batches = self._batches(config["mean"])
        self.mixup: Any = None
        self.criterion: nn.Module = LabelSmoothingCrossEntropy(recipe.label_smoothing)
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(
                recipe.mixup,
                recipe.cutmix,
                label_smoothing=recipe.label_smoothing,
                num_classes=classes,
            )
            self.criterion = SoftTargetCrossEntropy()
        self.optimizer, self.scheduler = self._optimizer()
        self.module: Any = self.model
        if self.distributed.world_size > 1:
            places = [device] if device.type == "cuda" else None
            self.module = nn.parallel.DistributedDataParallel(self.model, device_ids=places)

    def _batches(self, mean: tuple[float, ...]) -> AugmentedBatches:
        """Mixup takes pairs, so every process and every piece has an even number of images."""
        pairs, world = 2 * self.distributed.world_size, self.distributed.world_size
        batch = min(self.recipe.batch_size, len(self.train)) // pairs * pairs
        if not batch or (self.micro or 2) < 2:
            raise SettingsError(
                f"{len(self.train)} training images, batches of {self.recipe.batch_size}"
                + (f" and passes of {self.micro}" if self.micro else "")
                + (f" for {world} processes" if world > 1 else "")
                + ": each needs at least two images"
            )
        return AugmentedBatches(
            self.train,
            torch.arange(len(self.train)).numpy(),
            self.size,
            batch,
            auto_augment=self.recipe.auto_augment,
            mean=mean,
            seed=self.seed,
            rank=self.distributed.rank,
            world=world,
            micro=(self.micro or batch) // 2 * 2,
        )

    def _optimizer(self) -> tuple[torch.optim.AdamW, Any]:
        """AdamW with a learning rate for each layer, and timm's schedule of updates."""
        from timm.optim import param_groups_layer_decay
        from timm.scheduler import CosineLRScheduler

        recipe, steps = self.recipe, self.batches.steps
        groups = param_groups_layer_decay(
            self.model,
            weight_decay=recipe.weight_decay,
            no_weight_decay_list=self.model.no_weight_decay(),
            layer_decay=recipe.layer_decay,
        )
        lr = recipe.lr * self.batches.batch_size / recipe.batch_size
        optimizer = torch.optim.AdamW(groups, lr=lr)
        warm_up = round(recipe.warmup_epochs * steps)
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(1, recipe.epochs * steps - warm_up),
            lr_min=recipe.min_lr,
            warmup_t=warm_up,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        return optimizer, scheduler

    def run(self, state: EpochState, bar: Any) -> None:
        """Train from the last finished epoch to the end; the state is kept after each.

        Args:
            state: Where the state of an unfinished run is, and is written to.
            bar: Progress bar of images.

        Raises:
            FloatingPointError: The loss is not finite; the state of the epoch before is intact.
            RunError: The state is damaged, or of other settings.
        """
        self._resume(state)
        device, recipe = self.distributed.device, self.recipe
        skip(bar, self.epoch * self.batches.steps * self.batches.batch_size)
        numbers = self.batches.numbers(self.epoch, recipe.epochs)
        generators = [device] if device.type == "cuda" else []
        pieces = load_in_order(self.batches, numbers, self.workers, device.type == "cuda")
        with torch.random.fork_rng(devices=generators):
            while self.epoch < recipe.epochs:
                started = time.perf_counter()
                self.model.train()
                self.loss = self._epoch(pieces, bar)
                self.epoch += 1
                self.seconds += time.perf_counter() - started
                bar.set_postfix(
                    epoch=f"{self.epoch}/{recipe.epochs}", loss=f"{self.loss:.3g}", refresh=False
                )
                self.broken = of_all_processes(self.broken, self.distributed)
                if self.distributed.rank == 0:
                    state.save(self._state())

    def _epoch(self, pieces: Iterator[EvalBatch], bar: Any) -> float:
        steps, parts = self.batches.steps, self.batches.parts
        total = torch.zeros((), device=self.distributed.device)
        for step in range(steps):
            self.scheduler.step_update(self.epoch * steps + step)
            self.optimizer.zero_grad()
            for part, batch in enumerate(islice(pieces, parts)):
                total += self._backward(batch, step, part, last=part == parts - 1)
            self.optimizer.step()
            bar.update(self.batches.batch_size)
        loss = float(self.distributed.all_reduce(total)) / (steps * self.distributed.world_size)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of epoch {self.epoch + 1} is {loss}: use a smaller "
                "batch_size (--batch-size), to which the learning rate belongs, or precision "
                "float32 (--precision)"
            )
        return loss

    def _backward(self, batch: EvalBatch, step: int, part: int, *, last: bool) -> Tensor:
        """Add the gradients of a piece, weighted by its share of the batch; returns its loss."""
        device, rank = self.distributed.device, self.distributed.rank
        self.broken.update(batch.broken)
        keys = (self.seed, Stream.EVAL_AUGMENT, self.epoch, step, part, rank)
        images, labels = self._normalised(batch.images), batch.labels.to(device)
        if self.mixup is not None:
            with library_seeds(*keys):
                images, labels = self.mixup(images, labels)
        torch.manual_seed(fold(*keys))  # of the dropped branches
        waits = self.distributed.world_size > 1 and not last
        with self.module.no_sync() if waits else nullcontext():
            with self._autocast():
                loss = self.criterion(self.module(images), labels)
            loss = loss.float() * len(images) / self.batches.share
            torch.autograd.backward(loss)
        return loss.detach()

    @torch.inference_mode()
    def right_answers(self, test: EvalSet) -> tuple[int, int]:
        """Right answers on a set and its images, of all processes; padding does not count."""
        world, rank, device = (
            self.distributed.world_size,
            self.distributed.rank,
            self.distributed.device,
        )
        rows = torch.arange(len(test)).numpy()
        size = min(self.batches.micro, -(-len(test) // world))
        batches = OrderedBatches(
            test, rows, self.batches.view, self.size, size, rank=rank, world=world
        )
        self.model.eval()
        found = torch.zeros(2, dtype=torch.int64)
        for batch in load_in_order(
            batches, range(len(batches)), self.workers, device.type == "cuda"
        ):
            self.broken.update(batch.broken)
            with self._autocast():
                answers = self.model(self._normalised(batch.images)).argmax(dim=1).cpu()
            right = (answers == batch.labels) & batch.valid
            found += torch.stack([right.sum(), batch.valid.sum()])
        right_total, total = self.distributed.all_reduce(found).tolist()
        return right_total, total

    def settings(self) -> dict[str, Any]:
        """What of the training decides the numbers, as plain values."""
        return {
            "batch_size": self.batches.batch_size,
            "micro": self.batches.micro,
            "processes": self.distributed.world_size,
            "precision": "bfloat16" if self.bfloat16 else "float32",
        }

    def _normalised(self, pixels: Tensor) -> Tensor:
        images = pixels.to(self.distributed.device, non_blocking=True).float().div_(255)
        return images.sub_(self.mean).div_(self.std)

    def _autocast(self) -> Any:
        return torch.autocast(
            self.distributed.device.type, dtype=torch.bfloat16, enabled=self.bfloat16
        )

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "loss": self.loss,
            "seconds": self.seconds,
            "broken": self.broken,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _resume(self, state: EpochState) -> None:
        found = state.load(self.recipe.epochs)
        epoch = 0 if found is None else int(found["epoch"])
        if self.distributed.broadcast_object(epoch) != epoch:
            raise RunError(f"process 0 finds another '{state.path}': all machines must see it")
        if found is None:
            return
        with state.restoring():
            self.loss = float(found["loss"])
            self.model.load_state_dict(found["model"])
            load_optimizer(self.optimizer, found["optimizer"])
        self.epoch, self.seconds = epoch, found["seconds"]
        self.broken.update(found["broken"])
