"""Tables of a text made from the JSON files of benches.

    python -m ijepa_zoo.bench.tables README.md examples/benchmarks/results

fills everything between a line `<!-- bench:NAME -->` and the next `<!-- /bench -->`, where NAME is
`train`, `features`, `load`, `masks`, `data`, `eval` or `scaling`. Of results with the same settings
on the same machine the newest counts.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .result import duration
from .timing import OURS

_BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
# settings that do not tell what was measured
_HOW = frozenset({"vs", "published_path", "seconds", "rounds", "data", "device", "workers"})
_WORDS = frozenset({"model", "precision", "dtype", "mode", "task"})  # whose value says enough
_UNSAID = frozenset({"published_precision", "other_precision"})  # stands beside the other's name

Found = Mapping[str, Any]  # the content of a JSON file


def fill(text: str, folder: Path) -> str:
    """A text with its tables made anew.

    Args:
        text: Any text; without blocks it stays as it is.
        folder: Where the JSON files are.

    Raises:
        ValueError: There is no result for a table.
    """
    results = newest(folder)

    def block(match: re.Match[str]) -> str:
        found = [result for result in results if result["bench"] == match[2]]
        if not found:
            kinds = ", ".join(sorted({result["bench"] for result in results})) or "none"
            raise ValueError(f"{folder} has no result of `bench {match[2]}`, only of {kinds}")
        return f"{match[1]}{table(found)}\n{match[3]}"

    return _BLOCK.sub(block, text)


def newest(folder: Path) -> list[Found]:
    """The results in a folder, in the order of their names; the last of those that are alike."""
    kept: dict[str, Found] = {}
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "bench" in content:
            like = json.dumps([content["bench"], content["settings"], content["machine"]["cpu"]])
            if like not in kept or kept[like]["date"] <= content["date"]:
                kept[like] = content
    return list(kept.values())


def table(found: Sequence[Found]) -> str:
    """The table of one kind of bench, and beneath it where and how it was measured."""
    rows = _ROWS.get(found[0]["bench"], _against)(found)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    places = dict.fromkeys(_place(result) for result in found)
    commands = "; ".join(f"`{result['command']}`" for result in found)
    return "\n".join([*lines, "", f"Measured on {'; '.join(places)}: {commands}."])


def _against(found: Sequence[Found]) -> list[tuple[str, ...]]:
    """Ours and another contender beside each other, a row for each pair."""
    rows: list[tuple[str, ...]] = [
        ("", OURS, "", "times as long as ours: median of the pairs (range)")
    ]
    for result in found:
        what = ", ".join(_settings(result))
        for name, ratio in result["ratios"].items():
            other, _, part = name.partition(", ")
            ours = result["results"][", ".join(filter(None, (OURS, part)))]
            low, high = ratio["range"]
            rows.append(
                (
                    ", ".join(filter(None, (what, part))),
                    _cell(ours),
                    f"{_contender(other, result)} {_cell(result['results'][name])}",
                    f"**{ratio['median']:.3g}** ({low:.3g} to {high:.3g}, {ratio['count']} pairs)",
                )
            )
    return rows


def _eval(found: Sequence[Found]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "encoder, per image", "all heads, per image", "share")]
    for result in found:
        per_image = [
            duration(1 / result["results"][name]["images_per_second"]) for name in (OURS, "heads")
        ]
        share = result["results"]["heads"]["over_encoder"]
        what = f"{', '.join(_settings(result))}, {result['extra']['heads']} heads"
        rows.append((what, *per_image, f"**{100 * share:.2g} %**"))
    return rows


def _scaling(found: Sequence[Found]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("", "step", "images/s", "GFLOP/s", "MB sent per step", "exchange hidden")
    ]
    for result in found:
        for name, figures in result["results"].items():
            step = figures.get("step_seconds") or figures["seconds"]["median"]
            rows.append(
                (
                    name,
                    duration(step),
                    _rate(figures),
                    _optional(figures, "tflop_per_second", 1e3),
                    _optional(figures, "bytes_exchanged", 1e-6),
                    _optional(figures, "exchange_hidden", 100, " %"),
                )
            )
    return rows


_ROWS = {"eval": _eval, "scaling": _scaling}


def _cell(figures: Mapping[str, Any]) -> str:
    """Time of a run, images/s and, where it was measured, memory."""
    parts = [duration(figures["seconds"]["median"])]
    if "images_per_second" in figures:
        parts.append(f"{_rate(figures)} images/s")
    if "fraction_of_peak" in figures:
        parts.append(f"{100 * figures['fraction_of_peak']:.2g} % of peak")
    if "peak_over_file" in figures:
        parts.append(f"{figures['peak_over_file']:.2f} file sizes")
    return ", ".join(parts)


def _rate(figures: Mapping[str, Any]) -> str:
    rate = figures["images_per_second"]
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _contender(name: str, result: Found) -> str:
    settings, version = result["settings"], result["versions"].get(name)
    precision = settings.get(f"{name}_precision", settings.get("other_precision"))
    return " ".join(filter(None, (name, version, precision and f"({precision})")))


def _settings(result: Found) -> list[str]:
    """The settings that tell what was measured, in words."""
    skipped = _HOW | _UNSAID | {"threads"}
    return [
        str(value) if name in _WORDS else f"{name.replace('_', ' ')} {value}"
        for name, value in result["settings"].items()
        if name not in skipped and value not in (None, False)
    ]


def _place(result: Found) -> str:
    machine, versions = result["machine"], result["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, threads: {machine['threads']}"
    return f"{where}, torch {versions['torch']}, {result['date']}"


def _optional(figures: Mapping[str, Any], key: str, factor: float, unit: str = "") -> str:
    return f"{figures[key] * factor:.3g}{unit}" if key in figures else ""


def main(text_file: str, folder: str) -> None:
    """Fill the tables of a file.

    Args:
        text_file: README.md or another.
        folder: The folder of the JSON files.
    """
    path = Path(text_file)
    path.write_text(fill(path.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
