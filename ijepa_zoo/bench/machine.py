"""What a measurement was made on, and how fast that machine multiplies matrices."""

from __future__ import annotations

import os
import platform
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..extraction.encoder import usable_cpus
from ..train.config import Precision
from .timing import finish

_PACKAGES = (
    *("torch", "torchvision", "torchao", "timm", "transformers", "torchcodec", "numpy", "pillow"),
)
_SIDE = {"cpu": 1536, "cuda": 8192}  # of the matrices: large enough for the full rate
# Dense products, TFLOP/s, from the makers' data sheets; the first name that fits counts.
_DATA_SHEET: dict[Precision, dict[str, float]] = {
    "bf16": {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0},
    "fp8": {"H200": 1979.0, "H100 PCIe": 1513.0, "H100": 1979.0},
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def machine() -> dict[str, Any]:
    """CPU, cores, memory, GPU and operating system, and how busy they are."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": usable_cpus(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
    }
    if hasattr(os, "sysconf"):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory_gib"] = round(pages / 2**30, 1)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """Of Python, this package and those that take part, as far as they are installed."""
    from .. import __version__

    found = {"python": platform.python_version(), "ijepa_zoo": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def data_sheet_peak(device: torch.device, precision: Precision) -> float | None:
    """FLOP/s of dense products that the maker of a GPU states; None if unknown.

    Args:
        device: Which.
        precision: `bf16` or `fp8`.
    """
    if device.type != "cuda":
        return None
    name, sheet = torch.cuda.get_device_name(device), _DATA_SHEET[precision]
    return next((1e12 * peak for word, peak in sheet.items() if word in name), None)


def peak_precision(device: torch.device, precision: Precision) -> Precision:
    """The fastest products that a step does: float8 is emulated by float32 ones on a CPU."""
    return "fp32" if precision == "fp8" and device.type == "cpu" else precision


def matrix_peak(device: torch.device, precision: Precision, seconds: float = 1.0) -> float:
    """FLOP/s of a product of two large random matrices, the best of as many as fit the time.

    Args:
        device: Where.
        precision: Of the matrices.
        seconds: How long to try.
    """
    side = _SIDE.get(device.type, 4096)
    left, right = torch.randn(2, side, side, device=device).to(_DTYPES[precision])
    if precision == "fp8":  # the product of torchao's layers; it wants the right one's columns
        one = torch.ones((), device=device)
        scales: dict[str, Any] = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
        product = partial(torch._scaled_mm, left, right.t(), **scales, use_fast_accum=True)
    else:
        product = partial(torch.mm, left, right, out=torch.empty_like(left))
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds or best == float("inf"):
        finish(device)
        begun = time.perf_counter()
        product()
        finish(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def memory_now() -> int:
    """Bytes of main memory that this process has in use (Linux)."""
    return _status("VmRSS")


def memory_peak() -> int:
    """The most it had since `forget_memory_peak` (Linux)."""
    return _status("VmHWM")


def forget_memory_peak() -> None:
    """Begin a new peak (Linux): imports use more than stays."""
    Path("/proc/self/clear_refs").write_text("5")


def measures_memory() -> bool:
    """Whether this system tells a process's peak of main memory and can begin a new one."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
