"""The chosen head of a probe as a classifier folder, and its test on other data."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from ..data.clevr import open_clevr
from ..data.splits import open_splits
from ..data.transforms import transform_config
from ..distributed import Distributed, init_distributed
from ..encode import model_name
from ..errors import CheckpointError, DataError, some
from ..features import Layers
from ..models.classifier import (
    HEAD,
    AttentiveHead,
    Classifier,
    load_classifier,
    read_classifier_config,
    save_classifier,
)
from ..weights.read import FOLDER_PREFIX
from .accuracy import Choice, compute_metrics
from .features import BlockFeatures, encoded
from .models import EvalModel
from .probe import EvalConfig, Probe, make_result
from .results import Result, data_name
from .runs import run_once
from .sets import EvalSet, select, split_off_test
from .tasks import TASKS, EvalTransform, Task


def save_head(
    config: EvalConfig,
    distributed: Distributed,
    model: EvalModel,
    classifier: Classifier,
    folder: Path,
    **record: Any,
) -> None:
    """Save the chosen head as a classifier folder, `model` beside the result, on rank 0.

    The encoder is saved too if requested, or if no name opens it alone.
    """
    if not distributed.is_main:
        return
    name = model.source
    if model.is_random or (name and read_classifier_config(name.removeprefix(FOLDER_PREFIX))):
        name = None
    save_classifier(
        folder / "model",
        classifier,
        encoder=name,
        encoder_args={"checkpoint": config.checkpoint, "network": config.network},
        with_encoder=config.with_encoder or name is None,
        overwrite=True,
        model=model.name,
        **record,
    )


def save_probe_head(
    probe: Probe, source: BlockFeatures, head: nn.Module, layers: str, folder: Path, chosen: str
) -> None:
    """Save the chosen head of a task of classes; `layers` are the head's representation."""
    network, read = source.model.model, cast("Layers", "last" if layers == "patches" else layers)
    classifier = Classifier(
        network,
        head,
        read,
        source.settings["pool"],
        probe.train.class_names,
        probe.train.multi_label,
        vars(probe.protocol.transform),
    )
    record = {"task": probe.name, "chosen": chosen, "train": probe.train_images}
    save_head(probe.config, probe.distributed, source.model, classifier, folder, **record)


def evaluate_head(
    head: str | Path, data: Any, out: str | Path = "results", **options: Any
) -> Result:
    """Test a head that a linear, attentive or logistic probe has saved.

    Args:
        head: Its folder, `model` in the folder of the result.
        data: Labeled images with class names of the head; if the data have a test part, or are the
            images that the head was trained on, only the test part is used. Images of other classes
            are left out.
        out: Folder of all evaluations.
        options: `device`, `workers`, `precision`, `value_range`, `bands`, `skip_broken` and
            `progress` of :class:`~ijepa_zoo.eval.probe.EvalConfig`.

    Raises:
        CheckpointError: The folder is not a classifier of a probe, or its encoder has changed.
        DataError: The data cannot be used, or have no class that the head knows.
        RunError: Another process works on the same evaluation.
    """
    about = read_classifier_config(head) or {}
    if "chosen" not in about:
        raise CheckpointError(
            f"'{head}' is not a head of eval linear, attentive, logreg or count: give RESULT/model "
            "of one of these, and use `ijepa-zoo predict` for other models"
        )
    classifier = load_classifier(head)
    config = EvalConfig(model=classifier.encoder, data=data, out=out, **options)
    cfg = transform_config(classifier)
    transform = EvalTransform(**{f.name: cfg[f.name] for f in fields(EvalTransform)})
    with init_distributed(config.device) as distributed:
        task = TASKS.get(about["task"]) or replace(TASKS["classes"], name=about["task"])
        part = _open_test(config, task, classifier, about.get("train"))
        protocol, none = replace(task.protocol, transform=transform), np.empty(0, np.int64)
        rows = np.arange(len(part))
        probe = Probe(config, distributed, none, none, rows, task, protocol, part, part)
        model = EvalModel(classifier.encoder, about["model"] or model_name(classifier.encoder))
        kind: Any = "tokens" if isinstance(classifier.head, AttentiveHead) else "vectors"
        source = BlockFeatures(model, about["pool"], kind, distributed.device, config.precision)
        weights = hashlib.sha256((Path(head) / HEAD).read_bytes()).hexdigest()[:16]
        settings = {"head": f"{about['chosen']} of {Path(head).resolve()}", "head_hash": weights}
        module = classifier.head.to(source.device).eval()
        name = list(source.widths)[-1 if len(classifier.extractor.layers) > 1 else 0]

        def work(probe: Probe, folder: Path) -> Result:
            batches = probe.in_order(part, probe.test_rows, source.size)
            rows = encoded(probe, source, batches, range(len(batches)))
            metrics = compute_metrics(probe, source, rows, lambda f: [module(f[name].float())])
            tested = ([about["chosen"]], Choice(0, None, metrics))
            how = "the probe that trained it"
            return make_result(probe, source, "saved head", settings, *tested, selection=how)

        return run_once(probe, source, "saved-head", settings, work)[0]


def _open_test(config: EvalConfig, task: Task, classifier: Classifier, train: Any) -> EvalSet:
    """The test images, with the classes of the head; `train` is the fingerprint of its images."""
    decoder = config.decoder(transform_config(classifier)["input_size"][0])
    if task.kind == "classes":
        whole, test = open_splits(config.data, None, decoder)
    else:
        whole, test = open_clevr(config.data, task.kind, decoder=decoder)
    notes: list[str] = []
    if test is None:
        trained, test = split_off_test(select(whole, whole.targets >= 0, "have no class"))
        if trained.images.fingerprint() == train:
            notes.append("the 20 % that the head was not trained on, by the names of the images")
        else:
            test = whole
            notes.append("no test part: all images are tested, also any that trained the head")
    part = test
    if part.targets.ndim > 1 and not classifier.multi_label:
        raise DataError(f"'{config.data}' has images of several classes, the head is for one")
    names = classifier.class_names or []
    part = part.with_classes(names, classifier.multi_label)
    known = part.targets >= 0
    if classifier.multi_label:
        known = np.full(len(known), part.targets.any())
    rows, others = np.flatnonzero(known), int((~known).sum())
    if not len(rows):
        raise DataError(f"no image of '{config.data}' is of a class of the head: {some(names)}")
    if others:
        notes.append(f"{others} of {len(known)} images are of other classes")
    chosen = part.subset(rows, part.name, notes)
    return EvalSet(**vars(chosen), data=data_name(config.data), skip_broken=config.skip_broken)
