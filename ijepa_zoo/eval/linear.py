"""Linear probes: heads on a frozen encoder, the best one chosen on held-out training images."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .accuracy import percent
from .features import BlockFeatures, Source
from .feeds import CachedFeed, Feed, OnlineFeed
from .heads import Grid, HeadSpec, Trained, choose_and_test, make_grid, train
from .logreg import fit_logistic
from .models import Subject
from .probe import (
    EvalConfig,
    Probe,
    describe_protocol,
    evaluate,
    make_result,
    paper_figure,
    run_once,
    save_head,
    with_protocol,
)
from .results import Result
from .runs import EpochState
from .tasks import Task

_CHECK_WORK = 4e8  # images x features x classes of the check, about 10 s on one CPU core
_CHECK_CS = (0.01, 1.0, 100.0)
_FAR = 1.0  # points of accuracy


def evaluate_linear(
    task: str | Task,
    model: str | nn.Module | Subject,
    data: Any,
    out: str | Path = "results",
    *,
    cached: bool = False,
    epochs: int | None = None,
    batch_size: int | None = None,
    lrs: Sequence[float] | None = None,
    wds: Sequence[float] | None = None,
    **options: Any,
) -> Result:
    """Train linear heads on a frozen encoder with the protocol of the task, and test the best one.

    Heads with and without BatchNorm, on `last` and `last4`, for every learning rate and weight
    decay of the protocol, are trained at once on one pass of the encoder. The best one on a seeded
    10 % of the training images, which no head is fitted to, is tested on the test set once, and
    saved as a classifier in the folder of the result (`model`).

    The same call resumes after an interruption, at the last finished epoch, and returns the result
    at once if it is finished. Processes started by torchrun share the images of each batch and
    exchange their features, so heads and BatchNorm see whole batches.

    Args:
        task: See :class:`~ijepa_zoo.eval.probe.EvalConfig`, as `model`, `data` and `out`.
        model: See there.
        data: See there.
        out: See there.
        cached: Encode each image and its mirror image once, and train on these features.
        epochs: Default: those of the protocol.
        batch_size: Default: that of the protocol; learning rates grow linearly with it.
        lrs: Learning rates per 256 images; default: those of the protocol.
        wds: Weight decays; default: those of the protocol.
        options: Further fields of `EvalConfig`.

    Raises:
        DataError: The data cannot be used, or do not fit the task.
        SettingsError: An option or the model does not fit.
        RunError: Another process works on the same evaluation, or features are not finite.
    """

    def prepare(probe: Probe) -> Probe:
        return with_protocol(probe, probe.task.protocol, epochs, batch_size, lrs, wds)

    def run(probe: Probe, source: Source) -> tuple[Result, Path]:
        fed = CachedFeed if cached else OnlineFeed
        protocol = describe_protocol(probe, fed.name, source.size)

        def work(folder: Path, settings: dict[str, Any]) -> tuple[Result, float | None]:
            started = time.perf_counter()
            images = probe.protocol.epochs * len(probe.fit) + len(probe.choose) + len(probe.test)
            with probe.bar(images, f"{probe.task.name}, {source.about['name']}") as bar:
                feed = fed(probe, source, bar)
                grid = linear_grid(probe, source)
                state = EpochState(folder / "state.pt", probe.distributed)
                trained = train(probe, source, feed, grid, state)
                result = _finish(probe, source, feed, grid, trained, protocol, folder)
            if probe.distributed.is_main:
                state.remove()
            return result, feed.rate(time.perf_counter() - started)

        return run_once(probe, source, f"linear-{fed.name}", protocol, work)

    config = EvalConfig(task=task, model=model, data=data, out=out, **options)
    return evaluate(config, run, prepare=prepare)


def linear_grid(probe: Probe, source: Source) -> Grid:
    """Heads of every representation, with and without BatchNorm, for each rate and decay."""
    protocol = probe.protocol
    rates = protocol.lrs, protocol.weight_decays
    specs = [HeadSpec(*values) for values in product(source.widths, ("linear", "bn"), *rates)]
    return make_grid(specs, source.widths, probe.num_classes, protocol, probe.seed, source.device)


def _finish(
    probe: Probe,
    source: Source,
    feed: Feed,
    grid: Grid,
    trained: Trained,
    protocol: dict[str, Any],
    folder: Path,
) -> Result:
    chosen, val, test, fitted = choose_and_test(probe, source, feed, grid)
    cached = isinstance(feed, CachedFeed)
    paper, notes = paper_figure(probe, source, probe.task.protocol, cached)
    check = None
    if isinstance(feed, CachedFeed):
        notes = [*feed.notes, *notes]
        if val is not None:
            name = grid.specs[chosen].representation
            check = _convex_check(probe, source, feed, name, val.values()[chosen])
            notes += [check["warning"]] if check.get("warning") else []
    spec, head = grid.specs[chosen], grid.modules[chosen]
    if isinstance(source, BlockFeatures):
        save_head(probe, source, head, spec.representation, folder, chosen=spec.name)
    result = make_result(
        *(probe, source, "linear", {**protocol, "batch_size": feed.batch_size}, grid.names),
        *(chosen, val, test, feed.broken, fitted),
        losses=trained.losses,
        paper=paper,
        check=check,
        notes=notes,
    )
    return replace(result, seconds=trained.earlier)


def _convex_check(
    probe: Probe, source: Source, feed: CachedFeed, name: str, sgd: float
) -> dict[str, Any]:
    """Logistic regression on the features of the chosen head: is SGD far from its minimum?

    It sees the same images without their mirror images, at most as many as take some seconds.
    `warning` is there where SGD is more than one point and two standard errors behind.
    """
    classes = probe.num_classes
    most = max(int(_CHECK_WORK / (source.widths[name] * classes)), 2 * classes)
    chosen = np.linspace(0, len(feed.fit), min(most, len(feed.fit)), endpoint=False).astype(int)
    (x, y), (val, answers) = (
        (
            source.split(feed.train.rows)[name][rows].to(feed.device),
            feed.labels(probe.train, feed.train, rows),
        )
        for rows in (feed.fit[chosen], feed.choose)
    )
    fitted, best, convex = None, 0.0, -1.0
    for c in _CHECK_CS:
        fitted = fit_logistic(x, y, c, classes, start=fitted, max_iterations=100)
        if (found := percent(fitted.logits(val), answers)) > convex:
            best, convex = c, found
    error = 100 * math.sqrt(convex / 100 * (1 - convex / 100) / len(answers))
    check: dict[str, Any] = {
        "method": "logistic regression, L-BFGS",
        "representation": name,
        "C": best,
        "fit_images": len(chosen),
        "held_out": convex,
        "held_out_sgd": sgd,
    }
    if convex - sgd > max(_FAR, 2 * error):
        check["warning"] = (
            f"SGD is far from converged: its best head has {sgd:.1f} % on the validation images, "
            f"logistic regression {convex:.1f} % on the same features ({name})"
        )
    return check
