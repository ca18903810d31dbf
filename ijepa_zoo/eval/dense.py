"""Dense probes: linear heads on frozen patch features predict depth or classes of pixels.

Depth follows DINOv2's `lin. 1` and `lin. 4` (arXiv 2304.07193, section 7.4, and its code), and
segmentation its linear evaluation (`BNHead`; its configuration for ADE20K: AdamW, learning rate
1e-3, weight decay 1e-4, 40,000 steps of 16 images, warm-up of 1,500 steps, then linear to 0).
Metrics compare with each other, and with published ones only roughly. Differences:

- `last4` are the last four layers, not four spread over the depth, and the class token is left out;
- images are resized as a whole to the model's own size, in training (DINOv2: random crops, color
  changes, rotations; here only flips) and in tests (DINOv2: 480 x 640 for depth, sliding windows of
  512 for segmentation; facebookresearch/capi resizes whole images too). Predictions are resized to
  the target, and all its valid pixels are measured (NYU: Eigen's crop);
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.dense import DenseData, DenseDataset, open_depth, open_segmentation
from ..data.loading import usable_cpus
from ..distributed import Distributed, init_distributed
from ..encode import Encoder
from ..errors import DataError, ImageError, SettingsError, option
from ..models.classifier import Classifier
from .dense_tasks import DenseProtocol, DenseTask, Depth, DepthProtocol, Segmentation
from .dense_training import DenseConfig, DenseLoader, DenseTraining, Indices
from .models import Subject
from .probe import CACHED_AS_IS, of_all_processes, other_epochs, save_head, undecoded
from .results import TEST_SET, Head, Result, data_name
from .runs import EpochState, once, run_folder
from .tasks import View

_MAX_DEPTH = 10.0  # meters, unless the data have their own limit
_TRIED = 100  # pairs that are read before the work, until one counts

# Small images and few of them: fewer bins and scores, and learning rates for few steps.
_SCENES_DEPTH = DepthProtocol(epochs=15, lrs=(5e-3, 2e-2), bins=64, upsample=2)
_SCENES_SEGMENTATION = DenseProtocol(epochs=15, lrs=(5e-3, 2e-2))


@dataclass(frozen=True)
class _Probe:
    """The data and how heads are trained on them, for any number of models."""

    config: DenseConfig
    pairs: DenseData
    task: DenseTask
    protocol: Any
    usual: Any
    distributed: Distributed
    target_options: dict[str, Any]


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
        out: Folder of all evaluations: each has a folder of its own in it with `result.json`, and
            a row in `results.csv`.
        protocol: How heads are trained.
        max_depth: Farther pixels are ignored; default: that of the data, else 10 m.
        depth_scale: Units of depth files per meter; see `open_depth`.
        options: Further fields of `DenseConfig`.

    Returns:
        The result, which is also in the folder; its value is the RMSE in meters or scene units.

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
    return _run(config, open_depth, {"depth_scale": depth_scale}, make_task, usual)


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

    Args:
        model: See `evaluate_dense_depth`.
        data: ADE20K, VOC, a folder of images and masks, or rendered scenes; see
            `open_segmentation`.
        out: Folder of all evaluations.
        protocol: How heads are trained.
        reduce_zero_label: Ignore class 0 and count from 1; default: for ADE20K only.
        options: Further fields of `DenseConfig`.

    Returns:
        The result; its value is the mean IoU in percent, its `metrics["IoU"]` that of each class.
    """

    def make_task(pairs: DenseData, _: Any) -> DenseTask:
        return Segmentation(pairs.num_classes or 0, pairs.class_names)

    config = DenseConfig(task="segmentation", model=model, data=data, out=out, **options)
    usual = protocol or (_SCENES_SEGMENTATION if _is_rendered(data) else DenseProtocol())
    options_of_masks = {"reduce_zero_label": reduce_zero_label}
    return _run(config, open_segmentation, options_of_masks, make_task, usual)


def _is_rendered(data: str | Path) -> bool:
    return str(data).startswith("scenes:")


