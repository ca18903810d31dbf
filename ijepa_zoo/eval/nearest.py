"""The kNN probe: no training at all, only neighbours among frozen features."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.datasets import Targets
from ..data.decode import Decoder
from ..distributed import init_distributed
from .feeds import CachedFeed
from .intervals import wilson_interval
from .knn import KS, TEMPERATURES, knn_correct
from .models import Subject, as_subject, check_model
from .probe import Probe, notes_of, open_probe, refuse_no_choice
from .representations import BlockFeatures, RawPixels, Representations
from .result import Head, Result
from .runs import once, run_folder
from .tasks import Task, find_task


def evaluate_knn(
    task: str | Task,
    model: str | nn.Module | Subject,
    data: Any,
    out: str | Path = "results",
    *,
    test: Any = None,
    baseline: bool = False,
    select_on_test: bool = False,
    seed: int = 0,
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
    """Classify test images by their nearest training images; see `knn_correct`.

    Number of neighbours and temperature are chosen on a seeded 10 % of the training images, whose
    neighbours are looked for among the others; all training images are neighbours of test images.
    The features are `last`, of the fixed view of tests, and are cached.

    Args:
        task: See `evaluate_linear`, as the other arguments.
        model: See there.
        data: See there.
        out: See there.
        test: See there.
        baseline: See there.
        select_on_test: See there.
        seed: Decides the split.
        device: See there.
        workers: See there.
        precision: See there.
        checkpoint: See there.
        network: See there.
        img_size: See there.
        random: See there.
        value_range: Values of 16-bit images that become black and white, see `Decoder`.
        bands: Bands or pages of image files that become channels, see `Decoder`.
        skip_broken: Leave out images that cannot be decoded; otherwise they stop the evaluation.
        progress: See there.

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
            seed=seed,
            workers=workers,
            decoder=decoder,
            skip_broken=skip_broken,
            progress=progress,
        )
        refuse_no_choice(probe, select_on_test)
        subject = as_subject(model, random=random, seed=seed, **options)
        settings = {"device": str(distributed.device), "precision": precision}
        source = BlockFeatures(subject, **settings)
        result, folder = _evaluate(probe, source)
        if baseline and not result.baselines:
            untrained = BlockFeatures(subject.untrained(seed), **settings)
            others = untrained, RawPixels(source.size, source.device)
            figures = {o.about["name"]: _evaluate(probe, o)[0].figure for o in others}
            result = replace(result, baselines=figures)
            if distributed.rank == 0:
                result.write(folder)
        distributed.barrier()
    return result


def _evaluate(probe: Probe, source: Representations) -> tuple[Result, Path]:
    """One model; from its folder where it is there already."""
    identity = {key: value for key, value in source.settings.items() if key != "versions"}
    transform = probe.protocol.view.describe(source.size, train=False)
    protocol = {"ks": list(KS), "temperatures": list(TEMPERATURES), "test_transform": transform}
    settings = {**probe.settings(), **identity, **protocol}
    folder = run_folder(probe.out, probe.task.name, "knn", source.about["name"], settings)

    def work() -> Result:
        started = time.perf_counter()
        with probe.bar(0, "neighbours") as bar:
            feed = CachedFeed(probe, source, bar, flips=False)
            result = _measure(probe, source, feed, protocol)
        spent = time.perf_counter() - started
        return replace(result, seconds=spent, images_per_second=feed.rate(spent))

    precision = str(source.settings.get("precision", "float32"))
    return once(folder, probe.distributed, precision, work), folder


def _measure(
    probe: Probe, source: Representations, feed: CachedFeed, protocol: dict[str, Any]
) -> Result:
    everyone = np.concatenate([feed.fit, feed.choose])
    neighbours = everyone if not len(feed.choose) else feed.fit
    ks = [k for k in KS if k <= len(neighbours)]
    grid = list(product(ks, TEMPERATURES))
    answered = feed.choose if len(feed.choose) else None
    right, asked = _right(probe, source, feed, neighbours, answered, ks, TEMPERATURES)
    figures = [100 * n / asked for n in right]
    chosen = max(range(len(right)), key=right.__getitem__)
    held_out: list[float | None] = [None] * len(grid)
    test: list[float | None] = [None] * len(grid)
    if answered is None:
        test, best, total = [*figures], right[chosen], asked
    else:
        k, temperature = grid[chosen]
        held_out = [*figures]
        (best,), total = _right(probe, source, feed, everyone, None, [k], [temperature])
        test[chosen] = 100 * best / total
    names = [f"k={k} T={temperature:g}" for k, temperature in grid]
    return Result(
        task=probe.task.name,
        method="knn",
        model=source.about,
        figure=100 * best / total,
        chosen=names[chosen],
        selection=probe.selection,
        heads=[Head(name, kept, tested) for name, kept, tested in zip(names, held_out, test)],
        protocol=protocol,
        data=probe.data(),
        images={"fit": len(feed.fit), "choose": len(feed.choose), "test": total},
        seed=probe.seed,
        interval=wilson_interval(best, total),
        notes=notes_of(probe, feed.broken),
    )


def _right(
    probe: Probe,
    source: Representations,
    feed: CachedFeed,
    neighbours: Targets,
    answered: Targets | None,
    ks: list[int],
    temperatures: Any,
) -> tuple[list[int], int]:
    """Right answers for every setting, and answers, of all processes."""
    name = next(iter(source.widths))
    near = source.split(feed.train.rows[neighbours])[name].to(feed.device)
    labels = feed.labels(probe.train, feed.train, neighbours)
    right = torch.zeros(len(ks) * len(temperatures), dtype=torch.int64)
    answers = 0
    for rows, truth in feed.testing() if answered is None else feed.held_out():
        queries = source.split(rows)[name]
        found = knn_correct(near, labels, queries, truth, ks=ks, temperatures=temperatures)
        right += found.flatten().cpu()
        answers += len(truth)
    *counts, total = probe.distributed.all_reduce(
        torch.cat([right, torch.tensor([answers])])
    ).tolist()
    return counts, total
