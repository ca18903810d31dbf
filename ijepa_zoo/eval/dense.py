"""Dense probes: linear heads on frozen patch features predict depth or classes of pixels.

Depth follows DINOv2's `lin. 1` and `lin. 4` (arXiv 2304.07193, section 7.4, and its code), and
segmentation its linear evaluation (`BNHead`; its configuration for ADE20K: AdamW, learning rate
1e-3, weight decay 1e-4, 40,000 steps of 16 images, warm-up of 1,500 steps, then linear to 0).
Metrics are comparable with each other, but only roughly with published ones. Differences:

- `last4` are the last four layers, not four spread over the depth, and the class token is left out;
- images are resized as a whole to the model's own size, in training (DINOv2: random crops, color
  changes, rotations; here only flips) and in tests (DINOv2: 480 x 640 for depth, sliding windows of
  512 for segmentation; facebookresearch/capi resizes whole images too). Predictions are resized to
  the target, and all its valid pixels are measured (NYU: Eigen's crop);
- the loss of depth is `SigLoss` alone: the official gradient loss takes differences along the
  batch;
- a grid of heads is trained (with and without BatchNorm, several learning rates), and the best one
  on held-out training images (10 %, by the seed) is tested, once;
- `nyu_depth_v2_labeled.mat` has 795 training images, so 25 epochs are 1,100 steps where DINOv2
  takes 38,400 on 24,231 images, and its depths are filled in;
- rendered scenes have fewer epochs and other learning rates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..data.dense import DenseData, open_depth, open_segmentation
from ..data.loading import usable_cpus
from ..distributed import Distributed
from ..errors import DataError, ImageError, SettingsError, option
from ..features import Layers
from ..models.classifier import Classifier
from ..seeds import Stream, numpy_generator
from .accuracy import Metrics
from .dense_tasks import DEPTH, SEGMENTATION, WHOLE, DenseTask, Depth, Segmentation
from .dense_training import DenseGrid, DenseLoader, DenseProbe, make_dense_grid
from .features import CACHED_AS_IS
from .heads import train_and_choose
from .models import EvalModel
from .probe import HeadsConfig, epochs_note, evaluate, make_result
from .results import Result
from .runs import run_once
from .saved_head import save_head
from .sets import VAL_SHARE
from .tasks import Protocol

_MAX_DEPTH = 10.0  # meters, unless the data have their own limit
_TRIED = 100  # pairs to check before training, until one has valid pixels
_SCENES: dict[str, Any] = {"epochs": 15, "lrs": (5e-3, 2e-2)}  # for few steps


def evaluate_dense_depth(
    model: str | nn.Module | EvalModel,
    data: str | Path,
    out: str | Path = "results",
    *,
    bins: int | None = None,
    upsample: int | None = None,
    max_depth: float | None = None,
    depth_scale: float | None = None,
    **options: Any,
) -> Result:
    """Train depth heads on frozen patch features, and measure the best one on the test set.

    The same call resumes after an interruption, at the last finished epoch, and returns the result
    at once if it is finished. Processes started by torchrun share the images of each batch and
    exchange their features. The chosen head is saved in the folder of the result (`model`).

    Args:
        model: As `out`, a field of :class:`~ijepa_zoo.eval.probe.HeadsConfig`.
        data: See `open_depth`: NYU Depth v2, pairs of images and depth maps, or rendered scenes.
        out: See there.
        bins: Depths whose weighted mean is predicted; default: 256, of rendered scenes 64.
        upsample: Factor of the maps before the head; default: 4, of rendered scenes 2.
        max_depth: Farther pixels are ignored; default: that of the data, else 10 m.
        depth_scale: Units of depth files per meter; see `open_depth`.
        options: Further fields of `HeadsConfig`.

    Returns:
        The result, which is also in the folder; its value is the RMSE in meters or scene units.

    Raises:
        DataError: The data cannot be used.
        SettingsError: An argument or the model does not fit.
        RunError: Another process works on the same evaluation, or features are not finite.
    """
    if max_depth is not None and not 1e-3 < max_depth < math.inf:
        raise SettingsError(f"{option('max_depth')} is {max_depth:g}: give a depth such as 10")

    small = _is_rendered(data)
    bins = (64 if small else 256) if bins is None else bins
    upsample = (2 if small else 4) if upsample is None else upsample
    if bins < 2 or upsample < 1:
        raise SettingsError(f"bins is {bins}, upsample {upsample}: use at least 2 and 1")

    def make_task(pairs: DenseData) -> DenseTask:
        limit = max_depth if max_depth is not None else pairs.max_depth or _MAX_DEPTH
        return Depth(limit, bins, upsample, pairs.crop, pairs.unit)

    config = HeadsConfig(task="depth", model=model, data=data, out=out, **options)
    usual = replace(DEPTH, **_SCENES) if small else DEPTH
    return _evaluate(config, open_depth, {"depth_scale": depth_scale}, make_task, usual)


def evaluate_segmentation(
    model: str | nn.Module | EvalModel,
    data: str | Path,
    out: str | Path = "results",
    *,
    reduce_zero_label: bool | None = None,
    **options: Any,
) -> Result:
    """Train segmentation heads on frozen patch features, and measure the best on the test set.

    Args:
        model: As `out`, a field of :class:`~ijepa_zoo.eval.probe.HeadsConfig`.
        data: See `open_segmentation`: ADE20K, VOC, images and masks, or rendered scenes.
        out: See there.
        reduce_zero_label: Ignore class 0 and count from 1; default: for ADE20K only.
        options: Further fields of `HeadsConfig`.

    Returns:
        The result; its value is the mean IoU in percent, its `metrics["IoU"]` that of each class.
    """

    def make_task(pairs: DenseData) -> DenseTask:
        return Segmentation(pairs.num_classes or 0, pairs.class_names)

    config = HeadsConfig(task="segmentation", model=model, data=data, out=out, **options)
    usual = replace(SEGMENTATION, **_SCENES) if _is_rendered(data) else SEGMENTATION
    options_of_masks = {"reduce_zero_label": reduce_zero_label}
    return _evaluate(config, open_segmentation, options_of_masks, make_task, usual)


def _is_rendered(data: str | Path) -> bool:
    return os.fspath(data).startswith("scenes:")


def _evaluate(
    config: HeadsConfig,
    open_pairs: Callable[..., DenseData],
    target_options: dict[str, Any],
    make_task: Callable[[DenseData], DenseTask],
    usual: Protocol,
) -> Result:
    if config.test is not None:
        raise SettingsError(f"{option('test')} is not for dense probes: {option('data')} has both")
    if config.pool not in ("auto", None):
        raise SettingsError(f"{option('pool')} is not for dense probes, which read patches")
    protocol = config.change(usual)

    def open_data(config: HeadsConfig, distributed: Distributed, model: EvalModel) -> DenseProbe:
        workers = usable_cpus() if config.workers is None else config.workers
        shown = config.progress and distributed.is_main
        pairs = open_pairs(config.data, workers=workers, progress=shown, **target_options)
        decoder = config.decoder(model.in_chans, as_tensor=False)
        train, test = (replace(part, decoder=decoder) for part in (pairs.train, pairs.test))
        pairs, images = replace(pairs, train=train, test=test), len(train)
        task = make_task(pairs)
        distributed.run_on_main(lambda: _check(config, pairs, task))
        order = numpy_generator(config.seed, Stream.EVAL_SPLIT, 1).permutation(images)
        held_out = 0 if config.select_on_test else max(1, round(VAL_SHARE * images))
        rows = np.sort(order[held_out:]), np.sort(order[:held_out]), np.arange(len(test))
        used = replace(config, workers=0) if _is_rendered(config.data) else config
        return DenseProbe(used, distributed, *rows, pairs, task, protocol, target_options)

    def run(probe: DenseProbe, source: Any) -> tuple[Result, Path]:
        task, names = probe.task, probe.pairs.class_names

        def work(probe: DenseProbe, folder: Path) -> Result:
            images = protocol.epochs * len(probe.train_rows)
            images += len(probe.val_rows) + len(probe.test_rows)
            with probe.bar(images, f"{probe.name}, {source.about['name']}") as bar:
                loader = DenseLoader(probe, source, bar)
                about = (source.widths, source.size, config.seed, source.device)
                grid = make_dense_grid(task, protocol, *about)

                def measure(batches: Any, heads: Sequence[int]) -> Metrics:
                    return _measure(loader, grid, batches, heads)

                choice, trained = train_and_choose(probe, source, loader, grid, folder, measure)
            layers = cast("Layers", grid.specs[choice.index].representation)
            classifier = Classifier(
                source.model.model,
                grid.heads[choice.index],
                layers,
                None,
                names,
                transform=vars(WHOLE),
            )
            save_head(
                config, probe.distributed, source.model, classifier, folder, **task.head_record
            )
            notes = [CACHED_AS_IS] if config.cached else []
            notes += epochs_note(protocol.epochs, usual.epochs)
            return make_result(
                probe,
                source,
                task.method,
                asdict(protocol) | task.settings,
                grid.names,
                choice,
                notes=notes,
                **trained,
            )

        return run_once(probe, source, task.method, {}, work)

    return evaluate(config, open_data, run, "maps")


def _check(config: HeadsConfig, pairs: DenseData, task: DenseTask) -> None:
    """Refuse targets without a pixel that counts, such as depths in other units."""
    if len(pairs.train) < 4:
        raise DataError(f"'{config.data}' has fewer than four training pairs")
    for data in (pairs.train, pairs.test):
        found = ""
        for index in np.linspace(0, len(data) - 1, min(len(data), _TRIED)).astype(int).tolist():
            try:
                target = torch.from_numpy(data[index][1].astype(np.float32))
            except ImageError as error:
                found = found or str(error)
                continue
            if task.valid(target, test=True).any():
                break
            found = f"values are from {target.min():g} to {target.max():g}, {task.counts} count"
        else:
            raise DataError(f"no pixel of '{data.names[0]}' and others counts: {found}")


@torch.inference_mode()
def _measure(loader: DenseLoader, grid: DenseGrid, batches: Any, heads: Sequence[int]) -> Metrics:
    """Metrics of some heads and of constant predictions."""
    task, distributed = loader.probe.task, loader.probe.distributed
    total = torch.zeros(len(heads) + len(task.blind), *task.shape, dtype=torch.float64)
    count = torch.zeros(1, dtype=torch.int64)
    for batch in batches:
        predictions = grid.outputs(loader.source.split(batch.maps), heads)
        if task.mirrored:  # the mean over both sides, as in DINOv2
            pairs = [prediction.chunk(2) for prediction in predictions]
            predictions = [(plain + mirror.flip(-1)) / 2 for plain, mirror in pairs]
        for i, target in enumerate(batch.targets):
            if task.valid(target, test=True).any():
                maps = [prediction[i] for prediction in predictions]
                total += task.statistics(maps, grid.sums, target)
                count += 1
        loader.bar.update(len(batch.targets) * distributed.world_size)
    total, images = distributed.all_reduce(total), int(distributed.all_reduce(count))
    if not images:
        raise DataError(f"no pixel to choose by, or to test on, counts: {task.counts} count")
    rows = task.summary(total, images).tolist()
    constant = {
        f"{task.metrics[column]} of {name}": row[column]
        for name, row in zip(task.blind, rows[len(heads) :])
        for column in task.shown
    }
    others = [
        dict(zip(task.metrics[1:], row[1:])) | task.more(statistics)
        for row, statistics in zip(rows[: len(heads)], total)
    ]
    values, none = [row[0] for row in rows[: len(heads)]], [None] * len(heads)
    unit, higher = task.unit, task.higher_is_better
    return Metrics(task.metric, images, values, none, others, unit, higher, constant)
