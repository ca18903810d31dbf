"""Shared by the benchmarks: interleaved timing, agreement of outputs, the environment, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils import benchmark

OURS = "ijepa_zoo"
H100_BF16_PEAK = 989e12  # dense FLOP/s from the data sheet; the H200 has the same chip
PACKAGES = (
    "torch",
    "torchvision",
    "torchao",
    "timm",
    "transformers",
    "torchcodec",
    "pillow",
    "triton",
)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    made.add_argument("--seconds", type=float, default=60, help="time for the rounds")
    made.add_argument("--rounds", type=int, default=20, help="rounds at most")
    made.add_argument("--out", type=Path, help="JSON file")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and set the number of threads."""
    args = made.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def interleave(
    contenders: Mapping[str, Callable[[int], object]], seconds: float, rounds: int
) -> Iterator[dict[str, list[float]]]:
    """Time contenders in turns, in alternating order, so that a busy machine slows all of them.

    Args:
        contenders: By name; a call with the number of the round is timed, unless it returns its
            seconds.
        seconds: No round starts after that time, but three are always run.
        rounds: Rounds at most.

    Yields:
        Seconds of each contender, after every round.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.monotonic()
    for number in range(rounds):
        if number >= 3 and time.monotonic() - started > seconds:
            return
        for name in reversed(contenders) if number % 2 else contenders:
            begun = benchmark.timer()  # waits for the device
            own = contenders[name](number)
            taken = benchmark.timer() - begun
            samples[name].append(own if isinstance(own, float) else taken)
        yield samples


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def ratios(samples: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """How many times as long as ours each other contender takes, round by round."""
    return {
        name: summary([other / ours for other, ours in zip(values, samples[OURS])])
        for name, values in samples.items()
        if name != OURS
    }


def agree(what: str, difference: float, tolerance: float) -> dict[str, Any]:
    """Exit if outputs differ by more than the tolerance."""
    if not difference <= tolerance:
        raise SystemExit(f"{what} differ by {difference:.3g}, more than {tolerance:.3g}")
    return {"what": what, "difference": difference, "tolerance": tolerance}


def report(metrics: Mapping[str, Any], pairs: Mapping[str, Any]) -> None:
    """Print a line for each contender and each ratio."""
    for name, row in metrics.items():
        words = [
            f"{key} {value['median'] if isinstance(value, dict) else value:.4g}"
            for key, value in row.items()
        ]
        print(f"{name}: {', '.join(words)}")
    for name, ratio in pairs.items():
        print(
            f"{name} takes {ratio['median']:.3g} times as long "
            f"({ratio['min']:.3g} to {ratio['max']:.3g}, {ratio['count']} rounds)"
        )


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two large random matrices: the rate that this machine reaches."""
    side = 8192 if device == "cuda" else 1536
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    timer = benchmark.Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * side**3 / timer.blocked_autorange(min_run_time=1.0).median


def write(args: argparse.Namespace, metrics: Mapping[str, Any], **more: Any) -> None:
    """Write the result of a benchmark to `--out`, with what is needed to repeat it."""
    if args.out is None:
        return
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    result = {
        "benchmark": Path(sys.argv[0]).stem,
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "environment": environment(),
        "settings": settings,
        "metrics": metrics,
        **more,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((ln.partition(":")[2].strip() for ln in lines if ln.startswith("model name")), "")


def random_jpegs(folder: Path, count: int) -> Path:
    """Write JPEG files of about the size of ImageNet's: 500 x 375, around 100 KB.

    At most 256 are drawn; the others are links to these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(256, count):
        (folder / f"{number:05}.jpg").symlink_to(f"{number % 256:05}.jpg")
    for number in range(min(count, 256)):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + rng.normal(0, 14, smooth.shape)
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:05}.jpg", quality=90)
    return folder


def image_files(folder: Path, count: int) -> list[Path]:
    """JPEG files below a folder, `count` of them drawn with a fixed seed."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg"})
    return sorted(random.Random(0).sample(files, min(count, len(files))))
