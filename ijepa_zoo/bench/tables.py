"""Tables of a text made from the JSON files of benches.

    python -m ijepa_zoo.bench.tables README.md examples/benchmarks/results

fills everything between a line `<!-- bench:NAME -->` and the next `<!-- /bench -->`, where NAME is
`train`, `features`, `load`, `masks`, `data`, `eval`, `checkpoint` or `scaling`, or `scale_out` for
the model of many GPUs that results of `bench scaling` have. Of results with the same settings
on the same machine the newest counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .result import duration
from .saving import SAVING
from .timing import OURS

SCALE_OUT = "scale_out"  # a table of what results of `bench scaling` have beside measurements

_BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_LENGTH = frozenset({"published_path", "seconds", "rounds", "folder"})  # of the measurement
# settings that do not tell what was measured
_HOW = _LENGTH | {"vs", "data", "device", "workers"}
_WORDS = frozenset({"model", "precision", "dtype", "mode", "task"})  # whose value says enough
_UNSAID = frozenset({"published_precision", "other_precision"})  # stands beside the other's name

Found = Mapping[str, Any]  # the content of a JSON file


def fill(text: str, folder: Path) -> str:
    """A text with its tables made anew.

    Args:
        text: Any text; without blocks it stays as it is.
        folder: Where the JSON files are.

    Raises:
        ValueError: There is no result for a table, or a table has no end or an unknown name.
    """
    results = newest(folder)
    opened, whole = text.count("<!-- bench:"), len(_BLOCK.findall(text))
    if opened != whole:
        raise ValueError(
            f"{opened} lines `<!-- bench:NAME -->`, but {whole} tables: each needs a name of "
            "letters and a `<!-- /bench -->` after it"
        )

    def block(match: re.Match[str]) -> str:
        bench = "scaling" if match[2] == SCALE_OUT else match[2]
        found = [result for result in results if result["bench"] == bench]
        if not found:
            kinds = ", ".join(sorted({result["bench"] for result in results})) or "none"
            raise ValueError(f"{folder} has no result of `bench {bench}`, only of {kinds}")
        return f"{match[1]}{table(found, match[2])}\n{match[3]}"

    return _BLOCK.sub(block, text)


def newest(folder: Path) -> list[Found]:
    """The results in a folder, in the order of their names; the last of those that are alike."""
    kept: dict[str, Found] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error})") from error
        if isinstance(content, dict) and "bench" in content:
            settings = {k: v for k, v in content["settings"].items() if k not in _LENGTH}
            like = json.dumps([content["bench"], settings, content["machine"]["cpu"]])
            if like not in kept or kept[like]["date"] <= content["date"]:
                kept[like] = content
    return list(kept.values())


def table(found: Sequence[Found], kind: str) -> str:
    """The table of one kind of bench, and beneath it where and how it was measured."""
    rows = _ROWS.get(kind, _against)(found)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    commands = f"`{found[0]['command']}`"
    if len(found) > 1:
        commands = f"`ijepa-zoo bench {found[0]['bench']}`, with the options that each result names"
    if kind == SCALE_OUT:
        what = found[0]["extra"]["many_gpus"]["what"]
        return "\n".join([*lines, "", f"{what[0].upper()}{what[1:]}: {commands}."])
    places = dict.fromkeys(_place(result) for result in found)
    return "\n".join([*lines, "", f"Measured on {'; '.join(places)}: {commands}."])


def _against(found: Sequence[Found]) -> list[tuple[str, ...]]:
    """Ours and another contender beside each other, a row for each pair."""
    rows: list[tuple[str, ...]] = [
        ("", OURS, "", "times as long as ours: median of the pairs (range)")
    ]
    for what, ours, name, other, ratio in _pairs(found):
        low, high = ratio["range"]
        rows.append(
            (
                what,
                _cell(ours),
                f"{name} {_cell(other)}",
                f"**{ratio['median']:.3g}** ({low:.3g} to {high:.3g}, {ratio['count']} pairs)",
            )
        )
    return rows


def _features(found: Sequence[Found]) -> list[tuple[str, ...]]:
    """With a column for the time until the first batch, which is part of the others."""
    starts = ["of it until the first batch: ours, other"]
    for _, ours, _, other, _ in _pairs(found):
        pair = (ours, other)
        times = [duration(one["start_seconds"]) for one in pair if "start_seconds" in one]
        starts.append(", ".join(times))
    return [(*row, start) for row, start in zip(_against(found), starts)]


def _pairs(found: Sequence[Found]) -> Iterator[tuple[str, Found, str, Found, Found]]:
    """What was measured, our figures, the other's name and figures, and the ratio."""
    for result in found:
        what = ", ".join(_settings(result))
        for name, ratio in result["ratios"].items():
            other, _, part = name.partition(", ")
            ours = result["results"][", ".join(filter(None, (OURS, part)))]
            words = ", ".join(filter(None, (what, part)))
            yield words, ours, _contender(other, result), result["results"][name], ratio


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


