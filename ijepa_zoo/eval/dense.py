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
- the loss of depth is `SigLoss` alone: the official gradient loss takes differences along the batch;
- a grid of heads is trained (with and without BatchNorm, several learning rates), and the best one
  on held-out training images, a seeded 10 %, reads the test set, once;
- `nyu_depth_v2_labeled.mat` has 795 training images, so 25 epochs are 1,100 steps where DINOv2
  takes 38,400 on 24,231 images, and its depths are filled in;
- rendered scenes have fewer epochs and other learning rates.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..data.decode import Decoder
from ..data.dense import DenseData, DenseDataset, open_depth, open_segmentation
from ..data.loading import load_in_order, usable_cpus
from ..distributed import Distributed, init_distributed
from ..encode import Encoder
from ..errors import DataError, ImageError, RunError, SettingsError
from ..models.classifier import Classifier, DenseHead, save_classifier
from ..progress import progress_bar
from ..seeds import Stream, numpy_generator, torch_generator
from .dense_tasks import DenseTask, Depth, Segmentation, picture
from .epoch_state import EpochState, checked_losses, load_optimizer
from .models import Subject, as_subject, check_model
from .notes import CACHED_AS_IS, few_to_choose, of_all_processes, undecoded
from .probe import EvalConfig
from .result import Head, Result
from .runs import once, run_folder
from .words import counted, data_name, option, other_epochs

Indices = npt.NDArray[np.int64]
Plan = Sequence[tuple[Indices, npt.NDArray[np.bool_]]]  # indices and flips of each batch

_MAX_DEPTH = 10.0  # meters, where the data do not tell: rooms
_CHOOSE_SHARE = 0.1
_STD = 0.01  # of the initial weights, as in mmsegmentation's heads
_TRIED = 100  # pairs that are read before the work, until one counts


@dataclass(frozen=True)
class DenseProtocol:
    """How heads are trained, and by default DINOv2's linear segmentation on ADE20K.

    Attributes:
        epochs: Passes over the training images; 40,000 steps of ADE20K's 20,210.
        batch_size: Images of a step, over all processes.
        lrs: Learning rates of the grid.
        batch_norm: Whether BatchNorm comes before the linear layer.
        weight_decay: Of AdamW.
    """

    epochs: int = 32
    batch_size: int = 16
    lrs: tuple[float, ...] = (1e-3, 1e-2)
    batch_norm: tuple[bool, ...] = (False, True)
    weight_decay: float = 1e-4

    def lr_scale(self, step: int, steps: int) -> float:
        """Share of the learning rate: linear warm-up over 3.75 % of the steps, then linear to 0."""
        warm_up = max(1, round(steps * 1_500 / 40_000))
        return (step + 1) / warm_up if step < warm_up else (steps - step) / steps


@dataclass(frozen=True)
class DepthProtocol(DenseProtocol):
    """DINOv2's depth: 38,400 steps of 16, which is 25 epochs of its 24,231 images of NYU.

    Attributes:
        bins: Depth bins.
        upsample: Factor of the bilinear upsampling of their scores.
    """

    epochs: int = 25
    lrs: tuple[float, ...] = (1e-4, 1e-3)
    weight_decay: float = 0.01
    bins: int = 256
    upsample: int = 4

    def lr_scale(self, step: int, steps: int) -> float:
        """Share of the learning rate: linear over the first third, then a cosine to 0."""
        warm_up = max(1, round(steps / 3))  # in DINOv2's configuration: 12,800 of 38,400
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


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
    epochs: int | None = None,
    batch_size: int | None = None,
    cached: bool = False,
    pictures: int = 8,
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
        epochs: Default: those of the protocol.
        batch_size: Default: that of the protocol.
        cached: Encode each training image and its mirror image once and keep the features in
            memory, `2 n 4 D h w` numbers of 4 bytes. The training is the same to rounding.
        pictures: Rows of `predictions.png`; 0 for none.
        options: Further fields of :class:`EvalConfig`.

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
    config = EvalConfig(task="depth", model=model, data=data, out=out, **options)
    usual = protocol or (_SCENES_DEPTH if _is_rendered(data) else DepthProtocol())
    used = _with(usual, epochs, batch_size)
    channels = _check_model(config)
    with init_distributed(config.device) as distributed:
        pairs = open_depth(data, depth_scale=depth_scale, **_opening(config, distributed))
        pairs = _decoded(config, pairs, channels)
        limit = max_depth if max_depth is not None else pairs.max_depth or _MAX_DEPTH
        task = Depth(limit, used.bins, used.upsample, pairs.crop, pairs.unit)
        return _run(_Probe(config, pairs, task, used, usual, distributed, cached, pictures))


