"""`ijepa-zoo bench load`: time and memory from a warm file to a model that encodes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from ..models.factory import create_model
from ..weights.export import export
from .fresh import in_fresh_process
from .machine import forget_memory_peak, measures_memory, memory_now, memory_peak
from .result import BenchResult, agreed
from .timing import OURS, Work, take_turns

OTHERS = ("timm", "transformers")
_LAYOUTS = {OURS: "native", "timm": "timm", "transformers": "transformers"}
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
_SHOWN = 8  # entries of the feature that are compared


def load(
    *,
    model: str = "vit_huge14_ijepa",
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: int | None = None,
    vs: Sequence[str] = (),
    seconds: float = 120.0,
    rounds: int = 5,
    progress: bool = False,
) -> BenchResult:
    """Time `create_model` on a local folder whose file is in the page cache.

    Random weights of the model's real size are written to a temporary folder first, in float32 and
    in each library's layout: as many times the model's size on the disk as there are contenders.
    Every measurement is a process of its own, and encodes an image after loading.

    Args:
        model: Name of the model.
        dtype: What the weights become while they are loaded; the files are float32.
        threads: CPU threads; None for torch's own choice.
        vs: `timm`, `transformers` or both.
        seconds: Time for the rounds.
        rounds: Most rounds.
        progress: Show a progress bar.

    Returns:
        Seconds and peak memory of each contender, the first image included in the latter.

    Raises:
        ValueError: A setting is unknown.
        ImportError: A library is not installed.
        DisagreementError: Features of the image are others.
    """
    vs = list(dict.fromkeys(vs))
    settings = {name: value for name, value in locals().items() if name != "progress"}
    refuse_absent("load", vs, OTHERS)
    if dtype not in _TOLERANCE:
        raise ValueError(f"dtype is {dtype!r}; use float32 or bfloat16")
    with TemporaryDirectory(prefix="ijepa-zoo-bench-") as scratch:
        encoder = create_model(model, pretrained=False)
        folders = {
            name: export(encoder, Path(scratch) / name, _LAYOUTS[name]) for name in (OURS, *vs)
        }
        del encoder
        size = (folders[OURS] / "model.safetensors").stat().st_size
        measure: dict[str, Callable[[], dict[str, Any]]] = {
            name: partial(
                in_fresh_process,
                load_and_encode,
                library=name,
                folder=str(folder),
                dtype=dtype,
                threads=threads,
            )
            for name, folder in folders.items()
        }
        features = {name: run().pop("feature") for name, run in measure.items()}
        agreement = {
            name: agreed(
                "features of an image",
                max(abs(a - b) for a, b in zip(features[name], features[OURS])),
                _TOLERANCE[dtype],
            )
            for name in vs
        }
        works: dict[str, Work] = {name: _numbers(run) for name, run in measure.items()}
        timings = take_turns(
            works, seconds=seconds, rounds=rounds, warmup=0, progress=progress, what="loading"
        )
    results: dict[str, dict[str, Any]] = {}
    for name in works:
        results[name] = {"seconds": timings.summary(name).as_json()}
        if measures_memory():
            peak = timings.summary(name, "peak_memory_bytes").median
            results[name] |= {"peak_memory_bytes": peak, "peak_over_file": peak / size}
    return BenchResult(
        "load", settings, results, timings.ratios(), agreement, extra={"file_bytes": size}
    )


def load_and_encode(library: str, folder: str, dtype: str, threads: int | None) -> dict[str, Any]:
    """Load one library's folder and encode one image; called in a fresh process.

    Args:
        library: Which.
        folder: Written by `export`.
        dtype: Of the weights in memory.
        threads: CPU threads.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    package = import_module(library)
    if library == "transformers":
        package.IJepaModel  # noqa: B018 - imports it, which is not part of loading
    before = memory_now() if measures_memory() else 0
    if measures_memory():
        forget_memory_peak()
    kind = getattr(torch, dtype)
    started = time.perf_counter()
    if library == "transformers":
        model = package.IJepaModel.from_pretrained(folder, dtype=kind)
    else:
        options = {} if kind == torch.float32 else {"dtype": kind}
        model = package.create_model(f"local-dir:{folder}", pretrained=True, **options)
    seconds = time.perf_counter() - started
    model.eval()
    with torch.inference_mode():
        output = model(_image(Path(folder)).to(kind))
    tokens = output.last_hidden_state.mean(1) if library == "transformers" else output
    peak = {"peak_memory_bytes": memory_peak() - before} if measures_memory() else {}
    return {"seconds": seconds, "feature": tokens[0, :_SHOWN].tolist(), **peak}


def refuse_absent(bench: str, vs: Sequence[str], known: Sequence[str]) -> None:
    """Refuse contenders that a bench does not have, or that are not installed.

    Args:
        bench: Its name.
        vs: The contenders asked for.
        known: Those it has.

    Raises:
        ValueError: One is unknown.
        ImportError: One is not installed.
    """
    if unknown := [name for name in vs if name not in known]:
        raise ValueError(
            f"bench {bench} has no contender {', '.join(unknown)}: use {' or '.join(known)}"
        )
    for name in vs:
        if find_spec(name) is None:
            raise ImportError(f"{name} is not installed: pip install {name}, or leave it out")


def _image(folder: Path) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.get("image_size") or config["model_args"]["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return torch.linspace(-1, 1, 3 * height * width).view(1, 3, height, width)


def _numbers(run: Callable[[], dict[str, Any]]) -> Work:
    return lambda: {key: value for key, value in run().items() if key != "feature"}
