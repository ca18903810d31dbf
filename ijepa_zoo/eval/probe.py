"""What the probes share: options, data, baselines, and results of classes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from torch import nn

from ..data.datasets import Targets
from ..data.decode import Decoder
from ..data.loading import load_in_order, usable_cpus
from ..distributed import Distributed, init_distributed
from ..encode import model_name
from ..errors import DataError, ImageError, SettingsError, option, some
from ..progress import progress_bar
from .accuracy import Choice
from .batches import OrderedBatches
from .features import PIECE, BlockFeatures, Kind, RawPixels, Source, pixel_options
from .models import EvalModel, open_model
from .results import TEST_SET, Head, Result
from .sets import VAL_SHARE, EvalSet, open_task, split_classes
from .tasks import Protocol, Task, find_task

if TYPE_CHECKING:
    from .dense_training import DenseProbe

_LARGEST = 1e6  # learning rate and weight decay
_CACHE_SECONDS = 21_600.0


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Options that all probes share.

    Attributes:
        task: A task or its name; see `find_task`.
        model: A name (see `open_model`) or any timm ViT of at least four blocks.
        data: See `open_task`; for dense probes `open_depth` and `open_segmentation`.
        out: Folder of all evaluations: each has a folder with `result.json` in it, and a row
            in `results.csv`; features are cached in `cache`.
        test: The test data, if `data` does not hold them.
        pool: See `FeatureExtractor`; 'auto' is the mean over patches for I-JEPA, the class token
            for DINOv2.
        baseline: Also evaluate the same architecture with random weights, and raw pixels.
        select_on_test: Fit to all training images and choose the head on the test set, as is common
            in the literature; the accuracy is then too high.
        seed: Of the validation split, order, augmentation and initial weights.
        device: 'auto', or torch's name of a device.
        workers: Processes that decode; default: one per CPU.
        precision: Of the encoder, see `extract_features`; 'auto': half precision on a GPU.
        checkpoint: Weights for a model that is named; see `create_model`.
        network: Which network of the checkpoint; see there.
        img_size: Image size in pixels for a model that is named; default: its own.
        random: Random weights, drawn by the seed, for a model that is named.
        value_range: Values of 16-bit images that become black and white, see `Decoder`.
        bands: Bands or pages of image files that become channels, see `Decoder`.
        skip_broken: Leave out images that cannot be decoded; otherwise they stop the evaluation.
        with_encoder: Save the encoder beside the head, not only a reference to it.
        progress: Show progress: bars in a terminal, a line every 30 s elsewhere.
    """

    task: str | Task = "classes"
    model: str | nn.Module | EvalModel
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

    def open_model(self) -> EvalModel:
        """The model of these options."""
        if self.random and self.baseline:
            raise SettingsError(f"{option('random')} is the {option('baseline')} itself")
        options = {name: getattr(self, name) for name in ("checkpoint", "network", "img_size")}
        if isinstance(self.model, str):
            return open_model(self.model, random=self.random, seed=self.seed, **options)
        if self.random or any(value is not None for value in options.values()):
            raise SettingsError("random, checkpoint, network and img_size are for named models")
        model = self.model
        found = model if isinstance(model, EvalModel) else EvalModel(model, model_name(model))
        if self.baseline and found.source is None:
            raise SettingsError(f"{option('baseline')} needs a model that is given by its name")
        return found

    def decoder(self, in_chans: int, as_tensor: bool = True) -> Decoder:
        """See `Decoder`."""
        return Decoder(in_chans, self.value_range, self.bands, as_tensor=as_tensor)


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(EvalConfig):
    """Options of the probes that train heads in epochs.

    Attributes:
        cached: Encode each image and its mirror image once, with the test transform.
        epochs: Default: those of the protocol.
        batch_size: Default: that of the protocol; learning rates of linear and attentive probes
            grow linearly with it.
        lrs: Learning rates, of linear and attentive probes per 256 images; default: those of the
            protocol.
        wds: Weight decays; default: those of the protocol.
    """

    cached: bool = False
    epochs: int | None = None
    batch_size: int | None = None
    lrs: Sequence[float] | None = None
    wds: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 2:
            raise SettingsError(f"{option('batch_size')} must be at least 2")
        if self.epochs is not None and self.epochs < 1:
            raise SettingsError(f"{option('epochs')} must be at least 1")

    def change(self, protocol: Protocol) -> Protocol:
        """The protocol with these changes."""
        if any(not 0 < lr < _LARGEST for lr in self.lrs or ()):
            raise SettingsError(f"{option('lrs')} must be above 0 and below {_LARGEST:g}")
        if any(not 0 <= wd < _LARGEST for wd in self.wds or ()):
            raise SettingsError(f"{option('wds')} must be 0 or more and below {_LARGEST:g}")
        return replace(
            protocol if self.epochs is None else protocol.with_epochs(self.epochs),
            batch_size=self.batch_size or protocol.batch_size,
            lrs=tuple(dict.fromkeys(self.lrs or protocol.lrs)),
            weight_decays=tuple(dict.fromkeys(self.wds or protocol.weight_decays)),
        )


