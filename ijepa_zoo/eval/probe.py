"""What the classification probes share: options, data, counts and results."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from ..data.datasets import Targets
from ..data.decode import Decoder
from ..data.loading import load_in_order, usable_cpus
from ..distributed import Distributed, init_distributed
from ..encode import model_name
from ..errors import DataError, SettingsError, option, some
from ..features import Layers
from ..models.classifier import Classifier, save_classifier
from ..progress import progress_bar
from .accuracy import Metrics
from .batches import EvalBatch, OrderedBatches
from .features import BlockFeatures, RawPixels, Source, pixel_options
from .models import Subject, as_subject
from .results import TEST_SET, Head, Result
from .runs import EpochState, once, run_folder
from .sets import VAL_SHARE, EvalSet, data_record, open_task, split_off_val
from .tasks import Protocol, Task, find_task

MICRO = 128  # images of a forward pass
_LARGEST = 1e6  # learning rate and weight decay
_CACHE_SECONDS = 21_600.0
_FEW = 100  # images to choose by that deserve a warning: their accuracies come in whole points
CACHED_AS_IS = (
    "cached: each image and its mirror image are encoded once, as the protocol has them (its only "
    "random transform is the flip)"
)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Options that all probes of classes share.

    Attributes:
        task: A task or its name; see `find_task`.
        model: A name (see `open_model`) or any timm ViT of at least four blocks.
        data: See `open_task`.
        out: Folder of all evaluations: each has a folder of its own in it with `result.json`, and
            a row in `results.csv`; features are cached in `cache`.
        test: The test data, if `data` does not hold them.
        pool: See `FeatureExtractor`; 'auto' is the mean over patches for I-JEPA, the class token
            for DINOv2.
        baseline: Also evaluate the same architecture with random weights, and raw pixels.
        select_on_test: Fit to all training images and choose the head on the test set, as much of
            the literature does; the accuracy is then too high.
        seed: Of the validation split, order, augmentation and first weights.
        device: 'auto', or torch's name of a device.
        workers: Processes that decode; default: one per CPU.
        precision: Of the encoder, see `extract_features`; 'auto': half precision on a GPU.
        checkpoint: Weights for a model that is named; see `create_model`.
        network: Which network of them; see there.
        img_size: Image size in pixels for a model that is named; default: its own.
        random: Random weights, drawn by the seed, for a model that is named.
        value_range: Values of 16-bit images that become black and white, see `Decoder`.
        bands: Bands or pages of image files that become channels, see `Decoder`.
        skip_broken: Leave out images that cannot be decoded; otherwise they stop the evaluation.
        with_encoder: Save the encoder beside the head, not only a reference to it.
        progress: Show progress: bars in a terminal, a line every 30 s elsewhere.
    """

    task: str | Task = "classes"
    model: str | nn.Module | Subject
    data: Any
    out: str | Path = "results"
    test: Any = None
    pool: str | None = "auto"
    baseline: bool = False
    select_on_test: bool = False
    seed: int = 0
    device: str = "auto"
    workers: int | None = None
    precision: str = "auto"
    checkpoint: str | None = None
    network: str | None = None
    img_size: int | tuple[int, int] | None = None
    random: bool = False
    value_range: tuple[float, float] | None = None
    bands: tuple[int, ...] | None = None
    skip_broken: bool = False
    with_encoder: bool = False
    progress: bool = False

    def open_model(self) -> Subject:
        """The model of these options.

        Raises:
            SettingsError: No model is called that, or an option does not hold for it.
        """
        if self.random and self.baseline:
            raise SettingsError(
                f"{option('random')} is the baseline itself: leave {option('baseline')} out"
            )
        options = {name: getattr(self, name) for name in ("checkpoint", "network", "img_size")}
        subject = as_subject(self.model, random=self.random, seed=self.seed, **options)
        if self.baseline and subject.given is None:
            raise SettingsError(f"{option('baseline')} needs a model that is given by its name")
        return subject

    def decoder(self, in_chans: int, as_tensor: bool = True) -> Decoder:
        """See `Decoder`."""
        return Decoder(in_chans, self.value_range, self.bands, as_tensor=as_tensor)


