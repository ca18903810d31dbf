"""`ijepa-zoo bench checkpoint`: what saving costs the training that goes on meanwhile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from ..processes import Processes
from ..train.checkpoint import Checkpoints
from ..train.checkpoint_folder import path as checkpoint_path
from ..train.config import Precision
from ..train.monitor import total_norm
from .result import BenchResult
from .steps import OurStep, StepSettings
from .timing import OURS, Summary, finish, take_turns, use_threads

SAVING = "while saving"
_LEAST_STEPS = 3  # without a save in a round, for their median


def checkpoint(
    *,
    model: str = "vit_small16_ijepa",
    img_size: int | None = None,
    batch_size: int = 16,
    precision: Precision = "fp32",
    device: str = "auto",
    folder: str | Path | None = None,
    threads: int | None = None,
    seconds: float = 120.0,
    rounds: int = 10,
    progress: bool = False,
) -> BenchResult:
    """Time training steps without a save, and those while a checkpoint is copied and written.

    Every round saves as a run does (`Checkpoints.save`: weights checked, state copied to the CPU,
    written in the background, checksums, an older checkpoint deleted) and goes on with steps until
    the checkpoint is whole; then it does as many steps without a save, whose longest tells how far
    steps differ here anyway. A save's copy counts to the step before it.

    Args:
        model: Name of the model, see `ijepa-zoo list`.
        img_size: Side of the images in pixels; None for the model's own.
        batch_size: Images of a step; they lie in memory.
        precision: `fp32`, `bf16` or `fp8`.
        device: `auto`, `cpu`, `cuda`, ...
        folder: On the disk to measure; a folder is made in it and deleted at the end. None for
            the system's folder for temporary files, which may lie in memory.
        threads: CPU threads; None for torch's own choice.
        seconds: Time for the rounds.
        rounds: Most rounds.
        progress: Show a progress bar.

    Returns:
        Seconds of a step (median of each round) and of the longest step while saving; of both
        `steps_stalled`, what the longest adds to a median step without a save, in such steps. Of
        saving also `steps_lost`, what all steps of a save together add, `copy_seconds` for which
        training stands still, `save_seconds` until the checkpoint is whole, and `bytes_written`.
        `first_save` in `extra` is the run's first, which allocates the copies and imports what
        writes.

    Raises:
        ValueError: A setting does not fit, or `folder` is no folder.
        OSError: A checkpoint cannot be written.
    """
    settings = {name: value for name, value in locals().items() if name != "progress"}
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder: make it first, or leave folder away")
    settings["folder"] = None if folder is None else Path(folder)
    own = StepSettings(model, img_size, batch_size, precision, device)
    with (
        use_threads(threads),
        TemporaryDirectory(prefix="ijepa-zoo-bench-", dir=folder) as scratch,
    ):
        work = _Saving(OurStep(own), Path(scratch) / "checkpoints")
        work.steps_without()  # warm
        usual, first = work.steps_without(), work.steps_with()
        timings = take_turns(
            {SAVING: work.steps_with, OURS: work.steps_without},
            seconds=seconds,
            rounds=rounds,
            warmup=0,
            progress=progress,
            what="saving",
        )
        size = work.size()
    stalled = _stalled(timings.samples[OURS], timings.samples[SAVING])
    step = timings.summary(OURS)
    results = {
        OURS: {
            "seconds": step.as_json(),
            "images_per_second": batch_size / step.median,
            "steps_stalled": timings.summary(OURS, "steps_stalled").median,
        },
        SAVING: {
            "seconds": timings.summary(SAVING).as_json(),
            **{name: found.median for name, found in stalled.items()},
            "steps_stalled_summary": stalled["steps_stalled"].as_json(),
            "copy_seconds": timings.summary(SAVING, "copy_seconds").median,
            "save_seconds": timings.summary(SAVING, "save_seconds").median,
            "bytes_written": size,
        },
    }
    first_save = {name: found.median for name, found in _stalled([usual], [first]).items()}
    return BenchResult(
        "checkpoint",
        settings,
        results,
        extra={"first_save": first_save},
        resolved={"device": str(work.step.device)},
    )


class _Saving:
    """Steps with and without a save.

    Args:
        step: The step.
        folder: For the checkpoints.
    """

    def __init__(self, step: OurStep, folder: Path) -> None:
        self.step, self.count = step, _LEAST_STEPS
        self.checkpoints = Checkpoints(folder, Processes.alone(str(step.device)), keep=1)

    def steps_without(self) -> dict[str, float]:
        """As many steps as the last save took; seconds of the median one."""
        taken = [self._timed() for _ in range(self.count)]
        middle = statistics.median(taken)
        return {"seconds": middle, "steps_stalled": max(taken) / middle - 1}

    def steps_with(self) -> dict[str, float]:
        """A step and a save, then steps until the checkpoint is whole; seconds of the longest."""
        with ThreadPoolExecutor(1) as thread:
            writing: list[Future[float]] = []
            started: list[float] = []

            def save() -> None:
                started.append(time.perf_counter())
                self._save()
                writing.append(thread.submit(self._written))
                started.append(time.perf_counter())

            taken = [self._timed(save), self._timed()]
            while not writing[0].done():
                taken.append(self._timed())
            ended = writing[0].result()  # raises what the save raised
        self.count = max(_LEAST_STEPS, len(taken))
        return {
            "seconds": max(taken),
            "steps": len(taken),
            "all_seconds": sum(taken),
            "copy_seconds": started[1] - started[0],
            "save_seconds": ended - started[0],
        }

    def size(self) -> int:
        """Bytes of the last checkpoint."""
        folder = checkpoint_path(self.checkpoints.folder, self.checkpoints.complete()[-1])
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    def _save(self) -> None:
        """What a run does when a checkpoint is due."""
        trainer = self.step.trainer
        total_norm(trainer.model.parameters())  # must be finite in a run
        self.checkpoints.save(trainer.step, trainer.tensors(), {})

    def _written(self) -> float:
        self.checkpoints.wait()
        return time.perf_counter()

    def _timed(self, then: Callable[[], None] | None = None) -> float:
        """Seconds of a step, and of what is done before the next."""
        started = time.perf_counter()
        self.step.update()
        finish(self.step.device)
        if then is not None:
            then()
        return time.perf_counter() - started


def _stalled(without: list[dict[str, float]], saving: list[dict[str, float]]) -> dict[str, Summary]:
    """What the saves cost, in steps of the same round without one."""
    pairs = [(one["seconds"], save) for one, save in zip(without, saving)]
    lost = [save["all_seconds"] / step - save["steps"] for step, save in pairs]
    return {
        "steps_stalled": Summary.of([save["seconds"] / step - 1 for step, save in pairs]),
        "steps_lost": Summary.of(lost),
    }
