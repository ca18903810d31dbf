"""The kNN probe: nothing is trained, frozen features of training images vote."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.datasets import Targets
from ..metrics import knn_predict
from .accuracy import TOP, Metrics, choose, count_correct
from .features import CachedLoader, Source
from .models import EvalModel
from .probe import EvalConfig, Probe, evaluate, make_result, open_probe
from .results import Result
from .runs import run_once
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
    config = EvalConfig(task=task, model=model, data=data, out=out, **options)
    return evaluate(config, open_probe, _run)


def _run(probe: Probe, source: Source) -> tuple[Result, Path]:
    probe.train.refuse_several_labels("knn")
    transform = probe.protocol.transform.describe(source.size, train=False)
    protocol = {"ks": list(KS), "temperatures": list(TEMPERATURES), "test_transform": transform}
    if "layers" in source.settings:
        protocol["layers"] = source.settings["layers"][-1:]  # `last`

    def work(probe: Probe, folder: Path) -> Result:
        with probe.bar(0, "neighbors") as bar:
            return _vote(probe, source, CachedLoader(probe, source, bar, flips=False), protocol)

    return run_once(probe, source, "knn", protocol, work)


def _vote(probe: Probe, source: Source, loader: CachedLoader, protocol: dict[str, Any]) -> Result:
    name, classes, found = next(iter(source.widths)), probe.num_classes, loader.train
    rows = source.split(found.rows)[name]  # of the file: only these columns are read
    number = len(loader.train_rows)
    ks = [k for k in KS if k <= number] or [number]

    def answer(bank_rows: Targets, batches: Any, ks: Sequence[int], ts: Sequence[float]) -> Metrics:
        bank = F.normalize(rows[bank_rows].to(loader.device), dim=1)
        labels = found.labels[bank_rows].to(loader.device)
        options: dict[str, Any] = {"num_classes": classes, "top": min(TOP, classes)}

        def predict(features: dict[str, Tensor]) -> Tensor:
            found = knn_predict(bank, labels, features[name], ks=ks, temperatures=ts, **options)
            return found.transpose(0, 1)

        return count_correct(probe, source, batches, predict)

    def test(batches: Any, chosen: int) -> Metrics:
        everything = np.concatenate([loader.train_rows, loader.val_rows])
        k, temperature = settings[chosen]
        return answer(everything, batches, [k], [temperature])

    settings = list(product(ks, TEMPERATURES))
    choice = choose(loader, lambda b: answer(loader.train_rows, b, ks, TEMPERATURES), test)
    names = [f"k={k} T={temperature:g}" for k, temperature in settings]
    notes = ["all training images are neighbors of test images"]
    args = (probe, source, "knn", protocol, names, choice)
    return make_result(*args, notes=notes)
