"""The picture of `bench scaling`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8c8c8c"
_PANELS = {
    "model": ("model size", "weights that are trained (millions)"),
    "img_size": ("image size", "side of the images (pixels)"),
    "batch_size": ("batch", "images of a step"),
    "ranks": ("ranks", "processes on this machine, each with the batch"),
}

Figures = Mapping[str, Any]


def refuse_plot(plot: Path) -> None:
    """See before a measurement that the picture can be drawn and written.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `plot` is no name of a picture in a folder that is there.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a plot needs matplotlib: pip install 'ijepa-zoo[plot]', or leave --plot away"
        ) from error
    if plot.suffix.lower() != ".png" or plot.is_dir() or not plot.parent.is_dir():
        raise ValueError(
            f"plot is {plot}: give the name of a .png file in a folder that is there, for "
            "example scaling.png"
        )


def draw_scaling(axes: Mapping[str, Mapping[str, Figures]], of_gpus: Figures, plot: Path) -> None:
    """Draw step time along each axis, and the model of many GPUs.

    Args:
        axes: By axis the rows of the result by their value, with `x`, `work` and `step_seconds`.
        of_gpus: What `modelled` returned.
        plot: The picture, a PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.5), layout="constrained")
    panels: Any = figure.subplots(2, 3)
    for panel, (axis, rows) in zip(panels.flat, axes.items()):
        _draw_axis(panel, rows)
        title, xlabel = _PANELS[axis]
        panel.set(title=f"Measured: {title}", xlabel=xlabel, ylabel="step (ms)")
    assumed = of_gpus["assumed"]
    where = f"{assumed['model']}, {assumed['bandwidth_gb_s']:g} GB/s"
    computed = [row["step_ms"] for kind in ("weak", "strong") for row in of_gpus[kind].values()]
    panels[1, 1].set(ylabel="step (ms)", ylim=_around(computed), yscale="log")
    panels[1, 2].set(ylabel="efficiency", ylim=(0, 1.03))
    for panel, value in zip(panels[1, 1:], ("step_ms", "efficiency")):
        _draw_gpus(panel, of_gpus, value)
        panel.set_title(f"Computed, not measured:\n{where}")
    figure.savefig(plot, dpi=110)


def _draw_axis(panel: Any, rows: Mapping[str, Figures]) -> None:
    """Times as points; dashed what they were if each operation took as long as in the first."""
    figures = list(rows.values())
    xs = [row["x"] for row in figures]
    times = [1000 * row["step_seconds"] for row in figures]
    panel.plot(xs, times, marker="o", color=_BLUE, label="measured")
    expected = [times[0] * row["work"] / figures[0]["work"] for row in figures]
    panel.plot(xs, expected, linestyle="--", color=_GREY, label="if time grew as the work")
    for name, x, time in zip(rows, xs, times):
        place = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
        panel.annotate(name, (x, time), fontsize=8, **place)
    panel.margins(x=0.22)
    panel.set(ylim=_around(times + expected), xscale="log", yscale="log")
    _label(panel, xs)


def _draw_gpus(panel: Any, of_gpus: Figures, figure: str) -> None:
    assumed = of_gpus["assumed"]
    batches = {
        "weak": f"weak: {assumed['one_gpu_images']} images for each GPU",
        "strong": "strong: the published batch of 2,048",
    }
    for (name, label), colour in zip(batches.items(), (_BLUE, _ORANGE)):
        rows = of_gpus[name]
        gpus = [int(n) for n in rows]
        values = [row[figure] for row in rows.values()]
        panel.plot(gpus, values, marker="o", color=colour, label=label)
    panel.set(xscale="log", xlabel="GPUs")
    _label(panel, gpus)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits with some room; a margin has none where values are equal but for rounding."""
    return min(values) / 1.3, max(values) * 1.3


def _label(panel: Any, xs: Sequence[float]) -> None:
    """Numbers in the place of powers of ten, a grid and a legend."""
    from matplotlib.ticker import NullLocator, ScalarFormatter

    panel.set_xticks(xs, [f"{x:.3g}" for x in xs])
    panel.xaxis.set_minor_locator(NullLocator())
    for formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        formatter(ScalarFormatter())
    panel.tick_params(axis="y", which="minor", labelsize=7)
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=8)
