"""`ijepa-zoo bench eval`: what the heads of a linear probe cost beside the encoder's pass."""

from __future__ import annotations

from itertools import product

import torch

from ..eval.heads import HeadGrid, HeadSpec
from ..eval.models import Subject
from ..eval.representations import BlockFeatures
from ..eval.tasks import find_task
from ..models.factory import create_model
from ..rendezvous import Place, choose_device
from .result import BenchResult
from .timing import OURS, Work, finish, take_turns, use_threads

HEADS = "heads"


def eval(
    *,
    model: str = "vit_base16_ijepa",
    task: str = "cifar100",
    classes: int | None = None,
    batch_size: int | None = None,
    images: int = 32,
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    seconds: float = 60.0,
    rounds: int = 30,
    progress: bool = False,
) -> BenchResult:
    """Time the encoder's pass over images, and an update of all heads of a linear probe.

    Args:
        model: Name of the model; its weights are random.
        task: Whose protocol gives the heads and the batch, see `find_task`.
        classes: Number of classes; None for the task's.
        batch_size: Images of an update of the heads; None for the protocol's.
        images: Images of the encoder's pass.
        precision: Of the encoder, see `evaluate_linear`.
        device: `auto`, `cpu`, `cuda`, ...
        threads: CPU threads; None for torch's own choice.
        seconds: Time for the rounds.
        rounds: Most rounds.
        progress: Show a progress bar.

    Returns:
        Times of both, and the heads' time per image as a share of the encoder's (`over_encoder`).

    Raises:
        ValueError: A setting does not fit.
        ProcessError: There is no such device.
    """
    settings = {name: value for name, value in locals().items() if name != "progress"}
    chosen = find_task(task)
    protocol, number = chosen.protocol, classes or chosen.num_classes
    if number is None:
        raise ValueError(f"task {task} has any number of classes: give classes, --classes N")
    if device != "auto":
        choose_device(device, Place())  # refuses what cannot be used
    batch = batch_size or protocol.batch_size
    with use_threads(threads):
        source = BlockFeatures(_subject(model), device=device, precision=precision)
        pixels = torch.randint(0, 256, (images, 3, *source.size), dtype=torch.uint8)
        rows = torch.randn(batch, source.row_width, device=source.device)
        labels = torch.randint(0, number, (batch,), device=source.device)
        specs = [
            HeadSpec(*values)
            for values in product(
                source.widths, (False, True), protocol.lrs, protocol.weight_decays
            )
        ]
        grid = HeadGrid(
            *(specs, source.widths, number),
            optimizer=protocol.optimizer,
            momentum=protocol.momentum,
            nesterov=protocol.nesterov,
            device=source.device,
        )

        def encode() -> None:
            list(source.encode([(pixels, [None] * images)]))
            finish(source.device)

        def update() -> None:
            grid.update(source.split(rows), labels, 1.0)
            finish(source.device)

        works: dict[str, Work] = {OURS: encode, HEADS: update}
        timings = take_turns(works, seconds=seconds, rounds=rounds, progress=progress, what="probe")
    encoder, heads = timings.summary(OURS), timings.summary(HEADS)
    share = (heads.median / batch) / (encoder.median / images)
    results = {
        OURS: {"seconds": encoder.as_json(), "images_per_second": images / encoder.median},
        HEADS: {
            "seconds": heads.as_json(),
            "images_per_second": batch / heads.median,
            "over_encoder": share,
        },
    }
    return BenchResult(
        "eval",
        settings,
        results,
        extra={"heads": len(specs), "batch": batch, "classes": number},
        resolved={"device": str(source.device), "precision": source.settings["precision"]},
    )


def _subject(model: str) -> Subject:
    return Subject(create_model(model, pretrained=False).eval(), model)
