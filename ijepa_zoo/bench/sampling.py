"""`ijepa-zoo bench masks`: the time to sample the masks of a batch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch

from ..masks import MultiBlockMasks
from .published import PUBLISHED, PublishedCode, chosen_code
from .result import BenchResult, agreed
from .timing import OURS, Work, repeated, take_turns, use_threads

_BATCHES = 10  # of a round
_COMPARED = 40  # batches whose masks are compared
# Contexts of a batch have the length of the shortest, which is random. Means of 40 batches differ
# by about 1 %; the law of `unbiased` leaves other lengths.
_TOLERANCE = {"published": 0.05, "unbiased": 0.25}


def masks(
    *,
    batch_size: int = 128,
    grid: int = 16,
    mode: Literal["published", "unbiased"] = "published",
    threads: int | None = None,
    vs: Sequence[str] = (),
    published_path: str | Path | None = None,
    seconds: float = 60.0,
    rounds: int = 30,
    progress: bool = False,
) -> BenchResult:
    """Time the masks of a batch: one context block and four target blocks per image.

    Args:
        batch_size: Images of a batch.
        grid: Patches of a side.
        mode: See `MultiBlockMasks`.
        threads: CPU threads; None for torch's own choice.
        vs: `published` to take turns with the published collator, on a batch of bare numbers.
        published_path: A clone of the published code.
        seconds: Time for the rounds.
        rounds: Most rounds, of ten batches.
        progress: Show a progress bar.

    Returns:
        Seconds per batch of each contender, and the ratio.

    Raises:
        ValueError: A setting does not fit, or there is no such clone.
        DisagreementError: Sizes of blocks or lengths of contexts are others.
    """
    vs = list(dict.fromkeys(vs))
    settings = {name: value for name, value in locals().items() if name != "progress"}
    code = chosen_code("masks", vs, published_path)
    sampler = MultiBlockMasks((grid, grid), mode=mode)
    steps = count()
    with use_threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        works: dict[str, Work] = {
            OURS: repeated(lambda: sampler.sample(batch_size, seed=0, step=next(steps)), _BATCHES)
        }
        agreement = {}
        if code is not None:
            collator, batch = _collator(code, sampler), list(range(batch_size))
            agreement[PUBLISHED] = compare_masks(sampler, collator, batch)
            works[PUBLISHED] = repeated(lambda: collator(batch), _BATCHES)
        timings = take_turns(works, seconds=seconds, rounds=rounds, progress=progress, what="masks")
    results = {}
    for name in works:
        taken = timings.summary(name)
        results[name] = {
            "seconds": taken.as_json(),
            "images_per_second": batch_size / taken.median,
        }
    return BenchResult("masks", settings, results, timings.ratios(), agreement)


def compare_masks(sampler: MultiBlockMasks, collator: Any, batch: list[int]) -> dict[str, Any]:
    """Compare sizes and lengths of the masks of the first batches.

    Args:
        sampler: Ours.
        collator: The published one, from its first batch on.
        batch: What it collates.

    Raises:
        DisagreementError: A target block of the published mode has another size, or the mean
            length of contexts is another.
    """
    lengths: dict[str, list[int]] = {"context": [], "other context": [], "target": [], "other": []}
    for step in range(_COMPARED):
        context, targets = sampler.sample(len(batch), seed=0, step=step)
        _, (other_context,), others = collator(batch)
        lengths["context"].append(context.shape[1])
        lengths["other context"].append(other_context.shape[1])
        lengths["target"].append(targets.shape[2])
        lengths["other"].append(others[0].shape[1])
    if sampler.mode == "published":
        wrong = sum(one != two for one, two in zip(lengths["target"], lengths["other"]))
        agreed(f"sizes of target blocks in {_COMPARED} batches", wrong, 0)
    mean, other = (statistics.fmean(lengths[name]) for name in ("context", "other context"))
    return agreed(
        f"mean lengths of the contexts of {_COMPARED} batches, relative,",
        abs(mean - other) / other,
        _TOLERANCE[sampler.mode],
        f"{mean:.1f} and {other:.1f} patches",
    )


def _collator(code: PublishedCode, sampler: MultiBlockMasks) -> Any:
    return code.multiblock.MaskCollator(
        input_size=sampler.grid_size,
        patch_size=1,
        pred_mask_scale=sampler.target_scale,
        enc_mask_scale=sampler.context_scale,
        aspect_ratio=sampler.target_aspect,
        nenc=1,
        npred=sampler.num_targets,
        min_keep=sampler.min_keep,
        allow_overlap=sampler.allow_overlap,
    )
