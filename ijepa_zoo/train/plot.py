"""One picture of a run: its curves, and what its masks hide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MissingPackageError, SettingsError
from ..masks import MultiBlockMasks
from ..models.factory import create_encoder
from .config import PretrainConfig
from .data import mask_sampler
from .folder import read_settings
from .logger import read_initial, read_log

# Okabe and Ito's colours, which colour-blind readers can tell apart
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_GREY = "#8c8c8c"
_NAMES = {
    "rankme": "RankMe",
    "spread": "spread (standard deviation)",
    "cosine": "cosine between images",
    "knn": "kNN",
    "linear": "linear",
    "grad_encoder": "gradient, encoder",
    "grad_predictor": "gradient, predictor",
    "update_encoder": "update / weights, encoder",
    "update_predictor": "update / weights, predictor",
}
_DRAWS = 6
_COVERAGE_STEPS = 200
_MOST_IMAGES = 128  # of a draw's group: more change nothing that can be seen


def plot_run(run: Path, out: Path | None = None) -> Path:
    """Draw loss, rank, probes, rates, speed and masks of a run, finished or not.

    Args:
        run: The run's folder.
        out: Picture to write, a `.png` file; `RUN/plot.png` by default.

    Returns:
        The picture.

    Raises:
        ImportError: matplotlib is not installed.
        RunError: `run` is not a run's folder, or its log is damaged.
        ValueError: Nothing has been logged yet, or `out` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("drawing needs matplotlib: pip install matplotlib") from error
    run, out = Path(run), Path(run) / "plot.png" if out is None else Path(out)
    config = read_settings(run)
    _refuse_place(out)
    rows = read_log(run)
    if not rows:
        raise SettingsError(f"{run} has no row in log.csv yet: wait for log.log_every steps")
    initial = read_initial(run)
    figure = Figure(figsize=(16, 13), layout="constrained")
    last = rows[-1]
    figure.suptitle(
        f"{run.resolve().name}: {config.model.name}, {last['step'] + 1:,.0f} steps of "
        f"{config.optim.batch_size} images, epoch {last['epoch']:.0f}",
        fontsize=14,
    )
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.6, 1))
    curves, pictures = parts
    _draw_curves(curves.subplots(3, 3), rows, initial)
    _draw_masks(pictures, config)
    figure.savefig(out, dpi=110)
    return out


def _refuse_place(out: Path) -> None:
    """Before anything is drawn."""
    if out.suffix.lower() != ".png":
        wanted = out / "plot.png" if out.is_dir() else out.with_name(f"{out.stem}.png")
        raise SettingsError(f"the picture is a PNG file, and {out} is no name of one: use {wanted}")
    if out.is_dir():
        raise SettingsError(f"{out} is a folder: use {out / 'plot.png'}")
    if not out.parent.is_dir():
        raise SettingsError(f"there is no folder {out.parent} for {out.name}: make it first")


def _draw_curves(
    axes: npt.NDArray[Any], rows: Sequence[dict[str, float]], initial: dict[str, float]
) -> None:
    loss, rank, spread, probes, lr, norms, ema, speed, tokens = axes.flat
    _draw_loss(loss, rows)
    _draw_beside(rank, rows, initial, {"rankme": _BLUE})
    rank.set(title="Effective rank of held-out features: low is collapsed", ylabel="RankMe")
    _draw_beside(spread, rows, initial, {"spread": _BLUE, "cosine": _ORANGE})
    spread.set(title="Do features differ between images?", ylabel="from 0 to 1")
    _draw_beside(probes, rows, initial, {"knn": _BLUE, "linear": _ORANGE})
    probes.set(title="Probes of held-out images", ylabel="accuracy (%)")
    _draw_rates(lr, rows)
    parts = ("encoder", _BLUE), ("predictor", _ORANGE)
    _draw_lines(norms, rows, {f"grad_{name}": colour for name, colour in parts})
    _draw_lines(norms, rows, {f"update_{name}": colour for name, colour in parts}, linestyle=":")
    norms.set(title="Gradients, and updates relative to the weights", ylabel="L2 norm")
    norms.set_yscale("log")
    if norms.lines:
        norms.legend(fontsize=8)
    _draw_lines(ema, rows, {"ema_distance": _BLUE})
    ema.set(title="Encoder against target encoder", ylabel="relative L2 distance")
    _draw_lines(speed, rows, {"images_per_second": _BLUE})
    speed.set(title="Speed", ylabel="images / s", ylim=(0, None))
    _draw_lines(tokens, rows, {"mask-A": _BLUE, "mask-B": _ORANGE}, marker=".", linestyle="")
    tokens.set(title="Patches seen (blue) and in each target (orange)", ylabel="patches")
    tokens.set_ylim(0, None)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", ha="center", color=_GREY, transform=axis.transAxes)


