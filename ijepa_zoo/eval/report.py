"""Several results side by side: a Markdown table and a picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..extraction.parts import whole_file
from .result import Result
from .result_files import find_results
from .words import counted

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#8c8c8c"


def write_report(
    places: Iterable[str | Path], out: str | Path = "report.md", *, picture: bool = True
) -> tuple[Path, Path | None]:
    """Write one comparison table of results, and a picture of it.

    One row per model, one column per task, method and way of feeding; in bold the best of a
    column. Different data have different columns, told apart by a hash. Of several results of one
    cell (seeds, repetitions) the newest is shown.

    Args:
        places: `result.json` files, or folders with such files anywhere below them.
        out: Markdown file to write.
        picture: Also draw bars, into a PNG of the same name.

    Returns:
        The Markdown file and the picture, None without one.

    Raises:
        ResultError: A place holds no result, or a damaged one.
        ValueError: `out` is a folder or a picture.
        ImportError: A picture is wanted and matplotlib is not installed.
    """
    out = Path(out)
    if out.is_dir() or out.suffix.lower() == ".png":
        what = "is a folder" if out.is_dir() else "is the name of a picture"
        raise ValueError(f"'{out}' {what}: name the Markdown file to write, such as report.md")
    results = [result for _, result in find_results(places)]
    figure_class = _figure_class() if picture else None
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as file:
        file.write(markdown(results).encode())
    if figure_class is None:
        return out, None
    drawn = out.with_suffix(".png")
    _draw(results, figure_class, drawn)
    return out, drawn


def markdown(results: Sequence[Result]) -> str:
    """The table, and below it what a reader must know of each figure."""
    cells, columns = _cells(results), _columns(results)
    models = list(dict.fromkeys(model for model, _ in cells))
    lines = [
        f"| model | {' | '.join(map(_escape, columns))} |",
        f"|---|{'---|' * len(columns)}",
    ]
    best = {column: _best([r for (_, c), r in cells.items() if c == column]) for column in columns}
    for model in models:
        shown = [_cell(cells.get((model, column)), best[column]) for column in columns]
        lines.append(f"| {_escape(model)} | {' | '.join(shown)} |")
    lines.append("")
    for (model, column), result in cells.items():
        lines.append(f"- {_escape(model)}, {_escape(column)}: {_about(result)}")
    if left := len(results) - len(cells):
        verb = "is" if left == 1 else "are"
        lines += ["", f"{counted(left, 'result')} {verb} left out: for each there is a newer one "
                  "of the same model and data."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cells(results: Sequence[Result]) -> dict[tuple[str, str], Result]:
    """The newest result of each model and column; models in the order of their best figures."""
    newest: dict[tuple[str, str], Result] = {}
    for result in sorted(results, key=lambda result: result.date):
        newest[_model(result, results), _column(result, results)] = result
    order = sorted(newest.items(), key=lambda item: -item[1].figure * _sign(item[1]))
    return dict(order)


def _model(result: Result, results: Sequence[Result]) -> str:
    """The model's name, with image size and hash where models of one name differ in them."""
    name = result.model["name"]
    same = [other.model for other in results if other.model["name"] == name]
    sizes = {_size(model) for model in same}
    told = [_size(result.model)] if len(sizes) > 1 else []
    hashes = {m["weights_hash"] for m in same if _size(m) == _size(result.model)}
    told += [result.model["weights_hash"][:6]] if len(hashes) > 1 else []
    return f"{name} ({', '.join(told)})" if told else name


def _size(model: Mapping[str, Any]) -> str:
    """Image size of a model in pixels; older results do not have it."""
    size = model.get("image_size") or []
    return f"{' x '.join(map(str, size))} px" if size else "image size unknown"


def _columns(results: Sequence[Result]) -> list[str]:
    ordered = sorted(results, key=lambda r: (r.task, r.method, str(r.protocol.get("fed"))))
    return list(dict.fromkeys(_column(result, results) for result in ordered))


