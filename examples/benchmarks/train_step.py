"""Time a full training step, by itself or against the official repository or another precision.

    python examples/benchmarks/train_step.py --model vit_small16_ijepa
    python examples/benchmarks/train_step.py --model vit_huge14_ijepa --batch-size 128 \
        --precision bf16 --compile --vs official --official ijepa --official-precision bf16

A step is everything between two batches: copy to the device, three networks, backward, AdamW,
moving average. Every step has new masks, because new lengths take time that repeated batches would
hide. On a GPU the steps of a round follow each other without waiting.
"""

from __future__ import annotations

import statistics
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    H100_BF16_PEAK,
    OURS,
    agree,
    interleave,
    matmul_peak,
    parse,
    parser,
    ratios,
    report,
    summary,
    write,
)
from official import OfficialStep, load_official
from torch import Tensor
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

import ijepa_zoo
from ijepa_zoo.data import open_images
from ijepa_zoo.train import Trainer, load_config

STEPS, WARMUP = 100_000, 10_000  # of the schedules
COMPARED = 3  # first losses
Masks = tuple[Tensor, Tensor]


class OurStep:
    """Updates by the trainer, on one batch of random images."""

    def __init__(self, args: Namespace, precision: str, compile: bool) -> None:
        size = ijepa_zoo.create_model(args.model, pretrained=False, device="meta").patch_embed
        self.config = load_config(
            "vith14_in1k",
            [
                f"model.name={args.model}", "data.held_out=0", "mask.group_size=global",
                f"mask.min_keep={10 if min(size.grid_size) > 13 else 4}",
                f"optim.batch_size={args.batch_size}", f"optim.precision={precision}",
                f"optim.duration={STEPS} steps", f"optim.warmup={WARMUP} steps",
                f"runtime.device={args.device}", f"runtime.compile={str(compile).lower()}",
                "runtime.workers=0",
            ],
        )  # fmt: skip
        shape = (args.batch_size, *size.img_size, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.trainer = Trainer(self.config, open_images(images))
        if args.cudnn:
            torch.backends.cuda.enable_cudnn_sdp(True)
        self.batch = next(iter(self.trainer.batches()))[0]

    def update(self, masks: Masks) -> float:
        """One step; returns its loss."""
        batch = replace(self.batch, context=masks[0], targets=masks[1])
        return self.trainer.train_step([batch]).metrics["loss"]

    def masks(self, step: int) -> Masks:
        """Context and targets of a step."""
        context, targets = self.trainer.masks.sample(len(self.batch.images), seed=0, step=step)
        pin = self.config.runtime.device == "cuda"
        return (context.pin_memory(), targets.pin_memory()) if pin else (context, targets)

    def normalized(self) -> Tensor:
        """The images as the official loader delivers them."""
        mean, std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (self.config.data.mean, self.config.data.std)
        )
        images = (self.batch.images.float() / 255 - mean) / std
        return images.pin_memory() if self.config.runtime.device == "cuda" else images


def flops_per_image(model: str, context: int, targets: int, target_tokens: int) -> int:
    """Operations of our step for one image, counted on the meta device."""
    with torch.device("meta"):
        networks = ijepa_zoo.create_ijepa(model, pretrained=False)
        images = torch.zeros(1, 3, *networks.encoder.patch_embed.img_size)
        kept = torch.zeros(1, context, dtype=torch.int64)
        blocks = torch.zeros(1, targets, target_tokens, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            networks(images, kept, blocks).backward()
    return counter.get_total_flops()


@dataclass
class Contender:
    """One of the steps that are timed in turns.

    Attributes:
        update: One step with the given masks; returns the loss.
        precision: Of its matrix products.
        gflop: Operations for one image, in billions.
        metrics: For the result.
    """

    update: Callable[[Masks], float]
    precision: str
    gflop: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)


def contenders(args: Namespace, ours: OurStep) -> dict[str, Contender]:
    """Our step and those of `--vs`, by name."""
    found = {OURS: Contender(ours.update, args.precision)}
    for name in args.vs:
        if name == "official":
            theirs = OfficialStep(
                load_official(args.official), ours.trainer.model, ours.config.optim, STEPS, WARMUP,
                args.device, args.official_precision == "bf16",
            )  # fmt: skip
            update = partial(theirs.update, ours.normalized())
            found[name] = Contender(update, args.official_precision)
        elif name == "eager":
            found[name] = Contender(OurStep(args, args.precision, False).update, args.precision)
        else:
            found[name] = Contender(OurStep(args, name, args.compile).update, name)
    return found


def compare(ours: OurStep, found: dict[str, Contender]) -> dict[str, dict[str, Any]]:
    """Compare the losses of the first steps."""
    losses = {
        name: [one.update(ours.masks(step)) for step in range(COMPARED)]
        for name, one in found.items()
    }
    exact = all(one.precision == "fp32" for one in found.values())
    return {
        name: agree(
            f"losses of the first {COMPARED} steps, relative,",
            max(abs(a / b - 1) for a, b in zip(values, losses[OURS])),
            1e-5 if exact else 3e-2,
        )
        for name, values in losses.items()
        if name != OURS
    }


