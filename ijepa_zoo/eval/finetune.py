"""Fine-tuning: all weights of a model trained with labels, by the paper's recipe."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..data.decode import Decoder
from ..data.loading import usable_cpus
from ..distributed import Distributed, init_distributed
from ..errors import DataError, SettingsError
from ..progress import progress_bar
from .epoch_state import EpochState
from .features import decoded, files_state, refuse_undecoded
from .finetune_training import FineTuning
from .intervals import wilson_interval
from .models import Subject, as_subject, check_model
from .notes import lost_classes, of_all_processes, undecoded
from .recipes import FULL, FineTuneRecipe
from .result import NOTHING_CHOSEN, Head, Result
from .runs import once, run_folder
from .sets import EvalSet, data_record, open_task
from .tasks import Task, find_task
from .words import other_epochs


def evaluate_finetune(
    task: str | Task,
    model: str | nn.Module | Subject,
    data: Any,
    out: str | Path = "results",
    *,
    test: Any = None,
    recipe: FineTuneRecipe = FULL,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    micro: int | None = None,
    grad_checkpointing: bool = False,
    device: str = "auto",
    workers: int | None = None,
    precision: str = "auto",
    checkpoint: str | None = None,
    network: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    random: bool = False,
    value_range: tuple[float, float] | None = None,
    bands: tuple[int, ...] | None = None,
    skip_broken: bool = False,
    progress: bool = False,
) -> Result:
    """Fine-tune a copy of a model on all training images, and test it after the last epoch.

    The same call goes on after an interruption, at the last finished epoch, and returns the result
    at once where it is there already. torchrun starts several processes, which share each batch.

    Args:
        task: A task of classes or its name; see `find_task`.
        model: A name (see `open_model`) or any timm ViT.
        data: See `open_task`.
        out: Folder of all evaluations: each has a folder of its own in it with `result.json`, and a
            row in `results.csv`.
        test: The test data, if `data` does not hold them.
        recipe: Settings.
        seed: Decides order, augmentation, dropped branches and the head at the start.
        epochs: In the place of the recipe's; the warm-up is shortened with it.
        batch_size: In the place of the recipe's; the learning rate grows linearly with it.
        micro: Images of a forward and backward pass of a process; None for its share of a batch.
        grad_checkpointing: Compute activations twice rather than keep them.
        device: 'auto', or torch's name of a device.
        workers: Processes that decode; default: one for each CPU.
        precision: 'bfloat16' or 'float32'; 'auto': the first on a GPU.
        checkpoint: See `open_model`; for a model that is named.
        network: See there.
        img_size: See there.
        random: See there; then it is a training from scratch.
        value_range: Values of 16-bit images that become black and white, see `Decoder`.
        bands: Bands or pages of image files that become channels, see `Decoder`.
        skip_broken: Leave out images that cannot be decoded; otherwise they stop the evaluation.
        progress: Show a progress bar.

    Returns:
        The result, which is also in the folder.

    Raises:
        DataError: The data cannot be used, or do not fit the task.
        ValueError: An argument or the model does not fit.
        FloatingPointError: The loss is not finite.
        RunError: Another process works on the same evaluation.
    """
    chosen = find_task(task) if isinstance(task, str) else task
    refuse_scenes(chosen)
    shown = recipe if epochs is None else recipe.with_epochs(epochs)
    notes = other_epochs(shown.epochs, recipe.epochs, "recipe")
    recipe = with_batch(shown, batch_size)
    workers = usable_cpus() if workers is None else workers
    options: dict[str, Any] = {"checkpoint": checkpoint, "network": network, "img_size": img_size}
    decoder = Decoder(check_model(model, random=random, **options), value_range, bands)
    with init_distributed(device) as distributed:
        sets = open_task(
            chosen, data, test=test, workers=workers, decoder=decoder, skip_broken=skip_broken
        )
        subject = as_subject(model, random=random, seed=seed, **options)
        training = prepare(
            subject,
            sets[0],
            recipe,
            seed,
            distributed,
            micro,
            grad_checkpointing,
            workers,
            precision,
        )
        result = run(chosen, subject, training, sets, Path(out), "finetune", notes, progress)
        distributed.barrier()
    return result


def refuse_scenes(task: Task) -> None:
    """Refuse a task whose answers random crops would change.

    Raises:
        DataError: It counts or measures what is in a scene.
    """
    if task.kind != "classes":
        raise DataError(
            f"fine-tuning crops images at random, which changes the answers of {task.title}: use a "
            "task of classes, or `eval count` or `eval depth`, which crop nothing"
        )


def with_batch(recipe: FineTuneRecipe, batch_size: int | None) -> FineTuneRecipe:
    """The recipe for another batch: the learning rate grows linearly with it."""
    if batch_size is None:
        return recipe
    scale = batch_size / recipe.batch_size
    return replace(recipe, batch_size=batch_size, lr=recipe.lr * scale)


def prepare(
    subject: Subject,
    train: EvalSet,
    recipe: FineTuneRecipe,
    seed: int,
    distributed: Distributed,
    micro: int | None,
    grad_checkpointing: bool,
    workers: int,
    precision: str,
) -> FineTuning:
    """A copy of the model, ready to be trained.

    Raises:
        ValueError: An argument or the model does not fit.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise SettingsError(
            f"precision is {precision!r}; fine-tune in 'float32', 'bfloat16' or 'auto'"
        )
    if not hasattr(subject.model, "blocks") or not hasattr(subject.model, "group_matcher"):
        raise SettingsError(
            f"{type(subject.model).__name__} is no timm ViT, whose layers are known"
        )
    half = precision == "bfloat16" or (precision == "auto" and distributed.device.type == "cuda")
    network: Any = copy.deepcopy(subject.model)
    network.set_grad_checkpointing(grad_checkpointing)
    return FineTuning(network, train, recipe, seed, distributed, half, micro, workers)