@dataclass(frozen=True)
class Probe:
    """One task with its data, for any number of models."""

    config: EvalConfig
    task: Task
    protocol: Protocol
    train: EvalSet
    test: EvalSet
    train_rows: Targets
    val_rows: Targets
    distributed: Distributed
    subset: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """Folder of all evaluations."""
        return Path(self.config.out)

    @property
    def seed(self) -> int:
        """The seed."""
        return self.config.seed

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the metrics except the model, as plain values."""
        return {
            "task": self.task.name,
            "train": self.train.fingerprint(),
            "test": self.test.fingerprint(),
            "files": [part.files_state for part in (self.train, self.test)],
            **pixel_options(self.train),
            "select_on_test": not len(self.val_rows),
            "skip_broken": self.config.skip_broken,
            "seed": self.seed,
        }

    @property
    def selection(self) -> str:
        """What the head is chosen by."""
        if not len(self.val_rows):
            return TEST_SET
        return f"a seeded 10 % of the {'chosen' if self.subset else 'training'} images"

    def in_order(
        self, part: EvalSet, rows: Targets, size: tuple[int, int], *, shared: bool = True
    ) -> OrderedBatches:
        """Images in order with the test transform; the share of this process, or all of them."""
        rank, world = (self.distributed.rank, self.distributed.world_size) if shared else (0, 1)
        # one shape for all batches: no slot is wasted where there are few images
        micro = min(MICRO, -(-len(rows) // world))
        view = self.protocol.view
        return OrderedBatches(part, rows, view, size, micro, rank=rank, world=world)

    def loaded(self, batches: Any, numbers: Any) -> Iterator[EvalBatch]:
        """Batches by their numbers, decoded ahead."""
        workers, cuda = self.config.workers, self.distributed.device.type == "cuda"
        return load_in_order(batches, numbers, workers, pin_memory=cuda)

    def bar(self, total: int, description: str) -> Any:
        """A progress bar in images, in process 0."""
        return progress_bar(self.config.progress and self.distributed.is_main, total, description)


def open_probe(config: EvalConfig, distributed: Distributed, subject: Subject) -> Probe:
    """Open the data of a task; no image is decoded."""
    task = find_task(config.task) if isinstance(config.task, str) else config.task
    task = task.of_model(model_name(subject.model))
    train, test = open_task(
        task,
        config.data,
        test=config.test,
        workers=usable_cpus() if config.workers is None else config.workers,
        decoder=config.decoder(subject.in_chans),
        skip_broken=config.skip_broken,
        progress=config.progress and distributed.is_main,
    )
    fit, choose = split_off_val(train, config.seed)
    if config.select_on_test:
        fit, choose = np.arange(len(train)), choose[:0]
    return Probe(config, task, task.protocol, train, test, fit, choose, distributed)


def evaluate(
    config: EvalConfig,
    run: Callable[[Probe, Source], tuple[Result, Path]],
    *,
    patches: bool = False,
    prepare: Callable[[Probe], Probe] = lambda probe: probe,
) -> Result:
    """Evaluate a model, and with `baseline` the untrained model and raw pixels."""
    subject = config.open_model()
    # hours: the others wait while rank 0 writes the cache
    with init_distributed(config.device, timeout=_CACHE_SECONDS) as distributed:
        probe = prepare(open_probe(config, distributed, subject))
        if not config.select_on_test and not len(probe.val_rows):
            raise _nothing_to_choose_by(probe)
        if len(probe.train_rows) < 2:
            raise DataError("one training image is too few: give at least two")

        def features(subject: Subject) -> BlockFeatures:
            return BlockFeatures(
                subject, config.pool, patches, distributed.device, config.precision
            )

        source = features(subject)
        result, folder = run(probe, source)
        if config.baseline and not result.baselines:
            others: list[Source] = [features(subject.untrained(config.seed))]
            others += [] if patches else [RawPixels(source.size, subject.in_chans, source.device)]
            values = {other.about["name"]: run(probe, other)[0].value for other in others}
            result = replace(result, baselines=values)
            if distributed.is_main:
                result.write(folder)
        distributed.barrier()
    return result


def _nothing_to_choose_by(probe: Probe) -> DataError:
    return DataError(
        f"the training images ({len(probe.train)} of {probe.num_classes} classes) leave none to "
        f"choose the best head by: use at least {round(1 / VAL_SHARE)}, and two of a class, or "
        f"choose on the test set, {option('select_on_test')}"
    )


def run_once(
    probe: Probe,
    source: Source,
    method: str,
    protocol: dict[str, Any],
    work: Callable[[Path, dict[str, Any]], tuple[Result, float | None]],
) -> tuple[Result, Path]:
    """The result of an evaluation, from its folder if it is finished, and the folder."""
    identity = {key: value for key, value in source.settings.items() if key != "versions"}
    settings = {**probe.settings(), **identity, **protocol, **probe.subset}
    folder = run_folder(probe.out, probe.task.name, method, source.about["name"], settings)

    def timed() -> Result:
        started = time.perf_counter()
        result, rate = work(folder, settings)
        seconds = result.seconds + time.perf_counter() - started
        return replace(result, seconds=seconds, images_per_second=rate)

    precision = str(source.settings.get("precision", "float32"))
    result = once(folder, probe.distributed, precision, timed)
    if probe.distributed.is_main:
        EpochState(folder / "state.pt").remove()
    return result, folder


def make_result(
    probe: Probe,
    about: dict[str, Any],
    method: str,
    protocol: dict[str, Any],
    heads: Sequence[str],
    chosen: int,
    val: Metrics | None,
    test: Metrics,
    broken: dict[str, str],
    *,
    losses: Sequence[float | None] | None = None,
    notes: Sequence[str] = (),
    selection: str | None = None,
    **more: Any,
) -> Result:
    """The result of a probe; every process must call this.

    `val` has the metrics of all heads, and `test` those of the chosen one; without `val`, `test`
    has those of all heads.
    """
    on_val: list[float | None] = [None] * len(heads)
    on_test: list[float | None] = [None] * len(heads)
    if val is None:
        on_test = [*test.values()]
        test = test.only(chosen)
    else:
        on_val, on_test[chosen] = [*val.values()], test.values()[0]
    found = of_all_processes(broken, probe.distributed)
    names = (probe.train.images.name(row) for row in probe.train_rows.tolist()) if found else ()
    fitted = len(probe.train_rows) - sum(name in found for name in names)
    images = {"train": fitted, "val": val.total if val else 0, "test": test.total}
    selection = selection or probe.selection
    columns = (heads, on_val, on_test, losses or [None] * len(heads))
    return Result(
        task=probe.task.name,
        method=method,
        model=about,
        value=test.values()[0],
        metric=test.name,
        chosen=heads[chosen],
        selection=selection,
        heads=[Head(*column) for column in zip(*columns)],
        protocol={**protocol, **probe.subset},
        data=data_record(probe.train, probe.test),
        images={name: count for name, count in images.items() if count},
        seed=probe.seed,
        interval=test.interval(),
        metrics=test.others(),
        notes=[*notes, *_notes(probe, selection, found)],
        **more,
    )


def pooling(source: Source) -> dict[str, Any]:
    """Settings of an encoder that results show."""
    names = ("pool", "layers", "precision")
    return {name: source.settings[name] for name in names if name in source.settings}


def _notes(probe: Probe, selection: str, broken: dict[str, str]) -> list[str]:
    """What a reader must know of data and protocol; `broken` is that of all processes."""
    parts = [probe.train] if probe.train is probe.test else [probe.train, probe.test]
    notes = [note for part in parts for note in part.notes]
    if selection == TEST_SET:
        notes.append(
            "chosen on the test set, as much of the literature does: the accuracy is too high by "
            "as much as luck helps the best of the heads"
        )
    elif 0 < len(probe.val_rows) < _FEW:
        notes.append(f"chosen by {len(probe.val_rows)} images: another seed may choose otherwise")
    return [*notes, *undecoded(broken), *lost_classes(probe.train, probe.train_rows, broken)]


def of_all_processes(texts: Mapping[str, str], distributed: Distributed) -> dict[str, str]:
    """The texts of all processes; every process must call this."""
    return {k: v for part in distributed.all_gather_object(texts) for k, v in part.items()}


def undecoded(broken: Mapping[str, str], what: str = "image") -> list[str]:
    """A note on what could not be decoded, by name and reason; none where there is none."""
    if not broken:
        return []
    named = some(f"{name}: {reason}" for name, reason in broken.items())
    return [f"{what}s that could not be decoded: {len(broken)} ({named})"]


def lost_classes(train: EvalSet, rows: Targets, broken: Mapping[str, str]) -> list[str]:
    """A note on classes of which no training image could be decoded."""
    if not broken or not len(rows):
        return []  # of a million images no names are asked for
    good = np.array([train.images.name(row) not in broken for row in rows.tolist()], np.bool_)
    left = train.class_sizes(rows[good])
    lost = [f"'{train.classes[k]}'" for k in np.flatnonzero(left == 0).tolist()]
    if not lost:
        return []
    return [f"classes without a training image that could be decoded: {len(lost)} ({some(lost)})"]


def other_epochs(epochs: int, usual: int, whose: str) -> list[str]:
    """A note where a training is not as long as its source has it; none where it is."""
    return [] if epochs == usual else [f"epochs: {epochs} instead of the {whose}'s {usual}"]


def with_protocol(
    probe: Probe,
    protocol: Protocol,
    epochs: int | None,
    batch_size: int | None,
    lrs: Sequence[float] | None,
    wds: Sequence[float] | None,
) -> Probe:
    """The probe with a protocol and the user's changes of it."""
    if batch_size is not None and batch_size < 2:
        raise SettingsError(f"{option('batch_size')} must be at least 2")
    if any(not 0 < lr < _LARGEST for lr in lrs or ()):
        raise SettingsError(f"{option('lrs')} must be above 0 and below {_LARGEST:g}")
    if any(not 0 <= wd < _LARGEST for wd in wds or ()):
        raise SettingsError(f"{option('wds')} must be 0 or more and below {_LARGEST:g}")
    changed = protocol if epochs is None else protocol.with_epochs(epochs)
    changed = replace(
        changed,
        batch_size=batch_size or changed.batch_size,
        lrs=tuple(lrs or changed.lrs),
        weight_decays=changed.weight_decays if wds is None else tuple(wds),
    )
    return replace(probe, protocol=changed)


