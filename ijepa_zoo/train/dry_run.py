"""A trial of a run: what it needs and how long it takes, before it is started."""

from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distributed import init_distributed
from ..masks import MultiBlockMasks
from .config import PretrainConfig
from .data import Batch, open_training_images
from .flops import Flops, flops_per_image
from .networks import build_networks
from .trainer import Trainer

_SIZES = 4096  # steps whose block sizes are looked at; positions cost more
_STEPS = 32  # of them, those with the longest contexts, are drawn
_DRAWS = 16  # times each
_TYPICAL = 63  # steps whose median is the typical one
_TIMED = 3  # updates whose median counts
_GIB = 2**30
_NETWORKS = ("encoder", "predictor", "target_encoder")
_Masks = tuple[torch.Tensor, torch.Tensor]  # context [b, K] and targets [b, M, L]


@dataclass(frozen=True)
class DryRunReport:
    """What `dry_run` found; its text is the report.

    Attributes:
        parameters: Number of parameters by network.
        flops: Operations for an image with masks of typical size, without recomputation.
        images: Training images.
        steps: Updates of the whole run.
        batch_size: Images of an update.
        parts: Forward passes of each process in an update.
        world_size: Number of processes.
        device: Name of rank 0's device.
        largest: Context tokens and tokens of a target block of the largest masks.
        typical: The same of typical ones.
        memory: Most memory that a process took with the largest masks, in bytes; on a GPU its
            memory, otherwise the main memory of the process.
        memory_limit: Memory of the GPU in bytes, None without one.
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

    @property
    def images_per_second(self) -> float:
        """Of all processes together, when no update waits for images."""
        return self.batch_size / self.step_seconds

    @property
    def seconds(self) -> float:
        """Of the whole run, when no update waits for images; monitors and checkpoints are extra."""
        return self.steps * self.step_seconds

    def __str__(self) -> str:
        """The report, a line for each matter."""
        flops, rate = self.flops, self.images_per_second
        limit = f" of {self.memory_limit / _GIB:.1f}" if self.memory_limit else ""
        own_rate = rate / self.world_size
        lines = {
            "parameters": ", ".join(f"{k} {v / 1e6:.4g} M" for k, v in self.parameters.items()),
            "data": f"{self.images:,} training images, {self.steps:,} updates of {self.batch_size}"
            f" images (processes: {self.world_size}, parts for each: {self.parts})",
            "masks": "context {} tokens, target blocks {}".format(*self.typical)
            + "; largest {} and {}".format(*self.largest),
            "GFLOP/image": f"{flops.total / 1e9:.4g}: target encoder {flops.target / 1e9:.4g}, "
            f"context encoder {flops.context_forward / 1e9:.4g} forward and "
            f"{flops.context_backward / 1e9:.4g} backward, predictor {flops.predictor / 1e9:.4g}",
            "memory": f"{self.memory / _GIB:.2f}{limit} GiB at most for a process ({self.device})",
            "speed": f"{rate:.4g} images/s, {rate * flops.total / self.world_size / 1e12:.3g} "
            f"TFLOP/s on each device, {self.step_seconds:.3g} s an update",
            "loader": f"{self.read_rate:.4g} images/s for one loader process; "
            f"{math.ceil(own_rate / self.read_rate)} for each process keep up (runtime.workers)",
            "time": f"{_duration(self.seconds)} for the whole run, without monitors",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())


def dry_run(
    config: PretrainConfig, data: Any, *, init: str | Path | None = None
) -> DryRunReport | None:
    """Build all that a run needs, do some updates and measure them; nothing is kept.

    Updates are of one part (see `runtime.micro_batch_size`), and of two where the run has more: the
    second shows what a further part takes, without the optimizer and the moving average. The first
    have the largest masks that the settings draw, so they show the memory that the run needs; the
    others have masks of typical size and show its speed.

    Args:
        config: Settings.
        data: Images; see `open_images`.
        init: Weights to start from; see `build_networks`.

    Returns:
        The report; None on all processes but the first.

    Raises:
        ValueError: Settings or images do not fit.
        torch.OutOfMemoryError: The device has too little memory for `runtime.micro_batch_size`.
    """
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    with init_distributed(config.runtime.device, config.runtime.timeout) as distributed:
        images = open_training_images(config, data)
        trainer = Trainer(config, images, distributed, init=init)
        started = time.perf_counter()
        batch = trainer.data[0]
        reading = time.perf_counter() - started
        group = config.group_size * config.mask.per_image
        largest = largest_masks(trainer.masks, group, config.seed)
        typical = typical_masks(trainer.masks, group, config.seed)
        if distributed.rank == 0:
            print(f"{trainer}\ntiming updates of {trainer.micro_batch_size} images ...")
        for _ in range(2):
            _timed_update(trainer, batch, largest, min(trainer.data.per_step, 2))
        memory = float(_memory_peak(distributed.device))
        update = _whole_update(trainer, batch, typical)
        measured = torch.tensor([[update, reading, memory]], dtype=torch.float64)
        slowest = distributed.all_gather(measured).amax(dim=0).tolist()
        return None if distributed.rank else _report(trainer, largest, typical, slowest)


def _report(
    trainer: Trainer, largest: _Masks, typical: _Masks, slowest: list[float]
) -> DryRunReport:
    config, device = trainer.config, trainer.distributed.device
    update, reading, memory = slowest
    with torch.device("meta"):  # the trained networks may be sharded, compiled, recomputing
        model = build_networks(config)
    context, target = _lengths(typical)
    return DryRunReport(
        parameters={name: _parameters(getattr(model, name)) for name in _NETWORKS},
        flops=flops_per_image(
            model, context, config.mask.num_targets, target, config.mask.per_image
        ),
        images=len(trainer.train_indices),
        steps=trainer.schedule.steps,
        batch_size=config.optim.batch_size,
        parts=trainer.data.per_step,
        world_size=trainer.distributed.world_size,
        device=_device_name(device),
        largest=_lengths(largest),
        typical=(context, target),
        memory=int(memory),
        memory_limit=_memory_limit(device),
        step_seconds=update,
        read_rate=trainer.micro_batch_size / reading,
    )


def largest_masks(masks: MultiBlockMasks, images: int, seed: int) -> _Masks:
    """The longest context and the largest target blocks that some step draws.

    Block sizes are those of the first 4,096 steps; where they leave most to the context, positions
    are drawn 512 times. The two come from different steps, so no step has more of both.

    Args:
        masks: Sampler.
        images: Images that share a context length, b.
        seed: Where the draws start.

    Returns:
        `context` [b, K] and `targets` [b, M, L].
    """
    sizes = [masks.block_sizes(step) for step in range(_SIZES)]
    areas = [(math.prod(target), math.prod(context)) for target, context in sizes]

    def room(step: int) -> int:
        target, context = areas[step]
        return context - (0 if masks.allow_overlap else masks.num_targets * target)

    best = sorted(range(_SIZES), key=room, reverse=True)[:_STEPS]
    drawn = [
        masks.sample(images, seed=seed + draw, step=step)[0]
        for step in best
        for draw in range(_DRAWS)
    ]
    context = max(drawn, key=lambda tokens: tokens.shape[1])
    widest = max(range(_SIZES), key=lambda step: areas[step][0])
    return context, masks.sample(images, seed=seed, step=widest)[1]


def typical_masks(masks: MultiBlockMasks, images: int, seed: int) -> _Masks:
    """Context [b, K] and targets [b, M, L] of median lengths among the first steps of a run."""
    drawn = [masks.sample(images, seed=seed, step=step) for step in range(_TYPICAL)]
    length = statistics.median(context.shape[1] for context, _ in drawn)
    area = statistics.median(targets.shape[2] for _, targets in drawn)
    context = next(context for context, _ in drawn if context.shape[1] == length)
    return context, next(targets for _, targets in drawn if targets.shape[2] == area)


def _whole_update(trainer: Trainer, batch: Batch, masks: _Masks) -> float:
    """Seconds of an update of all parts, from those of updates of one and of two."""

    def median(parts: int) -> float:
        return statistics.median(_timed_update(trainer, batch, masks, parts) for _ in range(_TIMED))

    _timed_update(trainer, batch, masks, 1)  # compiles and fills caches for these lengths
    one = median(1)
    further = max(0.0, median(2) - one) if trainer.data.per_step > 1 else 0.0
    return one + (trainer.data.per_step - 1) * further


def _timed_update(trainer: Trainer, batch: Batch, masks: _Masks, parts: int) -> float:
    """Seconds of an update of so many parts, each `batch` with `masks`."""
    device = trainer.distributed.device
    size = trainer.micro_batch_size * trainer.config.mask.per_image
    part = replace(batch, context=masks[0][:size], targets=masks[1][:size], broken=[])
    part = part.pin_memory() if device.type == "cuda" else part  # as the loader does
    trainer.distributed.barrier()
    _finish(device)
    started = time.perf_counter()
    trainer.train_step([part] * parts)
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _memory_peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _memory_limit(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _lengths(masks: _Masks) -> tuple[int, int]:
    return masks[0].shape[1], masks[1].shape[2]


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
