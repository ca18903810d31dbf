"""The picture of a comparison of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import MissingPackageError
from .report_table import Cell, Table

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY, _PALE = "#595959", "#b3b3b3"
_WIDE = 2  # panels in a row


def figure_class() -> Any:
    """Matplotlib's class of figures.

    Raises:
        ImportError: It is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "the picture needs matplotlib: pip install matplotlib, or --no-picture"
        ) from error
    return Figure


def draw(table: Table, kind: Any, out: Path) -> None:
    """One panel per column: a bar with its interval per row, dashed lines for what is constant.

    Args:
        table: What to draw.
        kind: See `figure_class`.
        out: PNG to write.
    """
    wide = min(len(table.columns), _WIDE)
    lines = [table.columns[i : i + wide] for i in range(0, len(table.columns), wide)]
    heights = [max(_height(table, column) for column in line) for line in lines]
    figure = kind(figsize=(6.6 * wide, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(lines), wide, height_ratios=heights)
    for place, column in enumerate(table.columns):
        panel = figure.add_subplot(grid[place // wide, place % wide])
        most = max(len(table.column(name)) for name in lines[place // wide])
        _draw_panel(panel, table, column, 0.7 * len(table.column(column)) / most)
    figure.savefig(out, dpi=130)


def _height(table: Table, column: str) -> float:
    rows = table.column(column)
    constant = len(table.constants & rows.keys())
    return 1.2 + 0.17 * constant + 0.5 * (len(rows) - constant)


def _draw_panel(panel: Any, table: Table, column: str, thick: float) -> None:
    found = table.column(column)
    bars = {row: cell for row, cell in found.items() if row not in table.constants}
    models = [row for row in table.rows if row not in table.baselines]
    for place, (row, cell) in enumerate(bars.items()):
        colour = _COLOURS[models.index(row) % len(_COLOURS)] if row in models else _PALE
        _draw_bar(panel, place, cell, colour, thick)
    names = [row.replace(", ", ",\n", 1).replace(" (", "\n(") for row in bars]
    panel.set_yticks(range(len(bars)), names, fontsize=8)
    panel.set_ylim(len(bars) - 0.4, -0.6)
    panel.margins(x=0.14)
    lines = [(row, cell) for row, cell in found.items() if row in table.constants]
    panel.set_title(column.replace(": ", "\n"), fontsize=10, pad=8 + 11 * len(lines))
    panel.spines[["top", "right"]].set_visible(False)
    for _, cell in lines:
        panel.axvline(cell.figure, color=_GREY, linestyle="--", linewidth=1)
    for level, (row, cell) in enumerate(lines):  # after all lines: they move the limits
        right = cell.figure > sum(panel.get_xlim()) / 2
        panel.annotate(f"{row} {cell.result.show(cell.figure)}", (cell.figure, 1),
            xycoords=("data", "axes fraction"), xytext=(0, 2 + 11 * level),
            textcoords="offset points", ha="right" if right else "left", va="bottom",
            color=_GREY, fontsize=8)  # fmt: skip


def _draw_bar(panel: Any, place: int, cell: Cell, colour: str, thick: float) -> None:
    result, end = cell.result, cell.figure
    error = None
    if cell.own and result.interval is not None:
        low, end = result.interval
        error = [[max(cell.figure - low, 0)], [max(end - cell.figure, 0)]]
    panel.barh(place, cell.figure, xerr=error, color=colour, height=thick)
    panel.annotate(result.show(cell.figure), (end, place), xytext=(4, 0),
        textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    if cell.own and result.paper is not None:
        panel.plot([result.paper] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
        panel.text(result.paper, place + 0.4, "paper", ha="center", va="top", fontsize=7)