def run(
    task: Task,
    subject: Subject,
    training: FineTuning,
    sets: tuple[EvalSet, EvalSet],
    out: Path,
    method: str,
    notes: list[str],
    progress: bool,
) -> Result:
    """Train and test; from the folder where the result is there already.

    Args:
        task: What is measured.
        subject: The model that `training` has a copy of.
        training: Ready to run.
        sets: Training and test set.
        out: Folder of all evaluations.
        method: What results call it.
        notes: What a reader must know of the recipe.
        progress: Show a progress bar.
    """
    train, test = sets
    distributed, recipe = training.distributed, training.recipe
    about = subject.describe()
    settings: dict[str, Any] = {
        "task": task.name,
        "model": about,
        "train": train.fingerprint(),
        "test": test.fingerprint(),
        "files": [files_state(part.images) for part in sets],
        "seed": training.seed,
        **{key: value for key, value in vars(recipe).items() if key != "paper"},
        **training.settings(),
    }
    folder = run_folder(out, task.name, method, about["name"], settings)
    state = EpochState(folder / "state.pt", settings)

    def work() -> Result:
        images = recipe.epochs * training.batches.steps * training.batches.batch_size
        with progress_bar(progress and distributed.rank == 0, images, folder.name) as bar:
            training.run(state, bar)
        result = _result(task, subject, training, sets, method, settings)
        return replace(result, notes=[*notes, *result.notes])

    result = once(folder, distributed, training.settings()["precision"], work)
    if distributed.rank == 0:
        state.remove()
    return result


def _result(
    task: Task,
    subject: Subject,
    training: FineTuning,
    sets: tuple[EvalSet, EvalSet],
    method: str,
    protocol: dict[str, Any],
) -> Result:
    train, test = sets
    everything = np.arange(len(train))
    fitted = decoded(train, everything, training.broken, training.distributed)
    right, total = training.right_answers(test)
    refuse_undecoded("test", test, np.arange(len(test)), total, training.broken)
    figure = 100 * right / total
    broken = of_all_processes(training.broken, training.distributed)
    lost = lost_classes(train, everything, broken)
    published = training.recipe.paper if task.name == "imagenet1k" else {}
    return Result(
        task=task.name,
        method=method,
        model=subject.describe(),
        figure=figure,
        chosen="last epoch",
        selection=NOTHING_CHOSEN,
        heads=[Head("last epoch", None, figure, training.loss)],
        protocol=protocol,
        data=data_record(train, test),
        images={"fit": fitted, "test": total},
        seed=training.seed,
        interval=wilson_interval(right, total),
        paper=published.get(subject.paper_name or ""),
        notes=[*train.notes, *test.notes, *undecoded(broken), *lost],
        seconds=training.seconds,
    )
