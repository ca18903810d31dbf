"""Dense depth: linear heads on frozen patch features, as DINOv2 reports it.

Figures compare with each other, and with published ones only roughly. Differences to DINOv2's
`lin. 1` and `lin. 4` (arXiv 2304.07193, section 7.4, and its code):

- `last4` are the last four layers, not four spread over the depth, and the class token is left out;
- images are resized as a whole to the model's own size, in training (DINOv2: crops of 416 x 544,
  rotations, colour changes; here flips alone) and in tests (DINOv2: 480 x 640). Predictions are
  resized to the depth map, and figures are of all its pixels that count (NYU: Eigen's crop);
- the loss is `SigLoss` alone: the published gradient loss takes differences along the batch;
- a grid of heads is trained (with and without BatchNorm, several learning rates), and the one of
  the smallest RMSE on held-out training images, a seeded 10 %, reads the test set, once;
- `nyu_depth_v2_labeled.mat` has 795 training images, so 25 epochs are 1,100 steps where DINOv2
  takes 38,400 on 24,231 images, and its depths are filled in;
- rendered scenes have fewer bins, epochs and scores, see `SCENES`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..data.decode import Decoder
from ..data.dense import DenseData, open_depth
from ..data.loading import usable_cpus
from ..distributed import Distributed, init_distributed
from .depth_checks import check_pairs, check_range
from .depth_metrics import METRICS
from .depth_pictures import depth_picture
from .depth_scores import Row, measure
from .depth_training import NYU, SCENES, DepthProtocol, DepthTraining
from .epoch_state import EpochState
from .models import Subject, as_subject, check_model
from .notes import CACHED_AS_IS, few_to_choose, of_all_processes, undecoded
from .result import Head, Result
from .runs import once, run_folder
from .words import counted, data_name, option, other_epochs

_MAX_DEPTH = 10.0  # meters, where the data do not say: rooms


def evaluate_dense_depth(
    model: str | nn.Module | Subject,
    data: str | Path,
    out: str | Path = "results",
    *,
    protocol: DepthProtocol | None = None,
    cached: bool = False,
    baseline: bool = False,
    select_on_test: bool = False,
    max_depth: float | None = None,
    depth_scale: float | None = None,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    pictures: int = 8,
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
    """Train depth heads on frozen patch features and measure the best one on the test set.

    The same call goes on after an interruption, at the last finished epoch, and returns the result
    at once where it is there already. torchrun starts several processes, which share each batch.

    Args:
        model: A name (see `open_model`) or any timm ViT of at least four blocks.
        data: NYU Depth v2's `nyu_depth_v2_labeled.mat` or a folder that holds it (`splits.mat`
            beside it), pairs of images and depth maps, or rendered scenes; see `open_depth`.
        out: Folder of all evaluations: each has a folder of its own in it with `result.json` and
            `predictions.png`, and a row in `results.csv`.
        protocol: Settings; `NYU` by default, `SCENES` for rendered scenes.
        cached: Encode each training image and its mirror image once and keep the features in
            memory, `2 n 4 D h w` numbers of 4 bytes. The training is the same to rounding.
        baseline: Also measure the same architecture with random weights.
        select_on_test: Choose the head on the test set, as the literature often does.
        max_depth: Farther pixels do not count; 10 (m) where the data do not say.
        depth_scale: Units of depth files per meter; see `open_depth`.
        seed: Decides the split, the order, the flips and the heads at the start.
        epochs: In the place of the protocol's.
        batch_size: In the place of the protocol's.
        pictures: Rows of `predictions.png`; 0 for none.
        device: 'auto', or torch's name of a device.
        workers: Processes that decode; default: one for each CPU.
        precision: Of the encoder, see `extract_features`; 'auto': bfloat16 on a GPU, else float32.
        checkpoint: See `open_model`; for a model that is named.
        network: See there.
        img_size: See there.
        random: See there.
        value_range: Values of 16-bit images that become black and white, see `Decoder`.
        bands: Bands or pages of image files that become channels, see `Decoder`.
        skip_broken: Leave out pairs that cannot be read; otherwise they stop the evaluation.
        progress: Show progress bars.

    Returns:
        The result, which is also in the folder; its figure is the RMSE in meters or scene units.

    Raises:
        DataError: The data cannot be used.
        ValueError: An argument or the model does not fit, or features are not finite.
        RunError: Another process works on the same evaluation.
    """
    rendered = str(data).startswith("scenes:")
    check_range(max_depth)
    usual = protocol or (SCENES if rendered else NYU)
    protocol = replace(
        usual,
        epochs=usual.epochs if epochs is None else epochs,
        batch_size=usual.batch_size if batch_size is None else batch_size,
    )
    notes = other_epochs(protocol.epochs, usual.epochs, "protocol")
    workers = usable_cpus() if workers is None else workers
    options: dict[str, Any] = {"checkpoint": checkpoint, "network": network, "img_size": img_size}
    channels = check_model(model, baseline=baseline, random=random, **options)
    decoder = Decoder(channels, value_range, bands)
    with init_distributed(device) as distributed:
        shown = progress and distributed.rank == 0
        pairs = open_depth(
            data, seed=seed, depth_scale=depth_scale, workers=workers, progress=shown
        )
        train, test = (
            replace(part, decoder=decoder, skip_broken=skip_broken)
            for part in (pairs.train, pairs.test)
        )
        pairs = replace(pairs, train=train, test=test)
        limit = max_depth if max_depth is not None else pairs.max_depth or _MAX_DEPTH
        check_pairs(protocol, pairs, limit, distributed.world_size)
        workers = 0 if rendered else workers  # arrays in memory
        if precision == "auto":
            precision = "bfloat16" if distributed.device.type == "cuda" else "float32"
        subject = as_subject(model, random=random, seed=seed, **options)
        common = (pairs, protocol, limit, seed, precision, workers, distributed)
        how = (Path(out), data_name(data), cached, select_on_test, pictures, notes, shown)
        result, folder = _evaluate(subject, common, *how)
        if baseline and not any("random weights" in name for name in result.baselines):
            untrained = subject.untrained(seed)
            other = _evaluate(untrained, common, *how)[0]
            result = replace(result, baselines={**result.baselines, untrained.name: other.figure})
            if distributed.rank == 0:
                result.write(folder)
        distributed.barrier()
    return result


_Common = tuple[DenseData, DepthProtocol, float, int, str, int, Distributed]


def _evaluate(
    subject: Subject,
    common: _Common,
    out: Path,
    called: str,
    cached: bool,
    select_on_test: bool,
    pictures: int,
    notes: list[str],
    progress: bool,
) -> tuple[Result, Path]:
    """One model; from its folder where its result is there already."""
    training = DepthTraining(subject.model, *common)
    settings = training.settings() | {"select_on_test": select_on_test}
    name = subject.describe()["name"]
    folder = run_folder(out, f"depth-{training.pairs.name}", "dense", name, settings)
    state = EpochState(folder / "state.pt", settings)

    def work() -> Result:
        training.train(state, cached, progress)
        result, drawn = _measure(training, subject, select_on_test, pictures, progress, called)
        if drawn and training.distributed.rank == 0:
            depth_picture(drawn, training.max_depth).save(folder / "predictions.png")
        how = [CACHED_AS_IS] if cached else []
        return replace(result, notes=[*how, *notes, *result.notes])

    result = once(folder, training.distributed, training.precision, work)
    if training.distributed.rank == 0:
        state.remove()
    return result, folder


def _measure(
    training: DepthTraining,
    subject: Subject,
    select_on_test: bool,
    pictures: int,
    progress: bool,
    called: str,
) -> tuple[Result, list[Row]]:
    """Choose a head on held-out training images; it reads the test set."""
    pairs, specs = training.pairs, training.heads.specs
    held_out, kept, _ = measure(training, training.feed, training.choose, None, 0, progress)
    rmse = held_out[: len(specs), 0]
    test_feed = training.feed.of(pairs.test)
    everything = np.arange(len(pairs.test))
    only = None if select_on_test else int(rmse.argmin())
    test, count, rows = measure(training, test_feed, everything, only, pictures, progress)
    best = int(test[: len(specs), 0].argmin()) if only is None else 0
    chosen = best if only is None else only
    constant, mean_map = test[-2:]
    asked = range(len(specs)) if only is None else [only]
    tested = dict(zip(asked, test[:, 0].tolist()))
    losses = training.losses
    heads = [
        Head(spec.name, float(rmse[i]), tested.get(i), losses[i]) for i, spec in enumerate(specs)
    ]
    broken, test_broken = (
        of_all_processes(feed.broken, training.distributed) for feed in (training.feed, test_feed)
    )
    fitted = sum(pairs.train.names[index] not in broken for index in training.fit.tolist())
    drawn = [(pixels, depth, predicted[best]) for pixels, depth, predicted in rows]
    result = Result(
        task=f"dense depth, {pairs.name}",
        method="dense depth",
        model=subject.describe(),
        figure=float(test[best, 0]),
        chosen=specs[chosen].name,
        selection="the test set" if select_on_test else "a seeded 10 % of the training images",
        heads=heads,
        protocol=asdict(training.protocol) | {"max_depth": training.max_depth, "crop": pairs.crop},
        data=_record(pairs, called),
        images={"fit": fitted, "choose": kept, "test": count},
        seed=training.seed,
        measure="RMSE",
        unit=pairs.unit,
        higher_is_better=False,
        others=dict(zip(METRICS[1:], test[best, 1:].tolist())),
        baselines=_baselines(constant, mean_map),
        notes=[
            *few_to_choose(0 if select_on_test else kept),
            *_worse_than_mean(float(test[best, 0]), float(mean_map[0])),
            *undecoded(broken | test_broken, "pair"),
            *_blank(len(everything) - len(test_broken) - count),
        ],
        seconds=training.seconds,
    )
    return result, drawn


def _record(pairs: DenseData, called: str) -> dict[str, Any]:
    """The data as results record them."""
    return {
        name: {
            **({"name": called} if called else {}),
            "split": pairs.split,
            "images": len(part),
            "fingerprint": part.fingerprint,
        }
        for name, part in (("train", pairs.train), ("test", pairs.test))
    }


def _worse_than_mean(rmse: float, mean_map: float) -> list[str]:
    """A note where a prediction that does not look at the image is better."""
    if rmse <= mean_map:
        return []
    return [
        f"worse than the mean depth map, which looks at no image (RMSE {rmse:.4g}, mean depth map "
        f"{mean_map:.4g}): train longer, {option('epochs')}, or on more images"
    ]


def _blank(pairs: int) -> list[str]:
    """A note on test pairs without a pixel that counts."""
    if not pairs:
        return []
    return [f"{counted(pairs, 'test pair')} without a pixel that counts: not among those tested"]


def _baselines(constant: Tensor, mean_map: Tensor) -> dict[str, float]:
    """RMSE, AbsRel and delta_1 of predictions that do not look at the image."""
    return {
        f"{METRICS[column]} of {name}": float(figures[column])
        for name, figures in (("the mean depth", constant), ("the mean depth map", mean_map))
        for column in (0, 2, 5)
    }
