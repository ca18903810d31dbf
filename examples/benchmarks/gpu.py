"""Everything that only a GPU can show, in one run of about nine minutes.

    python examples/benchmarks/gpu.py --out DIR --minutes 9 --official ijepa
    python examples/benchmarks/gpu.py --out DIR --minutes 8 --imagenette imagenette/train

Each step is a process with a time limit; a step that fails or runs out of time does not stop the
others. At its limit a step is interrupted, which pytest and the trainer survive with a report and a
checkpoint, and killed 20 seconds later. `DIR/results.json` and `DIR/log.txt` are written after
every step. The second form trains ViT-S/16 on Imagenette and keeps its export, in pieces of 15 MB.
`--smoke` runs three of the steps with the smallest models on a CPU.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed
NEEDED = ("torch", "torchvision", "timm", "transformers", "safetensors", "huggingface_hub",
          "pydantic", "filelock", "yaml", "tqdm", "pytest", "hypothesis")  # fmt: skip
GPU_TESTS = ["tests/test_gpu.py", "tests/train/test_gpu_run.py", "tests/train/test_precision.py"]
GRACE = 20  # seconds after an interruption
PIECE = 15 * 2**20  # bytes
HUGE = ["--model=vit_huge14_ijepa", "--batch-size=128", "--compile", "--device=cuda"]
SMOKE = ("tests", "train bf16", "features")  # steps that differ on a CPU
NANO = ["--model=vit_nano8_64_ijepa", "--batch-size=2", "--device=cpu", "--rounds=3", "--steps=1"]


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: For the log and the results.
        command: Arguments of Python; a benchmark's script gets `--out`.
        limit: Seconds.
        aims: Metric, as a path into the result, and the value to reach.
    """

    name: str
    command: list[str]
    limit: float
    aims: dict[str, float] = field(default_factory=dict)


def steps(args: argparse.Namespace) -> list[Step]:
    """The steps of a run, the most important ones first."""
    size, cuda = (NANO, False) if args.smoke else (HUGE, True)
    train = [str(HERE / "train_step.py"), *size]
    official = []
    if args.official:
        official = ["--vs", "official", "--official", str(args.official.resolve())]
        official += ["--official-precision=bf16"]
    features = [str(HERE / "extract_features.py"), size[0], f"--device={'cuda' if cuda else 'cpu'}"]
    features += ["--vs", "timm", "transformers", "--precision=bfloat16", "--vs-precision=bfloat16"]
    # batches that all workers share, and no smaller last one, which would be compiled again
    features += ["--images=2048", "--batch-size=64", "--compile", "--rounds=3"] if cuda else []
    features += ["--images=2", "--batch-size=2", "--rounds=3", "--seconds=0.1"] if not cuda else []
    tests = ["-m", "pytest", "-m", "gpu", *GPU_TESTS[: 1 if args.smoke else None]]
    few = ["--precision=bf16", "--seconds=10"]
    planned = [
        Step(
            "train bf16",
            [*train, "--precision=bf16", *official, "--seconds=40"],
            170,
            {"ratios official median": 2.2, "metrics ijepa_zoo mfu": 0.48},
        ),
        Step(
            "features",
            [*features, "--seconds=8"] if cuda else features,
            200,
            {
                "metrics ijepa_zoo images_per_second": 1500,
                "ratios timm, bare model median": 1.0,
                "ratios transformers, bare model median": 1.0,
                "ratios timm median": 1.5,
                "ratios transformers median": 1.5,
            },
        ),
        Step("tests", tests, 110),
        Step(
            "train fp8",
            [*train, "--precision=fp8", "--vs", "bf16", "--seconds=15"],
            120,
            {"metrics ijepa_zoo mfu": 0.55},
        ),
        Step("train bf16 eager", [*(a for a in train if a != "--compile"), *few], 60),
        # cuDNN takes a second for each new pair of lengths
        Step("train bf16 cuDNN", [*train, *few, "--cudnn", "--steps=2", "--rounds=3"], 60),
    ]
    return planned if cuda else [step for step in planned if step.name in SMOKE]


