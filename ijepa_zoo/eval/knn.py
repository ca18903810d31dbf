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
from .accuracy import TOP, Metrics, count_correct
from .features import CachedLoader, Source
from .models import EvalModel
from .probe import EvalConfig, Probe, evaluate_classes, make_result, pooling, run_once
from .results import Result
from .tasks import Task

KS = (10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.04, 0.07, 0.1, 0.2)


def evaluate_knn(
    task: str | Task,
    model: str | nn.Module | EvalModel,
    data: Any,
    out: str | Path = "results",
    **options: Any,
) -> Result:
    """Classify test images by their nearest training images; see `knn_predict`.

    Number of neighbors and temperature are chosen on a seeded 10 % of the training images, whose
    neighbors are among the others; all training images are neighbors of test images. The features
    are `last`, with the test transform, and are cached.

    The arguments are fields of :class:`~ijepa_zoo.eval.probe.EvalConfig`; errors are those of
    :func:`evaluate_linear`.
    """
    return evaluate_classes(EvalConfig(task=task, model=model, data=data, out=out, **options), _run)


def _run(probe: Probe, source: Source) -> tuple[Result, Path]:
    probe.train.refuse_several_labels("knn")
    transform = probe.protocol.transform.describe(source.size, train=False)
    protocol = {"ks": list(KS), "temperatures": list(TEMPERATURES), "test_transform": transform}
    if "layers" in source.settings:
        protocol["layers"] = source.settings["layers"][-1:]  # `last`

    def work(folder: Path) -> Result:
        with probe.bar(0, "neighbors") as bar:
            loader = CachedLoader(probe, source, bar, flips=False)
            return _vote(probe, source, loader, protocol)

    return run_once(probe, source, "knn", protocol, work)


def _vote(probe: Probe, source: Source, loader: CachedLoader, protocol: dict[str, Any]) -> Result:
    all_rows = np.concatenate([loader.train_rows, loader.val_rows])
    name = next(iter(source.widths))
    rows = source.split(loader.train.rows)[name]  # of the file: only these columns are read

    def answer(indices: Targets, batches: Any, settings: list[tuple[int, float]]) -> Metrics:
        bank = F.normalize(rows[indices].to(loader.device), dim=1)
        labels = loader.labels(probe.train, loader.train, indices)
        ks, temperatures = (list(dict.fromkeys(column)) for column in zip(*settings))
        classes = probe.num_classes
        options: dict[str, Any] = {"num_classes": classes, "top": min(TOP, classes)}

        def predict(features: dict[str, Tensor]) -> Tensor:
            queries = features[name]
            return knn_predict(bank, labels, queries, ks=ks, temperatures=temperatures, **options)

        return count_correct(probe, source, batches, predict, len(settings))

    on_test = not len(loader.val_rows)
    number = len(loader.train_rows)
    grid = list(product([k for k in KS if k <= number] or [number], TEMPERATURES))
    val = answer(loader.train_rows, loader.testing() if on_test else loader.validation(), grid)
    chosen = val.best
    return make_result(
        *(probe, source.about, "knn", {**pooling(source), **protocol}),
        [f"k={k} T={temperature:g}" for k, temperature in grid],
        chosen,
        None if on_test else val,
        val if on_test else answer(all_rows, loader.testing(), [grid[chosen]]),
        loader.broken,
        notes=["all training images are neighbors of test images"],
    )
