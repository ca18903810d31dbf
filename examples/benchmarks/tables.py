"""Fill the tables of a Markdown file from `results/`.

    python examples/benchmarks/tables.py examples/benchmarks/README.md

A table stands between `<!-- results: GLOB -->` and `<!-- /results -->`; GLOB names files there.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OURS = "ijepa_zoo"
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def cell(row: dict[str, Any]) -> str:
    """Time, rate and shares of a contender."""
    words = [duration(row["seconds"]["median"])]
    if "images_per_second" in row:
        words.append(f"{row['images_per_second']:.3g} images/s")
    if "share_of_matmul_peak" in row:
        words.append(f"{row['share_of_matmul_peak']:.0%} of the matmul peak")
    if "mfu" in row:
        words.append(f"MFU {row['mfu']:.0%}")
    if "peak_over_file" in row:
        words.append(f"{row['peak_over_file']['median']:.2f} file sizes")
    return ", ".join(words)


def rows(result: dict[str, Any]) -> list[str]:
    """A row for each contender of a result."""
    settings, metrics = result["settings"], result["metrics"]
    named = [
        f"{settings[key]}" for key in ("model", "precision", "dtype", "mode") if key in settings
    ]
    named += [f"batch {settings['batch_size']}"] if "batch_size" in settings else []
    named += [key for key in ("compile", "cudnn") if settings.get(key)]
    found = []
    for name, ratio in result["ratios"].items():
        other, _, part = name.partition(", ")
        precision = settings.get(f"{other}_precision", settings.get("vs_precision"))
        version = result["environment"].get(other, "")
        words = " ".join(filter(None, [other, version, f"({precision})" if precision else ""]))
        ours = metrics[f"{OURS}, {part}" if part else OURS]
        first = ", ".join([*named, part] if part else named)
        spread = f"{ratio['min']:.3g} to {ratio['max']:.3g}, {ratio['count']}"
        times = f"**{ratio['median']:.3g}** ({spread})"
        found.append(f"| {first} | {cell(ours)} | {words}: {cell(metrics[name])} | {times} |")
    return found


def table(pattern: str) -> str:
    """The table of the results that a pattern names."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob(pattern))]
    # gpu.py writes the results of its steps into one file
    steps = [[one] if "metrics" in one else one.values() for one in found]
    results = [step for group in steps for step in group if "ratios" in step]
    if not results:
        return "Not measured yet.\n"
    lines = ["| | ijepa_zoo | other | times as long (range, rounds) |", "|---|---|---|---|"]
    for result in results:
        lines += rows(result)
    where = {
        f"{r['environment'].get('gpu') or r['environment']['cpu']}, {r['environment']['threads']} "
        f"threads, torch {r['environment']['torch']}, {r['date']}"
        for r in results
    }
    return "\n".join([*lines, "", f"Measured on {'; '.join(sorted(where))}.", ""])


def fill(text: str) -> str:
    """Rebuild the tables in a text."""
    return BLOCK.sub(lambda m: f"{m[1]}{table(m[2])}{m[3]}", text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
