"""`ijepa-zoo bench scaling`: the cost of a training step as model, images, batch and ranks grow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..extraction.encoder import usable_cpus
from ..processes import join_processes
from ..train.config import Precision
from .fresh import in_ranks
from .growth_plot import draw_scaling, refuse_plot
from .result import BenchResult
from .scale_out import modelled
from .steps import OurStep, StepSettings, updating
from .timing import Timings, Work, finish, take_turns, use_threads
from .training import count_flops

_UPDATES = 5  # of every rank; the first is not kept
_BYTES = 4  # of a gradient: they are exchanged in float32


def scaling(
    *,
    models: Sequence[str] = ("vit_tiny16_ijepa", "vit_small16_ijepa", "vit_base16_ijepa"),
    img_sizes: Sequence[int] = (112, 160, 224),
    batch_sizes: Sequence[int] = (4, 8, 16),
    ranks: Sequence[int] = (1, 2, 4),
    precision: Precision = "fp32",
    device: str = "auto",
    plot: str | Path | None = None,
    gpu_model: str = "vit_huge14_ijepa",
    gpu_batch_size: int = 128,
    gpus: Sequence[int] = (8, 16, 32, 64, 128, 256),
    step_ms: float | None = None,
    bandwidth_gb_s: float = 100.0,
    threads: int | None = None,
    seconds: float = 60.0,
    rounds: int = 10,
    progress: bool = False,
) -> BenchResult:
    """Time training steps along four axes; on each the other values are the first of their lists.

    Beside the measurements the result has a model of many GPUs, see `ijepa_zoo.bench.scale_out`.

    The steps of an axis take turns. Ranks are processes on this machine that each have the batch
    (weak scaling) and share its cores; the time that their exchange of gradients adds to a step is
    set beside the time of the same exchange alone.

    Args:
        models: Names of models.
        img_sizes: Sides of images in pixels.
        batch_sizes: Images of a step, of each rank.
        ranks: Numbers of processes; more than cores make sense on GPUs only.
        precision: `fp32`, `bf16` or `fp8`.
        device: `auto`, `cpu`, `cuda`, ...
        plot: Picture to draw, a PNG file; needs matplotlib.
        gpu_model: Name of the model on many GPUs.
        gpu_batch_size: Images of each of them in weak scaling, and of the step of `step_ms`.
        gpus: How many GPUs; strong scaling shares the published batch of 2,048 out.
        step_ms: Milliseconds of a step on one GPU, from `bench train`; None for the roofline of an
            H200 in bfloat16.
        bandwidth_gb_s: Bus bandwidth of their all-reduce as nccl-tests reports it, 10^9 bytes/s;
            the default is a guess.
        threads: CPU threads, of each rank too; None for torch's own choice, and the cores shared
            out between ranks.
        seconds: Time for the rounds of each axis but the ranks.
        rounds: Most rounds.
        progress: Show a progress bar.

    Returns:
        By axis and value: seconds, images/s, TFLOP/s; for ranks also the bytes that each sends per
        step, and the share of their exchange that is hidden behind the backward pass. In `extra`
        the model of many GPUs.

    Raises:
        ValueError: A setting does not fit.
        ImportError: `plot` without matplotlib.
    """
    settings = {name: value for name, value in locals().items() if name != "progress"}
    if plot is not None:
        settings["plot"] = plot = Path(plot)
        refuse_plot(plot)
    of_gpus = modelled(gpu_model, gpus, gpu_batch_size, bandwidth_gb_s, step_ms)
    base = StepSettings(models[0], img_sizes[0], batch_sizes[0], precision, device)
    axes = {
        "model": [replace(base, model=name) for name in models],
        "img_size": [replace(base, img_size=side) for side in img_sizes],
        "batch_size": [replace(base, batch_size=size) for size in batch_sizes],
    }
    found: dict[str, dict[str, dict[str, Any]]] = {}
    with use_threads(threads):
        for axis, chosen in axes.items():
            steps = {str(getattr(one, axis)): OurStep(one) for one in chosen}
            works: dict[str, Work] = {name: updating(step) for name, step in steps.items()}
            timings = take_turns(
                works, seconds=seconds, rounds=rounds, progress=progress, what=f"scaling, {axis}"
            )
            found[axis] = {name: _figures(name, step, timings) for name, step in steps.items()}
        found["ranks"] = {
            str(world): in_ranks(
                time_rank, world, settings=asdict(base), threads=_threads(world, threads)
            )
            for world in ranks
        }
    results = {f"{axis} {name}": row for axis, rows in found.items() for name, row in rows.items()}
    if plot is not None:
        draw_scaling(_points(found, threads), of_gpus, plot)
    resolved = {"device": str(next(iter(steps.values())).device)}
    return BenchResult(
        "scaling", settings, results, extra={"many_gpus": of_gpus}, resolved=resolved
    )


def time_rank(settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """Time updates on one of several processes; called by each of them.

    Args:
        settings: Of `StepSettings`.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    with join_processes(settings["device"]) as processes:
        step = OurStep(StepSettings(**settings), processes)
        gradients = torch.zeros(_exchanged(step), device=step.device)
        works: dict[str, Callable[[], object]] = {
            "seconds": step.update,
            "with": lambda: step.passes(exchange=True),
            "without": lambda: step.passes(exchange=False),
            "alone": lambda: processes.sum(gradients),
        }
        taken: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(_UPDATES):
            for name, work in works.items():
                processes.barrier("a measurement")
                started = time.perf_counter()
                work()
                finish(step.device)
                taken[name].append(time.perf_counter() - started)
        middle = {name: statistics.median(values[1:]) for name, values in taken.items()}
        world = processes.world
        found: dict[str, Any] = {
            "images_per_second": world * settings["batch_size"] / middle["seconds"],
            "step_seconds": middle["seconds"],
            "on_gpu": step.device.type == "cuda",
            "bytes_exchanged": round(2 * (world - 1) / world * _BYTES * len(gradients)),
        }
        if world > 1:
            exposed = max(0.0, middle["with"] - middle["without"])
            found["exchange_seconds"] = middle["alone"]
            found["exchange_seconds_exposed"] = exposed
            found["exchange_hidden"] = max(0.0, 1 - exposed / middle["alone"])
        return found


