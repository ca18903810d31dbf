"""Time from a warm file to a model that encodes, and the peak of memory, against others.

    python examples/benchmarks/load.py --model vit_huge14_ijepa --vs timm transformers

Random weights of the real size are written in each library's format. Each measurement runs in a new
process; imports are not timed. Memory is read from Linux and includes the first image.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from harness import OURS, agree, interleave, parse, parser, ratios, report, summary, write

import ijepa_zoo


def load(library: str, folder: str, dtype: str, side: int) -> dict[str, Any]:
    """Load a folder and encode an image; called in a fresh process."""
    package: Any = import_module(library)
    if library == "transformers":
        _ = package.IJepaModel  # imports it, which is not part of loading
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak after the imports
    before = _memory("VmRSS")
    started = time.perf_counter()
    if library == "transformers":
        model = package.IJepaModel.from_pretrained(folder, dtype=getattr(torch, dtype))
    else:
        options = {} if dtype == "float32" else {"dtype": getattr(torch, dtype)}
        model = package.create_model(f"local-dir:{folder}", pretrained=True, **options)
    seconds = time.perf_counter() - started
    image = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
    with torch.inference_mode():
        output = model.eval()(image.to(getattr(torch, dtype)))
    features = output.last_hidden_state.mean(1) if library == "transformers" else output
    peak = _memory("VmHWM") - before
    return {"seconds": seconds, "peak": peak, "features": features[0, :8].tolist()}


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--model", default="vit_huge14_ijepa")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--vs", nargs="*", choices=["timm", "transformers"], default=[])
    made.set_defaults(rounds=5)
    args = parse(made)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, *args.vs)}
    with tempfile.TemporaryDirectory() as scratch:
        model = ijepa_zoo.create_model(args.model, pretrained=False)
        side = model.patch_embed.img_size[0]
        for name in results:
            ijepa_zoo.export(model, Path(scratch) / name, "native" if name == OURS else name)
        del model
        size = (Path(scratch) / OURS / "model.safetensors").stat().st_size

        def measure(name: str, number: int) -> float:
            call = f"load({name!r}, {str(Path(scratch) / name)!r}, {args.dtype!r}, {side})"
            code = f"import json, load; print(json.dumps(load.{call}))"
            command = [sys.executable, "-c", code]
            here = Path(__file__).parent
            done = subprocess.run(command, cwd=here, stdout=subprocess.PIPE, check=True, text=True)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            return float(results[name][-1]["seconds"])

        turns = {name: partial(measure, name) for name in results}
        for samples in interleave(turns, args.seconds, args.rounds):
            metrics = {
                name: {
                    "seconds": summary(samples[name]),
                    "peak_over_file": summary([run["peak"] / size for run in runs]),
                }
                for name, runs in results.items()
            }
            agreement = {
                name: agree(
                    "features of an image",
                    max(
                        abs(a - b)
                        for a, b in zip(runs[0]["features"], results[OURS][0]["features"])
                    ),
                    1e-4 if args.dtype == "float32" else 5e-2,
                )
                for name, runs in results.items()
                if name != OURS
            }
            write(
                args,
                metrics,
                ratios=ratios(samples),
                agreement=agreement,
                file_gb=round(size / 1e9, 2),
            )
    report(metrics, ratios(samples))


if __name__ == "__main__":
    main()
