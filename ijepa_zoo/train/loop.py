"""The steps of one process: updates, checkpoints, monitors and the log."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from ..errors import CheckpointError, ImageError, SettingsError
from ..progress import progress_bar
from .checkpoint import Checkpoints
from .config import steps_of
from .data import Batch
from .flops import peak_flops, training_flops
from .folder import named_broken
from .logger import Meter, RunLogger, read_log
from .monitor import CollapseWatch, Monitor, total_norm, update_norms
from .trainer import NonFiniteLossError, Trainer, Update

_NAMED = 10  # broken images shown; the file has all
_BAR = {"loss": "loss", "rank": "rankme", "images/s": "images_per_second"}


@dataclass(frozen=True)
class _Watching:
    """What looks at the run while it goes on; only rank 0 has a log."""

    monitor: Monitor
    watch: CollapseWatch
    log: RunLogger | None
    meter: Meter
    bar: Any


class Loop:
    """The loop of one process: trainer, checkpoints, monitors and log.

    Args:
        trainer: Makes the updates.
        checkpoints: Where they are saved.
        out: The run's folder.
        skip_nonfinite: See `pretrain`.
        progress: Show a progress bar.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        out: Path,
        skip_nonfinite: int,
        progress: bool,
    ) -> None:
        self.trainer, self.checkpoints, self.out = trainer, checkpoints, out
        self.progress = progress
        self.distributed = trainer.distributed
        self.first = self.distributed.rank == 0
        self.skip_nonfinite = skip_nonfinite
        config = trainer.config
        sizes = {"batch_size": config.optim.batch_size, "images": len(trainer.train_indices)}
        self.save_every = max(1, steps_of(config.log.save_every, **sizes))
        self.about: dict[str, Any] = {"skipped": [], "broken": 0, "initial": {}}
        self.saved = 0
        self.broken_file = out / f"broken-{self.distributed.rank}.jsonl"
        self.named = named_broken(self.broken_file)
        self.shown: dict[str, str] = {}
        self.measured: dict[str, float] = {}

    def resume(self, step: int) -> None:
        """Load a checkpoint; the log of steps that are to be done again is kept beside the new."""
        newest = self.checkpoints.complete()[-1]
        log = self.out / "log.csv"
        if self.first and step < newest and log.exists():
            shutil.copyfile(log, log.with_name(f"log.until-{newest}.csv"))
        self.about = self.checkpoints.load(step, self.trainer.tensors())
        self.trainer.step = self.saved = step
        if step >= self.trainer.schedule.steps:
            self._say(f"{self.out} is finished: {step} steps are done")
        else:
            self._say(f"going on after step {step}, saved in {self.checkpoints.folder}")

    def branch(self, source: Path, resume_from: int | Literal["latest", "previous"]) -> None:
        """Continue a checkpoint of another run, which becomes the first checkpoint of this one.

        Args:
            source: Folder of the other run.
            resume_from: Which of its checkpoints, see `Checkpoints.choose`.

        Raises:
            CheckpointError: There is none, it is damaged, or it is of other networks.
            SettingsError: The checkpoint is not before the end of this run.
        """
        checkpoints = Checkpoints(source / "checkpoints", self.distributed)
        step = checkpoints.choose(resume_from)
        if step is None:
            raise CheckpointError(
                f"{source} has no checkpoints to continue: leave out --resume-optimizer to start "
                "from its exported weights"
            )
        optim = self.trainer.config.optim
        if step >= self.trainer.schedule.steps:
            raise SettingsError(
                f"optim.duration={optim.duration} ends before or at step {step}, from which "
                f"{source} is continued: use a longer one, or an earlier checkpoint"
            )
        self.about = checkpoints.load(step, self.trainer.tensors())
        self.trainer.step = step
        self._save()
        self.checkpoints.wait()
        self._say(f"continuing {source} after step {step} in {self.out}")

    @contextmanager
    def finished_saves(self) -> Iterator[None]:
        """An error leaves no save behind; with others, who may be lost, the program's end waits."""
        try:
            yield
        except BaseException:
            if self.distributed.world_size == 1:
                self.checkpoints.wait()
            raise

    def train(self, received: list[int]) -> None:
        """Update until the last step, or until a process is asked to stop."""
        trainer = self.trainer
        steps = trainer.schedule.steps
        asked = self.distributed.all_reduce(torch.tensor([len(received)]))
        if trainer.step >= steps or int(asked):
            return
        self._say(str(trainer))
        monitor, broken = trainer.monitor()
        if self.first:
            self._note_broken(broken)
        with ExitStack() as stack:
            log = stack.enter_context(self._log())
            if trainer.step == 0:
                self.about["initial"] = monitor.measure(trainer.model, self.distributed)
                if log is not None:
                    log.initial(self.about["initial"])
            watch = CollapseWatch(self.about["initial"])
            if self.first:
                watch.replay(read_log(self.out))
            shown = self.progress and self.first
            bar = progress_bar(shown, steps, self.out.name, "step", trainer.step)
            stack.enter_context(bar)
            self._loop(received, _Watching(monitor, watch, log, self._meter(), bar))
            if log is not None and trainer.step == steps:
                log.final(self.measured, self.about["initial"])
        if self.saved != trainer.step:
            self._save()
        self.checkpoints.wait()

    def _loop(self, received: list[int], watching: _Watching) -> None:
        trainer, log = self.trainer, self.trainer.config.log
        started = time.perf_counter()
        for batches in trainer.batches():
            waited = time.perf_counter() - started
            self._note_broken([found for batch in batches for found in batch.broken])
            update = self._update(batches, bool(received), watching)
            if update is None:
                continue
            seconds = time.perf_counter() - started
            step, last = trainer.step, trainer.step == trainer.schedule.steps
            self._check_broken(update.broken)
            watching.meter.update(update.figures, seconds, waited)
            row: dict[str, float] = {}
            if step % log.log_every == 0 or last:
                row |= self._gradient_norms()
                row |= update_norms(trainer.model, trainer.optimizer)
            if step % log.monitor_every == 0 or last:
                self.measured = watching.monitor.measure(trainer.model, self.distributed)
                row |= self.measured
            self._write(row, watching)
            if step % self.save_every == 0:
                self._save()
            if update.stop:
                return
            started = time.perf_counter()

    def _update(self, batches: list[Batch], stop: bool, watching: _Watching) -> Update | None:
        """One update, or None where it is not finite and may be left out."""
        trainer = self.trainer
        try:
            return trainer.update(batches, stop)
        except NonFiniteLossError as error:
            skipped = self.about["skipped"]
            if trainer.step - 1 in skipped:
                raise NonFiniteLossError(f"{error}. {self._ruined()}") from error
            if len(skipped) >= self.skip_nonfinite:
                raise
            self.about["skipped"].append(trainer.step)
            self._event(watching.log, "skipped", str(error))
            trainer.step += 1
            watching.bar.update()
            return None

    def _ruined(self) -> str:
        steps = self.checkpoints.complete()
        back = f"go back by --resume-from with one of {steps}" if steps else "start anew"
        return f"An earlier update has ruined the weights: {back}, with a lower optim.lr"

    def _save(self) -> None:
        trainer = self.trainer
        if not math.isfinite(total_norm(trainer.model.parameters())):
            raise NonFiniteLossError(
                f"the weights are not finite after step {trainer.step} and are not saved. "
                + self._ruined()
            )
        self.checkpoints.save(trainer.step, trainer.tensors(), self.about)
        self.saved = trainer.step

    def _log(self) -> RunLogger | nullcontext[None]:
        if not self.first:
            return nullcontext()
        return RunLogger(self.out, self.trainer.step, self.trainer.config)

    def _meter(self) -> Meter:
        config, distributed = self.trainer.config, self.distributed
        peak = peak_flops(distributed.device, config.optim.precision)
        return Meter(
            config.optim.batch_size,
            self.trainer.schedule.epoch_steps,
            training_flops(config) if peak else 0.0,
            peak,
            distributed.world_size,
        )

    def _gradient_norms(self) -> dict[str, float]:
        model = self.trainer.model
        return {
            f"grad_{name}": total_norm(p.grad for p in network.parameters() if p.grad is not None)
            for name, network in (("encoder", model.encoder), ("predictor", model.predictor))
        }

    def _write(self, row: dict[str, float], watching: _Watching) -> None:
        """Log the row where it is due, warn, and move the progress bar."""
        config, step = self.trainer.config, self.trainer.step
        if watching.log is None:
            return
        if step % config.log.log_every == 0 or "rankme" in row:
            row |= watching.meter.row(step)
            watching.log.write(row)
            for warning in watching.watch.update(step - 1, row):
                watching.log.event(step - 1, "warning", warning)
        self.shown |= {name: f"{row[key]:.4g}" for name, key in _BAR.items() if key in row}
        watching.bar.set_postfix(self.shown, refresh=False)
        watching.bar.update()

    def _say(self, text: str) -> None:
        """Tell the user, once for all processes."""
        if self.first:
            tqdm.write(text, file=sys.stderr)

    def _event(self, log: RunLogger | None, kind: str, text: str) -> None:
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
                f"{self.out}/broken-*.jsonl names them. Mend or remove them, or allow "
                f"more: data.max_broken={min(1.0, 2 * self.about['broken'] / wanted):.2g}"
            )

    def _note_broken(self, broken: list[tuple[str, str]]) -> None:
        """Name every broken image of this process once."""
        for name, reason in broken:
            if name not in self.named:
                self.named.add(name)
                if len(self.named) <= _NAMED:
                    more = "; further ones only there" if len(self.named) == _NAMED else ""
                    self._say(f"broken image: {name}: {reason} ({self.broken_file}{more})")
                with self.broken_file.open("a", encoding="ascii") as file:
                    file.write(json.dumps({"image": name, "reason": reason}) + "\n")
