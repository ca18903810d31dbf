"""Measure what a run needs and how long it takes, before it starts."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..data.loading import usable_cpus
from ..distributed import init_distributed
from ..progress import progress_bar
from .config import PretrainConfig
from .data import open_training_images
from .flops import Masks, flops_per_image, typical_and_largest
from .networks import build_networks
from .trainer import NETWORKS, Trainer

_GIB = 2**30


@dataclass(frozen=True)
class DryRunReport:
    """Results of `dry_run`; `str` formats them."""

    parameters: dict[str, int]  # by network
    flops: int  # of an image with masks of typical size, without recomputation
    images: int  # for training
    steps: int  # updates of the whole run
    batch_size: int  # images of an update
    parts: int  # forward passes of each process in an update
    world_size: int
    device: str  # name of rank 0's device
    memory: int  # peak bytes of a process with the largest masks: the GPU's, else main memory
    memory_limit: int | None  # bytes of the GPU; None without one
    step_seconds: float  # of an update with typical masks
    read_rate: float  # images/s that one loader process reads, decodes and crops
    workers: int  # loader processes of each process; 0: it loads between its updates

    def __str__(self) -> str:
        """The report, one line per topic."""
        rate = self.batch_size / self.step_seconds
        own_rate = rate / self.world_size
        limit = f" of {self.memory_limit / _GIB:.1f}" if self.memory_limit else ""
        lines = {
            "parameters": ", ".join(f"{k} {v / 1e6:.4g} M" for k, v in self.parameters.items()),
            "data": f"{self.images:,} training images, {self.steps:,} updates of {self.batch_size} "
            f"images ({self.world_size} processes, {self.parts} micro-batches each)",
            "memory": f"peak of a process {self.memory / _GIB:.2f}{limit} GiB ({self.device})",
            "speed": f"{rate:.4g} images/s of {self.flops / 1e9:.4g} GFLOP, "
            f"{own_rate * self.flops / 1e12:.3g} TFLOP/s per device, {self.step_seconds:.3g} s per "
            "update",
            "loader": f"{self.read_rate:.4g} images/s per loader process, so each process needs "
            f"runtime.workers={math.ceil(own_rate / self.read_rate)}",
        }
        loading = self.batch_size / self.world_size / self.read_rate / max(1, self.workers)
        seconds = max(self.step_seconds, loading)
        if not self.workers:
            seconds = self.step_seconds + loading
        limited = ", limited by the loaders" if loading > self.step_seconds else ""
        duration = timedelta(seconds=round(self.steps * seconds))
        lines["time"] = f"{duration} for the run{limited}, without monitors and checkpoints"
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())


def dry_run(
    config: PretrainConfig, data: Any, *, init: str | Path | None = None
) -> DryRunReport | None:
    """Build everything that a run needs, time some updates, and keep nothing.

    Updates with the largest masks show the memory, those with typical ones the speed. They have one
    micro-batch, and two if the run has more: the difference is the time of each further one.

    Args:
        config: Settings.
        data: Images; see `open_images`.
        init: Weights to start from; see `build_networks`.

    Returns:
        The report; None on ranks other than 0.

    Raises:
        SettingsError: Settings or images do not fit.
        torch.OutOfMemoryError: The device has too little memory for `runtime.micro_batch_size`.
    """
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    with init_distributed(config.runtime.device, config.runtime.timeout) as distributed:
        trainer = Trainer(config, open_training_images(config, data), distributed, init=init)
        if distributed.is_main:
            print(trainer, flush=True)
        group = config.group_size * config.mask.per_image
        typical, largest = typical_and_largest(trainer.masks, group, config.seed)
        times = _measure(trainer, typical, largest)
        measured = torch.tensor([times], dtype=torch.float64)
        slowest = distributed.all_gather(measured).amax(dim=0).tolist()
        return _report(trainer, slowest) if distributed.is_main else None


def _measure(trainer: Trainer, typical: Masks, largest: Masks) -> list[float]:
    """Seconds of an update, seconds of reading a micro-batch, and bytes of peak memory."""
    device, parts = trainer.distributed.device, trainer.data.per_step
    size = trainer.micro_batch_size * trainer.config.mask.per_image
    batch = trainer.data[0]
    # A GPU compiles for new lengths and varies; on a CPU an update can take a minute.
    repeats = 3 if device.type == "cuda" else 1

    def update(masks: Masks, count: int) -> float:
        part = replace(batch, context=masks[0][:size], targets=masks[1][:size], broken=[])
        part = part.pin_memory() if device.type == "cuda" else part  # as the loader does
        times = []
        for _ in range(repeats):
            trainer.distributed.barrier()
            times.append(_seconds(lambda: trainer.train_step([part] * count), device))
            bar.update()
        return statistics.median(times)

    with progress_bar(trainer.distributed.is_main, 3 * repeats, "timing", "update") as bar:
        update(largest, min(parts, 2))
        memory = float(_peak_memory(device))
        one, two = update(typical, 1), update(typical, min(parts, 2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    reading = _seconds(lambda: [trainer.data[number] for number in range(3)], device) / 3
    torch.set_num_threads(threads)
    return [one + (parts - 1) * max(0.0, two - one), reading, memory]


def _report(trainer: Trainer, slowest: list[float]) -> DryRunReport:
    config, device = trainer.config, trainer.distributed.device
    update, reading, memory = slowest
    workers = config.runtime.workers
    with torch.device("meta"):  # the trained networks may be sharded, compiled, recomputing
        model = build_networks(config)
    cuda = device.type == "cuda"
    return DryRunReport(
        parameters={n: sum(p.numel() for p in getattr(model, n).parameters()) for n in NETWORKS},
        flops=flops_per_image(config),
        images=len(trainer.train_indices),
        steps=trainer.schedule.steps,
        batch_size=config.optim.batch_size,
        parts=trainer.data.per_step,
        world_size=trainer.distributed.world_size,
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        memory=int(memory),
        memory_limit=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        step_seconds=update,
        read_rate=trainer.micro_batch_size / reading,
        workers=usable_cpus() if workers is None else workers,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":  # no module resource
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
