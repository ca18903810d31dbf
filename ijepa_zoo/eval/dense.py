"""Dense probes: linear heads on frozen patch features predict depth or classes of pixels.

Depth follows DINOv2's `lin. 1` and `lin. 4` (arXiv 2304.07193, section 7.4, and its code), and
segmentation its linear evaluation (`BNHead`; its configuration for ADE20K: AdamW, learning rate
1e-3, weight decay 1e-4, 40,000 steps of 16 images, warm-up of 1,500 steps, then linear to 0).
Metrics compare with each other, and with published ones only roughly. Differences:

- `last4` are the last four layers, not four spread over the depth, and the class token is left out;
- images are resized as a whole to the model's own size, in training (DINOv2: random crops, color
  changes, rotations; here only flips) and in tests (DINOv2: 480 x 640 for depth, sliding windows of
  512 for segmentation; facebookresearch/capi resizes whole images too). Predictions are resized to
  the target, and all its pixels that count are measured (NYU: Eigen's crop);
- the loss of depth is `SigLoss` alone: the official gradient loss takes differences along the
  batch;
- a grid of heads is trained (with and without BatchNorm, several learning rates), and the best one
  on held-out training images, a seeded 10 %, reads the test set, once;
- `nyu_depth_v2_labeled.mat` has 795 training images, so 25 epochs are 1,100 steps where DINOv2
  takes 38,400 on 24,231 images, and its depths are filled in;
- rendered scenes have fewer epochs and other learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.dense import DenseData, DenseDataset, open_depth, open_segmentation
from ..data.loading import usable_cpus
from ..distributed import init_distributed
from ..errors import DataError, ImageError, SettingsError, option
from ..models.classifier import Classifier, DenseHead
from .dense_features import DenseFeed, Indices
from .dense_tasks import DenseTask, Depth, Segmentation, picture
from .dense_training import (
    DenseConfig,
    DenseProbe,
    DenseProtocol,
    DenseTraining,
    DepthProtocol,
)
from .models import Subject
from .probe import CACHED_AS_IS, of_all_processes, other_epochs, save_result_model, undecoded
from .results import Head, Result, data_name
from .runs import EpochState, once, run_folder

_MAX_DEPTH = 10.0  # meters, where the data do not tell: rooms
_TRIED = 100  # pairs that are read before the work, until one counts

# Small images and few of them: fewer bins and scores, and learning rates for few steps.
_SCENES_DEPTH = DepthProtocol(epochs=15, lrs=(5e-3, 2e-2), bins=64, upsample=2)
_SCENES_SEGMENTATION = DenseProtocol(epochs=15, lrs=(5e-3, 2e-2))


def evaluate_dense_depth(
    model: str | nn.Module | Subject,
    data: str | Path,
    out: str | Path = "results",
    *,
    protocol: DepthProtocol | None = None,
    max_depth: float | None = None,
    depth_scale: float | None = None,
    **options: Any,
) -> Result:
    """Train depth heads on frozen patch features, and measure the best one on the test set.

    The same call resumes after an interruption, at the last finished epoch, and returns the result
    at once if it is finished. Processes started by torchrun share the images of each batch and
    exchange their features. The chosen head is saved in the folder of the result (`model`).

    Args:
        model: A name (see `open_model`) or any timm ViT of at least four blocks.
        data: NYU Depth v2's `nyu_depth_v2_labeled.mat` or a folder that holds it (`splits.mat`
            beside it), pairs of images and depth maps, or rendered scenes; see `open_depth`.
        out: Folder of all evaluations: each has a folder of its own in it with `result.json` and
            `predictions.png`, and a row in `results.csv`.
        protocol: How heads are trained.
        max_depth: Farther pixels do not count; 10 (m) where the data do not tell.
        depth_scale: Units of depth files per meter; see `open_depth`.
        options: Further fields of `DenseConfig`.

    Returns:
        The result, which is also in the folder; its figure is the RMSE in meters or scene units.

    Raises:
        DataError: The data cannot be used.
        SettingsError: An argument or the model does not fit.
        RunError: Another process works on the same evaluation, or features are not finite.
    """
    if max_depth is not None and not 1e-3 < max_depth < math.inf:
        raise SettingsError(
            f"{option('max_depth')} is {max_depth:g}: depths from 0.001 to it count, so give a "
            "larger one, such as 10"
        )

    def make_task(pairs: DenseData, used: Any) -> DenseTask:
        limit = max_depth if max_depth is not None else pairs.max_depth or _MAX_DEPTH
        return Depth(limit, used.bins, used.upsample, pairs.crop, pairs.unit)

    config = DenseConfig(task="depth", model=model, data=data, out=out, **options)
    usual = protocol or (_SCENES_DEPTH if _is_rendered(data) else DepthProtocol())
    return _run(config, partial(open_depth, depth_scale=depth_scale), make_task, usual)


def evaluate_segmentation(
    model: str | nn.Module | Subject,
    data: str | Path,
    out: str | Path = "results",
    *,
    protocol: DenseProtocol | None = None,
    reduce_zero_label: bool | None = None,
    **options: Any,
) -> Result:
    """Train segmentation heads on frozen patch features, and measure the best on the test set.

    See `evaluate_dense_depth` for resuming, processes, the folder, and the other arguments.

    Args:
        model: A name (see `open_model`) or any timm ViT of at least four blocks.
        data: ADE20K, VOC, a folder of images and masks, or rendered scenes; see
            `open_segmentation`.
        out: Folder of all evaluations.
        protocol: How heads are trained.
        reduce_zero_label: Ignore class 0 and count from 1; default: for ADE20K only.
        options: Further fields of `DenseConfig`.

    Returns:
        The result, which is also in the folder; its figure is the mean IoU in percent.

    Raises:
        DataError: The data cannot be used.
        SettingsError: An argument or the model does not fit.
        RunError: Another process works on the same evaluation, or features are not finite.
    """
    config = DenseConfig(task="segmentation", model=model, data=data, out=out, **options)
    usual = protocol or (_SCENES_SEGMENTATION if _is_rendered(data) else DenseProtocol())
    opened = partial(open_segmentation, reduce_zero_label=reduce_zero_label)
    return _run(config, opened, lambda pairs, _: Segmentation(pairs.num_classes or 0), usual)


def _is_rendered(data: str | Path) -> bool:
    return str(data).startswith("scenes:")


def _run(
    config: DenseConfig,
    open_pairs: Callable[..., DenseData],
    make_task: Callable[[DenseData, Any], DenseTask],
    usual: Any,
) -> Result:
    """Evaluate the model, and the architecture with random weights if that is wanted."""
    if config.test is not None:
        raise SettingsError(f"{option('test')}: DATA holds training and test pairs")
    given = {"epochs": config.epochs, "batch_size": config.batch_size}
    protocol = replace(usual, **{name: n for name, n in given.items() if n is not None})
    subject = config.open_model()
    decoder = config.decoder(subject.in_chans, as_tensor=False)
    workers = usable_cpus() if config.workers is None else config.workers
    with init_distributed(config.device) as distributed:
        shown = config.progress and distributed.is_main
        pairs = open_pairs(config.data, workers=workers, progress=shown)
        train, test = (
            replace(part, decoder=decoder, skip_broken=config.skip_broken)
            for part in (pairs.train, pairs.test)
        )
        pairs = replace(pairs, train=train, test=test)
        task = make_task(pairs, protocol)
        probe = DenseProbe(config, pairs, task, protocol, usual, distributed)
        distributed.run_on_main(lambda: _check_pairs(probe))
        result, folder = _evaluate(probe, subject)
        if config.baseline and not any("random weights" in name for name in result.baselines):
            untrained = subject.untrained(config.seed)
            other = _evaluate(probe, untrained)[0]
            result = replace(result, baselines={**result.baselines, untrained.name: other.value})
            if distributed.is_main:
                result.write(folder)
        distributed.barrier()
    return result


def _check_pairs(probe: DenseProbe) -> None:
    """Refuse what would fail later, or give metrics without a meaning."""
    protocol, pairs, world = probe.protocol, probe.pairs, probe.distributed.world_size
    if protocol.epochs < 1 or protocol.batch_size < 1 or protocol.batch_size % world:
        raise SettingsError(
            f"epochs is {protocol.epochs}, batch_size {protocol.batch_size} and processes are "
            f"{world}: at least one epoch, and a batch that the processes can share equally"
        )
    if len(pairs.train) < 4 or not len(pairs.test):
        raise DataError(
            f"{len(pairs.train)} training and {len(pairs.test)} test pairs: at least four and one "
            "are needed"
        )
    for data in (pairs.train, pairs.test):
        _check_targets(data, probe.task)


def _check_targets(data: DenseDataset, task: DenseTask) -> None:
    """See that a pixel counts, in one of some targets spread over the set."""
    unread, blank = "", ""
    for index in np.linspace(0, len(data) - 1, min(len(data), _TRIED)).astype(int).tolist():
        try:
            target = torch.from_numpy(data[index][1].astype(np.float32))
        except ImageError as error:
            unread = unread or f"'{data.names[index]}' ({error})"
            continue
        if task.valid(target, test=True).any():
            return
        span = f"values from {target.min():g} to {target.max():g}"
        blank = blank or f"'{data.names[index]}' has {span}"
    if not blank:
        raise DataError(f"none of the pairs that were tried can be read, for example {unread}")
    counts = "" if isinstance(task, Segmentation) else (
        f", and depths from 0.001 to {task.max_depth:g} count: give the units with "
        f"{option('depth_scale')}, the range with {option('max_depth')}"
    )  # fmt: skip
    raise DataError(f"no pixel of the targets counts: for example {blank}{counts}")


def _evaluate(probe: DenseProbe, subject: Subject) -> tuple[Result, Path]:
    """One model; from its folder if its result is there."""
    training, distributed = DenseTraining(probe, subject.model), probe.distributed
    settings = training.settings()
    name, task = subject.describe()["name"], f"{probe.config.task}-{probe.pairs.name}"
    folder = run_folder(probe.config.out, task, "dense", name, settings)
    state = EpochState(folder / "state.pt", distributed)

    def work() -> Result:
        training.train(state)
        result, chosen, rows = _measure(training, subject)
        if distributed.is_main:
            if rows:
                picture(probe.task, rows).save(folder / "predictions.png")
            _save_head(training, subject, chosen, folder)
        return result

    result = once(folder, distributed, training.feed.precision, work)
    if distributed.is_main:
        state.remove()
    return result, folder


def _save_head(training: DenseTraining, subject: Subject, chosen: int, folder: Path) -> None:
    """Save a head as a classifier folder, `model`; with the encoder if no name opens it again."""
    config, spec = training.probe.config, training.specs[chosen]
    head = DenseHead(**training.heads[chosen].args)
    head.load_state_dict(training.heads[chosen].state_dict())
    layers: Any = spec.representation
    save_result_model(
        Classifier(subject.model, head, layers, None, training.probe.pairs.class_names),
        None if subject.name.endswith("random weights") else subject.given,
        config,
        folder,
        **training.probe.task.record(),
    )


def _measure(
    training: DenseTraining, subject: Subject
) -> tuple[Result, int, list[tuple[Tensor, Tensor, Tensor]]]:
    """Choose a head on held-out training images; it reads the test set."""
    probe, task, specs = training.probe, training.probe.task, training.specs
    pairs, config = probe.pairs, probe.config
    test_feed = probe.feed(pairs.test, training.model)
    everything = np.arange(len(pairs.test))
    held_out, kept, only = [None] * len(specs), 0, None
    if not config.select_on_test:
        found, kept, _ = _score(training, training.feed, training.choose, None, 0)
        held_out = found[: len(specs), 0].tolist()
        only = _best(task, found[: len(specs), 0])
    test, count, rows = _score(training, test_feed, everything, only, config.pictures)
    asked = list(range(len(specs))) if only is None else [only]
    place = _best(task, test[: len(asked), 0])
    chosen, blind = asked[place], test[len(asked) :]
    tested = dict(zip(asked, test[:, 0].tolist()))
    heads = [
        Head(spec.name, held_out[i], tested.get(i), training.losses[i])
        for i, spec in enumerate(specs)
    ]
    broken, test_broken = (
        of_all_processes(feed.broken, probe.distributed) for feed in (training.feed, test_feed)
    )
    fitted = sum(pairs.train.names[index] not in broken for index in training.fit.tolist())
    blank = len(everything) - len(test_broken) - count
    figure, others = float(test[place, 0]), test[place, 1:].tolist()
    result = Result(
        task=f"{task.method}, {pairs.name}",
        method=task.method,
        model=subject.describe(),
        value=figure,
        chosen=specs[chosen].name,
        selection="the test set" if only is None else "a seeded 10 % of the training images",
        heads=heads,
        protocol=asdict(probe.protocol) | task.settings,
        data={
            name: {
                "name": data_name(config.data),
                "split": pairs.split,
                "images": len(part),
                "fingerprint": part.fingerprint,
            }
            for name, part in (("train", pairs.train), ("test", pairs.test))
        },
        images={"fit": fitted, "choose": kept, "test": count},
        seed=config.seed,
        metric=task.metric,
        unit=task.unit,
        higher_is_better=task.higher_is_better,
        metrics=dict(zip(task.metrics[1:], others)),
        baselines={
            f"{task.metrics[column]} of {name}": float(figures[column])
            for name, figures in zip(task.blind, blind)
            for column in task.shown
        },
        notes=[
            *_notes(probe, figure, float(blind[-1, 0]), kept, blank),
            *undecoded(broken | test_broken, "pair"),
        ],
        seconds=training.seconds,
    )
    return result, chosen, [(pixels, target, drawn[place]) for pixels, target, drawn in rows]


def _best(task: DenseTask, figures: Tensor) -> int:
    sign = 1 if task.higher_is_better else -1
    return int(torch.nan_to_num(sign * figures, nan=-math.inf).argmax())


def _notes(probe: DenseProbe, figure: float, blind: float, kept: int, blank: int) -> list[str]:
    """What a reader must know of a result."""
    notes = [CACHED_AS_IS] if probe.config.cached else []
    notes += other_epochs(probe.protocol.epochs, probe.usual.epochs, "protocol")
    task, name = probe.task, probe.task.blind[-1]
    if figure != blind and (figure < blind) == task.higher_is_better:
        notes.append(
            f"worse than {name}, which ignores the image ({task.metric} {figure:.4g}, {name} "
            f"{blind:.4g}): train longer, {option('epochs')}, or on more images"
        )
    if blank:
        notes.append(f"{blank} test pairs without a pixel that counts: not among those tested")
    return notes


def _score(
    training: DenseTraining, feed: DenseFeed, indices: Indices, only: int | None, pictures: int
) -> tuple[Tensor, int, list[tuple[Tensor, Tensor, list[Tensor]]]]:
    """Metrics of the heads (or one), then of predictions that see no image.

    Returns:
        `[H + blind, metrics]`, the number of images that they are of, and image, target and
        predictions of evenly spaced images, on the process that has them.
    """
    task, distributed = training.probe.task, training.probe.distributed
    asked = list(range(len(training.specs))) if only is None else [only]
    total, count = task.zeros(len(asked)), torch.zeros(1, dtype=torch.int64)
    rows: list[tuple[Tensor, Tensor, list[Tensor]]] = []
    mine = indices[distributed.rank :: distributed.world_size]
    evenly = np.linspace(0, len(mine), min(pictures, len(mine)), endpoint=False).astype(int)
    shown = set(mine[evenly].tolist())
    with training.probe.bar(len(mine), "measuring") as bar:
        for batch in feed.for_testing(mine, training.probe.protocol.batch_size):
            predictions = _predict(training, batch.maps, asked)
            bar.update(len(batch.indices))
            for i, target in enumerate(batch.targets):
                if not task.valid(target, test=True).any():
                    continue
                maps = [prediction[i] for prediction in predictions]
                total += task.figures(maps, training.sums, target)
                count += 1
                if int(batch.indices[i]) in shown:
                    rows.append((batch.pixels[i], target, [task.drawn(m, target) for m in maps]))
    images = int(distributed.all_reduce(count))
    if not images:
        reason = next(iter(feed.broken.values()), "no pixel of a target counts")
        raise DataError(f"no pair of the set can be measured: {reason}")
    return task.summary(distributed.all_reduce(total), images), images, rows


@torch.inference_mode()
def _predict(training: DenseTraining, maps: Tensor, asked: Sequence[int]) -> list[Tensor]:
    """Predictions `[b, C, h, w]` of each head, for depth the mean over both sides as in DINOv2."""
    training.heads.eval()
    features, task, predictions = training.feed.split(maps), training.probe.task, []
    for place in asked if len(maps) else []:
        prediction = training.heads[place](features[training.specs[place].representation])
        if task.mirrored:
            plain, mirror = prediction.chunk(2)
            prediction = (plain + mirror.flip(-1)) / 2
        predictions.append(prediction)
    return predictions
