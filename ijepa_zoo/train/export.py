"""From a run's checkpoint to a folder that `create_model` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..models.jepa import IJepa
from ..weights.export import export
from . import checkpoint_folder as layout
from .checkpoint import read_checkpoint
from .folder import read_settings
from .networks import build_networks

_NETWORKS = ("encoder", "predictor", "target_encoder")
_STEP = "export.step"  # beside `export`: which checkpoint it was made from


def exported_step(run: Path) -> int | None:
    """The step that `RUN/export` was made from; None where there is none, or nobody knows."""
    known = (run / "export" / "config.json").exists() and (run / _STEP).exists()
    text = (run / _STEP).read_text(encoding="utf-8", errors="replace") if known else ""
    return int(text) if text.isdecimal() else None


def load_run(run: str | Path, step: int | None = None) -> tuple[IJepa, str]:
    """Load the three networks of a pretraining run, finished or not.

    Args:
        run: Folder of the run.
        step: Which checkpoint; the newest by default.

    Returns:
        The networks on the CPU, in float32, and where their weights come from, for model cards.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or its weights are not finite.
        RunError: `run` is not a run, or its settings are damaged.
    """
    run = Path(run)
    config = read_settings(run)
    step = _find_step(run, step)
    checkpoint = layout.path(run / "checkpoints", step)
    only = tuple(f"{network}." for network in _NETWORKS)
    tensors, _ = read_checkpoint(checkpoint, only=only)
    model = build_networks(config)
    _fill(model, tensors, checkpoint)
    origin = f"a pretraining run of ijepa_zoo on {config.model.name}, after {step} steps"
    for network in ("encoder", "target_encoder"):
        encoder = getattr(model, network)
        encoder.weights_origin = f"{network.replace('_', ' ')} of {origin}"
        encoder.weights_network = network
    return model, origin


def export_run(
    run: str | Path,
    folder: str | Path | None = None,
    *,
    step: int | None = None,
    **options: Any,
) -> Path:
    """Export the networks of a pretraining run, finished or not.

    Args:
        run: Folder of the run.
        folder: Where to write; `RUN/export` by default.
        step: Which checkpoint; the newest by default.
        **options: Those of `ijepa_zoo.export`: to, network, dtype, license, overwrite, push_to, ...

    Returns:
        The folder, for `create_model("local-dir:FOLDER")`.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or its weights are not finite.
        RunError: `run` is not a run, its settings are damaged, or `folder` exists.
    """
    run = Path(run)
    step = _find_step(run, step)
    model, origin = load_run(run, step)
    target = run / "export" if folder is None else folder
    written = export(model, target, origin=origin, **options)
    if folder is None:
        (run / _STEP).write_text(str(step), encoding="utf-8")
    return written


def _find_step(run: Path, step: int | None) -> int:
    steps = layout.steps(run / "checkpoints")
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint yet" if step is None else f"checkpoint of step {step}"
        raise CheckpointError(f"{run} has no {wanted}: it has {steps or 'none'}")
    return steps[-1] if step is None else step


def _fill(model: IJepa, tensors: dict[str, torch.Tensor], origin: Path) -> None:
    own = {
        f"{network}.{name}": value
        for network in _NETWORKS
        for name, value in getattr(model, network).state_dict().items()
    }
    other = [
        name for name in own.keys() | tensors.keys() if _shape(own, name) != _shape(tensors, name)
    ]
    if other:
        raise CheckpointError(
            f"{origin} is not of the settings in config.yaml: {min(other)} is "
            f"{_shape(tensors, min(other))} there, {_shape(own, min(other))} by the settings"
        )
    ruined = [name for name, value in tensors.items() if not value.isfinite().all()]
    if ruined:
        raise CheckpointError(
            f"{origin}: the weights are not finite ({ruined[0]}): go back to an earlier checkpoint"
        )
    for name, value in own.items():
        value.copy_(tensors[name])


def _shape(tensors: dict[str, torch.Tensor], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None
