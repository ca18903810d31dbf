"""A pretraining run from start to end: resuming, the loop over steps, signals, the export.

The folder of a run has `config.yaml`, `checkpoints/step-*/`, `log.csv` and, at the end, `export/`,
which `create_model("local-dir:RUN")` opens.
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from ..distributed import init_distributed
from ..errors import CheckpointError, DataError, RunError, SettingsError
from ..progress import progress_bar
from .checkpoint import (
    CheckpointManager,
    ResumeFrom,
    checkpoint_path,
    checkpoint_steps,
    select_checkpoint,
    split_checkpoint,
)
from .config import PretrainConfig, steps_of
from .data import open_training_images
from .export import export_run
from .flops import flops_per_image, peak_flops
from .folder import check_run, open_folder, write_settings
from .logger import Meter, RunLogger, check_log_targets, read_log
from .monitor import CollapseWatch, Monitor
from .optim import total_norm
from .trainer import NonFiniteLossError, Trainer

_SIGNALS = [  # Windows has no SIGUSR1
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]
_NAMED = 10  # broken images that a process names
_BAR = {"loss": "loss", "rank": "rankme", "images/s": "images_per_second"}


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop by `signal` (SIGTERM: another process was), and saved its state."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def pretrain(
    config: PretrainConfig,
    data: Any,
    out: str | Path,
    *,
    init: str | Path | None = None,
    resume_optimizer: bool = False,
    resume_from: ResumeFrom = "latest",
    progress: bool = True,
) -> Path:
    """Pretrain without labels, or resume the run in `out`.

    The same call resumes after an interruption, with any number of processes: torchrun starts
    several. SIGINT, SIGTERM and SIGUSR1 end the run after the current step, with a checkpoint.

    Args:
        config: Settings; see `load_config` for recipes.
        data: Images; see `open_images`.
        out: The run's folder; created if it does not exist.
        init: Weights to start from; see `build_networks`. Not used when the run resumes.
        resume_optimizer: Branch from another run: start with the weights, the optimizer and the
            step of its latest checkpoint (`init` is the run's folder), or of another one (`init` is
            `RUN/checkpoints/step-000000500`). Settings may differ from those of that run, except
            the sizes of the networks. Not used when the run resumes.
        resume_from: Which checkpoint to resume from: `latest`, `previous` (the newest that is not
            damaged) or a step.
        progress: Show a progress bar.

    Returns:
        The exported folder, for `create_model("local-dir:...")`.

    Raises:
        SettingsError: Settings or images do not fit.
        RunError: The folder is in use, or has a run of other settings or images.
        CheckpointError: A checkpoint is damaged, or has other networks.
        NonFiniteLossError: Loss, gradient or weights are not finite.
        Interrupted: The run was stopped and saved.
    """
    check_log_targets(config.log)
    if resume_optimizer and init is None:
        raise SettingsError("--resume-optimizer continues a run: name its folder with --init RUN")
    with stop_signals() as received, ExitStack() as stack:
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        distributed = stack.enter_context(
            init_distributed(config.runtime.device, config.runtime.timeout)
        )
        out = open_folder(out, data, distributed, stack)
        images = open_training_images(config, data)
        config = distributed.run_on_main(lambda: check_run(out, config, distributed.device))
        step = distributed.run_on_main(lambda: select_checkpoint(out / "checkpoints", resume_from))
        fresh = step is None and not resume_optimizer
        trainer = Trainer(config, images, distributed, init=init if fresh else None)
        loop = Loop(trainer, out, progress)
        distributed.run_on_main(lambda: write_settings(out, config))
        if step is not None:
            loop.resume(step)
        elif init is not None and resume_optimizer:
            loop.branch(Path(str(init).removeprefix("local-dir:")))
        loop.train(received)
        if trainer.step < trainer.schedule.steps:
            raise Interrupted(
                f"stopped after step {trainer.step} of {trainer.schedule.steps}, saved in {out}; "
                "run the same command again to resume",
                received[0] if received else signal.SIGTERM,
            )
        if distributed.is_main and not _is_exported(out, trainer.step):
            for unfinished in out.glob(".export.*"):  # what a crash left behind
                shutil.rmtree(unfinished)
            export_run(out, overwrite=True)
        distributed.barrier()
    return out / "export"


class Loop:
    """The loop of one process over the steps, with checkpoints, monitors and the log."""

    def __init__(self, trainer: Trainer, out: Path, progress: bool) -> None:
        self.trainer, self.out = trainer, out
        self.distributed, self.config = trainer.distributed, trainer.config
        log, images = self.config.log, trainer.images
        keep_every = self._duration(log.keep_every) if log.keep_every else None
        folder = out / "checkpoints"
        self.checkpoints = CheckpointManager(folder, self.distributed, log.keep, keep_every)
        # Saved beside the tensors: number of broken images, metrics at initialization, data.
        self.extra: dict[str, Any] = {
            "broken": 0,
            "initial": {},
            "images": len(images),
            "fingerprint": self.distributed.run_on_main(images.fingerprint),
        }
        self.saved = 0
        self.named: set[str] = set()  # broken images
        self.progress = progress and self.distributed.is_main

    def resume(self, step: int) -> None:
        """Load a checkpoint of this run that was verified."""
        loaded = self.checkpoints.load(step, self.trainer.tensors())
        if loaded["fingerprint"] != self.extra["fingerprint"]:
            raise RunError(
                f"{self.out} was trained on other images ({loaded['images']} then, "
                f"{self.extra['images']} now, or other names): use the same images to resume it, "
                "or another folder for a new run"
            )
        self.extra = loaded
        self.checkpoints.delete_after(step)
        self.trainer.step = self.saved = step
        finished = step >= self.trainer.schedule.steps
        self._print(f"{self.out} is finished" if finished else f"resuming after step {step}")

    def branch(self, source: Path) -> None:
        """Load a checkpoint of another run, which becomes the first checkpoint of this one."""
        folder, which = split_checkpoint(source)
        step = self.distributed.run_on_main(lambda: select_checkpoint(folder, which))
        if step is None:
            raise CheckpointError(
                f"{source} has no checkpoints to continue: leave out --resume-optimizer to start "
                "from its exported weights"
            )
        if step >= self.trainer.schedule.steps:
            raise SettingsError(
                f"optim.duration={self.config.optim.duration} ends before or at step {step}, from "
                f"which {source} is continued: use a longer one, or an earlier checkpoint"
            )
        loaded = self.checkpoints.load(step, self.trainer.tensors(), folder)
        if loaded["fingerprint"] == self.extra["fingerprint"]:
            self.extra["initial"] = loaded["initial"]
        self.trainer.step = step
        self._save()
        self.checkpoints.wait()
        self._print(f"continuing {source} after step {step}")

    def train(self, received: list[int]) -> None:
        """Train until the last step, or until some process has received a signal to stop."""
        trainer, steps = self.trainer, self.trainer.schedule.steps
        if trainer.step >= steps:
            return
        self._print(str(trainer))
        monitor, broken = trainer.monitor()
        for name, reason in broken[:_NAMED]:
            self._warn(f"broken image of the monitors: {name}: {reason}")
        with self._finished_saves(), ExitStack() as stack:
            logger = None
            if self.distributed.is_main:
                logger = stack.enter_context(RunLogger(self.out, trainer.step, self.config))
            if trainer.step == 0:
                self.extra["initial"] = monitor.measure(trainer.model, self.distributed)
            if logger is not None and self.extra["initial"] and not read_log(self.out):
                logger.initial(self.extra["initial"])
            bar = progress_bar(self.progress, steps, self.out.name, "step", trainer.step)
            metrics = self._steps(received, monitor, logger, stack.enter_context(bar))
            if logger is not None and trainer.step == steps:
                logger.final(metrics, self.extra["initial"])
        if self.saved != trainer.step:
            self._save()
        self.checkpoints.wait()

    @contextmanager
    def _finished_saves(self) -> Iterator[None]:
        """After an error wait for the running save, unless other processes may be lost."""
        try:
            yield
        except BaseException:
            if self.distributed.world_size == 1:
                self.checkpoints.wait()
            raise

    def _steps(
        self, received: list[int], monitor: Monitor, logger: RunLogger | None, bar: Any
    ) -> dict[str, float]:
        """Do the remaining steps; return the last metrics of the monitor."""
        trainer, every = self.trainer, self.config.log
        save_every, keep_every = self._duration(every.save_every), self.checkpoints.keep_every
        watch = CollapseWatch(self.extra["initial"])
        if logger is not None:
            watch.replay(read_log(self.out))
        meter = self._meter()
        measured: dict[str, float] = {}
        shown: dict[str, str] = {}
        batches = trainer.batches()
        while trainer.step < trainer.schedule.steps:
            started = time.perf_counter()
            micro_batches = next(batches)
            waited = time.perf_counter() - started
            for name, reason in (broken for batch in micro_batches for broken in batch.broken):
                if name not in self.named and len(self.named) < _NAMED:
                    self.named.add(name)
                    self._warn(f"broken image: {name}: {reason}")
            result = trainer.train_step(micro_batches, bool(received))
            meter.update(result.metrics, time.perf_counter() - started, waited)
            self._check_broken(result.broken)
            bar.update()
            step, last = trainer.step, trainer.step == trainer.schedule.steps
            row = meter.row(step) if step % every.log_every == 0 or last else {}
            if step % every.monitor_every == 0 or last:
                measured = monitor.measure(trainer.model, self.distributed)
                row = (row or meter.row(step)) | measured
            if row and logger is not None:
                logger.write(row | {"broken": self.extra["broken"]})
                if warning := watch.update(step, row):
                    self._print(f"warning: {warning}")
                shown |= {name: f"{row[key]:.4g}" for name, key in _BAR.items() if key in row}
                bar.set_postfix(shown, refresh=False)
            if step % save_every == 0 or (keep_every and step % keep_every == 0):
                self._save()
            if result.stop:
                break
        return measured

    def _save(self) -> None:
        trainer = self.trainer
        if not math.isfinite(total_norm(trainer.model.parameters())):
            raise NonFiniteLossError(
                f"the weights are not finite after step {trainer.step} and were not saved: start "
                f"again with a lower optim.lr; steps {checkpoint_steps(self.checkpoints.folder)} "
                "are saved"
            )
        self.checkpoints.save(trainer.step, trainer.tensors(), self.extra)
        self.saved = trainer.step

    def _duration(self, text: str) -> int:
        images = len(self.trainer.train_indices)
        return max(1, steps_of(text, batch_size=self.config.optim.batch_size, images=images))

    def _meter(self) -> Meter:
        optim, epoch_steps = self.config.optim, self.trainer.schedule.epoch_steps
        peak = peak_flops(self.distributed.device, optim.precision)
        rate = peak and peak * self.distributed.world_size / flops_per_image(self.config)
        return Meter(optim.batch_size, epoch_steps, rate)

    def _check_broken(self, broken: int) -> None:
        """Stop when too many images cannot be decoded; the first epoch counts as a whole."""
        self.extra["broken"] += broken
        trainer, total = self.trainer, self.extra["broken"]
        read = max(trainer.step * self.config.optim.batch_size, len(trainer.train_indices))
        if broken and total > self.config.data.max_broken * read:
            raise DataError(
                f"{total} images could not be decoded until step {trainer.step}, more than "
                f"data.max_broken={self.config.data.max_broken:g} of {read}: repair or remove "
                "them (the first ones are named in the log of each process), or allow more with "
                "data.max_broken="
                f"{min(1.0, 2 * total / read):.2g}"
            )

    @staticmethod
    def _warn(text: str) -> None:
        """Write to stderr, in every process; names may hold bytes that are not UTF-8."""
        tqdm.write(text.encode(errors="backslashreplace").decode(), file=sys.stderr)

    def _print(self, text: str) -> None:
        if self.distributed.is_main:
            tqdm.write(text, file=sys.stderr)


def _is_exported(out: Path, step: int) -> bool:
    """Whether the export is of this step, by the source that it names, and of this checkpoint."""
    exported, checkpoint = out / "export", checkpoint_path(out / "checkpoints", step)
    if not exported.exists() or exported.stat().st_mtime < checkpoint.stat().st_mtime:
        return False
    files = [exported / name for name in ("config.json", "README.md")]
    return any(f"after {step} steps" in f.read_text("utf-8") for f in files if f.exists())


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect stop signals instead of ending during a step; a second Ctrl-C raises."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers
        yield received
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt(
                "stopped without saving; the same command resumes from the last checkpoint"
            )
        received.append(number)

    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