def _checkpoint(found: Sequence[Found]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("", "step", "longest step while saving", "steps stalled (range)", "without a save",
         "steps lost in all", "until whole", "written")
    ]  # fmt: skip
    for result in found:
        usual, saving = result["results"][OURS], result["results"][SAVING]
        stalled = saving["steps_stalled_summary"]
        low, high = stalled["range"]
        rows.append(
            (
                ", ".join(_settings(result)),
                *(duration(one["seconds"]["median"]) for one in (usual, saving)),
                f"**{stalled['median']:.2g}** ({low:.2g} to {high:.2g}, {stalled['count']} saves)",
                *(f"{found:.2g}" for found in (usual["steps_stalled"], saving["steps_lost"])),
                duration(saving["save_seconds"]),
                f"{saving['bytes_written'] / 1e6:,.0f} MB",
            )
        )
    return rows


def _scale_out(found: Sequence[Found]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("", "GPUs", "images per GPU", "step", "images/s", "exchange", "hidden", "efficiency")
    ]
    for result in found:
        model = result["extra"]["many_gpus"]
        assumed = model["assumed"]
        what = (
            f"{assumed['model']}, one GPU {assumed['one_gpu_step_ms']:.0f} ms for "
            f"{assumed['one_gpu_images']} images, {assumed['bandwidth_gb_s']:g} GB/s"
        )
        for scaling in ("weak", "strong"):
            for gpus, row in model[scaling].items():
                rows.append(
                    (
                        f"{scaling}: {what}",
                        gpus,
                        f"{row['images_per_gpu']:g}",
                        f"{row['step_ms']:.3g} ms",
                        _rate(row),
                        f"{row['exchange_ms']:.3g} ms",
                        f"{100 * row['exchange_hidden']:.2g} %",
                        f"{100 * row['efficiency']:.3g} %",
                    )
                )
    return rows


_ROWS = {
    "eval": _eval,
    "scaling": _scaling,
    SCALE_OUT: _scale_out,
    "features": _features,
    "checkpoint": _checkpoint,
}


def _cell(figures: Mapping[str, Any]) -> str:
    """Time of a run, images/s and, where they were measured, share of the peak and memory."""
    parts = [duration(figures["seconds"]["median"])]
    if "images_per_second" in figures:
        parts.append(f"{_rate(figures)} images/s")
    if "fraction_of_peak" in figures:
        peak = "fp8 peak" if figures.get("peak_precision") == "fp8" else "peak"
        parts.append(f"{100 * figures['fraction_of_peak']:.2g} % of {peak}")
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


def main() -> None:
    """Fill the tables of a file."""
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_zoo.bench.tables", description="Fill the tables of a text."
    )
    parser.add_argument("text", type=Path, help="README.md or another")
    parser.add_argument("results", type=Path, help="folder of the JSON files")
    args = parser.parse_args()
    try:
        filled = fill(args.text.read_text(encoding="utf-8"), args.results)
        args.text.write_text(filled, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"tables: {error}")


if __name__ == "__main__":
    main()
