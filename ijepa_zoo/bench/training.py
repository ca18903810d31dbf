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

from ..train.flops import Flops, flops_per_image
from ..train.start import build_networks
from .fresh import in_fresh_process
from .machine import (
    data_sheet_peak,
    forget_memory_peak,
    matrix_peak,
    measures_memory,
    memory_now,
    memory_peak,
)
from .published import PUBLISHED, chosen_code, published_code
from .published_step import PublishedStep
from .result import BenchResult, agreed
from .steps import OurStep, Step, StepSettings, updating
from .timing import OURS, Timings, take_turns, time_phases, use_threads

_COMPARED = 3  # updates whose losses must agree
_EXACT, _LOOSE = 1e-5, 2e-2  # relative; bfloat16 keeps 8 bits
_PHASE_REPEATS = 5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(
    *,
    model: str = "vit_tiny16_ijepa",
    img_size: int | None = None,
    batch_size: int = 16,
    precision: Literal["fp32", "bf16"] = "fp32",
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
        precision: `fp32` or `bf16` (autocast), ours.
        device: `auto`, `cpu`, `cuda`, ...
        compile: Compile the blocks (ours).
        predictor_context: The predictor: `repeated` is the paper's (None: the model's own);
            `shared` is another method, whose losses are not those of the published code.
        threads: CPU threads; None for torch's own choice.
        vs: `published` to take turns with the published code.
        published_path: A clone of it.
        published_precision: `fp32` as released, or `bf16` for its autocast.
        seconds: Time for the rounds.
        rounds: Most rounds.
        progress: Show a progress bar.

    Returns:
        Of each contender time, images/s, phases, operations, share of the machine's matrix-product
        rate and memory; the ratio of the times.

    Raises:
        ValueError: A setting does not fit, or there is no such clone.
        DisagreementError: The losses of the first updates differ from the published code's.
    """
    vs = list(dict.fromkeys(vs))
    settings = {name: value for name, value in locals().items() if name != "progress"}
    code = chosen_code("train", vs, published_path)
    own = StepSettings(model, img_size, batch_size, precision, device, compile, predictor_context)
    with use_threads(threads):
        agreement: dict[str, dict[str, Any]] = {}
        ours = OurStep(own)
        steps: dict[str, Step] = {OURS: ours}
        if code is not None:
            other = PublishedStep(code, ours, published_precision)
            agreement = _agreement(own, ours, other)
            steps[PUBLISHED] = other
        precisions = {OURS: own.precision, PUBLISHED: published_precision}
        peaks = _peaks(steps, precisions)
        timings = take_turns(
            {name: updating(step) for name, step in steps.items()},
            seconds=seconds,
            rounds=rounds,
            warmup=2,
            progress=progress,
            what="training step",
        )
        peaks = {name: max(peak, _peaks(steps, precisions)[name]) for name, peak in peaks.items()}
        flops = count_flops(ours)
        results = {
            name: {
                **_rates(name, timings, batch_size, flops, peaks[name], step.device),
                **_own_figures(step),
                "peak_memory_bytes": in_fresh_process(
                    memory_of_updates,
                    settings=asdict(own),
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
                name: value / 1e9 for name, value in {"all": flops.total, **asdict(flops)}.items()
            }
        },
    )


def _agreement(own: StepSettings, ours: OurStep, other: PublishedStep) -> dict[str, Any]:
    """Compare the first updates: in fp32 exactly, and otherwise also as they are timed."""
    exact = replace(own, precision="fp32", compile=False, predictor_context=None)
    if exact == own and other.precision == "fp32":
        return {PUBLISHED: compare_losses(ours, other, _EXACT, "fp32")}
    first = OurStep(exact)
    second = PublishedStep(other.code, first, "fp32")
    found = {"published in fp32": compare_losses(first, second, _EXACT, "fp32")}
    if own.predictor_context in (None, "repeated"):
        what = f"{own.precision} and {other.precision}"
        found[PUBLISHED] = compare_losses(ours, other, _LOOSE, what)
    return found


def compare_losses(ours: Step, other: Step, tolerance: float, what: str) -> dict[str, Any]:
    """Do the first updates of both.

    Args:
        ours: Ours.
        other: With the same weights and batches.
        tolerance: Largest relative difference of a loss.
        what: Their precisions, for the record.

    Raises:
        DisagreementError: A loss differs by more.
    """
    pairs = [(ours.update(), other.update()) for _ in range(_COMPARED)]
    difference = max(abs(one - two) / abs(one) for one, two in pairs)
    words = f"losses of the first {_COMPARED} updates in {what}, relative,"
    shown = ", ".join(f"{one:.6g} and {two:.6g}" for one, two in pairs)
    return agreed(words, difference, tolerance, shown)


def memory_of_updates(
    settings: Mapping[str, Any],
    published_path: str | None,
    published_precision: str,
    threads: int,
) -> int | None:
    """Bytes that networks, optimizer and updates take; called in a fresh process.

    On a GPU its memory, otherwise main memory; None where the system does not tell.

    Args:
        settings: Of `StepSettings`.
        published_path: Measure the published code of this clone instead of ours.
        published_precision: Its precision.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    before = memory_now() if measures_memory() else None
    step: Any = OurStep(StepSettings(**settings))
    if published_path is not None:
        step = PublishedStep(published_code(published_path), step, published_precision)
    gc.collect()  # our networks, of which only the numbers were needed
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif before is not None:
        forget_memory_peak()
    for _ in range(2):
        step.update()
    if step.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return None if before is None else memory_peak() - before


def _peaks(steps: Mapping[str, Step], precisions: Mapping[str, str]) -> dict[str, float]:
    """The machine's matrix-product rate in the precision of each contender, FLOP/s."""
    device = next(iter(steps.values())).device
    by_precision = {
        precision: matrix_peak(device, _DTYPES[precision])
        for precision in {precisions[name] for name in steps}
    }
    return {name: by_precision[precisions[name]] for name in steps}


def count_flops(step: OurStep) -> Flops:
    """Operations of our networks for an image, with masks of the batches' median lengths."""
    context = statistics.median_low(batch.context.shape[1] for batch in step.batches)
    target = statistics.median_low(batch.targets.shape[2] for batch in step.batches)
    config = step.trainer.config
    with torch.device("meta"):  # the timed networks may be compiled
        model = build_networks(config)
    return flops_per_image(model, context, config.mask.num_targets, target)


def _rates(
    name: str,
    timings: Timings,
    batch_size: int,
    flops: Flops,
    peak: float,
    device: torch.device,
) -> dict[str, Any]:
    seconds = timings.summary(name)
    rate = batch_size / seconds.median * flops.total
    stated = data_sheet_peak(device)
    return {
        "seconds": seconds.as_json(),
        "images_per_second": batch_size / seconds.median,
        "tflop_per_second": rate / 1e12,
        "fraction_of_peak": rate / peak,
        "measured_peak_tflop_per_second": peak / 1e12,
        **({"mfu": rate / stated} if stated else {}),
    }


def _own_figures(step: Step) -> dict[str, Any]:
    """Phases, and what only some steps have: host syncs of a GPU, compiled graphs."""
    found: dict[str, Any] = {"phases_ms": time_phases(step.phases, step.device, _PHASE_REPEATS)}
    if step.device.type == "cuda":
        found["host_syncs"] = host_syncs(step)
    if isinstance(step, OurStep) and step.trainer.config.machine.compile:
        from torch._dynamo.utils import counters

        found["compiled_graphs"] = counters["stats"]["unique_graphs"]
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
