"""Few labels: the images of a list, a classifier on frozen features or the fine-tuning recipe."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.datasets import Subset, Targets
from ..data.decode import Decoder
from ..distributed import init_distributed
from ..errors import DataError, SettingsError
from .feeds import CachedFeed
from .finetune import prepare, refuse_scenes, run, with_batch
from .intervals import wilson_interval
from .logistic import L2S, choose_logistic, fit_logistic
from .models import Subject, as_subject, check_model
from .probe import Probe, notes_of, open_probe
from .recipes import few_labels_recipe
from .representations import BlockFeatures
from .result import Head, Result
from .runs import once, run_folder
from .sets import EvalSet, split_to_choose
from .tasks import Task, find_task
from .words import counted, option, other_epochs, some


def evaluate_lowshot(
    task: str | Task,
    model: str | nn.Module | Subject,
    data: Any,
    files: str | Path,
    out: str | Path = "results",
    *,
    finetune: bool = False,
    test: Any = None,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    micro: int | None = None,
    grad_checkpointing: bool = False,
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
    """Learn from the few training images that a list names, and test on the whole test set.

    By default a logistic regression on frozen features: `last` or `last4` and the strength of its
    penalty are chosen on a seeded 10 % of the listed images, then it is fitted to all of them.
    With `finetune` all weights are trained by the paper's recipe for 1 % of ImageNet.

    Args:
        task: A task of classes or its name; see `find_task`.
        model: A name (see `open_model`) or any timm ViT of at least four blocks.
        data: See `open_task`.
        files: The list; see `listed_rows`.
        out: Folder of all evaluations; see `evaluate_linear`.
        finetune: Train all weights.
        test: The test data, if `data` does not hold them.
        seed: See `evaluate_linear` and `evaluate_finetune`, as for all that follow.
        epochs: Of `finetune`.
        batch_size: Of `finetune`.
        micro: Of `finetune`.
        grad_checkpointing: Of `finetune`.
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
        DataError: The data or the list cannot be used, or do not fit the task.
        ValueError: An argument or the model does not fit, or features are not finite.
        RunError: Another process works on the same evaluation.
    """
    chosen = find_task(task) if isinstance(task, str) else task
    given = {"epochs": epochs, "batch_size": batch_size, "micro": micro}
    unused = [option(name) for name, value in given.items() if value is not None]
    unused += [option("grad_checkpointing")] if grad_checkpointing else []
    if unused and not finetune:
        raise SettingsError(
            f"{', '.join(unused)}: for fine-tuning alone, use {option('finetune')} too"
        )
    if finetune:
        refuse_scenes(chosen)
    options: dict[str, Any] = {"checkpoint": checkpoint, "network": network, "img_size": img_size}
    decoder = Decoder(check_model(model, random=random, **options), value_range, bands)
    with init_distributed(device) as distributed:
        probe = open_probe(
            *(chosen, data, out, distributed),
            test=test, seed=seed, workers=workers, decoder=decoder, skip_broken=skip_broken,
            progress=progress,
        )  # fmt: skip
        probe = few_labels(probe, files)
        if not finetune and not len(probe.choose):
            raise DataError(
                f"'{files}' names {counted(len(probe.train), 'image')}, too few to choose a "
                "penalty by: name more, at least two of a class and ten of all"
            )
        subject = as_subject(model, random=random, seed=seed, **options)
        if finetune:
            recipe = few_labels_recipe(subject.model)
            shorter = recipe if epochs is None else recipe.with_epochs(epochs)
            notes = other_epochs(shorter.epochs, recipe.epochs, "recipe")
            recipe = with_batch(shorter, batch_size)
            training = prepare(
                *(subject, probe.train, recipe, seed, distributed, micro, grad_checkpointing),
                *(probe.workers, precision),
            )
            sets = (probe.train, probe.test)
            how = "lowshot-finetune", notes, progress
            result = run(chosen, subject, training, sets, Path(out), *how)
        else:
            source = BlockFeatures(subject, device=str(distributed.device), precision=precision)
            result = _regression(probe, source)
        distributed.barrier()
    return result


def few_labels(probe: Probe, files: str | Path) -> Probe:
    """The probe with the listed training images alone.

    Raises:
        DataError: The list cannot be used, or leaves fewer than two classes.
    """
    train = probe.train
    rows = listed_rows(train, files)
    labels = train.labels[rows]
    counts = np.bincount(labels, minlength=len(train.classes))
    present = counts[counts > 0]
    if len(present) < 2:
        raise DataError(f"the images of '{files}' are all of one class, at least two are needed")
    each = f"{present.min()} to {present.max()}" if present.min() < present.max() else present[0]
    notes = [
        *train.notes,
        f"{len(rows)} of {len(train)} training images, {each} of a class, named by "
        f"'{Path(files).name}'",
    ]
    if len(present) < len(counts):
        notes.append(f"{len(counts) - len(present)} of {len(counts)} classes have no listed image")
    few = replace(train, images=Subset(train.images, rows), labels=labels, notes=tuple(notes))
    fit, choose = split_to_choose(few, probe.seed)
    return replace(probe, train=few, fit=fit, choose=choose)


def listed_rows(train: EvalSet, files: str | Path) -> Targets:
    """Numbers of the images that a list names.

    Args:
        train: The training set.
        files: A text file in the format of the 1 % list of ImageNet: one file name a line
            (`n01440764_10043.JPEG`), or with folders (`n01440764/n01440764_10043.JPEG`) where
            names alone are not unique.

    Returns:
        Sorted int64.

    Raises:
        DataError: The list cannot be read or is empty, names an image that is not there, or one
            of several of that name.
    """
    try:
        lines = Path(files).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list '{files}' cannot be read: {error}") from error
    wanted = dict.fromkeys(line.strip() for line in lines if line.strip())
    if not wanted:
        raise DataError(f"the list '{files}' is empty: it has one file name a line")
    places = _places(train, {name.count("/") for name in wanted})
    missing = [name for name in wanted if name not in places]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(wanted)} images of '{files}' are not among the training "
            f"images: {some(missing)}; those are called, for example, '{train.images.name(0)}'"
        )
    several = [name for name in wanted if len(places[name]) > 1]
    if several:
        example = " and ".join(f"'{train.images.name(row)}'" for row in places[several[0]][:2])
        raise DataError(
            f"{len(several)} names of '{files}' mean several images ({some(several)}: {example}): "
            "write them with the folder, CLASS/NAME"
        )
    return np.array(sorted({places[name][0] for name in wanted}), np.int64)


def _places(train: EvalSet, depths: Iterable[int]) -> dict[str, list[int]]:
    """Images by the ends of their names, with as many folders as `depths` has."""
    found: dict[str, list[int]] = defaultdict(list)
    for row in range(len(train)):
        parts = train.images.name(row).split("/")
        for depth in depths:
            found["/".join(parts[-depth - 1 :])].append(row)
    return found


def _regression(probe: Probe, source: BlockFeatures) -> Result:
    """Logistic regression; from its folder where the result is there already."""
    identity = {key: value for key, value in source.settings.items() if key != "versions"}
    protocol = {
        "l2s": list(L2S),
        "transform": probe.protocol.view.describe(source.size, train=False),
    }
    settings = {**probe.settings(), **identity, **protocol}
    folder = run_folder(probe.out, probe.task.name, "lowshot", source.about["name"], settings)

    def work() -> Result:
        started = time.perf_counter()
        with probe.bar(0, "features") as bar:
            feed = CachedFeed(probe, source, bar, flips=False)
            result = _measure(probe, source, feed, protocol)
        spent = time.perf_counter() - started
        return replace(result, seconds=spent, images_per_second=feed.rate(spent))

    return once(folder, probe.distributed, str(source.settings["precision"]), work)


def _measure(
    probe: Probe, source: BlockFeatures, feed: CachedFeed, protocol: dict[str, Any]
) -> Result:
    classes = len(probe.train.classes)

    def data(places: Targets) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows = source.split(feed.train.rows[places].to(feed.device))
        return rows, feed.labels(probe.train, feed.train, places)

    (fit, fit_labels), (held, held_labels) = data(feed.fit), data(feed.choose)
    right: dict[tuple[str, float], int] = {}
    for name in source.widths:
        path = choose_logistic(fit[name], fit_labels, held[name], held_labels, num_classes=classes)
        right |= {(name, l2): count for l2, count in path.correct.items()}
    chosen = max(right, key=lambda setting: right[setting])
    everything, labels = data(np.concatenate([feed.fit, feed.choose]))
    name, l2 = chosen
    best = fit_logistic(everything[name], labels, l2, num_classes=classes)
    found = torch.zeros(2, dtype=torch.int64)
    for rows, truth in feed.testing():
        answers = source.split(rows)[name]
        found += torch.tensor([best.correct(answers, truth), len(truth)])
    correct, total = probe.distributed.all_reduce(found).tolist()
    figure = 100 * correct / total
    return Result(
        task=probe.task.name,
        method="lowshot",
        model=source.about,
        figure=figure,
        chosen=_setting(chosen),
        selection="a seeded 10 % of the listed images",
        heads=[
            Head(
                _setting(setting),
                100 * count / len(feed.choose),
                figure if setting == chosen else None,
            )
            for setting, count in right.items()
        ],
        protocol=protocol,
        data=probe.data(),
        images={"fit": len(feed.fit), "choose": len(feed.choose), "test": total},
        seed=probe.seed,
        interval=wilson_interval(correct, total),
        notes=notes_of(probe, feed.broken),
    )


def _setting(setting: tuple[str, float]) -> str:
    return f"{setting[0]} l2={setting[1]:g}"
