"""One picture of a run: its curves and its masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import MissingPackageError, SettingsError
from .config import PretrainConfig
from .data import mask_sampler, sample_masks
from .folder import read_settings
from .logger import read_log
from .networks import build_networks

# Okabe and Ito's colors, which color-blind readers can tell apart
_COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_GRAY = "#8c8c8c"
# title, label of the y axis, columns of the log
_PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss: falls, then rises slowly; a jump is bad", "loss", ("loss",)),
    ("Effective rank of held-out features: low is collapsed", "RankMe", ("rankme",)),
    ("Do features differ between images?", "from 0 to 1", ("spread", "cosine")),
    (
        "What explains target tokens: position alone is collapse", "share of variance",
        ("position_variance", "image_variance"),
    ),
    ("Classifiers on held-out features", "accuracy (%)", ("knn", "linear")),
    ("Learning rate", "learning rate", ("lr",)),
    ("Gradients", "L2 norm", ("grad_encoder", "grad_predictor")),
    ("Context encoder and target encoder", "relative L2 distance", ("ema_distance",)),
    ("Speed", "images / s", ("images_per_second",)),
)  # fmt: skip
_DRAWS = 8


def plot_run(run: str | Path, out: str | Path | None = None) -> Path:
    """Plot loss, monitors, rates, speed and masks of a run, finished or not.

    Args:
        run: The run's folder.
        out: PNG file to write and return; `RUN/plot.png` by default.

    Raises:
        MissingPackageError: matplotlib is not installed.
        RunError: `run` is not a run's folder, or its log is damaged.
        SettingsError: Nothing has been logged yet, or `out` is not a PNG file in a directory.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("plotting needs matplotlib: pip install matplotlib") from error
    run, out = Path(run), Path(run) / "plot.png" if out is None else Path(out)
    config = read_settings(run)
    if out.suffix.lower() != ".png" or out.is_dir() or not out.parent.is_dir():
        raise SettingsError(f"{out} is not a .png file in an existing directory")
    rows = read_log(run)
    if not rows or rows[-1]["step"] < 0:
        raise SettingsError(f"{run} has no row in log.csv yet: wait for log.log_every steps")
    figure = Figure(figsize=(16, 13), layout="constrained")
    figure.suptitle(
        f"{run.resolve().name}: {config.model.name}, {rows[-1]['step'] + 1:,.0f} steps of "
        f"{config.optim.batch_size} images, epoch {rows[-1]['epoch']:.0f}",
        fontsize=14,
    )
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.6, 1))
    for axis, (title, label, columns) in zip(parts[0].subplots(3, 3).flat, _PANELS):
        axis.set(title=title, ylabel=label, xlabel="step")
        axis.grid(alpha=0.3)
        _plot_panel(axis, rows, columns)
        axis.set_xlim(left=0)
    _plot_masks(parts[1], config)
    figure.savefig(out, dpi=110)
    return out


def _plot_panel(axis: Any, rows: Sequence[dict[str, float]], columns: Sequence[str]) -> None:
    for column, color in zip(columns, _COLORS):
        points = [(row["step"] + 1, row[column]) for row in rows if column in row]
        if not points:
            continue
        label, marker = column, "." if len(points) == 1 else ""
        first_step, first_value = points[0]
        if first_step == 0:  # measured before the first update
            axis.axhline(first_value, color=color, linestyle="--", linewidth=1)
            label += " (dashed: at initialization)"
        axis.plot(*zip(*points), color=color, marker=marker, label=label)
    if axis.lines:
        axis.legend(fontsize=8)
    else:
        axis.text(0.5, 0.5, "not measured", ha="center", color=_GRAY, transform=axis.transAxes)
    if "grad_encoder" in columns:
        axis.set_yscale("log")
    elif "images_per_second" in columns:
        axis.set_ylim(0, None)


def _plot_masks(figure: Any, config: PretrainConfig) -> None:
    """Masks of the first image of each of the first steps."""
    from matplotlib.colors import ListedColormap

    with torch.device("meta"):
        embed = build_networks(config).encoder.patch_embed
    masks = mask_sampler(config.mask, embed.grid_size)
    height, width = masks.grid_size
    for step, axis in enumerate(figure.subplots(1, _DRAWS)):
        context, targets = sample_masks(masks, config, step, slice(0, 1))
        pixels = np.full(height * width, 0)
        pixels[context[0].numpy()] = 1
        for number, target in enumerate(targets[0].numpy()):
            pixels[target] = 2 + number % len(_COLORS)
        colors = ListedColormap([_GRAY, "white", *_COLORS])
        axis.imshow(pixels.reshape(height, width), colors, vmin=0, vmax=1 + len(_COLORS))
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"step {step}", fontsize=9)
    figure.suptitle(
        f"Masks ({config.mask.mode}, grid of {height} x {width} patches): context white, targets "
        "colored",
        fontsize=11,
    )
