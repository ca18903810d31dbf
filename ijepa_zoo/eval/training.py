"""Training the heads of a probe and measuring them; goes on after an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, product

import torch
from torch import Tensor

from ..errors import RunError
from ..progress import skip
from .epoch_state import EpochState, checked_losses
from .feeds import Feed, Labelled
from .heads import HeadGrid, HeadSpec
from .notes import of_all_processes
from .probe import Probe
from .representations import Representations


@dataclass(frozen=True)
class Trained:
    """The heads after the last epoch.

    Attributes:
        grid: The heads.
        losses: `[H]`, mean training loss of the last epoch.
        earlier: Seconds that earlier sessions took.
    """

    grid: HeadGrid
    losses: list[float]
    earlier: float


def grid_of(probe: Probe, source: Representations) -> HeadGrid:
    """Heads of every representation, with and without BatchNorm, for each rate and decay."""
    protocol = probe.protocol
    specs = [
        HeadSpec(representation, batch_norm, lr, weight_decay)
        for representation, batch_norm, lr, weight_decay in product(
            source.widths, (False, True), protocol.lrs, protocol.weight_decays
        )
    ]
    return HeadGrid(
        specs,
        source.widths,
        len(probe.train.classes),
        optimizer=protocol.optimizer,
        momentum=protocol.momentum,
        nesterov=protocol.nesterov,
        seed=probe.seed,
        device=source.device,
        total=probe.distributed.all_reduce if probe.distributed.world_size > 1 else None,
    )


def train(probe: Probe, source: Representations, feed: Feed, state: EpochState) -> Trained:
    """Train all heads; the state is kept after every epoch.

    Args:
        probe: Data and protocol.
        source: The frozen encoder.
        feed: Its features.
        state: Where the state of an unfinished run is, and is written to.

    Raises:
        ValueError: Features are not finite.
        RunError: The state is damaged, or of other settings.
    """
    grid, losses, earlier, done = grid_of(probe, source), [0.0], 0.0, 0
    started = time.perf_counter()
    if (found := state.load(probe.protocol.epochs)) is not None:
        with state.restoring():
            grid.load_state_dict(found["grid"])
            losses = checked_losses(found["losses"], len(grid.specs))
        done, earlier = found["epoch"], found["seconds"]
        feed.recall(found["broken"])
    protocol, epochs = probe.protocol, probe.protocol.epochs
    if probe.distributed.broadcast_object(done) != done:  # also: nobody writes while others read
        raise RunError(
            f"process {probe.distributed.rank} finds {done} finished epochs in '{state.path}', and "
            "process 0 others: the folder must be one that all machines see"
        )
    skip(feed.bar, done * feed.steps * feed.batch_size)
    steps = feed.training(done, epochs)
    for epoch in range(done, epochs):
        scale = protocol.lr_scale(epoch, feed.batch_size)
        total = torch.zeros(len(grid.specs), device=source.device)
        for rows, labels in islice(steps, feed.steps):
            total += grid.update(source.split(rows), labels, scale)
        losses = (total / feed.steps).tolist()
        feed.bar.set_postfix(
            epoch=f"{epoch + 1}/{epochs}", loss=f"{min(losses):.3g}", refresh=False
        )
        broken = of_all_processes(feed.broken, probe.distributed)
        if probe.distributed.rank == 0:
            seconds = earlier + time.perf_counter() - started
            kept = {"epoch": epoch + 1, "losses": losses, "seconds": seconds, "broken": broken}
            state.save({**kept, "grid": grid.state_dict()})
    return Trained(grid, losses, earlier)


def count_right(
    probe: Probe,
    source: Representations,
    batches: Iterator[Labelled],
    grid: HeadGrid,
    only: int | None = None,
) -> tuple[list[int], int]:
    """Right answers of all heads or of one, and images, of all processes.

    Args:
        probe: Data and processes.
        source: What the rows are of.
        batches: Rows and classes.
        grid: The heads.
        only: Number of the one head that answers; None for all.
    """
    count = grid.correct if only is None else _single(grid, only)
    right = torch.zeros(len(grid.specs) if only is None else 1, dtype=torch.int64)
    images = 0
    for rows, labels in batches:
        right += count(source.split(rows), labels).cpu()
        images += len(labels)
    found = probe.distributed.all_reduce(torch.cat([right, torch.tensor([images])]))
    *counts, total = found.tolist()
    return counts, total


def _single(grid: HeadGrid, index: int) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    head, representation = grid.head(index), grid.specs[index].representation

    @torch.inference_mode()
    def count(features: dict[str, Tensor], labels: Tensor) -> Tensor:
        best = head(features[representation]).max(dim=1)
        # nothing is right where a head has diverged
        return ((best.indices == labels) & ~best.values.isnan()).sum().reshape(1)

    return count
