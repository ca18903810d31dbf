"""Linear probes: heads on a frozen encoder, the best one chosen on held-out training images."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..data.decode import Decoder
from ..distributed import init_distributed
from .check import convex_check
from .epoch_state import EpochState
from .feeds import CachedFeed, Feed, OnlineFeed, refuse_undecoded
from .intervals import wilson_interval
from .models import Subject, as_subject, check_model
from .notes import CACHED_AS_IS
from .probe import Probe, notes_of, open_probe, protocol_record, refuse_no_choice
from .representations import BlockFeatures, RawPixels, Representations
from .result import Head, Result
from .runs import once, run_folder
from .tasks import Task, find_task
from .training import Trained, count_right, train

_CROPS_STAND = (
    "cached: each image and its mirror image are encoded once, in the fixed view of tests, which "
    "stands for the protocol's random crops"
)


def evaluate_linear(
    task: str | Task,
    model: str | nn.Module | Subject,
    data: Any,
    out: str | Path = "results",
    *,
    test: Any = None,
    cached: bool = False,
    baseline: bool = False,
    select_on_test: bool = False,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    workers: int | None = None,
    precision: str = "auto",
    checkpoint: str | None = None,
    network: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    random: bool = False,
    value_range: tuple[float, float] | None = None,
    bands: tuple[int, ...] | None = None,
    skip_broken: bool = False,
    progress: bool = False,
) -> Result:
    """Train linear heads on a frozen encoder with the protocol of the task, and test the best one.

    Heads with and without BatchNorm, on `last` and `last4`, for every learning rate and weight
    decay of the protocol, are trained at once on one pass of the encoder. The best one on a seeded
    10 % of the training images, which no head is fitted to, reads the test set, once.

    The same call goes on after an interruption, at the last finished epoch, and returns the result
    at once where it is there already. torchrun starts several processes, which share each batch.

    Args:
        task: A task or its name; see `find_task`.
        model: A name (see `open_model`) or any timm ViT of at least four blocks.
        data: See `open_task`.
        out: Folder of all evaluations: each has a folder of its own in it with `result.json`, and a
            row in `results.csv`; cached features are in `cache`.
        test: The test data, if `data` does not hold them.
        cached: Encode each image and its mirror image once, and train on these features.
        baseline: Also measure the same architecture with random weights, and raw pixels.
        select_on_test: Fit to all training images and choose the head on the test set, as much of
            the literature does; the figure is then too high.
        seed: Decides split, order, augmentation and heads at the start.
        epochs: In the place of the protocol's.
        batch_size: In the place of the protocol's; learning rates grow linearly with it.
        device: 'auto', or torch's name of a device.
        workers: Processes that decode; default: one for each CPU.
        precision: Of the encoder, see `extract_features`; 'auto': bfloat16 on a GPU, else float32.
        checkpoint: Weights for a model that is named; see `create_model`.
        network: Which network of them; see there.
        img_size: Image size in pixels, or height and width, for a model that is named; default:
            its own.
        random: Random weights, by the seed, in the place of those of a model that is named.
        value_range: Values of 16-bit images that become black and white, see `Decoder`.
        bands: Bands or pages of image files that become channels, see `Decoder`.
        skip_broken: Leave out images that cannot be decoded; otherwise they stop the evaluation.
        progress: Show progress: bars in a terminal, a line every 30 s elsewhere.

    Returns:
        The result, which is also in the folder.

    Raises:
        DataError: The data cannot be used, or do not fit the task.
        ValueError: An argument or the model does not fit, or features are not finite.
        RunError: Another process works on the same evaluation.
    """
    chosen = find_task(task) if isinstance(task, str) else task
    options = {"checkpoint": checkpoint, "network": network, "img_size": img_size}
    decoder = Decoder(
        check_model(model, baseline=baseline, random=random, **options), value_range, bands
    )
    with init_distributed(device) as distributed:
        probe = open_probe(
            *(chosen, data, out, distributed),
            test=test,
            select_on_test=select_on_test,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            workers=workers,
            decoder=decoder,
            skip_broken=skip_broken,
            progress=progress,
        )
        refuse_no_choice(probe, select_on_test)
        subject = as_subject(model, random=random, seed=seed, **options)
        source = BlockFeatures(subject, device=str(distributed.device), precision=precision)
        result, folder = _evaluate(probe, source, cached)
        if baseline and not result.baselines:
            settings = {"device": str(distributed.device), "precision": precision}
            others: list[Representations] = [
                BlockFeatures(subject.untrained(seed), **settings),
                RawPixels(source.size, source.device),
            ]
            figures = {o.about["name"]: _evaluate(probe, o, cached)[0].figure for o in others}
            result = replace(result, baselines=figures)
            if distributed.rank == 0:
                result.write(folder)
        distributed.barrier()
    return result


def _evaluate(probe: Probe, source: Representations, cached: bool) -> tuple[Result, Path]:
    """One model through the probe; from its folder where it is there already."""
    kind: type[OnlineFeed] | type[CachedFeed] = CachedFeed if cached else OnlineFeed
    identity = {key: value for key, value in source.settings.items() if key != "versions"}
    protocol = protocol_record(probe, kind.name, source.size)
    settings = {**probe.settings(), **identity, **protocol}
    name = source.about["name"]
    folder = run_folder(probe.out, probe.task.name, f"linear-{kind.name}", name, settings)

    def work() -> Result:
        started = time.perf_counter()
        images = probe.protocol.epochs * len(probe.fit) + len(probe.choose) + len(probe.test)
        with probe.bar(images, f"{probe.task.name}, {name}") as bar:
            feed: Feed = kind(probe, source, bar)
            trained = train(probe, source, feed, EpochState(folder / "state.pt", settings))
            result = _measure(probe, source, feed, trained, protocol)
        spent = time.perf_counter() - started
        seconds = trained.earlier + spent
        return replace(result, seconds=seconds, images_per_second=feed.rate(spent))

    precision = str(source.settings.get("precision", "float32"))
    result = once(folder, probe.distributed, precision, work)
    if probe.distributed.rank == 0:
        EpochState(folder / "state.pt", settings).remove()
    return result, folder


def _measure(
    probe: Probe,
    source: Representations,
    feed: Feed,
    trained: Trained,
    protocol: dict[str, Any],
) -> Result:
    """Choose a head on held-out training images; it reads the test set, once."""
    grid, on_test = trained.grid, not len(probe.choose)
    held_out: list[float | None] = [None] * len(grid.specs)
    test: list[float | None] = [None] * len(grid.specs)
    images = {"fit": feed.fitted(), "choose": 0}
    tests = ("test", probe.test, np.arange(len(probe.test)))
    if on_test:
        right, total = count_right(probe, source, feed.testing(), grid)
        refuse_undecoded(*tests, total, feed.broken)
        test = [100 * n / total for n in right]
        chosen = max(range(len(right)), key=right.__getitem__)
        best = right[chosen]
    else:
        right, images["choose"] = count_right(probe, source, feed.held_out(), grid)
        kept_back = ("held-out training", probe.train, probe.choose)
        refuse_undecoded(*kept_back, images["choose"], feed.broken)
        held_out = [100 * n / images["choose"] for n in right]
        chosen = max(range(len(right)), key=right.__getitem__)
        (best,), total = count_right(probe, source, feed.testing(), grid, only=chosen)
        refuse_undecoded(*tests, total, feed.broken)
        test[chosen] = 100 * best / total
    notes = notes_of(probe, feed.broken)
    check = None
    if isinstance(feed, CachedFeed):
        notes.insert(0, CACHED_AS_IS if probe.protocol.view.shape == "square" else _CROPS_STAND)
        check = convex_check(feed, source, grid, chosen, held_out[chosen])
        notes += [check["warning"]] if check and check.get("warning") else []
    columns = zip(grid.specs, held_out, test, trained.losses)
    return Result(
        task=probe.task.name,
        method="linear",
        model=source.about,
        figure=100 * best / total,
        chosen=grid.specs[chosen].name,
        selection=probe.selection,
        heads=[Head(spec.name, kept, tested, loss) for spec, kept, tested, loss in columns],
        protocol={**protocol, "batch_size": feed.batch_size},
        data=probe.data(),
        images={**images, "test": total},
        seed=probe.seed,
        interval=wilson_interval(best, total),
        paper=probe.task.paper.get(source.paper_name or ""),
        check=check,
        notes=notes,
    )
