"""A model of the training step on many GPUs. Nothing here is measured on more than one.

One GPU: the time of a step has a part that grows with its images, and a part that does not: AdamW
and the moving average, which are bound by memory. Without a measurement both come from a roofline:
operations at the rate of large bfloat16 matrix products of an H200, bytes at the rate of its
memory.

Many GPUs: `DistributedDataParallel` sums the float32 gradients in buckets while the backward pass
goes on (Li et al., 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
sections 3.2 and 4.2; 25 MiB by default). A ring all-reduce of S bytes between n GPUs sends
2 (n - 1) / n * S from each (Patarasuk and Yuan, 2009, "Bandwidth optimal all-reduce algorithms for
clusters of workstations"), so it takes that over the bus bandwidth, as `all_reduce_perf` of
nccl-tests reports it (its doc/PERFORMANCE.md). K equal buckets of c seconds each that become ready
evenly over the b seconds of the backward pass are all summed max(K c - b (1 - 1 / K), c) seconds
after it: at least the last one cannot hide.

Left out: latencies, waiting for the slowest GPU, loading images, the GPU's time that the exchange
itself takes, and that small batches multiply matrices at a lower rate. Each of them makes many GPUs
worse. A step slower than the roofline, on the other hand, hides more of the same exchange.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..train.batches import mask_sampler
from ..train.flops import flops_per_image
from ..train.start import build_networks
from .steps import StepSettings

PUBLISHED_BATCH = 2048
_MATRIX_RATE = 790e12  # FLOP/s of bfloat16 products, measured on an H200
_MEMORY_RATE = 4.3e12  # bytes/s of its memory, measured too
_ADAMW_BYTES = 28  # for a weight: it, its gradient and two moments read, all but the second written
_AVERAGE_BYTES = 12  # for a weight of the target encoder: two read, one written
_GRADIENT_BYTES = 4
_BUCKET = 25 * 2**20
_DRAWS = 16  # batches whose masks give the median lengths


@dataclass(frozen=True)
class GpuStep:
    """A training step of one GPU.

    Attributes:
        image_seconds: For each image of the step.
        fixed_seconds: However many images there are.
        backward: Share of the backward pass in `image_seconds`.
        gradient_bytes: To be summed.
    """

    image_seconds: float
    fixed_seconds: float
    backward: float
    gradient_bytes: int

    def seconds(self, images: float) -> float:
        """Of a step of one GPU alone."""
        return images * self.image_seconds + self.fixed_seconds


def gpu_step(model: str, images: int, step_ms: float | None = None) -> GpuStep:
    """A step with the published recipe's masks, by the roofline of an H200 or from a measurement.

    Args:
        model: Name of the model.
        images: Of the measured step.
        step_ms: Its milliseconds, as `bench train` gives them; None for the roofline.

    Raises:
        ValueError: The model is unknown, or `step_ms` is less than AdamW alone takes.
    """
    config = StepSettings(model, batch_size=images, device="cpu").config()
    with torch.device("meta"):
        networks = build_networks(config)
    masks = mask_sampler(config.mask, networks.encoder.patch_embed.grid_size)
    drawn = [masks.sample(images, seed=0, step=step) for step in range(_DRAWS)]
    context = statistics.median_low(context.shape[1] for context, _ in drawn)
    target = statistics.median_low(targets.shape[2] for _, targets in drawn)
    flops = flops_per_image(networks, context, config.mask.num_targets, target)
    trained = sum(p.numel() for p in networks.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in networks.target_encoder.parameters())
    fixed = (_ADAMW_BYTES * trained + _AVERAGE_BYTES * averaged) / _MEMORY_RATE
    each = flops.total / _MATRIX_RATE
    if step_ms is not None:
        each = (step_ms / 1000 - fixed) / images
        if each <= 0:
            raise ValueError(
                f"step_ms is {step_ms:g}, less than the {1000 * fixed:.1f} ms that AdamW and the "
                f"moving average of {model} take on an H200 at least: give the milliseconds of a "
                f"whole step of {images} images"
            )
    # the predictor's operations are those of both its passes, of which backward is two thirds
    backward = (flops.context_backward + flops.predictor * 2 / 3) / flops.total
    return GpuStep(each, fixed, backward, _GRADIENT_BYTES * trained)


def exchange(step: GpuStep, images: float, gpus: int, bandwidth: float) -> tuple[float, float]:
    """Seconds of the sum of gradients, and how many of them come after the backward pass.

    Args:
        step: Of one GPU.
        images: Of each GPU.
        gpus: How many.
        bandwidth: Bus bandwidth in bytes/s.
    """
    if gpus == 1:
        return 0.0, 0.0
    whole = 2 * (gpus - 1) / gpus * step.gradient_bytes / bandwidth
    buckets = max(1.0, step.gradient_bytes / _BUCKET)
    backward = images * step.image_seconds * step.backward
    return whole, max(whole - backward * (1 - 1 / buckets), whole / buckets)


def modelled(
    model: str, gpus: Sequence[int], images: int, bandwidth_gb_s: float, step_ms: float | None
) -> dict[str, Any]:
    """Weak scaling (`images` for each GPU) and strong scaling (the published batch for all).

    Efficiency is one GPU's time for as many images as each of many has (weak), or for the whole
    batch over the number of GPUs (strong), divided by the time of a step of all.

    Args:
        model: Name of the model.
        gpus: Numbers of GPUs; they divide the published batch.
        images: Of each GPU in weak scaling, and of the measured step.
        bandwidth_gb_s: Bus bandwidth, 10^9 bytes/s.
        step_ms: See `gpu_step`.

    Returns:
        What was assumed, and figures by number of GPUs, for a result.

    Raises:
        ValueError: A setting does not fit.
    """
    if not bandwidth_gb_s > 0:
        raise ValueError(f"bandwidth_gb_s is {bandwidth_gb_s}; it must be more than 0")
    if unfit := [n for n in gpus if n < 1 or PUBLISHED_BATCH % n]:
        raise ValueError(f"gpus {unfit} do not divide the published batch of {PUBLISHED_BATCH}")
    step = gpu_step(model, images, step_ms)
    rate = 1e9 * bandwidth_gb_s
    return {
        "what": "a model, not a measurement, without latencies and waiting for the slowest GPU "
        "(ijepa_zoo.bench.scale_out has the formulas and their sources)",
        "assumed": {
            "model": model,
            "step_from": "the roofline of an H200" if step_ms is None else f"{step_ms:g} ms",
            "one_gpu_images": images,
            "one_gpu_step_ms": 1000 * step.seconds(images),
            "of_it_whatever_the_images_ms": 1000 * step.fixed_seconds,
            "bandwidth_gb_s": bandwidth_gb_s,
            "gradient_bytes": step.gradient_bytes,
        },
        "weak": {str(n): _figures(step, images, n, rate, 1.0) for n in gpus},
        "strong": {str(n): _figures(step, PUBLISHED_BATCH / n, n, rate, 1 / n) for n in gpus},
    }


def _figures(
    step: GpuStep, images: float, gpus: int, rate: float, share: float
) -> dict[str, float]:
    """Of a step of many GPUs; one GPU's own work is `1 / share` times that of each."""
    whole, exposed = exchange(step, images, gpus, rate)
    seconds = step.seconds(images) + exposed
    return {
        "images_per_gpu": images,
        "step_ms": 1000 * seconds,
        "images_per_second": gpus * images / seconds,
        "exchange_ms": 1000 * whole,
        "exchange_hidden": 1 - exposed / whole if whole else 1.0,
        "efficiency": share * step.seconds(images / share) / seconds,
    }