@dataclass(frozen=True)
class Evaluation(ABC):
    """A task with its data, for any number of models; see `Probe` and `DenseProbe`."""

    config: EvalConfig
    distributed: Distributed
    train_rows: Targets  # images that heads are fitted to
    val_rows: Targets  # training images that choose a head
    test_rows: Targets
    broken: Sequence[str] | None = field(default=None, kw_only=True)  # left out; None: not sought

    @abstractmethod
    def reader(self, part: str) -> Callable[[int], Any]:
        """Decodes an image of the part `train` or `test`, or raises an `ImageError`."""

    @abstractmethod
    def image_name(self, part: str, row: int) -> str:
        """Name of an image."""

    def without_broken(self) -> Self:
        """Without images that cannot be decoded, if the user asks for that."""
        if not self.config.skip_broken or self.broken is not None:
            return self
        train = self._find_broken("train", np.union1d(self.train_rows, self.val_rows))
        test = self._find_broken("test", self.test_rows)
        found = replace(
            self,
            train_rows=np.setdiff1d(self.train_rows, [*train]),
            val_rows=np.setdiff1d(self.val_rows, [*train]),
            test_rows=np.setdiff1d(self.test_rows, [*test]),
            broken=[*train.values(), *test.values()],
        )
        # a saved head is tested without training images, and some probes hold none out
        too_few = len(self.train_rows) and len(found.train_rows) < 2
        lost_val = len(self.val_rows) and not len(found.val_rows)
        if too_few or lost_val or not len(found.test_rows):
            raise DataError(f"too few images can be decoded ({some(found.broken or ())})")
        return found

    def _find_broken(self, part: str, rows: Targets) -> dict[int, str]:
        """Name and reason of each image that cannot be decoded; every process must call this."""
        own = rows[self.distributed.rank :: self.distributed.world_size].tolist()
        check, broken = partial(_why_broken, self.reader(part)), {}
        with self.bar(len(rows), f"decoding, {part}") as bar:
            for row, reason in zip(own, load_in_order(check, own, self.config.workers)):
                if reason is not None:
                    broken[row] = f"{self.image_name(part, row)}: {reason}"
                bar.update(self.distributed.world_size)
        found = self.distributed.all_gather_object(broken)
        return dict(sorted(item for each in found for item in each.items()))

    def loaded(self, batches: Any, numbers: Sequence[int]) -> Iterator[Any]:
        """Batches by their numbers, decoded ahead."""
        workers, cuda = self.config.workers, self.distributed.device.type == "cuda"
        return load_in_order(batches.__getitem__, numbers, workers, pin_memory=cuda)

    def bar(self, total: int, description: str) -> Any:
        """A progress bar in images, in process 0."""
        return progress_bar(self.config.progress and self.distributed.is_main, total, description)


def _why_broken(read: Callable[[int], Any], row: int) -> str | None:
    try:
        read(row)
    except ImageError as error:
        return str(error)
    return None


C = TypeVar("C", bound=EvalConfig)
E = TypeVar("E", bound=Evaluation)


@dataclass(frozen=True)
class Probe(Evaluation):
    """A task of classes with its data."""

    task: Task
    protocol: Protocol
    train: EvalSet
    test: EvalSet
    subset: dict[str, Any] = field(default_factory=dict)
    train_images: str = ""  # fingerprint of all training images, of which `train` may be some

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.task.name

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
            "seed": self.config.seed,
        }

    @property
    def notes(self) -> list[str]:
        """Notes on the data, for the user."""
        return list(dict.fromkeys([*self.train.notes, *self.test.notes]))

    def records(self) -> dict[str, Any]:
        """Training and test data as results record them."""
        return {"train": self.train.record(), "test": self.test.record()}

    def reader(self, part: str) -> Callable[[int], Any]:
        """See `Evaluation`."""
        return self._part(part).read

    def image_name(self, part: str, row: int) -> str:
        """See `Evaluation`."""
        return self._part(part).images.name(row)

    def _part(self, name: str) -> EvalSet:
        return self.train if name == "train" else self.test

    def with_rows(self, train: EvalSet, **changes: Any) -> Probe:
        """The probe with these training images, of which 10 % choose the head."""
        rows, val_rows = split_classes(train.targets, VAL_SHARE, self.config.seed)
        if self.config.select_on_test:
            rows, val_rows = np.arange(len(train)), val_rows[:0]
        return replace(self, train=train, train_rows=rows, val_rows=val_rows, **changes)

    def in_order(self, part: EvalSet, rows: Targets, size: tuple[int, int]) -> OrderedBatches:
        """Images in order with the test transform, the share of this process."""
        own = rows[self.distributed.rank :: self.distributed.world_size]
        # one shape for all batches, without empty slots for small sets
        micro = max(1, min(PIECE, len(own)))
        return OrderedBatches(part, own, self.protocol.transform, size, micro)


