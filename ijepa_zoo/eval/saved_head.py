"""A saved head on another test set, such as ImageNet-V2 or photos of another camera."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data.clevr import open_clevr
from ..data.decode import Decoder
from ..data.splits import open_splits
from ..data.transforms import transform_config
from ..distributed import init_distributed
from ..encode import model_name
from ..errors import CheckpointError, DataError, some
from ..models.classifier import (
    HEAD,
    AttentiveHead,
    Classifier,
    load_classifier,
    read_classifier_config,
)
from .accuracy import compute_metrics
from .features import BlockFeatures, Source, refuse_undecoded
from .loaders import encoded
from .models import Subject
from .probe import EvalConfig, Probe, make_result, run_once
from .results import Result, data_name
from .sets import EvalSet
from .tasks import TASKS, Task, View


def evaluate_head(
    head: str | Path, data: Any, out: str | Path = "results", **options: Any
) -> Result:
    """Test a head that a linear, attentive or logistic probe has saved.

    Args:
        head: Its folder, `model` in the folder of the result.
        data: Labeled images with the names of classes that the head knows; of data with a test
            part that part alone, else all images. Images of other classes are left out.
        out: Folder of all evaluations.
        options: `device`, `workers`, `precision`, `value_range`, `bands`, `skip_broken` and
            `progress` of :class:`~ijepa_zoo.eval.probe.EvalConfig`.

    Raises:
        CheckpointError: The folder is not a classifier of a probe, or its encoder has changed.
        DataError: The data cannot be used, or have no class that the head knows.
        RunError: Another process works on the same evaluation.
    """
    about = read_classifier_config(head) or {}
    if not {"chosen", "task", "view"} <= about.keys():
        raise CheckpointError(
            f"'{head}' is not a head of eval linear, attentive, logreg or count: give RESULT/model "
            "of one of these, and use `ijepa-zoo predict` for other models"
        )
    classifier = load_classifier(head)
    config = EvalConfig(model=classifier.encoder, data=data, out=out, **options)
    channels = int(transform_config(classifier.encoder)["input_size"][0])
    decoder = Decoder(channels, config.value_range, config.bands, as_tensor=True)
    with init_distributed(config.device) as distributed:
        task = TASKS.get(about["task"]) or replace(TASKS["classes"], name=about["task"])
        part = _open_test(config, task, classifier, decoder)
        trained_with = replace(task.protocol, view=View(**about["view"]))
        none = np.empty(0, np.int64)
        probe = Probe(config, task, trained_with, part, part, none, none, distributed)
        subject = Subject(classifier.encoder, about["model"] or model_name(classifier.encoder))
        patches = isinstance(classifier.head, AttentiveHead)
        source = BlockFeatures(
            subject, about["pool"], patches, distributed.device, config.precision
        )
        weights = hashlib.sha256((Path(head) / HEAD).read_bytes()).hexdigest()[:16]
        protocol = {"head": f"{about['chosen']} of {Path(head)}", "head_hash": weights}

        def work(folder: Path, settings: dict[str, Any]) -> tuple[Result, float | None]:
            started = time.perf_counter()
            result = _test(probe, source, classifier, about["chosen"], protocol)
            return result, result.images["test"] / (time.perf_counter() - started)

        return run_once(probe, source, "saved-head", protocol, work)[0]


def _open_test(config: EvalConfig, task: Task, classifier: Classifier, decoder: Decoder) -> EvalSet:
    """The test images, with the classes of the head."""
    if task.kind == "classes":
        train, test = open_splits(config.data, None, decoder)
    else:
        train, test = open_clevr(config.data, task.kind, decoder=decoder)
    part, several = train if test is None else test, classifier.multi_label
    if part.targets.ndim > 1 and not several:
        raise DataError(f"'{config.data}' has images of several classes, the head is for one")
    names = classifier.class_names or []
    known = part.with_classes(names, several)
    if several:
        rows = np.arange(len(known.targets)) if known.targets.any() else np.empty(0, np.int64)
    else:
        rows = np.flatnonzero(known.targets >= 0)
    if not len(rows):
        raise DataError(f"no image of '{config.data}' is of a class of the head: {some(names)}")
    others = len(known.targets) - len(rows)
    notes = [f"{others} of {len(known.targets)} images are of other classes"] if others else []
    chosen = known.subset(rows, known.name, notes)
    return EvalSet(
        *(chosen.images, chosen.targets, tuple(names), chosen.name, chosen.notes),
        name=data_name(config.data),
        skip_broken=config.skip_broken,
    )


def _test(
    probe: Probe, source: Source, classifier: Classifier, chosen: str, protocol: dict[str, Any]
) -> Result:
    head = classifier.head.to(source.device).eval()
    name = list(source.widths)[-1 if len(classifier.extractor.layers) > 1 else 0]
    rows, broken = np.arange(len(probe.test)), dict[str, str]()
    batches = probe.in_order(probe.test, rows, source.size)
    numbers = range(len(batches))

    def logits(features: dict[str, Tensor]) -> list[Tensor]:
        return [head(features[name].float())]

    rows_and_labels = encoded(probe, source, batches, numbers, broken)
    metrics = compute_metrics(probe, source, rows_and_labels, logits, 1)
    refuse_undecoded("test", probe.test, rows, metrics.total, broken)
    return make_result(
        *(probe, source.about, "saved head", protocol, [chosen], 0, None, metrics, broken),
        selection="the probe that trained it",
    )