def describe_protocol(probe: Probe, features: str, size: tuple[int, int]) -> dict[str, Any]:
    """The protocol of trained heads as results record it, in plain values."""
    view = probe.protocol.view
    return {
        **json.loads(json.dumps(asdict(probe.protocol))),
        "features": features,
        "train_transform": view.describe(size, train=features == "online"),
        "test_transform": view.describe(size, train=False),
    }


def paper_figure(
    probe: Probe, source: Source, usual: Protocol, cached: bool
) -> tuple[float | None, list[str]]:
    """The paper's accuracy if this run follows its protocol, and notes on what differs."""
    paper = probe.task.paper.get(source.paper_name or "")
    notes = other_epochs(probe.protocol.epochs, usual.epochs, "protocol")
    config = probe.config
    different = probe.protocol != probe.task.protocol or not len(probe.val_rows)
    different |= config.img_size is not None or config.pool != "auto"
    different |= cached and probe.protocol.view.shape != "square"
    if paper is not None and different:
        notes.append(f"the paper has {paper:g} % with another protocol: not comparable")
    return (None if different else paper), notes


def save_head(
    config: EvalConfig,
    distributed: Distributed,
    subject: Subject,
    classifier: Classifier,
    folder: Path,
    **record: Any,
) -> None:
    """Save encoder and chosen head as a classifier folder, `model` beside the result; rank 0 does.

    The encoder is saved too if the user wants that, or if no name opens it again.
    """
    if not distributed.is_main:
        return
    name, path = None if subject.is_random else subject.given, config.checkpoint
    if name is not None and os.path.isdir(name):
        name = f"local-dir:{name}"
    given = {
        "checkpoint": os.path.abspath(path) if path and os.path.exists(path) else path,
        "network": config.network,
    }
    save_classifier(
        folder / "model",
        classifier,
        encoder=name,
        encoder_args={key: value for key, value in given.items() if value is not None},
        with_encoder=config.with_encoder or name is None,
        overwrite=True,
        model=subject.name,
        **record,
    )


def save_probe_head(
    probe: Probe, source: BlockFeatures, head: nn.Module, layers: str, folder: Path, chosen: str
) -> None:
    """Save the chosen head of a task of classes."""
    train, subject, view = probe.train, source.subject, probe.protocol.view
    classifier = Classifier(
        *(subject.model, head, cast("Layers", layers), source.settings["pool"], train.classes),
        train.multi_label,
        view.timm_config(),
    )
    save_head(
        *(probe.config, probe.distributed, subject, classifier, folder),
        task=probe.task.name,
        view=asdict(view),
        chosen=chosen,
    )