def _points(rows: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    pairs = [(row["step"] + 1, row[name]) for row in rows if name in row]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _draw_lines(
    axis: Any, rows: Sequence[dict[str, float]], colours: dict[str, str], **style: Any
) -> None:
    for name, colour in colours.items():
        steps, values = _points(rows, name)
        if len(steps) == 1:  # a line without length would not be seen
            style = {**style, "marker": "o"}
        if steps:
            axis.plot(steps, values, color=colour, label=_NAMES.get(name), **style)


def _draw_beside(
    axis: Any,
    rows: Sequence[dict[str, float]],
    initial: dict[str, float],
    colours: dict[str, str],
) -> None:
    """Curves with a dashed line at their values at initialisation."""
    start = {name: initial[name] for name in colours if name in initial}
    _draw_lines(axis, [{"step": -1.0, **start}, *rows], colours)  # before the first step
    for name, colour in colours.items():
        if name in initial and axis.lines:
            label = f"{_NAMES[name]} at initialisation"
            axis.axhline(initial[name], color=colour, linestyle="--", linewidth=1, label=label)
    if axis.lines:
        axis.legend(fontsize=8)


def _draw_loss(axis: Any, rows: Sequence[dict[str, float]]) -> None:
    axis.set(title="Loss: falls, then rises slowly; a jump is bad", ylabel="loss")
    width = len(rows) // 40
    if width < 2:
        return _draw_lines(axis, rows, {"loss": _BLUE})
    _draw_lines(axis, rows, {"loss": _GREY}, alpha=0.5, linewidth=0.8)
    steps, values = _points(rows, "loss")
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    axis.plot(steps, means, color=_BLUE, label=f"mean of the last {width} logged steps")
    axis.legend(fontsize=8)


def _draw_rates(axis: Any, rows: Sequence[dict[str, float]]) -> None:
    _draw_lines(axis, rows, {"lr": _BLUE})
    axis.set_ylabel("learning rate", color=_BLUE)
    axis.set_title("Learning rate, and momentum of the target encoder")
    other = axis.twinx()
    _draw_lines(other, rows, {"momentum": _ORANGE}, linestyle="--")
    other.set_ylabel("momentum", color=_ORANGE)
    other.ticklabel_format(useOffset=False)


def _draw_masks(figure: Any, config: PretrainConfig) -> None:
    masks, images = _masks(config), _group(config)
    axes = figure.subplots(1, _DRAWS + 2, width_ratios=[1] * _DRAWS + [1.3] * 2)
    for step, axis in enumerate(axes[:_DRAWS]):
        context, targets = masks.sample(images, seed=config.seed, step=step)
        axis.imshow(_picture(masks.grid_size, context[0].numpy(), targets[0].numpy()))
        axis.set_title(f"step {step}", fontsize=9)
    axes[0].set_ylabel("white: seen, grey: not,\ncoloured: targets", fontsize=9)
    seen, wanted = _coverage(masks, images, config.seed)
    for axis, share, name in ((axes[-2], seen, "seen"), (axes[-1], wanted, "targets")):
        shown = axis.imshow(100 * share, vmin=0, cmap="cividis")
        axis.set_title(f"{name} (% of images)", fontsize=9)
        figure.colorbar(shown, ax=axis, shrink=0.7)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(
        f"Masks ({config.mask.mode}, grid of {masks.grid_size[0]} x {masks.grid_size[1]} patches, "
        f"contexts cut to the shortest of {images}): some draws, and {_COVERAGE_STEPS} steps "
        "together",
        fontsize=11,
    )


def _masks(config: PretrainConfig) -> MultiBlockMasks:
    sizes = ("img_size", "patch_size", "embed_dim", "num_heads")
    given = {k: v for k in sizes if (v := getattr(config.model, k)) is not None}
    model = create_encoder(config.model.name, device="meta", depth=1, **given)
    return mask_sampler(config.mask, tuple(model.patch_embed.grid_size))


def _group(config: PretrainConfig) -> int:
    return min(config.group_size, _MOST_IMAGES)


def _picture(
    grid: tuple[int, int], context: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """RGB `[h, w, 3]`: the context white, targets coloured, mixed where they overlap."""
    from matplotlib.colors import to_rgb

    pixels = np.full((grid[0] * grid[1], 3), 0.55)
    pixels[context] = 1.0
    colours = np.array([to_rgb(c) for c in (_BLUE, _ORANGE, _GREEN, _PURPLE)])
    hits = np.zeros((len(pixels), len(targets)))
    for number, target in enumerate(targets):
        hits[target, number] = 1
    inside = hits.any(axis=1)
    mixed = hits[inside] @ colours[np.arange(len(targets)) % len(colours)]
    pixels[inside] = mixed / hits[inside].sum(axis=1, keepdims=True)
    return pixels.reshape(*grid, 3)


def _coverage(
    masks: MultiBlockMasks, images: int, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Shares `[h, w]` of images whose context, and any of whose targets, holds a patch."""
    patches = masks.grid_size[0] * masks.grid_size[1]
    seen, wanted = np.zeros(patches), np.zeros(patches)
    rows = np.arange(images)[:, None]
    for step in range(_COVERAGE_STEPS):
        context, targets = masks.sample(images, seed=seed, step=step)
        for total, indices in ((seen, context), (wanted, targets.flatten(1))):
            hit = np.zeros((images, patches), np.bool_)
            hit[rows, indices.numpy()] = True
            total += hit.mean(axis=0)
    grids = [total.reshape(masks.grid_size) / _COVERAGE_STEPS for total in (seen, wanted)]
    return grids[0], grids[1]
