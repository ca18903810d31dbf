"""Export the networks of a run's checkpoint to a folder that `create_model` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, some
from ..models.jepa import IJepa
from ..weights.export import export
from .checkpoint import checkpoint_path, checkpoint_steps, read_checkpoint, verify
from .folder import read_settings
from .networks import build_networks


def load_run(run: str | Path, step: int | None = None) -> tuple[IJepa, str]:
    """Load the three networks of a pretraining run, finished or not, in float32 on the CPU.

    Args:
        run: Folder of the run.
        step: Step of the checkpoint; the newest by default.

    Returns:
        The networks, and where their weights come from, for model cards.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or its weights are not finite.
        RunError: `run` is not a run, or its settings are damaged.
    """
    run = Path(run)
    config = read_settings(run)
    steps = checkpoint_steps(run / "checkpoints")
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint yet" if step is None else f"checkpoint of step {step}"
        raise CheckpointError(f"{run} has no {wanted}: it has {steps or 'none'}")
    step = steps[-1] if step is None else step
    checkpoint = checkpoint_path(run / "checkpoints", step)
    with torch.device("meta"):
        model = build_networks(config)
    verify(checkpoint)
    tensors = model.to_empty(device="cpu").state_dict()
    read_checkpoint(checkpoint, tensors)
    if ruined := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{checkpoint} has weights that are not finite: {some(ruined)}")
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
        step: Step of the checkpoint; the newest by default.
        **options: Those of `ijepa_zoo.export`: to, network, dtype, license, overwrite.

    Returns:
        The folder, for `create_model("local-dir:FOLDER")`.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or its weights are not finite.
        RunError: `run` is not a run, its settings are damaged, or `folder` exists.
    """
    model, origin = load_run(run, step)
    target = Path(run) / "export" if folder is None else folder
    return export(model, target, origin=origin, **options)