def open_probe(config: EvalConfig, distributed: Distributed, model: EvalModel) -> Probe:
    """Open the data of a task; no image is decoded."""
    task = find_task(config.task) if isinstance(config.task, str) else config.task
    task = task.of_model(model_name(model.model))
    train, test = open_task(
        task,
        config.data,
        test=config.test,
        workers=usable_cpus() if config.workers is None else config.workers,
        decoder=config.decoder(model.in_chans),
        skip_broken=config.skip_broken,
        progress=config.progress and distributed.is_main,
    )
    none = np.empty(0, np.int64)
    probe = Probe(
        config,
        distributed,
        none,
        none,
        np.arange(len(test)),
        task,
        task.protocol,
        train,
        test,
        train_images=train.images.fingerprint(),
    )
    return probe.with_rows(train)


def evaluate(
    config: C,
    open_data: Callable[[C, Distributed, EvalModel], E],
    run: Callable[[E, Source], tuple[Result, Path]],
    kind: Kind = "vectors",
) -> Result:
    """Evaluate a model, and with `baseline` the untrained model and raw pixels."""
    model = config.open_model()
    # the others may wait for hours while rank 0 writes the cache
    with init_distributed(config.device, timeout=_CACHE_SECONDS) as distributed:
        probe = open_data(config, distributed, model)
        if not config.select_on_test and not len(probe.val_rows):
            raise DataError(
                "the training images leave none to choose the best head by: use at least "
                f"{round(1 / VAL_SHARE)}, and two of a class, or choose on the test set, "
                + option("select_on_test")
            )

        def features(model: EvalModel) -> BlockFeatures:
            return BlockFeatures(model, config.pool, kind, distributed.device, config.precision)

        source = features(model)
        result, folder = run(probe, source)
        if config.baseline:
            others: list[Source] = [features(model.untrained(config.seed))]
            if kind == "vectors":
                others.append(RawPixels(source.size, model.in_chans, source.device))
            values = {other.about["name"]: run(probe, other)[0].value for other in others}
            result = replace(result, baselines={**result.baselines, **values})
            if distributed.is_main:
                result.write(folder)
        distributed.barrier()
    return result


def make_result(
    probe: Probe | DenseProbe,
    source: Any,
    method: str,
    protocol: dict[str, Any],
    heads: Sequence[str],
    choice: Choice,
    *,
    losses: Sequence[float | None] | None = None,
    notes: Sequence[str] = (),
    selection: str | None = None,
    **more: Any,
) -> Result:
    """The result of an evaluation."""
    val, test, chosen = choice.val, choice.test, choice.index
    none = [None] * len(heads)
    tested = chosen if val is None else 0
    on_test = test.values if val is None else [*none[:chosen], test.values[0], *none[chosen + 1 :]]
    columns = (heads, none if val is None else val.values, on_test, losses or none)
    fitted = len(probe.train_rows)
    images = {"train": fitted, "val": val.images if val else 0, "test": test.images}
    names = [name for name in ("pool", "layers", "precision") if name in source.settings]
    used = {**{name: source.settings[name] for name in names}, **protocol}
    notes = [*notes, *probe.notes]
    if selection is None and val is None:
        notes.append("chosen on the test set, as is common in the literature: biased upward")
    if probe.broken:
        named = some(probe.broken)
        notes.append(f"images that could not be decoded: {len(probe.broken)} ({named})")
    held_out = "a seeded 10 % of the training images"
    return Result(
        task=probe.name,
        method=method,
        model=source.about,
        value=test.values[tested],
        metric=test.name,
        unit=test.unit,
        higher_is_better=test.higher_is_better,
        chosen=heads[chosen],
        selection=selection or (TEST_SET if val is None else held_out),
        heads=[Head(*column) for column in zip(*columns)],
        protocol=json.loads(json.dumps(used)),
        data=probe.records(),
        images={name: count for name, count in images.items() if count},
        seed=probe.config.seed,
        interval=test.intervals[tested],
        metrics=test.others[tested],
        baselines=test.constant,
        notes=notes,
        **more,
    )


def epochs_note(epochs: int, usual: int) -> list[str]:
    """A note if the number of epochs is not the protocol's."""
    return [] if epochs == usual else [f"epochs: {epochs} instead of the protocol's {usual}"]
