"""What an evaluation needs: data, model and protocol that fit each other, checked before work."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data.datasets import Targets
from ..data.decode import Decoder
from ..data.loading import load_in_order, usable_cpus
from ..distributed import Distributed
from ..encode import Batch
from ..errors import DataError, SettingsError
from ..progress import progress_bar
from .batches import EvalBatch, OrderedBatches
from .cache import CachedFeatures, cached_features, files_state
from .notes import few_to_choose, lost_classes, of_all_processes, undecoded
from .representations import Representations
from .sets import CHOOSE_SHARE, EvalSet, data_record, open_task, split_to_choose
from .tasks import Protocol, Task
from .words import option, other_epochs

MICRO = 128  # images of a forward pass


@dataclass(frozen=True)
class Probe:
    """One task with its data, for any number of models.

    Attributes:
        task: What is measured.
        protocol: How; that of the task, or with other epochs or batches.
        train: Training set.
        test: Test set.
        fit: Numbers of the training images that heads are fitted to.
        choose: Numbers of those that choose the head; none where the test set does.
        distributed: Those that share the work.
        out: Folder of all evaluations.
        seed: Decides split, order, augmentation and heads at the start.
        workers: Loader processes.
        progress: Whether to show progress bars.
    """

    task: Task
    protocol: Protocol
    train: EvalSet
    test: EvalSet
    fit: Targets
    choose: Targets
    distributed: Distributed
    out: Path
    seed: int
    workers: int
    progress: bool

    def settings(self) -> dict[str, Any]:
        """All that decides the numbers but the model, as plain values."""
        return {
            "task": self.task.name,
            "train": self.train.fingerprint(),
            "test": self.test.fingerprint(),
            "files": [files_state(part.images) for part in (self.train, self.test)],
            "select_on_test": not len(self.choose),
            "seed": self.seed,
        }

    def data(self) -> dict[str, Any]:
        """The data as results record them."""
        return data_record(self.train, self.test)

    @property
    def selection(self) -> str:
        """What the head is chosen by, in words."""
        share = "a seeded 10 % of the training images"
        return share if len(self.choose) else "the test set"

    def in_order(
        self, part: EvalSet, rows: Targets, size: tuple[int, int], *, shared: bool = True
    ) -> OrderedBatches:
        """Images in order with the transform of tests; of this process, or all of them."""
        rank, world = (self.distributed.rank, self.distributed.world_size) if shared else (0, 1)
        # one shape for all batches: no slot is wasted where there are few images
        micro = min(MICRO, -(-len(rows) // world))
        view = self.protocol.view
        return OrderedBatches(part, rows, view, size, micro, rank=rank, world=world)

    def loaded(self, batches: Any, numbers: Any) -> Iterator[EvalBatch]:
        """Batches by their numbers, decoded ahead."""
        return load_in_order(batches, numbers, self.workers, self.distributed.device.type == "cuda")

    def bar(self, total: int, what: str) -> Any:
        """A progress bar in images, in process 0."""
        return progress_bar(self.progress and self.distributed.rank == 0, total, what)

    def features(
        self, part: EvalSet, source: Representations, *, mirrored: bool = False
    ) -> CachedFeatures:
        """Features of all images of a set, from the cache or computed now."""
        batches = self.in_order(part, np.arange(len(part)), source.size, shared=False)

        def read(numbers: Iterable[int]) -> Iterator[Batch]:
            return ((b.images, b.reasons) for b in self.loaded(batches, numbers))

        about = {
            "images": part.images.fingerprint(),
            "files": files_state(part.images),
            "transform": self.protocol.view.describe(source.size, train=False),
        }
        with self.bar(
            len(part), f"features, {part.split}{', mirrored' if mirrored else ''}"
        ) as bar:
            return cached_features(
                self.out / "cache",
                read,
                (len(part), batches.batch_size),
                source,
                about,
                self.distributed,
                mirrored=mirrored,
                progress=bar,
            )


def open_probe(
    task: Task,
    data: Any,
    out: str | Path,
    distributed: Distributed,
    *,
    test: Any = None,
    select_on_test: bool = False,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    decoder: Decoder | None = None,
    skip_broken: bool = False,
    progress: bool = False,
) -> Probe:
    """Open the data of a task; no image is decoded.

    Args:
        task: See `find_task`.
        data: See `open_task`.
        out: Folder of all evaluations.
        distributed: Those that share the work.
        test: See `open_task`.
        select_on_test: Choose heads on the test set, and fit them to all training images.
        epochs: In the place of the protocol's; milestones move with it.
        batch_size: In the place of the protocol's; learning rates grow linearly with it.
        seed: The seed.
        workers: Loader processes; default: one for each CPU.
        decoder: See `open_images`.
        skip_broken: Leave out images that cannot be decoded; otherwise they stop the probe.
        progress: Show progress bars.

    Raises:
        DataError: The data cannot be used, or do not fit the task.
        ValueError: A number is out of range.
    """
    if (batch_size or 2) < 2 or (workers or 0) < 0:
        name, least = ("batch_size", 2) if (batch_size or 2) < 2 else ("workers", 0)
        raise SettingsError(f"{option(name)} must be at least {least}")
    protocol = task.protocol if epochs is None else task.protocol.with_epochs(epochs)
    protocol = replace(protocol, batch_size=batch_size or protocol.batch_size)
    workers = usable_cpus() if workers is None else workers
    shown = progress and distributed.rank == 0
    train, tested = open_task(
        task,
        data,
        seed,
        test=test,
        workers=workers,
        decoder=decoder,
        skip_broken=skip_broken,
        progress=shown,
    )
    fit, choose = split_to_choose(train, seed)
    if select_on_test:
        fit, choose = np.arange(len(train)), choose[:0]
    return Probe(
        *(task, protocol, train, tested, fit, choose, distributed, Path(out)),
        *(seed, workers, progress),
    )


def refuse_no_choice(probe: Probe, select_on_test: bool) -> None:
    """Refuse training images that leave none to choose the best head by.

    Raises:
        DataError: There are too few, or all classes have a single one.
    """
    if select_on_test or len(probe.choose):
        return
    raise DataError(
        f"the training images ({len(probe.train)} of {len(probe.train.classes)} classes) leave "
        f"none to choose the best head by: at least {round(1 / CHOOSE_SHARE)} are needed, and two "
        f"of a class; or choose on the test set, {option('select_on_test')}"
    )


def encoded(
    source: Representations, batches: Iterable[EvalBatch], broken: dict[str, str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and labels of the images of each batch that could be decoded.

    Args:
        source: Makes the rows.
        batches: Images.
        broken: Gets name and reason of the others.
    """
    waiting: deque[Tensor] = deque()

    def pixels() -> Iterator[Batch]:
        for batch in batches:
            broken.update(batch.broken)
            waiting.append(batch.labels[batch.valid])
            yield batch.images, batch.reasons

    for rows, _ in source.encode(pixels()):
        yield rows, waiting.popleft().to(rows.device)


def protocol_record(probe: Probe, fed: str, size: tuple[int, int]) -> dict[str, Any]:
    """The protocol as results record it, in plain values."""
    return {
        **json.loads(json.dumps(asdict(probe.protocol))),
        "fed": fed,
        "train_transform": probe.protocol.view.describe(size, train=fed == "online"),
        "test_transform": probe.protocol.view.describe(size, train=False),
    }


def notes_of(probe: Probe, broken: dict[str, str]) -> list[str]:
    """What a reader must know of data and protocol; every process must call this.

    Args:
        probe: What was measured.
        broken: Names and reasons of images that this process could not decode.
    """
    notes = [*probe.train.notes, *probe.test.notes]
    notes += other_epochs(probe.protocol.epochs, probe.task.protocol.epochs, "protocol")
    notes += few_to_choose(len(probe.choose))
    if not len(probe.choose):
        notes.append(
            "chosen on the test set, as much of the literature does: the figure is too high by "
            "as much as luck helps the best of the heads"
        )
    found = of_all_processes(broken, probe.distributed)
    return [*notes, *undecoded(found), *lost_classes(probe.train, probe.fit, found)]