def _run(
    config: DenseConfig,
    open_pairs: Callable[..., DenseData],
    target_options: dict[str, Any],
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
        pairs = open_pairs(config.data, workers=workers, progress=shown, **target_options)
        train, test = (
            replace(part, decoder=decoder, skip_broken=config.skip_broken)
            for part in (pairs.train, pairs.test)
        )
        pairs = replace(pairs, train=train, test=test)
        task = make_task(pairs, protocol)
        probe = _Probe(config, pairs, task, protocol, usual, distributed, target_options)
        distributed.run_on_main(lambda: _check(probe))
        result, folder = _evaluate(probe, subject)
        if config.baseline and not any("random weights" in name for name in result.baselines):
            untrained = subject.untrained(config.seed)
            other = _evaluate(probe, untrained)[0]
            result = replace(result, baselines={**result.baselines, untrained.name: other.value})
            if distributed.is_main:
                result.write(folder)
        distributed.barrier()
    return result


def _check(probe: _Probe) -> None:
    """Refuse what would fail later, or give metrics without a meaning."""
    protocol, pairs, world = probe.protocol, probe.pairs, probe.distributed.world_size
    if protocol.epochs < 1 or protocol.batch_size < world:
        raise SettingsError(
            f"epochs is {protocol.epochs}, batch_size {protocol.batch_size}: give at least one "
            f"epoch, and one image for each process ({world})"
        )
    if len(pairs.train) < 4:
        raise DataError(f"'{probe.config.data}' has fewer than four training pairs")
    for data in (pairs.train, pairs.test):
        _check_targets(data, probe.task)


def _check_targets(data: DenseDataset, task: DenseTask) -> None:
    """See that a pixel counts, in one of some targets spread over the set."""
    found = []
    for index in np.linspace(0, len(data) - 1, min(len(data), _TRIED)).astype(int).tolist():
        try:
            target = torch.from_numpy(data[index][1].astype(np.float32))
        except ImageError as error:
            found.append(f"'{data.names[index]}': {error}")
            continue
        if task.valid(target, test=True).any():
            return
        span = f"{target.min():g} to {target.max():g}"
        found.insert(0, f"'{data.names[index]}' has values from {span}, {task.counts} count")
    raise DataError(f"no target has a pixel that counts, for example {found[0]}")


def _evaluate(probe: _Probe, subject: Subject) -> tuple[Result, Path]:
    """One model; from its folder if its result is there."""
    config, distributed, task = probe.config, probe.distributed, probe.task
    computed: dict[str, Any] = {"device": distributed.device, "precision": config.precision}
    encoder = Encoder(subject.model, layers="last4", pool=None, host=False, **computed)
    workers = 0 if _is_rendered(config.data) else config.workers
    train, test = (
        DenseLoader(part, encoder, task, workers) for part in (probe.pairs.train, probe.pairs.test)
    )
    training = DenseTraining(config, probe.protocol, train, distributed)
    settings = {
        "protocol": asdict(probe.protocol),
        **task.settings,
        "seed": config.seed,
        **{k: v for k, v in encoder.settings.items() if k != "versions"},
        "train": train.data.fingerprint,
        "test": test.data.fingerprint,
        "select_on_test": config.select_on_test,
        "value_range": config.value_range,
        "bands": config.bands,
        **probe.target_options,
    }
    name = f"{config.task}-{probe.pairs.name}"
    folder = run_folder(config.out, name, "dense", subject.describe()["name"], settings)
    state = EpochState(folder / "state.pt", distributed)

    def work() -> Result:
        training.train(state)
        result, chosen = _measure(probe, subject, training, test)
        if distributed.is_main:
            head = training.heads[chosen]
            names = probe.pairs.class_names
            whole = View("square", "bicubic").timm_config()
            classifier = Classifier(
                subject.model, head.head, head.layers, None, names, transform=whole
            )
            save_head(config, distributed, subject, classifier, folder, **task.head_record)
        return result

    result = once(folder, distributed, encoder.settings["precision"], work)
    if distributed.is_main:
        state.remove()
    return result, folder


def _measure(
    probe: _Probe, subject: Subject, training: DenseTraining, test: DenseLoader
) -> tuple[Result, int]:
    """Choose a head on held-out training images; it reads the test set."""
    task, config, train, heads = probe.task, probe.config, training.loader, training.heads
    asked: Sequence[int] = range(len(heads))
    val: list[float | None] = [None] * len(heads)
    kept = 0
    if not config.select_on_test:
        total, kept = _score(training, train, training.val_rows, asked)
        values = task.summary(total, kept)[: len(heads), 0]
        val, asked = [*values.tolist()], [_best(task, values)]
    total, count = _score(training, test, np.arange(len(test.data)), asked)
    metrics = task.summary(total, count)
    place = _best(task, metrics[: len(asked), 0])
    own, blind = metrics[place].tolist(), metrics[len(asked) :].tolist()
    tested = dict(zip(asked, metrics[:, 0].tolist()))
    broken, test_broken = (
        of_all_processes(loader.broken, probe.distributed) for loader in (train, test)
    )
    notes = [CACHED_AS_IS] if config.cached else []
    notes += other_epochs(probe.protocol.epochs, probe.usual.epochs, "protocol")
    if without := len(test.data) - len(test_broken) - count:
        notes.append(f"test pairs without a pixel that counts: {without}, not among those tested")
    fitted = sum(train.data.names[index] not in broken for index in training.train_rows.tolist())
    result = Result(
        task=probe.pairs.name,
        method=task.method,
        model=subject.describe(),
        value=own[0],
        chosen=heads[asked[place]].name,
        selection="a seeded 10 % of the training images" if kept else TEST_SET,
        heads=[
            Head(head.name, val[i], tested.get(i), training.losses[i])
            for i, head in enumerate(heads)
        ],
        protocol=asdict(probe.protocol) | task.settings,
        data={
            name: {
                "name": data_name(config.data),
                "split": probe.pairs.split,
                "images": len(loader.data),
                "fingerprint": loader.data.fingerprint,
            }
            for name, loader in (("train", train), ("test", test))
        },
        images={"train": fitted, "val": kept, "test": count},
        seed=config.seed,
        metric=task.metric,
        unit=task.unit,
        higher_is_better=task.higher_is_better,
        metrics=dict(zip(task.metrics[1:], own[1:])) | task.more(total[place]),
        baselines={
            f"{task.metrics[column]} of {name}": row[column]
            for name, row in zip(task.blind, blind)
            for column in task.shown
        },
        notes=[*notes, *undecoded(broken | test_broken, "pair")],
        seconds=training.seconds,
    )
    return result, asked[place]


def _best(task: DenseTask, metrics: Tensor) -> int:
    sign = 1 if task.higher_is_better else -1
    return int(torch.nan_to_num(sign * metrics, nan=-math.inf).argmax())


def _score(
    training: DenseTraining, loader: DenseLoader, indices: Indices, asked: Sequence[int]
) -> tuple[Tensor, int]:
    """Statistics of some heads, then of predictions that see no image, and of how many images."""
    task, distributed = training.task, training.distributed
    heads = len(asked) + len(task.blind)
    total = torch.zeros(heads, *task.shape, dtype=torch.float64)
    count = torch.zeros(1, dtype=torch.int64)
    mine = indices[distributed.rank :: distributed.world_size]
    size = training.protocol.batch_size
    with training.bar(len(mine), "measuring") as bar:
        for batch in loader.in_order(mine, size, full=True, mirrored=task.mirrored):
            predictions = [_predict(training, batch.maps, head) for head in asked]
            bar.update(len(batch.indices))
            for i, target in enumerate(batch.targets):
                if task.valid(target, test=True).any():
                    maps = [prediction[i] for prediction in predictions]
                    total += task.statistics(maps, training.sums, target)
                    count += 1
    images = int(distributed.all_reduce(count))
    if not images:
        name = loader.data.names[int(indices[0])]
        reason = loader.broken.get(name, "no pixel of its target counts")
        raise DataError(f"none of {len(indices)} pairs can be measured: '{name}': {reason}")
    return distributed.all_reduce(total), images


@torch.inference_mode()
def _predict(training: DenseTraining, maps: Tensor, head: int) -> Tensor:
    """Predictions `[b, C, h, w]`, for depth the mean over both sides as in DINOv2."""
    training.heads.eval()
    if not len(maps):  # BatchNorm refuses none
        return maps
    prediction: Tensor = training.heads[head](maps)
    if training.task.mirrored:
        plain, mirror = prediction.chunk(2)
        prediction = (plain + mirror.flip(-1)) / 2
    return prediction