def evaluate_segmentation(
    model: str | nn.Module | Subject,
    data: str | Path,
    out: str | Path = "results",
    *,
    protocol: DenseProtocol | None = None,
    reduce_zero_label: bool | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    cached: bool = False,
    pictures: int = 8,
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
        epochs: Default: those of the protocol.
        batch_size: Default: that of the protocol.
        cached: Encode each training image and its mirror image once and keep the features.
        pictures: Rows of `predictions.png`; 0 for none.
        options: Further fields of :class:`EvalConfig`.

    Returns:
        The result, which is also in the folder; its figure is the mean IoU in percent.

    Raises:
        DataError: The data cannot be used.
        SettingsError: An argument or the model does not fit.
        RunError: Another process works on the same evaluation, or features are not finite.
    """
    config = EvalConfig(task="segmentation", model=model, data=data, out=out, **options)
    usual = protocol or (_SCENES_SEGMENTATION if _is_rendered(data) else DenseProtocol())
    used = _with(usual, epochs, batch_size)
    channels = _check_model(config)
    with init_distributed(config.device) as distributed:
        pairs = open_segmentation(
            data, reduce_zero_label=reduce_zero_label, **_opening(config, distributed)
        )
        pairs = _decoded(config, pairs, channels)
        task = Segmentation(pairs.num_classes or 0)
        return _run(_Probe(config, pairs, task, used, usual, distributed, cached, pictures))


def _is_rendered(data: str | Path) -> bool:
    return str(data).startswith("scenes:")


def _with(usual: Any, epochs: int | None, batch_size: int | None) -> Any:
    given = {"epochs": epochs, "batch_size": batch_size}
    return replace(usual, **{name: n for name, n in given.items() if n is not None})


def _check_model(config: EvalConfig) -> int:
    if config.test is not None:
        raise SettingsError(f"{option('test')}: DATA holds training and test pairs")
    return check_model(
        config.model, baseline=config.baseline, random=config.random, **config.weights
    )


def _opening(config: EvalConfig, distributed: Distributed) -> dict[str, Any]:
    workers = usable_cpus() if config.workers is None else config.workers
    return {"workers": workers, "progress": config.progress and distributed.is_main}


def _decoded(config: EvalConfig, pairs: DenseData, channels: int) -> DenseData:
    decoder = Decoder(channels, config.value_range, config.bands)
    train, test = (
        replace(part, decoder=decoder, skip_broken=config.skip_broken)
        for part in (pairs.train, pairs.test)
    )
    return replace(pairs, train=train, test=test)


@dataclass(frozen=True)
class _Probe:
    """The data and how heads are trained on them, for any number of models."""

    config: EvalConfig
    pairs: DenseData
    task: DenseTask
    protocol: Any
    usual: Any
    distributed: Distributed
    cached: bool
    pictures: int

    @property
    def precision(self) -> str:
        """Precision of the encoder."""
        if self.config.precision != "auto":
            return self.config.precision
        return "bfloat16" if self.distributed.device.type == "cuda" else "float32"

    def bar(self, total: int, what: str, unit: str = "image", done: int = 0) -> Any:
        """A progress bar, in rank 0."""
        return progress_bar(
            self.config.progress and self.distributed.is_main, total, what, unit, done
        )


def _run(probe: _Probe) -> Result:
    """Evaluate the model, and the architecture with random weights if that is wanted."""
    config, distributed = probe.config, probe.distributed
    distributed.run_on_main(lambda: _check_pairs(probe))
    subject = as_subject(config.model, random=config.random, seed=config.seed, **config.weights)
    result, folder = _evaluate(probe, subject)
    if config.baseline and not any("random weights" in name for name in result.baselines):
        untrained = subject.untrained(config.seed)
        other = _evaluate(probe, untrained)[0]
        result = replace(result, baselines={**result.baselines, untrained.name: other.figure})
        if distributed.is_main:
            result.write(folder)
    distributed.barrier()
    return result


def _check_pairs(probe: _Probe) -> None:
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


def _evaluate(probe: _Probe, subject: Subject) -> tuple[Result, Path]:
    """One model; from its folder if its result is there."""
    training, distributed = _Training(probe, subject.model), probe.distributed
    settings = training.settings()
    short = "depth" if isinstance(probe.task, Depth) else "segmentation"
    name = subject.describe()["name"]
    folder = run_folder(probe.config.out, f"{short}-{probe.pairs.name}", "dense", name, settings)
    state = EpochState(folder / "state.pt", settings, distributed)

    def work() -> Result:
        training.train(state)
        result, chosen, rows = _measure(training, subject)
        if distributed.is_main:
            if rows:
                picture(probe.task, rows).save(folder / "predictions.png")
            _save_head(training, subject, chosen, folder)
        return result

    result = once(folder, distributed, probe.precision, work)
    if distributed.is_main:
        state.remove()
    return result, folder


def _save_head(training: _Training, subject: Subject, chosen: int, folder: Path) -> None:
    """Save a head as a classifier folder, `model`; with the encoder if no name opens it again."""
    config, spec = training.probe.config, training.specs[chosen]
    head = DenseHead(**training.heads[chosen].args)
    head.load_state_dict(training.heads[chosen].state_dict())
    opened = None if subject.name.endswith("random weights") else subject.given
    if opened is not None and os.path.isdir(opened):
        opened = f"local-dir:{opened}"
    given = {"checkpoint": config.checkpoint, "network": config.network}
    if config.checkpoint and os.path.exists(config.checkpoint):
        given["checkpoint"] = os.path.abspath(config.checkpoint)
    layers: Any = spec.representation
    model = Classifier(subject.model, head, layers, None, training.probe.pairs.class_names)
    save_classifier(
        folder / "model",
        model,
        encoder=opened,
        encoder_args={name: value for name, value in given.items() if value is not None},
        with_encoder=config.with_encoder or opened is None,
        overwrite=True,
        **training.probe.task.record(),
    )


@dataclass(frozen=True)
class HeadSpec:
    """One head: what it reads, whether BatchNorm comes first, and its learning rate."""

    representation: str
    batch_norm: bool
    lr: float

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.representation}{' bn' if self.batch_norm else ''} lr={self.lr:g}"


def make_heads(
    specs: Sequence[HeadSpec], widths: dict[str, int], outputs: int, seed: int
) -> nn.ModuleList:
    """The heads of a grid; those that differ in the learning rate have the same initial weights.

    Args:
        specs: The heads.
        widths: Channels of each representation.
        outputs: Channels of a head.
        seed: Decides the weights.
    """
    heads = nn.ModuleList()
    for spec in specs:
        width = widths[spec.representation]
        head = DenseHead(width, outputs, spec.batch_norm)
        generator = torch_generator(seed, Stream.EVAL_INIT, width, int(spec.batch_norm))
        with torch.no_grad():
            weight = torch.randn(outputs, width, generator=generator) * _STD
            head.conv.weight.copy_(weight[:, :, None, None])
            head.conv.bias.zero_()  # type: ignore[union-attr]
        heads.append(head)
    return heads


def make_optimizer(
    specs: Sequence[HeadSpec], heads: nn.ModuleList, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with the learning rate of each head, in the order of the heads."""
    groups = [
        {"params": list(head.parameters()), "lr": spec.lr, "name": spec.name}
        for spec, head in zip(specs, heads)
    ]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


@dataclass
class _Training:
    """Trains the heads of a grid, resumable after each epoch.

    Attributes:
        probe: Data and protocol.
        model: The frozen encoder.
        epoch: Epochs done.
        seconds: Time that they took, over all sessions.
        losses: Mean loss of each head in the last epoch.
        sums: See `Depth.new_sums`; the same in all processes.
        fit: Training pairs that heads are fitted to.
        choose: Those that choose a head; none where the test set does.
    """

    probe: _Probe
    model: nn.Module
    epoch: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        probe, protocol = self.probe, self.probe.protocol
        self.feed = DenseFeed(
            probe.pairs.train,
            self.model,
            probe.task,
            str(probe.distributed.device),
            probe.precision,
            _opening(probe.config, probe.distributed)["workers"],
        )
        images = len(probe.pairs.train)
        order = numpy_generator(probe.config.seed, Stream.EVAL_SPLIT, 1).permutation(images)
        held_out = 0 if probe.config.select_on_test else max(1, round(_CHOOSE_SHARE * images))
        self.choose, self.fit = np.sort(order[:held_out]), np.sort(order[held_out:])
        grid = product(("last", "last4"), protocol.batch_norm, protocol.lrs)
        self.specs = [HeadSpec(*settings) for settings in grid]
        device, outputs = probe.distributed.device, probe.task.outputs
        self.heads: Any = make_heads(self.specs, self.feed.widths, outputs, probe.config.seed)
        self.heads.to(device)
        self.optimizer = make_optimizer(self.specs, self.heads, protocol.weight_decay)
        self.sums = probe.task.new_sums(self.feed.encoder.size)
        self.steps = max(1, len(self.fit) // protocol.batch_size)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the metrics, as plain values."""
        encoder = {k: v for k, v in self.feed.encoder.settings.items() if k != "versions"}
        return {
            "protocol": asdict(self.probe.protocol),
            **self.probe.task.settings,
            "seed": self.probe.config.seed,
            **encoder,
            "train": self.probe.pairs.train.fingerprint,
            "test": self.probe.pairs.test.fingerprint,
            "select_on_test": self.probe.config.select_on_test,
        }

    def train(self, state: EpochState) -> None:
        """Train from the last finished epoch on.

        Raises:
            RunError: The state is damaged, or of other settings.
        """
        self._resume(state)
        probe, epochs = self.probe, self.probe.protocol.epochs
        started = time.monotonic() - self.seconds
        if probe.cached and self.epoch < epochs:
            # every process draws from all images, so each encodes all
            with probe.bar(len(self.fit), "encoding") as bar:
                for count in self.feed.store(self.fit, probe.protocol.batch_size):
                    bar.update(count)
        total, done = self.steps * epochs, self.steps * self.epoch
        with probe.bar(total, f"{probe.task.method} heads", "step", done) as bar:
            while self.epoch < epochs:
                self._train_epoch(bar)
                self.epoch += 1
                self.seconds = time.monotonic() - started
                self._save(state)
        for tensor in self.heads.state_dict().values():  # GPUs may round differently
            probe.distributed.broadcast(tensor)

    def _train_epoch(self, bar: Any) -> None:
        self.heads.train()
        losses = torch.zeros(len(self.specs), device=self.probe.distributed.device)
        for step, (maps, targets) in enumerate(self._batches()):
            scale = self.probe.protocol.lr_scale(
                self.epoch * self.steps + step, self.steps * self.probe.protocol.epochs
            )
            for group, spec in zip(self.optimizer.param_groups, self.specs):
                group["lr"] = spec.lr * scale
            self.probe.task.add(self.sums, targets)
            if int(self.probe.task.valid(targets).sum()) >= 2:  # on the CPU
                losses += self._update(maps, targets)
            bar.update()
        self.losses = (losses / self.steps).tolist()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features `last4` and targets of whole batches; an incomplete last one is left out."""
        seed, size, distributed = (
            self.probe.config.seed, self.probe.protocol.batch_size, self.probe.distributed
        )  # fmt: skip
        generator = numpy_generator(seed, Stream.EVAL_ORDER, self.epoch)
        order = self.fit[generator.permutation(len(self.fit))]
        flips = numpy_generator(seed, Stream.EVAL_AUGMENT, self.epoch).random(len(order)) < 0.5
        rank, world = (0, 1) if self.probe.cached else (distributed.rank, distributed.world_size)
        parts = [slice(s * size + rank, (s + 1) * size, world) for s in range(self.steps)]
        for maps, targets in self.feed.for_training([(order[p], flips[p]) for p in parts]):
            if world == 1:
                yield maps, targets
            else:
                yield _exchange(distributed, size // world, maps, targets)

    def _update(self, maps: Tensor, targets: Tensor) -> Tensor:
        """One step of all heads; returns their losses."""
        self.optimizer.zero_grad()
        losses = []
        for spec, head in zip(self.specs, self.heads):  # one graph at a time: less memory
            features = self.feed.split(maps)[spec.representation]
            loss = self.probe.task.loss(self.probe.task.maps(head(features)), targets)
            loss.backward()
            losses.append(loss.detach())
        self.optimizer.step()
        return torch.stack(losses)

    def _save(self, state: EpochState) -> None:
        broken = of_all_processes(self.feed.broken, self.probe.distributed)
        if self.probe.distributed.is_main:
            content = {"epoch": self.epoch, "seconds": self.seconds, "losses": self.losses}
            content |= {"sums": self.sums, "broken": broken, "heads": self.heads.state_dict()}
            state.save({**content, "optimizer": self.optimizer.state_dict()})

    def _resume(self, state: EpochState) -> None:
        found = state.load(self.probe.protocol.epochs)
        if found is None:
            return
        with state.restoring():
            self.losses = checked_losses(found["losses"], len(self.specs))
            self.heads.load_state_dict(found["heads"])
            load_optimizer(self.optimizer, found["optimizer"])
            self.sums.copy_(found["sums"])
            self.epoch, self.seconds = found["epoch"], found["seconds"]
            self.feed.broken.update(found["broken"])


def _exchange(
    distributed: Distributed, share: int, maps: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The batches of all processes together; each has up to `share` images."""
    missing = share - len(maps)
    there = distributed.all_gather(torch.arange(share) < len(maps))
    padded = (torch.cat([t, t.new_zeros(missing, *t.shape[1:])]) for t in (maps, targets))
    maps, targets = (distributed.all_gather(t) for t in padded)
    places = there.nonzero()[:, 0]
    return maps[places.to(maps.device)], targets[places]


def _measure(
    training: _Training, subject: Subject
) -> tuple[Result, int, list[tuple[Tensor, Tensor, Tensor]]]:
    """Choose a head on held-out training images; it reads the test set."""
    probe, task, specs = training.probe, training.probe.task, training.specs
    pairs, config = probe.pairs, probe.config
    test_feed = training.feed.of(pairs.test)
    everything = np.arange(len(pairs.test))
    held_out, kept, only = [None] * len(specs), 0, None
    if not config.select_on_test:
        found, kept, _ = _score(training, training.feed, training.choose, None, 0)
        held_out = found[: len(specs), 0].tolist()
        only = _best(task, found[: len(specs), 0])
    test, count, rows = _score(training, test_feed, everything, only, probe.pictures)
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
    figure, others = float(test[place, 0]), test[place, 1:].tolist()
    result = Result(
        task=f"{task.method}, {pairs.name}",
        method=task.method,
        model=subject.describe(),
        figure=figure,
        chosen=specs[chosen].name,
        selection="the test set" if only is None else "a seeded 10 % of the training images",
        heads=heads,
        protocol=asdict(probe.protocol) | task.settings,
        data=_data_record(pairs, data_name(config.data)),
        images={"fit": fitted, "choose": kept, "test": count},
        seed=config.seed,
        measure=task.measure,
        unit=task.unit,
        higher_is_better=task.higher_is_better,
        others=dict(zip(task.metrics[1:], others)),
        baselines=_baselines(task, blind),
        notes=[
            *([CACHED_AS_IS] if probe.cached else []),
            *other_epochs(probe.protocol.epochs, probe.usual.epochs, "protocol"),
            *few_to_choose(kept),
            *_worse_than_blind(task, figure, blind),
            *undecoded(broken | test_broken, "pair"),
            *_blank(len(everything) - len(test_broken) - count),
        ],
        seconds=training.seconds,
    )
    return result, chosen, [(pixels, target, drawn[place]) for pixels, target, drawn in rows]


def _best(task: DenseTask, figures: Tensor) -> int:
    sign = 1 if task.higher_is_better else -1
    return int(torch.nan_to_num(sign * figures, nan=-math.inf).argmax())


def _data_record(pairs: DenseData, called: str) -> dict[str, Any]:
    return {
        name: {
            **({"name": called} if called else {}),
            "split": pairs.split,
            "images": len(part),
            "fingerprint": part.fingerprint,
        }
        for name, part in (("train", pairs.train), ("test", pairs.test))
    }


def _baselines(task: DenseTask, blind: Tensor) -> dict[str, float]:
    """Metrics of predictions that do not look at the image."""
    return {
        f"{task.metrics[column]} of {name}": float(figures[column])
        for name, figures in zip(task.blind, blind)
        for column in task.shown
    }


def _worse_than_blind(task: DenseTask, figure: float, blind: Tensor) -> list[str]:
    """A note where a prediction that does not look at the image is better."""
    name, other = task.blind[-1], float(blind[-1, 0])
    if figure == other or (figure > other) == task.higher_is_better:
        return []
    return [
        f"worse than {name}, which looks at no image ({task.measure} {figure:.4g}, {name} "
        f"{other:.4g}): train longer, {option('epochs')}, or on more images"
    ]


def _blank(pairs: int) -> list[str]:
    """A note on test pairs without a pixel that counts."""
    if not pairs:
        return []
    return [f"{counted(pairs, 'test pair')} without a pixel that counts: not among those tested"]


def _score(
    training: _Training, feed: DenseFeed, indices: Indices, only: int | None, pictures: int
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
def _predict(training: _Training, maps: Tensor, asked: Sequence[int]) -> list[Tensor]:
    """Predictions `[b, C, h, w]` of each head; as DINOv2 does, depth is averaged over both sides."""
    training.heads.eval()
    features, task, predictions = training.feed.split(maps), training.probe.task, []
    for place in asked if len(maps) else []:
        scores = training.heads[place](features[training.specs[place].representation])
        prediction = task.maps(scores)
        if task.mirrored:
            plain, mirror = prediction.chunk(2)
            prediction = (plain + mirror.flip(-1)) / 2
        predictions.append(prediction)
    return predictions


@dataclass(frozen=True)
class DenseBatch:
    """Encoded pairs that could be read.

    Attributes:
        maps: `last4` features `[b, 4D, h, w]`, of `2b` images where mirror images follow.
        targets: b targets float32 `[H, W]` on the CPU.
        pixels: uint8 `[b, C, H, W]`.
        indices: `[b]`, in the data set.
    """

    maps: Tensor
    targets: list[Tensor]
    pixels: Tensor
    indices: Indices


@dataclass(frozen=True)
class _Batches:
    """Decoded batches of a plan, for loader processes.

    Images are resized as a whole, so no part of a target is left out.
    """

    data: DenseDataset
    plan: Plan
    task: DenseTask
    size: tuple[int, int]
    full: bool
    mirrored: bool

    def __getitem__(self, batch: int) -> tuple[Tensor, list[Tensor], list[str | None]]:
        indices, flips = self.plan[batch]
        channels = self.data.decoder.in_chans
        pixels = torch.zeros(len(indices), channels, *self.size, dtype=torch.uint8)
        targets: list[Tensor] = []
        reasons: list[str | None] = []
        for slot, (index, flip) in enumerate(zip(indices.tolist(), flips.tolist())):
            try:
                image, target = self._read(index)
            except ImageError as error:
                if not self.data.skip_broken:
                    raise DataError(
                        f"the pair of '{self.data.names[index]}' cannot be read ({error}): repair "
                        f"or remove it, or leave such pairs out with {option('skip_broken')}"
                    ) from error
                reasons.append(str(error))
                continue
            reasons.append(None)
            pixels[slot] = image.flip(-1) if flip else image
            targets.append(target.flip(-1) if flip else target)
        if self.mirrored:
            pixels = torch.cat([pixels, pixels.flip(-1)])
        return pixels, targets, reasons

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        image, array, _ = self.data[index]
        target = torch.from_numpy(array.astype(np.float32))
        self.task.check(target)
        if not self.full:  # nearest, since unknown depths and classes must not be mixed
            target = F.interpolate(target[None, None], self.size, mode="nearest")[0, 0]
        resized: Any = tv.resize(image, list(self.size), interpolation=InterpolationMode.BICUBIC)
        return (resized if isinstance(resized, Tensor) else tv.pil_to_tensor(resized)), target


@dataclass
class DenseFeed:
    """Encodes the pairs of a data set with a frozen model.

    Args:
        data: The pairs.
        model: A timm ViT.
        task: What the targets are.
        device, precision: See :func:`ijepa_zoo.extract_features`.
        workers: Loader processes.

    Attributes:
        broken: Why a pair could not be read, by its name.
    """

    data: DenseDataset
    model: nn.Module
    task: DenseTask
    device: str = "auto"
    precision: str = "float32"
    workers: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.encoder = Encoder(
            self.model,
            layers="last4",
            pool=None,
            device=self.device,
            precision=self.precision,
            host=False,
        )
        self._stored: tuple[Tensor, Tensor, dict[int, int]] | None = None

    def of(self, data: DenseDataset) -> DenseFeed:
        """A feed of other data with the same model and settings."""
        return DenseFeed(data, self.model, self.task, self.device, self.precision, self.workers)

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each representation."""
        width = self.encoder.row_shape[0]
        return {"last": width // 4, "last4": width}

    def split(self, maps: Tensor) -> dict[str, Tensor]:
        """The representations in maps `[b, 4D, h, w]`, without a copy."""
        return {"last": maps[:, -self.widths["last"] :], "last4": maps}  # blocks ascend

    def for_training(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        """Maps on the device and targets of the size of the model's images, batch by batch."""
        size = self.encoder.size
        if self._stored is None:
            for batch in self._encode(plan, full=False, mirrored=False):
                targets = torch.stack(batch.targets) if batch.targets else torch.empty(0, *size)
                yield batch.maps.clone(), targets  # autograd refuses tensors of inference mode
            return
        maps, targets, places = self._stored
        for indices, flips in plan:
            good = [(places[i], f) for i, f in zip(indices.tolist(), flips.tolist()) if i in places]
            rows, sides = [row for row, _ in good], [int(flip) for _, flip in good]
            flipped = [
                targets[row].flip(-1) if side else targets[row] for row, side in zip(rows, sides)
            ]
            stacked = torch.stack(flipped) if flipped else torch.empty(0, *size)
            yield maps[sides, rows].to(self.encoder.device), stacked

    def for_testing(self, indices: Indices, batch_size: int) -> Iterator[DenseBatch]:
        """Images, for some tasks then their mirror images; targets have their own sizes."""
        plan = _in_order(indices, batch_size)
        yield from self._encode(plan, full=True, mirrored=self.task.mirrored)

    def store(self, indices: Indices, batch_size: int) -> Iterator[int]:
        """Keep features of both sides, and targets, in memory for `for_training`.

        Yields:
            How many pairs were encoded, batch by batch.
        """
        maps = torch.empty(2, len(indices), *self.encoder.row_shape)
        targets = torch.empty(len(indices), *self.encoder.size)
        places: dict[int, int] = {}
        for batch in self._encode(_in_order(indices, batch_size), full=False, mirrored=True):
            first, count = len(places), len(batch.indices)
            rows = slice(first, first + count)
            if count:
                maps[:, rows] = torch.stack(batch.maps.cpu().chunk(2))
                targets[rows] = torch.stack(batch.targets)
            places |= zip(batch.indices.tolist(), range(first, first + count))
            yield count
        self._stored = maps, targets, places

    def _encode(self, plan: Plan, *, full: bool, mirrored: bool) -> Iterator[DenseBatch]:
        items = _Batches(self.data, plan, self.task, self.encoder.size, full, mirrored)
        on_gpu = self.encoder.device.type == "cuda"
        loader = load_in_order(items, range(len(plan)), self.workers, pin_memory=on_gpu)
        waiting: deque[tuple[Tensor, list[Tensor], Indices]] = deque()

        def batches() -> Iterator[tuple[Tensor, list[str | None]]]:
            for (indices, _), (pixels, targets, reasons) in zip(plan, loader):
                good = [slot for slot, reason in enumerate(reasons) if reason is None]
                for index, reason in zip(indices.tolist(), reasons):
                    if reason is not None:
                        self.broken[self.data.names[index]] = reason
                waiting.append((pixels[good], targets, indices[good]))
                yield pixels, reasons * (2 if mirrored else 1)

        for number, (maps, _) in enumerate(self.encoder.encode(batches())):
            pixels, targets, indices = waiting.popleft()
            if not number and not maps.isfinite().all():  # once: a GPU would wait for each answer
                raise RunError(
                    f"features of '{self.data.names[int(indices[0])]}' or its neighbors are not "
                    "finite: the model's weights are damaged, or need another precision (float32)"
                )
            yield DenseBatch(maps, targets, pixels, indices)


def _in_order(indices: Indices, batch_size: int) -> Plan:
    parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return [(part, np.zeros(len(part), np.bool_)) for part in parts]
