"""Measure what a run needs and how long it takes, before it starts."""

from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..distributed import init_distributed
from .config import PretrainConfig
from .data import Batch, open_training_images
from .flops import Flops, Masks, flops_per_image, largest_masks, typical_masks
from .networks import build_networks
from .trainer import Trainer

_TIMED = 3  # updates whose median counts
_GIB = 2**30
_NETWORKS = ("encoder", "predictor", "target_encoder")


@dataclass(frozen=True)
class DryRunReport:
    """Results of `dry_run`; `str` formats them.

    Attributes:
        parameters: Number of parameters by network.
        flops: FLOPs of an image with masks of typical size, without recomputation.
        images: Training images.
        steps: Updates of the whole run.
        batch_size: Images of an update.
        parts: Forward passes of each process in an update.
        world_size: Number of processes.
        device: Name of rank 0's device.
        largest: Context tokens and tokens of a target block of the largest masks.
        typical: Context tokens and tokens of a target block of typical masks.
        memory: Peak memory of a process with the largest masks, in bytes: on a GPU the GPU's,
            otherwise the process's main memory.
        memory_limit: Memory of the GPU in bytes; None without one.
        step_seconds: Time of an update with typical masks.
        read_rate: Images/s that one loader process reads, decodes and crops.
    """

    parameters: dict[str, int]
    flops: Flops
    images: int
    steps: int
    batch_size: int
    parts: int
    world_size: int
    device: str
    largest: tuple[int, int]
    typical: tuple[int, int]
    memory: int
    memory_limit: int | None
    step_seconds: float
    read_rate: float

    def __str__(self) -> str:
        """The report, one line per topic."""
        flops, rate = self.flops, self.batch_size / self.step_seconds
        own_rate = rate / self.world_size
        limit = f" of {self.memory_limit / _GIB:.1f}" if self.memory_limit else ""
        lines = {
            "parameters": ", ".join(f"{k} {v / 1e6:.4g} M" for k, v in self.parameters.items()),
            "data": f"{self.images:,} training images, {self.steps:,} updates of {self.batch_size} "
            f"images ({self.world_size} processes, {self.parts} micro-batches each)",
            "masks": f"context {self.typical[0]} tokens, target blocks {self.typical[1]}; largest "
            f"{self.largest[0]} and {self.largest[1]}",
            "GFLOP/image": f"{flops.total / 1e9:.4g}: target encoder {flops.target / 1e9:.4g}, "
            f"context encoder {flops.context_forward / 1e9:.4g} forward and "
            f"{flops.context_backward / 1e9:.4g} backward, predictor {flops.predictor / 1e9:.4g}",
            "memory": f"peak of a process {self.memory / _GIB:.2f}{limit} GiB ({self.device})",
            "speed": f"{rate:.4g} images/s, {own_rate * flops.total / 1e12:.3g} TFLOP/s per "
            f"device, {self.step_seconds:.3g} s per update",
            "loader": f"{self.read_rate:.4g} images/s per loader process, so each process needs "
            f"runtime.workers={math.ceil(own_rate / self.read_rate)}",
            "time": f"{_duration(self.steps * self.step_seconds)} for the whole run, without "
            "monitors and checkpoints",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())


def dry_run(
    config: PretrainConfig, data: Any, *, init: str | Path | None = None
) -> DryRunReport | None:
    """Build everything that a run needs, time some updates, and keep nothing.

    The first updates have the largest masks and show the memory, later ones have masks of typical
    size and show the speed. They have one micro-batch, and two if the run has more: the difference
    is the time of each further one.

    Args:
        config: Settings.
        data: Images; see `open_images`.
        init: Weights to start from; see `build_networks`.

    Returns:
        The report; None on all processes but the first.

    Raises:
        SettingsError: Settings or images do not fit.
        torch.OutOfMemoryError: The device has too little memory for `runtime.micro_batch_size`.
    """
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    with init_distributed(config.runtime.device, config.runtime.timeout) as distributed:
        images = open_training_images(config, data)
        trainer = Trainer(config, images, distributed, init=init)
        batch, reading = trainer.data[0], _reading_seconds(trainer)
        group = config.group_size * config.mask.per_image
        largest = largest_masks(trainer.masks, group, config.seed)
        typical = typical_masks(trainer.masks, group, config.seed)
        if distributed.rank == 0:
            print(f"{trainer}\ntiming updates of {trainer.micro_batch_size} images ...")
        for _ in range(2):
            _timed_update(trainer, batch, largest, min(trainer.data.per_step, 2))
        memory = float(_peak_memory(distributed.device))
        update = _update_seconds(trainer, batch, typical)
        measured = torch.tensor([[update, reading, memory]], dtype=torch.float64)
        slowest = distributed.all_gather(measured).amax(dim=0).tolist()
        return None if distributed.rank else _report(trainer, largest, typical, slowest)


def _report(trainer: Trainer, largest: Masks, typical: Masks, slowest: list[float]) -> DryRunReport:
    config, device = trainer.config, trainer.distributed.device
    update, reading, memory = slowest
    with torch.device("meta"):  # the trained networks may be sharded, compiled, recomputing
        model = build_networks(config)
    (context, target), mask, cuda = _lengths(typical), config.mask, device.type == "cuda"
    return DryRunReport(
        parameters={n: sum(p.numel() for p in getattr(model, n).parameters()) for n in _NETWORKS},
        flops=flops_per_image(model, context, mask.num_targets, target, mask.per_image),
        images=len(trainer.train_indices),
        steps=trainer.schedule.steps,
        batch_size=config.optim.batch_size,
        parts=trainer.data.per_step,
        world_size=trainer.distributed.world_size,
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        largest=_lengths(largest),
        typical=(context, target),
        memory=int(memory),
        memory_limit=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        step_seconds=update,
        read_rate=trainer.micro_batch_size / reading,
    )


def _update_seconds(trainer: Trainer, batch: Batch, masks: Masks) -> float:
    """Seconds of an update of all parts, from those of updates of one and of two."""

    def measure(parts: int) -> float:
        return statistics.median(_timed_update(trainer, batch, masks, parts) for _ in range(_TIMED))

    _timed_update(trainer, batch, masks, 1)  # compiles and fills caches for these lengths
    one, parts = measure(1), trainer.data.per_step
    further = max(0.0, measure(2) - one) if parts > 1 else 0.0
    return one + (parts - 1) * further


def _reading_seconds(trainer: Trainer) -> float:
    """Seconds in which a loader process reads a micro-batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    started = time.perf_counter()
    for number in range(_TIMED):
        trainer.data[number]
    torch.set_num_threads(threads)
    return (time.perf_counter() - started) / _TIMED


def _timed_update(trainer: Trainer, batch: Batch, masks: Masks, parts: int) -> float:
    """Seconds of an update of `parts` times `batch` with `masks`."""
    device = trainer.distributed.device
    size = trainer.micro_batch_size * trainer.config.mask.per_image
    part = replace(batch, context=masks[0][:size], targets=masks[1][:size], broken=[])
    part = part.pin_memory() if device.type == "cuda" else part  # as the loader does
    trainer.distributed.barrier()
    _synchronize(device)
    started = time.perf_counter()
    trainer.train_step([part] * parts)
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _lengths(masks: Masks) -> tuple[int, int]:
    return masks[0].shape[1], masks[1].shape[2]


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
