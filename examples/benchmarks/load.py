"""Time and memory from a warm file to the first feature: ijepa_zoo, timm and transformers.

Every measurement is a process of its own; the libraries take turns and read the same numbers, which
this script writes first (random weights of the real size). Outputs are compared before any figure
is printed.

    python examples/benchmarks/load.py --model vit_huge14_ijepa --rounds 5

needs 3x the model's size on disk (7.6 GB for ViT-H/14) and `transformers`.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def memory(field: str) -> int:
    """Bytes of this process: 'VmRSS' now, 'VmHWM' at its highest (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(library: str, folder: Path) -> dict[str, object]:
    """Load one library's folder and encode one image; runs in a fresh process."""
    import torch

    if library == "ijepa_zoo":
        import ijepa_zoo as package
    elif library == "timm":
        import timm as package
    else:
        import transformers as package
        from transformers import IJepaModel
    Path("/proc/self/clear_refs").write_text("5")  # imports peak higher than they stay
    before = memory("VmRSS")
    start = time.perf_counter()
    if library == "ijepa_zoo":
        model = package.create_model(f"local-dir:{folder}")
    elif library == "timm":
        model = package.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        model = IJepaModel.from_pretrained(folder)
    seconds = time.perf_counter() - start
    model.eval()
    size = json.loads((folder / "config.json").read_text())
    side = size["image_size"] if library == "transformers" else size["model_args"]["img_size"][0]
    images = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
    with torch.inference_mode():
        output = model(images)
    tokens = output.last_hidden_state.mean(1) if library == "transformers" else output
    return {
        "seconds": seconds,
        "peak_bytes": memory("VmHWM") - before,
        "feature": tokens[0, :8].tolist(),
        "version": package.__version__,
    }


def prepare(model: str, folder: Path) -> dict[str, Path]:
    """Write the same random weights as a native, a timm and a transformers folder."""
    import ijepa_zoo

    encoder = ijepa_zoo.create_model(model, pretrained=False)
    layouts = {"ijepa_zoo": "native", "timm": "timm", "transformers": "transformers"}
    return {
        library: ijepa_zoo.export(encoder, folder / layout, layout)
        for library, layout in layouts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_huge14_ijepa")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=2, metavar=("LIBRARY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = prepare(args.model, Path(scratch))
        size = (folders["ijepa_zoo"] / "model.safetensors").stat().st_size
        runs: dict[str, list[dict]] = {library: [] for library in folders}
        for _ in range(args.rounds + 1):  # the first round warms the page cache
            for library, folder in folders.items():
                command = [sys.executable, __file__, "--measure", library, str(folder)]
                out = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[library].append(json.loads(out.stdout.splitlines()[-1]))
    reference = runs["ijepa_zoo"][0]["feature"]
    for library, results in runs.items():
        error = max(abs(a - b) for a, b in zip(results[0]["feature"], reference))
        assert error < 1e-4, f"{library} gives other features: {error}"
    table = {}
    print(f"{args.model}, {size / 1e9:.2f} GB, medians of {args.rounds} rounds")
    for library, results in runs.items():
        kept = results[1:]
        seconds = [r["seconds"] for r in kept]
        ratios = [r["seconds"] / o["seconds"] for r, o in zip(kept, runs["ijepa_zoo"][1:])]
        table[library] = {
            "version": kept[0]["version"],
            "seconds_median": statistics.median(seconds),
            "seconds_min_max": [min(seconds), max(seconds)],
            "time_over_ijepa_zoo_median": statistics.median(ratios),
            "peak_over_file_median": statistics.median(r["peak_bytes"] / size for r in kept),
        }
        row = table[library]
        print(
            f"{library:13} {row['seconds_median']:7.3f} s"
            f"  {row['time_over_ijepa_zoo_median']:6.1f} x"
            f"  peak {row['peak_over_file_median']:.2f} x the file"
        )
    write_result(args.model, args.rounds, size, table)


def write_result(model: str, rounds: int, size: int, table: dict) -> None:
    """Keep the figures with everything that is needed to repeat them."""
    import torch

    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    result = {
        "command": f"python examples/benchmarks/load.py --model {model} --rounds {rounds}",
        "date": date.today().isoformat(),
        "hardware": f"{cpu[0].split(':')[1].strip()}, {len(cpu)} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "model": model,
        "file_bytes": size,
        "results": table,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"load-{model}-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