def imagenette(args: argparse.Namespace, run: Path) -> list[Step]:
    """Pretraining of ViT-S/16 on Imagenette at 128 px for 200 epochs."""
    settings = ["model.name=vit_small16_ijepa", "model.img_size=128", "optim.batch_size=256"]
    settings += ["optim.duration=200 epochs", "optim.warmup=20 epochs", "mask.min_keep=4"]
    settings += ["runtime.compile=true"]
    if args.smoke:
        settings = ["model.name=vit_nano8_64_ijepa", "model.img_size=64", "optim.batch_size=4"]
        settings += ["optim.duration=2 steps", "optim.warmup=1 steps", "optim.precision=fp32"]
        settings += ["runtime.device=cpu", "data.held_out=0", "mask.group_size=global"]
        settings += ["mask.min_keep=4", "runtime.workers=0"]
    command = ["-m", "ijepa_zoo", "pretrain", args.recipe, "--data", str(args.imagenette.resolve())]
    return [Step("imagenette", [*command, "--out", str(run), *settings], 60 * args.minutes - 30)]


def perform(step: Step, limit: float, scratch: Path) -> tuple[dict[str, Any], str]:
    """Run a step; returns its result and its output."""
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, *step.command]
    if step.command[0].endswith(".py"):
        command += [f"--out={result}"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    started = time.monotonic()
    with (scratch / "log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "PYTHONUNBUFFERED": "1",
                # its key lacks the choice of attention, so cuDNN's step would load flash attention
                "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
            },
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status = f"exit code {code}" if code else "done"
        except subprocess.TimeoutExpired:
            end(process)
            status = f"stopped after {limit:.0f} s"
        log.seek(0)
        text = log.read()
    try:
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    except ValueError:  # killed while it wrote
        found = {}
    seconds = round(time.monotonic() - started, 1)
    return {"status": status, "wall_seconds": seconds, **found}, text


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a step, and kill it if it goes on."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lookup(result: dict[str, Any], path: str) -> Any:
    """A value by `outer name inner`, where the name may have spaces."""
    outer, _, rest = path.partition(" ")
    name, _, inner = rest.rpartition(" ")
    return result.get(outer, {}).get(name, {}).get(inner)


def summarize(results: dict[str, dict[str, Any]], planned: list[Step], aims: bool) -> Iterator[str]:
    """Lines of the summary: metrics and aims."""
    for step in planned:
        result = results.get(step.name, {"status": "no time left", "wall_seconds": 0})
        yield f"{step.name:18} {result['status']} ({result['wall_seconds']} s)"
        for name, row in result.get("metrics", {}).items():
            rates = {k: v for k, v in row.items() if isinstance(v, int | float)}
            yield f"  {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in rates.items())
        if "compile" in result:
            yield f"  compile: {result['compile']}"
        for path, aim in step.aims.items():
            value = lookup(result, path)
            if aims and value is not None:
                word = "met" if value >= aim else "missed"
                yield f"  aim {path} >= {aim}: {value:.3g}, {word}"


def pack(folder: Path, out: Path) -> None:
    """Write a folder as `export.tar.000`, `.001`, ... for `cat export.tar.* | tar x`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, arcname="export")
    data = buffer.getvalue()
    for number in range(-(-len(data) // PIECE)):
        piece = data[number * PIECE : (number + 1) * PIECE]
        (out / f"export.tar.{number:03}").write_bytes(piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--official", type=Path, help="clone of the official repository")
    parser.add_argument("--imagenette", type=Path, help="train on this folder, nothing else")
    parser.add_argument("--recipe", default="custom_small", help="for --imagenette")
    parser.add_argument("--smoke", action="store_true", help="smallest models, on a CPU")
    args = parser.parse_args()
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        parser.error(f"not installed: {', '.join(missing)}")
    if args.official and not (args.official / "src" / "helper.py").exists():
        parser.error(f"{args.official} is not a clone of the official repository")
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        planned = imagenette(args, run) if args.imagenette else steps(args)
        for step in planned:
            left = deadline - time.monotonic()
            if left < 20:
                break
            print(f"{step.name} ...", flush=True)
            results[step.name], text = perform(step, min(step.limit, left), Path(folder))
            (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            with (args.out / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"===== {step.name}: {' '.join(step.command)}\n{text}\n")
        if (run / "last_checkpoint.txt").exists():
            keep(run, args.out)
    print("\n".join(summarize(results, planned, aims=not args.smoke)))


def keep(run: Path, out: Path) -> None:
    """Write the log and the encoder of a run, finished or not."""
    import torch

    from ijepa_zoo.train import export_run

    pack(export_run(run, run.with_name("small"), to="timm", dtype=torch.bfloat16), out)
    (out / "train.csv").write_bytes((run / "log.csv").read_bytes())


if __name__ == "__main__":
    main()
