"""`ijepa-zoo bench train`: the time of a training step."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..train.config import Precision
from ..train.flops import Flops, flops_per_image
from ..train.start import build_networks
from .agreement import compare_first_updates
from .fresh import in_fresh_process
from .machine import (
    data_sheet_peak,
    forget_memory_peak,
    matrix_peak,
    measures_memory,
    memory_now,
    memory_peak,
    peak_precision,
)
from .published import PUBLISHED, chosen_code, published_code
from .published_step import PublishedStep
from .result import BenchResult
from .steps import BATCHES, OurStep, Step, StepSettings, updating
from .timing import OURS, Summary, take_turns, time_phases, use_threads

BF16 = "bf16"  # our step in it, beside another precision
_PHASE_REPEATS = 5
_EMULATED = "emulated in float32: times and memory say nothing about a GPU's"


def train(
    *,
    model: str = "vit_tiny16_ijepa",
    img_size: int | None = None,
    batch_size: int = 16,
    precision: Precision = "fp32",
    device: str = "auto",
    compile: bool = False,
    predictor_context: str | None = None,
    threads: int | None = None,
    vs: Sequence[str] = (),
    published_path: str | Path | None = None,
    published_precision: Literal["fp32", "bf16"] = "fp32",
    seconds: float = 60.0,
    rounds: int = 30,
    progress: bool = False,
) -> BenchResult:
    """Time a full update of the trainer: three networks, backward, AdamW, moving average.

    Args:
        model: Name of the model, see `ijepa-zoo list`.
        img_size: Side of the images in pixels; None for the model's own.
        batch_size: Images of an update.
        precision: `fp32`, `bf16` (autocast) or `fp8` (see `OptimConfig`), ours.
        device: `auto`, `cpu`, `cuda`, ...
        compile: Compile the blocks (ours).
        predictor_context: The predictor: `repeated` is the paper's (None: the model's own);
            `shared` is another method, whose losses are not those of the published code.
        threads: CPU threads; None for torch's own choice.
        vs: `published` to take turns with the published code, `bf16` with our own step in bf16.
        published_path: A clone of it.
        published_precision: `fp32` as released, or `bf16` for its autocast.
        seconds: Time for the rounds.
        rounds: Most rounds.
        progress: Show a progress bar.

    Returns:
        Of each contender time, images/s, phases, operations, memory, and share of the machine's
        matrix-product rate in the step's precision, which `peak_precision` names: for `fp8` that
        of float8, though a part of the step does not compute in it. `mfu` is the share of the rate
        of dense bfloat16 products in the GPU's data sheet, whatever the precision, and `mfu_fp8`
        that of float8. The ratio of the times.

    Raises:
        ValueError: A setting does not fit, or there is no such clone.
        ImportError: `fp8` without torchao.
        DisagreementError: The losses of the first updates differ from those of the contender.
    """
    vs = list(dict.fromkeys(vs))
    settings = {name: value for name, value in locals().items() if name != "progress"}
    if BF16 in vs and precision == "bf16":
        raise ValueError("--vs bf16 is our step in bf16 itself: use --precision fp8 or fp32")
    if PUBLISHED not in vs and published_precision != "fp32":
        raise ValueError(
            f"--published-precision {published_precision} is used with --vs {PUBLISHED} only"
        )
    code = chosen_code("train", vs, published_path, others=(BF16,))
    own = StepSettings(model, img_size, batch_size, precision, device, compile, predictor_context)
    built = {OURS: own, PUBLISHED: own, BF16: replace(own, precision="bf16")}
    precisions: dict[str, Precision] = {name: step.precision for name, step in built.items()}
    precisions[PUBLISHED] = published_precision
    with use_threads(threads):
        ours = OurStep(own)
        steps: dict[str, Step] = {OURS: ours}
        if BF16 in vs:
            steps[BF16] = OurStep(built[BF16])
        if code is not None:
            steps[PUBLISHED] = PublishedStep(code, ours, published_precision)
        precisions = {name: precisions[name] for name in steps}
        agreement = compare_first_updates(own, steps, precisions)
        peaks = _peaks(ours.device, precisions)
        timings = take_turns(
            {name: updating(step) for name, step in steps.items()},
            seconds=seconds,
            rounds=rounds,
            warmup=2,
            progress=progress,
            what="training step",
        )
        again = _peaks(ours.device, precisions)
        peaks = {name: max(peak, again[name]) for name, peak in peaks.items()}
        flops = count_flops(ours)
        work = {name: _work(step, flops, batch_size) for name, step in steps.items()}
        results = {
            name: {
                **_rates(
                    *(timings.summary(name), batch_size, work[name], peaks[name], step.device),
                    precisions[name],
                ),
                **_own_figures(step),
                **_fresh_figures(
                    step.device,
                    settings=asdict(built[name]),
                    published_path=str(published_path) if name == PUBLISHED else None,
                    published_precision=published_precision,
                    threads=torch.get_num_threads(),
                ),
            }
            for name, step in steps.items()
        }
    return BenchResult(
        bench="train",
        settings=settings,
        results=results,
        ratios=timings.ratios(),
        agreement=agreement,
        resolved={"device": str(ours.device)},
        extra={
            "gflop_per_image": {
                name: value / 1e9
                for name, value in {
                    **{"all": flops.total, **asdict(flops)},
                    **({PUBLISHED: work[PUBLISHED]} if PUBLISHED in work else {}),
                }.items()
            },
            **({"fp8": _EMULATED} if peak_precision(ours.device, precision) != precision else {}),
        },
    )


def _fresh_figures(device: torch.device, **arguments: Any) -> dict[str, int | None]:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other process needs the room
    found: dict[str, int | None] = in_fresh_process(fresh_updates, **arguments)
    return found


def fresh_updates(
    settings: Mapping[str, Any],
    published_path: str | None,
    published_precision: Literal["fp32", "bf16"],
    threads: int,
) -> dict[str, int | None]:
    """What a step takes in a process of its own, in which this is called.

    Args:
        settings: Of `StepSettings`.
        published_path: Measure the published code of this clone instead of ours.
        published_precision: Its precision.
        threads: CPU threads.

    Returns:
        `peak_memory_bytes` of networks, optimizer and updates: on a GPU its memory, otherwise main
        memory, None where the system does not tell. `compiled_graphs` where ours was compiled.
    """
    torch.set_num_threads(threads)
    before = memory_now() if measures_memory() else None
    own = StepSettings(**settings)
    step: Any = OurStep(own)
    if published_path is not None:
        step = PublishedStep(published_code(published_path), step, published_precision)
    gc.collect()  # our networks, of which only the numbers were needed
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif before is not None:
        forget_memory_peak()
    for _ in range(BATCHES):
        step.update()
    found: dict[str, int | None] = {"peak_memory_bytes": None}
    if step.device.type == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    elif before is not None:
        found["peak_memory_bytes"] = memory_peak() - before
    if own.compile and published_path is None:
        from torch._dynamo.utils import counters

        found["compiled_graphs"] = counters["stats"]["unique_graphs"]
    return found


def _peaks(device: torch.device, precisions: Mapping[str, Precision]) -> dict[str, float]:
    """The machine's matrix-product rate in the precision of each contender, FLOP/s."""
    rates = {
        precision: matrix_peak(device, precision)
        for precision in {peak_precision(device, own) for own in precisions.values()}
    }
    return {name: rates[peak_precision(device, own)] for name, own in precisions.items()}


