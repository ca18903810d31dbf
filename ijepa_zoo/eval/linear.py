"""Linear probes: heads on a frozen encoder, the best one chosen on held-out training images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from .features import Source
from .heads import Grid, HeadSpec, evaluate_heads, make_grid
from .models import Subject
from .probe import EvalConfig, Probe
from .results import Result
from .tasks import Task


def evaluate_linear(
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
    """Train linear heads on a frozen encoder with the protocol of the task, and test the best one.

    Heads with and without BatchNorm, on `last` and `last4`, for every learning rate and weight
    decay of the protocol, are trained at once on one pass of the encoder. The best one on a seeded
    10 % of the training images, which no head is fitted to, is tested on the test set once, and
    saved as a classifier in the folder of the result (`model`).

    The same call resumes after an interruption, at the last finished epoch, and returns the result
    at once if it is finished. Processes started by torchrun share the images of each batch and
    exchange their features, so heads and BatchNorm see whole batches.

    Args:
        task: See :class:`~ijepa_zoo.eval.probe.EvalConfig`, as `model`, `data` and `out`.
        model: See there.
        data: See there.
        out: See there.
        cached: Encode each image and its mirror image once, and train on these features.
        epochs: Default: those of the protocol.
        batch_size: Default: that of the protocol; learning rates grow linearly with it.
        lrs: Learning rates per 256 images; default: those of the protocol.
        wds: Weight decays; default: those of the protocol.
        options: Further fields of `EvalConfig`.

    Raises:
        DataError: The data cannot be used, or do not fit the task.
        SettingsError: An option or the model does not fit.
        RunError: Another process works on the same evaluation, or features are not finite.
    """
    return evaluate_heads(
        EvalConfig(task=task, model=model, data=data, out=out, **options),
        *("linear", None, linear_grid, epochs, batch_size, lrs, wds),
        cached=cached,
    )


def linear_grid(probe: Probe, source: Source) -> Grid:
    """Heads of every representation, with and without BatchNorm, for each rate and decay."""
    protocol = probe.protocol
    rates = protocol.lrs, protocol.weight_decays
    specs = [HeadSpec(*values) for values in product(source.widths, ("linear", "bn"), *rates)]
    return make_grid(specs, source.widths, probe.num_classes, protocol, probe.seed, source.device)
