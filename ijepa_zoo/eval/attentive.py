"""The attentive probe: a learned query pools the patch tokens of a frozen encoder.

From V-JEPA and V-JEPA 2 (`src/models/attentive_pooler.py`, `evals/image_classification_frozen`):
one query, one cross-attention block with its MLP, then a linear layer; AdamW; V-JEPA 2's grid of
20 heads (five learning rates, four weight decays) on one pass of the encoder, 20 epochs, a cosine
to 0 without warmup. From capi (`eval_classification.py`): random resized crops and flips instead
of AutoAugment and random erasing, no weight decay of biases, the head chosen on 10 % of the
training images. As in capi, rates are given per 256 images and grow with the batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.classifier import AttentiveHead
from ..seeds import Stream, fold
from .features import BlockFeatures, Source
from .feeds import CachedFeed, Feed, OnlineFeed
from .heads import Grid, HeadSpec, choose_and_test, train
from .models import Subject
from .probe import (
    EvalConfig,
    Probe,
    describe_protocol,
    evaluate,
    make_result,
    other_epochs,
    run_once,
    save_head,
    with_protocol,
)
from .results import Result
from .runs import EpochState
from .tasks import Protocol, Task, View

ATTENTIVE = Protocol(
    20,
    View("crop", "bicubic"),
    optimizer="adamw",
    lrs=(5e-3, 3e-3, 1e-3, 3e-4, 1e-4),
    weight_decays=(0.01, 0.1, 0.4, 0.8),
    schedule="cosine",
    floor=0.0,
    per_step=True,
)


def evaluate_attentive(
    task: str | Task,
    model: str | nn.Module | Subject,
    data: Any,
    out: str | Path = "results",
    *,
    cached: bool = False,
    epochs: int | None = None,
    batch_size: int | None = None,
    lrs: Sequence[float] | None = None,
    wds: Sequence[float] | None = None,
    **options: Any,
) -> Result:
    """Train attentive heads on the patch tokens of a frozen encoder, and test the best one.

    All heads of the grid are trained at once on one pass of the encoder. The best one on a seeded
    10 % of the training images, which no head is fitted to, is tested once, and saved as a
    classifier in the folder of the result (`model`). The same call resumes after an interruption,
    at the last finished epoch. Processes share the images of each batch and average gradients.

    Args:
        task: See :class:`~ijepa_zoo.eval.probe.EvalConfig`.
        model: See there.
        data: See there.
        out: See there.
        cached: Encode each image and its mirror image once, and train on these tokens. The files
            are large: 256 tokens of 1280 numbers are 655 kB per image in half precision.
        epochs: Default: 20.
        batch_size: Default: 256; learning rates grow linearly with it.
        lrs: Learning rates per 256 images.
        wds: Weight decays.
        options: Further fields of `EvalConfig`.

    Raises:
        DataError: The data cannot be used, or do not fit the task.
        SettingsError: An option or the model does not fit.
        RunError: Another process works on the same evaluation, or features are not finite.
    """

    def prepare(probe: Probe) -> Probe:
        usual = replace(ATTENTIVE, view=probe.task.protocol.view)
        return with_protocol(probe, usual, epochs, batch_size, lrs, wds)

    def run(probe: Probe, source: Source) -> tuple[Result, Path]:
        fed = CachedFeed if cached else OnlineFeed
        protocol = describe_protocol(probe, fed.name, source.size)

        def work(folder: Path, settings: dict[str, Any]) -> tuple[Result, float | None]:
            started = time.perf_counter()
            images = probe.protocol.epochs * len(probe.fit) + len(probe.choose) + len(probe.test)
            with probe.bar(images, f"{probe.task.name}, {source.about['name']}") as bar:
                feed = fed(probe, source, bar, gather=False)
                state = EpochState(folder / "state.pt", probe.distributed)
                result = _train(probe, source, feed, state, protocol, folder)
            if probe.distributed.is_main:
                state.remove()
            return result, feed.rate(time.perf_counter() - started)

        method = "attentive-cached" if cached else "attentive"
        return run_once(probe, source, method, protocol, work)

    config = EvalConfig(task=task, model=model, data=data, out=out, **options)
    return evaluate(config, run, patches=True, prepare=prepare)


def _train(
    probe: Probe,
    source: Source,
    feed: Feed,
    state: EpochState,
    protocol: dict[str, Any],
    folder: Path,
) -> Result:
    assert isinstance(source, BlockFeatures)
    grid = attentive_grid(probe, source)
    trained = train(probe, source, feed, grid, state)
    chosen, val, test, fitted = choose_and_test(probe, source, feed, grid)
    save_head(probe, source, grid.modules[chosen], "last", folder, chosen=grid.names[chosen])
    result = make_result(
        *(probe, source, "attentive", {**protocol, "batch_size": feed.batch_size}, grid.names),
        *(chosen, val, test, feed.broken, fitted),
        losses=trained.losses,
        notes=[*feed.notes, *other_epochs(probe.protocol.epochs, ATTENTIVE.epochs, "protocol")],
    )
    return replace(result, seconds=trained.earlier)


def attentive_grid(probe: Probe, source: BlockFeatures) -> Grid:
    """Heads of equal first weights for each rate and decay, with the encoder's attention heads."""
    block: Any = source.subject.model.blocks[-1]  # type: ignore[index]
    width, half = source.widths["patches"], source.settings["precision"] != "float32"
    heads: dict[HeadSpec, nn.Module] = {}
    groups = []
    for lr, wd in product(probe.protocol.lrs, probe.protocol.weight_decays):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(probe.seed, Stream.EVAL_INIT))
            head = AttentiveHead(width, probe.num_classes, block.attn.num_heads)
        heads[HeadSpec("patches", "attentive", lr, wd)] = head.to(source.device)
        decayed = [p for p in head.parameters() if p.ndim > 1]
        free = [p for p in head.parameters() if p.ndim == 1]
        rates = {"lr": lr, "base_lr": lr}
        groups.append({"params": decayed, **rates, "weight_decay": wd})
        groups.append({"params": free, **rates, "weight_decay": 0.0})
    autocast = torch.bfloat16 if half and source.device.type == "cuda" else None
    return Grid(heads, torch.optim.AdamW(groups), autocast)
