"""Linear probes: heads on a frozen encoder, the best one chosen on held-out training images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .accuracy import Metrics, compute_metrics
from .features import BlockFeatures, CachedLoader, Kind, OnlineLoader, Source
from .heads import Grid, HeadSpec, make_grid, train_and_choose
from .models import EvalModel
from .probe import HeadsConfig, Probe, epochs_note, evaluate, make_result, open_probe
from .results import Result
from .runs import run_once
from .saved_head import save_probe_head
from .tasks import Protocol, Task


def evaluate_linear(
    task: str | Task,
    model: str | nn.Module | EvalModel,
    data: Any,
    out: str | Path = "results",
    **options: Any,
) -> Result:
    """Train linear heads on a frozen encoder with the protocol of the task, and test the best one.

    Heads with and without BatchNorm, on `last` and `last4`, for every learning rate and weight
    decay of the protocol, are trained at once on one pass of the encoder. The best one on 10 % of
    the training images, held out by the seed, is tested once on the test set, and saved as a
    classifier in the folder of the result (`model`).

    The same call resumes after an interruption, at the last finished epoch, and returns the result
    at once if it is finished. Processes started by torchrun share the images of each batch and
    exchange their features, so heads and BatchNorm see whole batches.

    The arguments are fields of :class:`~ijepa_zoo.eval.probe.HeadsConfig`.

    Raises:
        DataError: The data cannot be used, or do not fit the task.
        SettingsError: An option or the model does not fit.
        RunError: Another process works on the same evaluation, or features are not finite.
    """
    config = HeadsConfig(task=task, model=model, data=data, out=out, **options)
    return evaluate_heads(config, "linear", None, linear_grid)


def linear_grid(probe: Probe, source: Source) -> Grid:
    """Heads of every representation, with and without BatchNorm, for each rate and decay."""
    protocol = probe.protocol
    rates = protocol.lrs, protocol.weight_decays
    specs = [HeadSpec(*values) for values in product(source.widths, ("linear", "bn"), *rates)]
    return make_grid(
        specs, source.widths, probe.num_classes, protocol, probe.config.seed, source.device
    )


def evaluate_heads(
    config: HeadsConfig,
    method: str,
    usual: Protocol | None,
    make: Callable[[Probe, Source], Grid],
    kind: Kind = "vectors",
) -> Result:
    """Train a grid of heads on features, choose one, test it and save it.

    `usual` replaces the protocol of the task, except for its transform.
    """
    loader_class = CachedLoader if config.cached else OnlineLoader

    def open_data(*args: Any) -> Probe:
        probe = open_probe(*args)
        own = probe.task.protocol
        protocol = own if usual is None else replace(usual, transform=own.transform)
        return replace(probe, protocol=config.change(protocol))

    def run(probe: Probe, source: Source) -> tuple[Result, Path]:
        transform = probe.protocol.transform
        protocol = {
            **asdict(probe.protocol),
            "features": loader_class.name,
            "train_transform": transform.describe(source.size, train=not config.cached),
            "test_transform": transform.describe(source.size, train=False),
        }

        def work(probe: Probe, folder: Path) -> Result:
            images = probe.protocol.epochs * len(probe.train_rows)
            images += len(probe.val_rows) + len(probe.test_rows)
            with probe.bar(images, f"{probe.name}, {source.about['name']}") as bar:
                loader = loader_class(probe, source, bar, gather=kind == "vectors")
                grid = make(probe, source)

                def measure(batches: Any, heads: Sequence[int]) -> Metrics:
                    def logits(features: dict[str, Tensor]) -> list[Tensor]:
                        return grid.outputs(features, heads)

                    return compute_metrics(probe, source, batches, logits)

                choice, trained = train_and_choose(probe, source, loader, grid, folder, measure)
            spec = grid.specs[choice.index]
            if isinstance(source, BlockFeatures):
                layers, head = spec.representation, grid.heads[choice.index]
                save_probe_head(probe, source, head, layers, folder, chosen=spec.name)
            used = {**protocol, "batch_size": loader.batch_size}
            usual_protocol = usual or probe.task.protocol
            paper, notes = _paper_accuracy(probe, source, usual_protocol, config.cached)
            return make_result(
                probe,
                source,
                method,
                used,
                grid.names,
                choice,
                paper=paper,
                notes=[*loader.notes, *notes],
                **trained,
            )

        return run_once(probe, source, f"{method}-{loader_class.name}", protocol, work)

    return evaluate(config, open_data, run, kind)


def _paper_accuracy(
    probe: Probe, source: Source, usual: Protocol, cached: bool
) -> tuple[float | None, list[str]]:
    """The paper's accuracy if this run follows its protocol, and notes on what differs."""
    paper = probe.task.paper.get(source.paper_name or "")
    notes = epochs_note(probe.protocol.epochs, usual.epochs)
    config = probe.config
    different = probe.protocol != probe.task.protocol or not len(probe.val_rows)
    different |= config.img_size is not None or config.pool != "auto"
    different |= config.value_range is not None or config.bands is not None
    different |= cached and probe.protocol.transform.crop_mode == "center"
    if paper is not None and different:
        notes.append(f"the paper has {paper:g} % with another protocol: not comparable")
    return (None if different else paper), notes
