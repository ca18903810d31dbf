"""A pretraining run: its folder, the loop over steps, stopping and going on.

The folder holds `config.yaml`, `checkpoints/step-*/`, `log.csv`, `log.jsonl`, `broken.jsonl` and,
in the end, `export/`, which `create_model("local-dir:RUN")` reads.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tqdm import tqdm

from ..data.image_sets import open_images
from ..data.images import ImageError
from ..processes import join_processes
from .batches import Batch
from .checkpoint import Checkpoints
from .config import PretrainConfig, steps_of
from .export import export_run
from .folder import claim_folder, settle_folder
from .log import RunLog, read_log
from .monitor import Monitor, gradient_norms, update_norms
from .settings import check
from .trainer import NonFiniteLossError, Trainer, Update
from .watch import CollapseWatch

_BAR = {"loss": "loss", "rank": "rankme", "images/s": "images_per_second"}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved its state.

    Attributes:
        signal: The signal that asked; SIGTERM where another process received it.
    """

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
        resume_optimizer: Take the optimizer's state from `init` too.
        resume_from: Which checkpoint to go on from: `latest`, `previous` (the last good one before
            it) or a step.
        skip_nonfinite: How many steps whose loss is not finite are left out before the run stops.
        progress: Show a progress bar.

    Returns:
        The exported folder, for `create_model("local-dir:...")`.

    Raises:
        ValueError: Settings or images do not fit; what was wrong and what to write instead.
        CheckpointError: The newest checkpoint is broken, or belongs to another run.
        NonFiniteLossError: The loss is not finite, more often than `skip_nonfinite`.
        Interrupted: The run was stopped and saved.
        OSError: A file could not be written; everything earlier is intact.
    """
    check(config)
    out = Path(out)
    machine = config.machine
    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(machine.device, machine.timeout))
        claim_folder(out, processes, stack)
        in_chans = config.model.in_chans or 3
        images = open_images(data, in_chans=in_chans, index=out / "shards.index")
        settle_folder(out, config, images, processes)
        trainer = Trainer(config, images, processes, init=init, resume_optimizer=resume_optimizer)
        run = _Run(trainer, out, skip_nonfinite, progress)
        run.resume(resume_from)
        with _stop_signals() as received, run.finished_saves():
            run.train(received)
        if trainer.step < trainer.schedule.steps:
            raise Interrupted(
                f"stopped after step {trainer.step} of {trainer.schedule.steps}, saved in {out}; "
                "run the same command again to go on",
                received[0] if received else signal.SIGTERM,
            )
        if processes.rank == 0 and run.updated:
            export_run(out, overwrite=True)
        processes.barrier("the export of rank 0")
    return out / "export"


@dataclass(frozen=True)
class _Watching:
    """What looks at the run while it goes on; only rank 0 has a log."""

    monitor: Monitor
    watch: CollapseWatch
    log: RunLog | None
    bar: Any


class _Run:
    """The loop of one process: trainer, checkpoints, monitors and log."""

    def __init__(self, trainer: Trainer, out: Path, skip_nonfinite: int, progress: bool) -> None:
        self.trainer, self.out, self.progress = trainer, out, progress
        self.processes = trainer.processes
        self.first = self.processes.rank == 0
        self.skip_nonfinite = skip_nonfinite
        log, optim = trainer.config.log, trainer.config.optim
        sizes = {"batch_size": optim.batch_size, "images": len(trainer.train_indices)}
        self.save_every = max(1, steps_of(log.save_every, **sizes))
        keep_every = max(1, steps_of(log.keep_every, **sizes)) if log.keep_every else None
        self.checkpoints = Checkpoints(out / "checkpoints", self.processes, log.keep, keep_every)
        self.about: dict[str, Any] = {"skipped": [], "broken": 0, "initial": {}}
        self.updated = False
        self.saved = -1
        self.named: set[str] = set()
        self.shown: dict[str, str] = {}

    def resume(self, resume_from: int | Literal["latest", "previous"]) -> None:
        """Load the chosen checkpoint, if there is one."""
        step = self.checkpoints.choose(resume_from)
        if step is None:
            self.updated = True
            return
        self.about = self.checkpoints.load(step, self.trainer.tensors())
        self.trainer.step = self.saved = step
        self.updated = not (self.out / "export").exists()

    @contextmanager
    def finished_saves(self) -> Iterator[None]:
        """An error leaves no save behind; with others, who may be lost, the program's end waits."""
        try:
            yield
        except BaseException:
            if self.processes.world == 1:
                self.checkpoints.wait()
            raise

    def train(self, received: list[int]) -> None:
        """Update until the last step, or until a process is asked to stop."""
        trainer = self.trainer
        steps = trainer.schedule.steps
        if trainer.step >= steps:
            return
        self.updated = True
        monitor, broken = trainer.monitor()
        if self.first:
            self._note_broken(broken)
        with ExitStack() as stack:
            log = stack.enter_context(self._log())
            if trainer.step == 0:
                self.about["initial"] = monitor.measure(trainer.model, self.processes)
                self._event(log, "initial", json.dumps(self.about["initial"]))
            watch = CollapseWatch(self.about["initial"])
            if self.first:
                watch.replay(read_log(self.out))
            bar = stack.enter_context(
                tqdm(
                    total=steps,
                    initial=trainer.step,
                    unit="step",
                    disable=not (self.progress and self.first),
                )
            )
            bar.set_description(self.out.name)
            self._loop(received, _Watching(monitor, watch, log, bar))
        if self.saved != trainer.step:
            self._save()
        self.checkpoints.wait()

    def _loop(self, received: list[int], watching: _Watching) -> None:
        trainer, log = self.trainer, self.trainer.config.log
        started = time.perf_counter()
        for batches in trainer.batches():
            self._note_broken([found for batch in batches for found in batch.broken])
            update = self._update(batches, bool(received), watching)
            if update is None:
                continue
            seconds = time.perf_counter() - started
            step, last = trainer.step, trainer.step == trainer.schedule.steps
            self._check_broken(update.broken)
            row = {"step": step - 1.0, **update.figures}
            if step % log.log_every == 0 or last:
                row |= gradient_norms(trainer.model)
                row |= update_norms(trainer.model, trainer.optimizer)
            if step % log.monitor_every == 0 or last:
                row |= watching.monitor.measure(trainer.model, self.processes)
            self._write(row, seconds, watching)
            if step % self.save_every == 0:
                self._save()
            if update.stop:
                return
            started = time.perf_counter()

    def _update(self, batches: list[Batch], stop: bool, watching: _Watching) -> Update | None:
        """One update, or None where its loss is not finite and it may be left out."""
        trainer = self.trainer
        try:
            return trainer.update(batches, stop)
        except NonFiniteLossError as error:
            if len(self.about["skipped"]) >= self.skip_nonfinite:
                raise
            self.about["skipped"].append(trainer.step)
            self._event(watching.log, "skipped", str(error))
            trainer.step += 1
            watching.bar.update()
            return None

    def _save(self) -> None:
        trainer = self.trainer
        self.checkpoints.save(trainer.step, trainer.tensors(), self.about)
        self.saved = trainer.step

    def _log(self) -> RunLog | nullcontext[None]:
        return RunLog(self.out, self.trainer.step) if self.first else nullcontext()

    def _write(self, row: dict[str, float], seconds: float, watching: _Watching) -> None:
        """Log the row where it is due, warn, and move the progress bar."""
        config, step = self.trainer.config, self.trainer.step
        steps = self.trainer.schedule.epoch_steps
        row |= {
            "epoch": (step - 1) // steps + 1.0,
            "itr": (step - 1.0) % steps,
            "time (ms)": 1000 * seconds,
            "images_per_second": config.optim.batch_size / seconds,
        }
        if watching.log is None:
            return
        if step % config.log.log_every == 0 or "rankme" in row:
            watching.log.write(row)
            for warning in watching.watch.update(step - 1, row):
                watching.log.event(step - 1, "warning", warning)
        self.shown |= {name: f"{row[key]:.4g}" for name, key in _BAR.items() if key in row}
        watching.bar.set_postfix(self.shown, refresh=False)
        watching.bar.update()

    def _event(self, log: RunLog | None, kind: str, text: str) -> None:
        if log is not None:
            log.event(self.trainer.step, kind, text)

    def _check_broken(self, broken: int) -> None:
        """Stop when too many images cannot be decoded; the first epoch counts as a whole."""
        self.about["broken"] += broken
        trainer = self.trainer
        wanted = max(trainer.step * trainer.config.optim.batch_size, len(trainer.train_indices))
        if broken and self.about["broken"] > trainer.config.data.max_broken * wanted:
            raise ImageError(
                f"{self.about['broken']} images could not be decoded until step {trainer.step}, "
                f"more than data.max_broken={trainer.config.data.max_broken:g} of {wanted}: "
                f"{self.out}/broken-*.jsonl names them. Mend or remove them, or allow more"
            )

    def _note_broken(self, broken: list[tuple[str, str]]) -> None:
        """Name every broken image of this process once."""
        path = self.out / f"broken-{self.processes.rank}.jsonl"
        for name, reason in broken:
            if name not in self.named:
                self.named.add(name)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"image": name, "reason": reason}) + "\n")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect stop signals instead of ending in the middle of an update; a second Ctrl-C ends it.

    Outside the main thread, where Python allows no handlers, signals keep their meaning.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt("stopped without saving")
        received.append(number)

    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
