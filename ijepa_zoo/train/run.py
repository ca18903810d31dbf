"""A pretraining run: its folder, its start and end, stopping and going on.

The folder holds `config.yaml`, `checkpoints/step-*/`, `log.csv`, `events.jsonl`, `broken.jsonl`
and, in the end, `export/`, which `create_model("local-dir:RUN")` reads.
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.datasets import ImageDataset
from ..distributed import Distributed, init_distributed
from ..errors import SettingsError
from .checkpoint import Checkpoints
from .config import PretrainConfig, steps_of
from .data import open_training_images
from .export import export_run, exported_step
from .folder import claim_folder, settle_folder
from .loop import Loop
from .stopping import Interrupted, stop_signals
from .trainer import Trainer


def pretrain(
    config: PretrainConfig,
    data: Any,
    out: str | Path,
    *,
    init: str | Path | None = None,
    resume_optimizer: int | Literal["latest", "previous"] | None = None,
    resume_from: int | Literal["latest", "previous"] = "latest",
    skip_nonfinite: int = 0,
    progress: bool = True,
) -> Path:
    """Pretrain without labels, or go on with the run in `out`.

    The same call goes on after an interruption, with any number of processes: torchrun starts
    several, which share the work. SIGINT, SIGTERM and SIGUSR1 end the run after the current step,
    with a checkpoint.

    Args:
        config: Settings; see `load_config` for recipes.
        data: Images; see `open_images`.
        out: The run's folder; made if it does not exist.
        init: Weights to start from; see `build_networks`. Without effect on a run that goes on.
        resume_optimizer: Branch from the run in the folder `init`: start with the weights, the
            optimizer and the step of one of its checkpoints: `latest`, `previous` or a step.
            Settings may differ from those of that run, except the sizes of the networks. Without
            effect on a run that goes on.
        resume_from: Which checkpoint to go on from: `latest`, `previous` (the newest that is not
            damaged) or a step.
        skip_nonfinite: How many steps whose loss or gradient is not finite are left out before the
            run stops. Two in a row always stop it: then the weights are ruined.
        progress: Show a progress bar.

    Returns:
        The exported folder, for `create_model("local-dir:...")`.

    Raises:
        ValueError: Settings or images do not fit; what was wrong and what to write instead.
        RunError: The folder is in use, or belongs to a run of other settings or images.
        CheckpointError: The newest checkpoint is broken, or belongs to another run.
        NonFiniteLossError: Loss or gradient is not finite, more often than `skip_nonfinite`.
        Interrupted: The run was stopped and saved.
        OSError: A log or settings file could not be written; everything earlier is intact.
    """
    out = _own_folder(out, data)
    source = _branched_run(init) if resume_optimizer is not None else None
    with stop_signals() as received, ExitStack() as stack:
        runtime = config.runtime
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        distributed = stack.enter_context(init_distributed(runtime.device, runtime.timeout))
        claim_folder(out, distributed, stack)
        images = open_training_images(config, data, out / "shards.index")
        config = settle_folder(out, config, images, distributed, source)
        checkpoints = _checkpoints(out, config, images, distributed)
        step = checkpoints.choose(resume_from)
        if step is not None or source is not None:
            init = None
        trainer = Trainer(config, images, distributed, init=init)
        loop = Loop(trainer, checkpoints, out, skip_nonfinite, progress)
        if step is not None:
            loop.resume(step)
        elif source is not None and resume_optimizer is not None:
            loop.branch(source, resume_optimizer)
        with loop.finished_saves():
            loop.train(received)
        if trainer.step < trainer.schedule.steps:
            saved = f"saved in {out}" if trainer.step else "nothing is done yet"
            raise Interrupted(
                f"stopped after step {trainer.step} of {trainer.schedule.steps}, {saved}; "
                "run the same command again to go on",
                received[0] if received else signal.SIGTERM,
            )
        if distributed.rank == 0 and exported_step(out) != trainer.step:
            export_run(out, overwrite=True)
        distributed.barrier()
    return out / "export"


def _own_folder(out: str | Path, data: Any) -> Path:
    """The run's folder, which must not become a part of the data.

    Raises:
        ValueError: It would.
    """
    if not str(out):
        raise SettingsError("the run's folder has no name: give one, for example runs/first")
    out = Path(out)
    for given in data if isinstance(data, list | tuple) else [data]:
        if isinstance(given, str | os.PathLike) and Path(given).resolve() in out.resolve().parents:
            raise SettingsError(
                f"the run's folder {out} lies in the data {given}, whose images would change: "
                "choose another"
            )
    return out


def _branched_run(init: str | Path | None) -> Path:
    """The folder of the run that `init` names.

    Raises:
        SettingsError: It names none.
    """
    if init is None:
        raise SettingsError("--resume-optimizer continues a run: name its folder, --init RUN")
    return Path(str(init).removeprefix("local-dir:"))


def _checkpoints(
    out: Path, config: PretrainConfig, images: ImageDataset, distributed: Distributed
) -> Checkpoints:
    log, count = config.log, len(images) - config.data.held_out
    sizes = {"batch_size": config.optim.batch_size, "images": count}
    keep_every = max(1, steps_of(log.keep_every, **sizes)) if log.keep_every else None
    return Checkpoints(out / "checkpoints", distributed, log.keep, keep_every)
