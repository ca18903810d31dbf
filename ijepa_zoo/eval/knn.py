"""The kNN probe: nothing is trained, frozen features of training images vote."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.datasets import Targets
from ..metrics import knn_predict
from .accuracy import TOP, best_head, count_correct
from .features import Source
from .loaders import CachedLoader
from .models import Subject
from .probe import EvalConfig, Probe, evaluate, make_result, pooling, run_once
from .results import Result
from .tasks import Task

KS = (10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.04, 0.07, 0.1, 0.2)


def evaluate_knn(
    task: str | Task,
    model: str | nn.Module | Subject,
    data: Any,
    out: str | Path = "results",
    **options: Any,
) -> Result:
    """Classify test images by their nearest training images; see `knn_predict`.

    Number of neighbors and temperature are chosen on a seeded 10 % of the training images, whose
    neighbors are among the others; all training images are neighbors of test images. The features
    are `last`, of the test view, and are cached.

    Args:
        task: See :class:`EvalConfig`, as the other arguments.
        model: See there.
        data: See there.
        out: See there.
        options: Further fields of :class:`EvalConfig`.

    Raises:
        DataError: The data cannot be used, or do not fit the task.
        SettingsError: An option or the model does not fit.
        RunError: Another process works on the same evaluation, or features are not finite.
    """
    return evaluate(EvalConfig(task=task, model=model, data=data, out=out, **options), _run)


def _run(probe: Probe, source: Source) -> tuple[Result, Path]:
    probe.train.refuse_several_labels("knn")
    transform = probe.protocol.view.describe(source.size, train=False)
    protocol = {"ks": list(KS), "temperatures": list(TEMPERATURES), "test_transform": transform}
    if "layers" in source.settings:
        protocol["layers"] = source.settings["layers"][-1:]  # `last`

    def work(folder: Path, settings: dict[str, Any]) -> tuple[Result, float | None]:
        with probe.bar(0, "neighbors") as bar:
            loader = CachedLoader(probe, source, bar, flips=False)
            return _vote(probe, source, loader, protocol), loader.rate(0)

    return run_once(probe, source, "knn", protocol, work)


def _vote(probe: Probe, source: Source, loader: CachedLoader, protocol: dict[str, Any]) -> Result:
    everyone = np.concatenate([loader.train_rows, loader.val_rows])
    name = next(iter(source.widths))
    rows = source.split(loader.train.rows)[name]  # a view of the file: only these columns are read

    def answer(indices: Targets, batches: Any, settings: list[tuple[int, float]]) -> Any:
        bank = F.normalize(rows[indices].to(loader.device), dim=1)
        labels = loader.labels(probe.train, loader.train, indices)
        ks, temperatures = (list(dict.fromkeys(column)) for column in zip(*settings))

        def predict(features: dict[str, Tensor]) -> Tensor:
            return knn_predict(
                bank,
                labels,
                features[name],
                ks=ks,
                temperatures=temperatures,
                num_classes=probe.num_classes,
                top=min(TOP, probe.num_classes),
            )

        return count_correct(probe, source, batches, predict, len(settings))

    on_test = not len(loader.val_rows)
    grid = list(
        product(
            [k for k in KS if k <= len(loader.train_rows)] or [len(loader.train_rows)], TEMPERATURES
        )
    )
    val = answer(loader.train_rows, loader.testing() if on_test else loader.validation(), grid)
    chosen = best_head(val)
    return make_result(
        *(probe, source.about, "knn", {**pooling(source), **protocol}),
        [f"k={k} T={temperature:g}" for k, temperature in grid],
        chosen,
        None if on_test else val,
        val if on_test else answer(everyone, loader.testing(), [grid[chosen]]),
        loader.broken,
        notes=["all training images are neighbors of test images"],
    )