def _threads(world: int, threads: int | None) -> int:
    return threads or max(1, usable_cpus() // world)


def _points(
    found: dict[str, dict[str, dict[str, Any]]], threads: int | None
) -> dict[str, dict[str, dict[str, float]]]:
    """What the picture shows of each row: its place, the machine's work, and the time."""
    points: dict[str, dict[str, dict[str, float]]] = {}
    for axis, rows in found.items():
        points[axis] = {}
        for name, row in rows.items():
            x = row["trained_weights"] / 1e6 if axis == "model" else float(name)
            if axis == "ranks":  # those on GPUs have one each, others share the cores
                at_once = min(usable_cpus(), int(name) * _threads(int(name), threads))
                work = 1.0 if row["on_gpu"] else int(name) / at_once
                seconds = row["step_seconds"]
            else:
                work, seconds = row["tflop_per_step"], row["seconds"]["median"]
            points[axis][name] = {"x": x, "work": work, "step_seconds": seconds}
    return points


def _exchanged(step: OurStep) -> int:
    """Number of gradients."""
    return sum(p.numel() for p in step.trainer.model.parameters() if p.requires_grad)


def _figures(name: str, step: OurStep, timings: Timings) -> dict[str, Any]:
    taken, flops = timings.summary(name), count_flops(step)
    images = step.trainer.config.optim.batch_size
    work = images * flops.total / 1e12
    return {
        "seconds": taken.as_json(),
        "images_per_second": images / taken.median,
        "tflop_per_second": work / taken.median,
        "tflop_per_step": work,
        "trained_weights": _exchanged(step),
    }