def _column(result: Result, results: Sequence[Result]) -> str:
    several = len({_data_hash(other) for other in results if other.task == result.task}) > 1
    data = f" (data {_data_hash(result)})" if several else ""
    fed = ", cached" if result.protocol.get("fed") == "cached" else ""
    on_test = ", chosen on test" if result.selection == "the test set" else ""
    return f"{result.task}{data}, {result.method}{fed}{on_test}: {result.measured}"


def _data_hash(result: Result) -> str:
    """A short hash of the data's fingerprints, however a method records them."""
    prints = {
        name: part.get("fingerprint") if isinstance(part, dict) else part
        for name, part in result.data.items()
    }
    return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()[:6]


def _sign(result: Result) -> int:
    return 1 if result.higher_is_better else -1


def _best(results: Sequence[Result]) -> float:
    return max(results, key=lambda result: _sign(result) * result.figure).figure


def _cell(result: Result | None, best: float) -> str:
    if result is None:
        return ""
    text = result.show(result.figure)
    text = f"**{text}**" if result.figure == best else text
    if result.interval is not None:
        text += f" ({result.show(result.interval[0])}-{result.show(result.interval[1])})"
    return text if result.paper is None else f"{text}, paper {result.show(result.paper)}"


def _about(result: Result) -> str:
    counts = ", ".join(f"{number:,} {name}" for name, number in result.images.items())
    parts = [f"{result.chosen}, chosen by {result.selection}", f"images: {counts}"]
    parts += [f"{name} {result.show(value)}" for name, value in result.baselines.items()]
    return "; ".join([*parts, f"seed {result.seed}", *result.notes])


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the picture needs matplotlib: pip install matplotlib, or --no-picture"
        ) from error
    return Figure


def _draw(results: Sequence[Result], figure_class: Any, out: Path) -> None:
    """One panel per column: a bar with its interval per model, lines for what has no model."""
    cells, columns = _cells(results), _columns(results)
    models = list(dict.fromkeys(model for model, _ in cells))
    wide = min(len(columns), 3)
    rows = -(-len(columns) // wide)
    size = 2.5 + 3.6 * wide, (1.3 + 0.42 * len(models)) * rows
    figure = figure_class(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, wide, squeeze=False, sharey=True).flat)
    for column, panel in zip(columns, panels):
        found = {model: r for (model, c), r in cells.items() if c == column}
        _draw_panel(panel, found, models)
        panel.set_title(column.replace(": ", "\n"), fontsize=10)
    panels[0].set_yticks(range(len(models)), models)
    panels[0].set_ylim(len(models) - 0.4, -0.6)
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    figure.savefig(out, dpi=130)


def _draw_panel(panel: Any, found: dict[str, Result], models: Sequence[str]) -> None:
    for model, result in found.items():
        place = models.index(model)
        low, high = result.interval or (result.figure, result.figure)
        error = [[max(result.figure - low, 0)], [max(high - result.figure, 0)]]
        colour = _COLOURS[place % len(_COLOURS)]
        panel.barh(place, result.figure, xerr=error, color=colour, height=0.7)
        panel.text(0, place, f" {result.show(result.figure)}", va="center", color="white")
        if result.paper is not None:
            panel.plot([result.paper] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
            panel.text(result.paper, place + 0.4, "paper", ha="center", va="top", fontsize=7)
    for name, value in _without_model(found.values(), models).items():
        panel.axvline(value, color=_GREY, linestyle="--", linewidth=1)
        panel.text(value, len(models) - 0.45, name, ha="right", va="bottom", rotation=90,
                   color=_GREY, fontsize=7)  # fmt: skip
    panel.spines[["top", "right"]].set_visible(False)


def _without_model(results: Iterable[Result], models: Sequence[str]) -> dict[str, float]:
    """Baselines of the panel's measure that have no row of their own."""
    found = {}
    for result in results:
        for name, value in result.baselines.items():
            measure, _, what = name.rpartition(" of ")
            if name not in models and measure.casefold() in ("", result.measure.casefold()):
                found[what] = value
    return found
