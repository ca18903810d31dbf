"""Fine-tuning: all weights of a model trained with labels, by the paper's recipes.

Sources: the I-JEPA paper (arXiv 2301.08243, section 5 and appendix A.1) and MAE's fine-tuning
(facebookresearch/mae), whose recipe it follows. From MAE: learning rates per 256 images, warm-up of
5 epochs from 0, smallest learning rate 1e-6, first head weights of std 2e-5, a test crop of 7/8 up
to 224 pixels and of the whole image above; for full fine-tuning also label smoothing 0.1,
RandAugment and random erasing 0.25.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.transforms import transform_config
from ..distributed import init_distributed
from ..encode import fast_precision
from ..errors import DataError, RunError, SettingsError, option
from ..seeds import Stream, fold, torch_generator
from ..weights.export import check_exportable, export
from .accuracy import Choice, classification_loss, compute_metrics
from .batches import LabeledImages, TrainBatches, library_seeds, rand_augment
from .features import Source
from .logreg import choose_rows
from .models import EvalModel
from .probe import EvalConfig, Probe, epochs_note, make_result, open_probe
from .results import Result
from .runs import run_once, train_epochs
from .sets import listed_rows
from .tasks import CROP, Task, find_task

MICRO_BATCH = 32
_HEAD_STD = 2e-5
_LARGE = 1024  # width of a ViT-L
_CROPPED = 224  # pixels; larger images are tested whole
_ONE_PERCENT = 12_811  # images of the list of 1 % of ImageNet


@dataclass(frozen=True)
class FineTuneRecipe:
    """How all weights of a model are trained with labels."""

    epochs: int = 50
    lr: float = 1e-4
    batch_size: int = 528
    weight_decay: float = 0.04
    layer_decay: float = 0.75
    drop_path: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    warmup_epochs: float = 5.0
    min_lr: float = 1e-6
    paper: Mapping[str, float] = field(default_factory=dict)

    def change(self, epochs: int | None, batch_size: int | None) -> FineTuneRecipe:
        """The recipe for other epochs, with the warm-up in proportion, or another batch."""
        epochs = self.epochs if epochs is None else epochs
        size = self.batch_size if batch_size is None else batch_size
        if epochs < 1 or size < 2:
            raise SettingsError(f"epochs is {epochs} and batch_size {size}: use at least 1 and 2")
        warmup = self.warmup_epochs * epochs / self.epochs
        return replace(self, epochs=epochs, warmup_epochs=warmup, batch_size=size)


FULL = FineTuneRecipe(paper={"vit_huge16_448_ijepa.in1k": 87.1})
FEW_LABELS = FineTuneRecipe(
    lr=1.5e-5,  # the paper's 3e-5 for its batch of 512
    batch_size=512,
    weight_decay=0.4,
    drop_path=0.0,
    mixup=0.0,
    cutmix=0.0,
    random_erasing=0.0,
    paper={"vit_huge14_ijepa.in1k": 73.3, "vit_huge16_448_ijepa.in1k": 77.3},
)


def few_labels_recipe(model: Any) -> FineTuneRecipe:
    """The recipe for 1 % of ImageNet: weight decay 0.4 for ViT-H, 0.05 up to ViT-L."""
    return replace(FEW_LABELS, weight_decay=0.05) if model.embed_dim <= _LARGE else FEW_LABELS


def evaluate_finetune(
    task: str | Task,
    model: str | nn.Module | EvalModel,
    data: Any,
    out: str | Path = "results",
    *,
    list: str | Path | None = None,
    recipe: FineTuneRecipe | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    micro_batch_size: int = MICRO_BATCH,
    grad_checkpointing: bool = False,
    **options: Any,
) -> Result:
    """Fine-tune a copy of a model, test it after the last epoch, and save it.

    The folder of the result has the trained classifier as ``model``, which
    ``timm.create_model("local-dir:.../model", pretrained=True)`` opens. The same call resumes after
    an interruption, at the last finished epoch, and returns the result at once if it is finished.
    Processes started by torchrun share each batch, and may be others after an interruption.

    `list` is a text file with the names of the training images to use, one per line, such as
    ImageNet's 1 %. `recipe` is the paper's by default, with a list that for few labels; the warm-up
    changes in proportion to `epochs`, and the learning rate grows linearly with `batch_size`. A
    forward and backward pass of a process has `micro_batch_size` images, and `grad_checkpointing`
    computes activations twice instead of keeping them. The other arguments are fields of
    :class:`~ijepa_zoo.eval.EvalConfig`; errors are those of :func:`evaluate_linear`, and a loss
    that is not finite is a `RunError`.
    """
    chosen = find_task(task) if isinstance(task, str) else task
    if chosen.kind != "classes":
        raise DataError(
            f"fine-tuning crops images at random, which changes the labels of {chosen.name}: use "
            "a task of classes, or `eval count` or `eval depth`, which crop nothing"
        )
    config = EvalConfig(task=chosen, model=model, data=data, out=out, **options)
    if config.baseline or config.select_on_test or config.with_encoder:
        raise SettingsError("fine-tuning has no baseline, select_on_test or with_encoder")
    opened = config.open_model()
    with init_distributed(config.device) as distributed:
        probe = open_probe(config, distributed, opened)
        if list is not None:
            probe = choose_rows(probe, listed_rows(probe.train, list), {"list": Path(list).name})
        check_exportable(opened.model)
        rows = np.arange(len(probe.train))  # nothing is chosen by held-out images
        probe = replace(probe, train_rows=rows, val_rows=rows[:0]).without_broken()
        network: Any = copy.deepcopy(opened.model)
        network.set_grad_checkpointing(grad_checkpointing)
        usual = recipe or (FULL if list is None else few_labels_recipe(network))
        changed = usual.change(epochs, batch_size)
        training = FineTuning(network, opened, probe, changed, micro_batch_size)
        notes = epochs_note(changed.epochs, usual.epochs)
        method = "finetune" if list is None else "finetune-list"

        def work(_: Probe, folder: Path) -> Result:
            images = changed.epochs * training.steps * training.batch_size
            with training.probe.bar(images, folder.name) as training.bar:
                losses, seconds = training.run(folder)
            result = training.test(method, notes, losses=losses, seconds=seconds)
            distributed.run_on_main(lambda: _save(training, folder / "model"))
            return result

        result, _ = run_once(training.probe, training, method, training.protocol(), work)
        distributed.barrier()
    return result


def _save(training: FineTuning, folder: Path) -> None:
    """The trained classifier as a timm folder, with the transform that it was tested with."""
    network, train = training.model, training.probe.train
    network.set_grad_checkpointing(False)
    network.multi_label = train.multi_label
    cfg = network.pretrained_cfg = {
        **network.pretrained_cfg,
        "label_names": train.class_names,
        "num_classes": len(train.classes),
        **vars(training.transform),
    }
    origin = f"fine-tuned from {training.about['name']}"
    export(network, folder, license=cfg.get("license"), overwrite=True, origin=origin)


class FineTuning:
    """A timm ViT that gets a classifier, its optimizer and its data; every process makes one."""

    def __init__(
        self,
        network: Any,
        model: EvalModel,
        probe: Probe,
        recipe: FineTuneRecipe,
        micro_batch_size: int = MICRO_BATCH,
    ) -> None:
        self.model, self.recipe = network, recipe
        self.about, self.paper_name = model.describe(), model.paper_name
        self.distributed, self.device = probe.distributed, probe.distributed.device
        self.bar: Any = None
        precision = probe.config.precision
        if precision == "auto":  # float16 would need a GradScaler
            precision = "bfloat16" if fast_precision(self.device) == "bfloat16" else "float32"
        if precision not in ("float32", "bfloat16"):
            raise SettingsError(f"precision is {precision!r}: use float32, bfloat16 or auto")
        self.autocast = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"
        )
        self.settings = {"model": self.about, "precision": precision}
        _add_head(network, probe.num_classes, probe.config.seed)
        set_drop_path(network, recipe.drop_path)
        network.to(self.device).requires_grad_(True)
        config = transform_config(network)
        self.size: tuple[int, int] = tuple(config["input_size"][1:])
        self.transform = replace(CROP, crop_pct=1.0) if max(self.size) > _CROPPED else CROP
        protocol = replace(probe.protocol, transform=self.transform)
        self.probe = replace(probe, protocol=protocol)
        self.augments = config["input_size"][0] in (1, 3)  # Pillow's operations take no others
        self.mean, self.std = (
            torch.tensor(config[key], device=self.device).view(-1, 1, 1) for key in ("mean", "std")
        )
        self.batches = TrainBatches(
            probe.train,
            probe.train_rows,
            self.transform,
            self.size,
            recipe.batch_size,
            seed=probe.config.seed,
            rank=self.distributed.rank,
            world=self.distributed.world_size,
            micro=max(2, micro_batch_size // 2 * 2),
            unit=2,  # mixup takes pairs
            augment=rand_augment(recipe.auto_augment, self.size, config["mean"])
            if self.augments
            else None,
        )
        self.steps, self.batch_size = self.batches.steps, self.batches.batch_size
        self.erase = RandomErasing(recipe.random_erasing, mode="pixel", device=self.device)
        self.mixup: Any = None
        if (recipe.mixup or recipe.cutmix) and not probe.train.multi_label:
            classes = probe.num_classes
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0, num_classes=classes)
        self.optimizer, self.scheduler = self._optimizer()
        self.module: Any = network
        if self.distributed.world_size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.module = nn.parallel.DistributedDataParallel(network, device_ids=devices)

    def _optimizer(self) -> tuple[torch.optim.AdamW, Any]:
        """AdamW with a learning rate for each layer, and timm's schedule of steps."""
        recipe, steps = self.recipe, self.steps
        groups = param_groups_layer_decay(
            self.model,
            weight_decay=recipe.weight_decay,
            no_weight_decay_list=self.model.no_weight_decay(),
            layer_decay=recipe.layer_decay,
        )
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr * self.batch_size / 256)
        warmup = round(recipe.warmup_epochs * steps)
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(1, recipe.epochs * steps - warmup),
            lr_min=recipe.min_lr,
            warmup_t=warmup,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        return optimizer, scheduler

    def protocol(self) -> dict[str, Any]:
        """What decides the result, as plain values."""
        used = {key: value for key, value in asdict(self.recipe).items() if key != "paper"}
        transform = self.transform.describe(self.size, train=False)
        used |= {"batch_size": self.batch_size, "test_transform": transform}
        return {**used, **self.probe.subset}

    def training(self, first: int, last: int) -> Iterator[LabeledImages]:
        """Pieces of the batches of epochs from `first` up to `last`, exclusive."""
        return self.probe.loaded(self.batches, self.batches.numbers(first, last))

    def run(self, folder: Path) -> tuple[list[float], float]:
        """Train; returns the last loss, and the seconds of earlier sessions; see `train_epochs`."""
        args = (self.optimizer, self._train_epoch, self.recipe.epochs, folder)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            return train_epochs(self.probe, self, self.model, *args)

    def _train_epoch(self, pieces: Iterator[LabeledImages], epoch: int) -> list[float]:
        total = torch.zeros((), device=self.device)
        for step in range(self.steps):
            self.scheduler.step_update(epoch * self.steps + step)
            self.optimizer.zero_grad()
            for part, batch in enumerate(islice(pieces, self.batches.parts)):
                total += self.backward(batch, epoch, step, part)
            self.optimizer.step()
            self.bar.update(self.batch_size)
        loss = float(self.distributed.all_reduce(total)) / self.steps / self.distributed.world_size
        if not math.isfinite(loss):
            raise RunError(
                f"the loss of epoch {epoch + 1} is {loss}: use a smaller {option('batch_size')}, "
                f"with which the learning rate shrinks, or {option('precision')} float32"
            )
        return [loss]

    def backward(self, batch: LabeledImages, epoch: int, step: int, part: int) -> Tensor:
        """Add the gradients of a micro-batch, weighted by its share; returns its loss."""
        rank, world = self.distributed.rank, self.distributed.world_size
        keys = (self.probe.config.seed, Stream.EVAL_AUGMENT, epoch, step, part, rank)
        images = self._normalize(batch[0])
        labels = batch[1].to(self.device, non_blocking=True)
        torch.manual_seed(fold(*keys))  # of erased pixels and stochastic depth
        with library_seeds(*keys):
            images = self.erase(images)
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
        last = part == self.batches.parts - 1
        with self.module.no_sync() if world > 1 and not last else nullcontext():
            with self.autocast:
                logits = self.module(images)
            if self.probe.train.multi_label:
                loss = classification_loss(logits.float(), labels)
            else:
                smoothing = self.recipe.label_smoothing
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            # DDP averages over processes, whose shares differ
            loss = loss * (len(images) * world / self.batch_size)
            torch.autograd.backward(loss)
        return loss.detach()

    def test(self, method: str, notes: list[str], **more: Any) -> Result:
        """The result; every process must call this."""
        probe, source = self.probe, cast("Source", self)  # whose features are the images
        metrics = compute_metrics(probe, source, self._test_images(), self._logits)
        if probe.train.multi_label:
            notes = [*notes, "several labels: no mixup, cutmix or label smoothing"]
        if not self.augments:
            notes = [*notes, "no RandAugment: it takes images of one or three channels"]
        paper, note = self._paper_accuracy()
        head = (["last epoch"], Choice(0, None, metrics))
        return make_result(
            probe,
            self,
            method,
            self.protocol(),
            *head,
            notes=[*notes, *note],
            paper=paper,
            selection="the last epoch",
            **more,
        )

    def _paper_accuracy(self) -> tuple[float | None, list[str]]:
        """The paper's accuracy if this run follows its recipe, else a note."""
        few = self.probe.subset
        published = few_labels_recipe(self.model) if few else FULL
        paper = published.paper.get(self.paper_name or "")
        if paper is None or self.probe.name != "imagenet1k":
            return None, []
        follows = self.recipe == published and self.batch_size == published.batch_size
        follows &= self.size == tuple(self.model.pretrained_cfg["input_size"][1:])
        if follows and (not few or len(self.probe.train) == _ONE_PERCENT):
            return paper, []
        return None, [f"the paper has {paper:g} % with another protocol: not comparable"]

    def _test_images(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.probe.in_order(self.probe.test, self.probe.test_rows, self.size)
        self.model.eval()
        for images, labels in self.probe.loaded(batches, range(len(batches))):
            yield images[: len(labels)], labels.to(self.device)

    def split(self, images: Tensor) -> Tensor:
        """The images, as `compute_metrics` asks for features."""
        return images

    def _logits(self, images: Any) -> list[Tensor]:
        with self.autocast:
            return [self.model(self._normalize(images))]

    def _normalize(self, pixels: Tensor) -> Tensor:
        images = pixels.to(self.device, non_blocking=True).float().div_(255)
        return images.sub_(self.mean).div_(self.std)


def _add_head(model: Any, num_classes: int, seed: int) -> None:
    """Give a timm model a classifier for `num_classes`, with small weights."""
    model.reset_classifier(num_classes)
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise SettingsError(f"{type(model).__name__} does not have one linear classifier")
    generator = torch_generator(seed, Stream.EVAL_INIT)
    with torch.no_grad():
        nn.init.trunc_normal_(head.weight, std=_HEAD_STD, generator=generator)
        nn.init.zeros_(head.bias)


def set_drop_path(model: Any, rate: float) -> None:
    """Set stochastic depth, from none in the first block to `rate` in the last."""
    for block, share in zip(model.blocks, np.linspace(0, rate, len(model.blocks)).tolist()):
        for name in [n for n, _ in block.named_children() if n.startswith("drop_path")]:
            setattr(block, name, DropPath(share) if share else nn.Identity())