def count_syncs(args: Namespace, ours: OurStep, found: dict[str, Contender]) -> None:
    """How often one more step makes the host wait for the GPU."""
    masks = ours.masks(COMPARED)
    for one in found.values():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if args.device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            one.update(masks)
            if args.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
                syncs = sum("called a synchronizing" in str(warning.message) for warning in caught)
                one.metrics["host_syncs"] = syncs


def count_flops(args: Namespace, ours: OurStep, found: dict[str, Contender]) -> None:
    """Operations of our step with masks of usual length, and of one official step."""
    masks = [ours.masks(step) for step in range(101)]
    context = statistics.median(context.shape[1] for context, _ in masks)
    targets = masks[0][1].shape[1]
    target_tokens = statistics.median(targets.shape[2] for _, targets in masks)
    own = flops_per_image(args.model, context, targets, target_tokens)
    for name, one in found.items():
        one.gflop = own / 1e9
        if name == "official":
            usual = next(m for m in masks if m[0].shape[1] == context)
            with FlopCounterMode(display=False) as counter:
                one.update(usual)
            one.gflop = counter.get_total_flops() / args.batch_size / 1e9
        else:
            one.update(masks[0])  # equal numbers of updates


def timed(args: Namespace, one: Contender, ours: OurStep, number: int) -> float:
    """Seconds of a step in a round; the masks depend on the number of the round alone."""
    first = COMPARED + number * args.steps
    masks = [ours.masks(first + step) for step in range(args.steps)]
    if args.device == "cuda":
        torch.cuda.empty_cache()  # contenders share the memory
        one.update(masks[0])
        torch.cuda.reset_peak_memory_stats()
    begun = benchmark.timer()
    for step in masks:
        one.update(step)
    seconds = (benchmark.timer() - begun) / args.steps
    if args.device == "cuda" and not args.vs:  # the others' weights count too
        one.metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return seconds


def rate(args: Namespace, one: Contender, seconds: list[float], peak: float) -> None:
    """Rates, and shares of the machine's peak."""
    taken = summary(seconds)
    images = args.batch_size / taken["median"]
    work = images * one.gflop * 1e9
    one.metrics |= {
        "seconds": taken,
        "images_per_second": images,
        "gflop_per_image": one.gflop,
        "tflop_per_second": work / 1e12,
        "share_of_matmul_peak": work / peak,
    }
    if args.device == "cuda":
        one.metrics["mfu"] = work / H100_BF16_PEAK


def compiled_graphs() -> tuple[int, int]:
    """Graphs compiled so far, and breaks between graphs."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def write_profile(ours: OurStep, device: str, path: Path) -> None:
    """Write torch.profiler's table of one of our steps."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=kinds) as profiler:
        ours.update(ours.masks(0))
    order = f"self_{device}_time_total"
    path.write_text(profiler.key_averages().table(sort_by=order, row_limit=40), encoding="utf-8")


def arguments() -> Namespace:
    made = parser(__doc__)
    made.add_argument("--model", default="vit_small16_ijepa")
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--precision", choices=["fp32", "bf16", "fp8"], default="fp32")
    made.add_argument("--compile", action="store_true")
    made.add_argument("--cudnn", action="store_true", help="allow cuDNN's attention kernels")
    made.add_argument("--vs", nargs="*", choices=["official", "fp32", "bf16", "eager"], default=[])
    made.add_argument("--official", type=Path, default=Path("ijepa"), help="its clone")
    made.add_argument("--official-precision", choices=["fp32", "bf16"], default="fp32")
    made.add_argument("--steps", type=int, help="steps of a round; default: 1, on a GPU 10")
    made.add_argument("--profile", type=Path, help="write torch.profiler's table of our step")
    args = parse(made)
    args.steps = args.steps or (10 if args.device == "cuda" else 1)
    return args


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    ours = OurStep(args, args.precision, args.compile)
    found = contenders(args, ours)
    agreement = compare(ours, found)
    count_syncs(args, ours, found)
    count_flops(args, ours, found)
    graphs, _ = compiled_graphs()
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
    peaks = {p: matmul_peak(args.device, dtypes[p]) for p in {c.precision for c in found.values()}}
    turns = {name: partial(timed, args, one, ours) for name, one in found.items()}
    for samples in interleave(turns, args.seconds, args.rounds):
        for name, one in found.items():
            rate(args, one, samples[name], peaks[one.precision])
        later, breaks = compiled_graphs()
        write(
            args,
            {name: one.metrics for name, one in found.items()},
            ratios=ratios(samples),
            agreement=agreement,
            compile={"graphs": graphs, "recompilations": later - graphs, "graph_breaks": breaks},
            matmul_tflop_per_second={name: peak / 1e12 for name, peak in peaks.items()},
        )
    report({name: one.metrics for name, one in found.items()}, ratios(samples))
    if args.profile:
        write_profile(ours, args.device, args.profile)


if __name__ == "__main__":
    main()