def count_flops(step: OurStep) -> Flops:
    """Operations of our networks for an image, with masks of the batches' median lengths."""
    context = statistics.median_low(batch.context.shape[1] for batch in step.batches)
    target = statistics.median_low(batch.targets.shape[2] for batch in step.batches)
    config = step.trainer.config
    with torch.device("meta"):  # the timed networks may be compiled
        model = build_networks(config)
    return flops_per_image(model, context, config.mask.num_targets, target)


def _work(step: Step, ours: Flops, batch_size: int) -> float:
    """Operations of an update for an image; those of the published code by doing some."""
    if not isinstance(step, PublishedStep):
        return ours.total
    counts = []
    for _ in range(BATCHES):  # each has other masks
        with FlopCounterMode(display=False) as counter:
            step.update()
        counts.append(counter.get_total_flops())
    return statistics.median_low(counts) / batch_size


def _rates(
    seconds: Summary,
    batch_size: int,
    flops: float,
    peak: float,
    device: torch.device,
    precision: Precision,
) -> dict[str, Any]:
    """Rates, and the shares of those that the machine reaches and its maker states."""
    rate = batch_size / seconds.median * flops
    stated = {"mfu": data_sheet_peak(device, "bf16")}
    if precision == "fp8":
        stated["mfu_fp8"] = data_sheet_peak(device, "fp8")
    return {
        "seconds": seconds.as_json(),
        "images_per_second": batch_size / seconds.median,
        "tflop_per_second": rate / 1e12,
        "fraction_of_peak": rate / peak,
        "peak_precision": peak_precision(device, precision),
        "measured_peak_tflop_per_second": peak / 1e12,
        **{name: rate / most for name, most in stated.items() if most},
    }


def _own_figures(step: Step) -> dict[str, Any]:
    """Phases, and host syncs of a GPU."""
    found: dict[str, Any] = {"phases_ms": time_phases(step.phases, step.device, _PHASE_REPEATS)}
    if step.device.type == "cuda":
        found["host_syncs"] = host_syncs(step)
    return found


def host_syncs(step: Step) -> int:
    """How often an update makes the host wait for a GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step.update()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in caught)
