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
from .config import PretrainConfig
from .data import open_training_images
from .flops import Masks, flops_per_image, typical_and_largest
from .trainer import NETWORKS, Trainer

_GIB = 2**30


@dataclass(frozen=True)
class DryRunReport:
    """Results of `dry_run`; `str` shows all of them."""

    memory: int  # peak bytes of a process with the largest masks: the GPU's, else main memory
    step_seconds: float  # of an update with typical masks
    text: str

    def __str__(self) -> str:
        return self.text


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
        step_seconds, reading, memory = distributed.all_gather(measured).amax(dim=0).tolist()
        if not distributed.is_main:
            return None
        return _report(trainer, step_seconds, reading, int(memory))


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
        return statistics.median(times)

    update(largest, min(parts, 2))
    memory = float(_peak_memory(device))
    one, two = update(typical, 1), update(typical, min(parts, 2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    reading = _seconds(lambda: [trainer.data[number] for number in range(3)], device) / 3
    torch.set_num_threads(threads)
    return [one + (parts - 1) * max(0.0, two - one), reading, memory]


def _report(trainer: Trainer, step_seconds: float, reading: float, memory: int) -> DryRunReport:
    config, device = trainer.config, trainer.distributed.device
    world, parts = trainer.distributed.world_size, trainer.data.per_step
    batch_size, steps = config.optim.batch_size, trainer.schedule.steps
    networks = {name: getattr(trainer.model, name).parameters() for name in NETWORKS}
    parameters = ", ".join(
        f"{name} {sum(weight.numel() for weight in own) / 1e6:.4g} M"
        for name, own in networks.items()
    )
    limit = "of main memory" if memory else "(main memory is measured on Linux only)"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        limit = f"of {properties.total_memory / _GIB:.1f} GiB ({properties.name})"
    flops = flops_per_image(config)
    rate = batch_size / step_seconds
    own_rate, read_rate = rate / world, trainer.micro_batch_size / reading
    workers = usable_cpus() if config.runtime.workers is None else config.runtime.workers
    loading = batch_size / world / read_rate / max(1, workers)
    # without loaders a process reads between its updates
    seconds = max(step_seconds, loading) if workers else step_seconds + loading
    limited = ", limited by the loaders" if loading > step_seconds else ""
    duration = timedelta(seconds=round(steps * seconds))
    lines = (
        f"parameters  {parameters}",
        f"data        {len(trainer.train_indices):,} training images, {steps:,} updates of "
        f"{batch_size} images ({world} processes, {parts} micro-batches each)",
        f"memory      peak of a process {memory / _GIB:.2f} GiB {limit}",
        f"speed       {rate:.4g} images/s of {flops / 1e9:.4g} GFLOP, "
        f"{own_rate * flops / 1e12:.3g} TFLOP/s per device, {step_seconds:.3g} s per update",
        f"loader      {read_rate:.4g} images/s per loader process, so each process needs "
        f"runtime.workers={math.ceil(own_rate / read_rate)}",
        f"time        {duration} for the run{limited}, without monitors and checkpoints",
    )
    return DryRunReport(memory, step_seconds, "\n".join(lines))


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
    if sys.platform != "linux":  # other units, or no module resource
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
