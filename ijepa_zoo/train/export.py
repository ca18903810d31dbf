"""From a run's checkpoint to a folder that `create_model` loads."""

from __future__ import annotations

from pathlib import Path

import torch

from ..weights.export import export
from ..weights.layouts import CheckpointError, some
from .checkpoint import read_checkpoint
from .settings import parse
from .start import build_networks

_NETWORKS = ("encoder", "predictor", "target_encoder")


def export_run(
    run: str | Path,
    folder: str | Path | None = None,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write all three networks of a run, trained to its end or not, into a folder.

    Args:
        run: The run's folder.
        folder: Where to write; `RUN/export` by default.
        step: Which checkpoint; the newest by default.
        dtype: Store tensors in this data type; None keeps float32.
        license: Licence of the weights (SPDX), for the model card.
        overwrite: Replace an existing export.

    Returns:
        The folder, for `create_model("local-dir:FOLDER")`.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        FileExistsError: `folder` exists and `overwrite` is false.
    """
    run = Path(run)
    settings = run / "config.yaml"
    if not settings.is_file():
        found = some(path.name for path in run.iterdir()) if run.is_dir() else ""
        raise CheckpointError(
            f"{run} is no run of ijepa-zoo pretrain: it has no config.yaml but {found or 'nothing'}"
        )
    config = parse(settings.read_text(encoding="utf-8"), str(settings))
    checkpoints = run / "checkpoints"
    tensors, _ = read_checkpoint(checkpoints if step is None else checkpoints / f"step-{step:09d}")
    model = build_networks(config)
    for network in _NETWORKS:
        start = f"{network}."
        getattr(model, network).load_state_dict(
            {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        )
    target = run / "export" if folder is None else Path(folder)
    return export(model, target, dtype=dtype, license=license, overwrite=overwrite)
