"""Several results side by side: a Markdown table and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import SettingsError
from ..extract import whole_file
from .report_picture import draw, figure_class
from .report_table import Cell, Table, compare, settings
from .result import Result
from .result_files import find_results
from .words import counted


def write_report(
    places: Iterable[str | Path], out: str | Path = "report.md", *, picture: bool = True
) -> tuple[Path, Path | None]:
    """Write one comparison table of results, and a picture of it.

    One row per model and baseline, one column per task, method and way of feeding; in bold the best
    of a column. Different data have different columns. Results of one column whose settings differ
    (epochs, batch, precision, images) have different rows; of those that differ in nothing but the
    seed the newest is shown.

    Args:
        places: `result.json` files, or folders with such files anywhere below them.
        out: Markdown file to write.
        picture: Also draw bars, into a PNG of the same name.

    Returns:
        The Markdown file and the picture, None without one.

    Raises:
        DataError: A place holds no result, or a damaged one.
        ValueError: `out` is a folder or a picture.
        ImportError: A picture is wanted and matplotlib is not installed.
    """
    out = Path(out)
    if out.is_dir() or out.suffix.lower() == ".png":
        what = "is a folder" if out.is_dir() else "is the name of a picture"
        raise SettingsError(f"'{out}' {what}: name the Markdown file to write, such as report.md")
    results = [result for _, result in find_results(places)]
    kind = figure_class() if picture else None
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as file:
        file.write(markdown(results).encode())
    if kind is None:
        return out, None
    drawn = out.with_suffix(".png")
    draw(compare(results), kind, drawn)
    return out, drawn


def markdown(results: Sequence[Result]) -> str:
    """The table, and below it what a reader must know of each column."""
    table = compare(results)
    lines = [
        f"| model | {' | '.join(map(_escape, table.columns))} |",
        f"|---|{'---|' * len(table.columns)}",
    ]
    best = {column: table.best(column) for column in table.columns}
    for row in table.rows:
        shown = [_shown(table.cells.get((row, column)), best[column], row in table.constants)
                 for column in table.columns]  # fmt: skip
        lines.append(f"| {_escape(row)} | {' | '.join(shown)} |")
    lines += [
        "",
        "Bold: the best figure of a column, where at least two look at images. In brackets: 95 % "
        "intervals of the test set's size.",
    ]
    for column in table.columns:
        lines += ["", *_notes(table, column)]
    if left := table.left_out:
        verb = "is" if left == 1 else "are"
        lines += ["", f"{counted(left, 'result')} {verb} left out: for each there is a newer one "
                  "of the same model, data and settings."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _shown(cell: Cell | None, best: float | None, constant: bool) -> str:
    if cell is None:
        return ""
    show, result = cell.result.show, cell.result
    text = f"**{show(cell.figure)}**" if cell.figure == best and not constant else show(cell.figure)
    if not cell.own:
        return text
    if result.interval is not None:
        text += f" ({show(result.interval[0])}-{show(result.interval[1])})"
    return text if result.paper is None else f"{text}, paper {show(result.paper)}"


def _notes(table: Table, column: str) -> list[str]:
    """What holds for the rows of a column: each fact once, with the rows that it holds for."""
    own = {row: cell.result for row, cell in table.column(column).items() if cell.own}
    holders: dict[str, list[str]] = {}
    for row, result in own.items():
        for fact in dict.fromkeys(_facts(result)):
            holders.setdefault(fact, []).append(row)
    together: dict[tuple[str, ...], list[str]] = {}
    for fact, found in holders.items():
        together.setdefault(tuple(found), []).append(fact)
    common = together.pop(tuple(own), [])
    lines = [f"- {_escape(column)}{': ' if common else ''}{'; '.join(common)}"]
    for rows, facts in sorted(together.items(), key=lambda item: -len(item[0])):
        lines.append(f"    - {', '.join(f'`{row}`' for row in rows)}: {'; '.join(facts)}")
    return lines


def _facts(result: Result) -> list[str]:
    counts = ", ".join(f"{number:,} {name}" for name, number in result.images.items())
    told = [value for name, value in settings(result).items() if name != "images"]
    told = [value for value in told if not any(n.startswith(f"{value} ") for n in result.notes)]
    facts = [result.choice, f"images: {counts}", f"seed {result.seed}", *told, *result.notes]
    return facts if len(result.heads) == 1 else [f"chosen: {result.chosen}", *facts]


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
