"""Which changes of the recipe help I-JEPA on little data: many short runs, one table.

Every arm is the published recipe, scaled down, with some settings changed; all arms see the same
number of images. Figures are those of the monitors on held-out images: kNN, linear probe, RankMe.
Data sets are told apart by the names of their images.

    python examples/small_data/study.py --data cifar10/train --out runs/small_data

screens the small model on a CPU (7 minutes a run and thread). On a GPU, at real length:

    python examples/small_data/study.py --data cifar10/train --out runs/vit_tiny --size gpu

A run that is finished is not repeated, one that was interrupted goes on. Rows of mae.py in the same
folder join the table. Arms, seeds and steps: `--arms published variance`, `--seeds 0 1 2`,
`--steps 3000`; `--set` changes a setting of all arms.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_zoo.data import open_images
from ijepa_zoo.train import load_config
from ijepa_zoo.train.config import differences
from ijepa_zoo.train.folder import read_settings

SIZES: dict[str, list[str]] = {
    "cpu": [
        "model.name=vit_nano8_64_ijepa", "optim.batch_size=64", "mask.group_size=64",
        "optim.duration=1000 steps", "optim.precision=fp32", "runtime.device=cpu",
        "runtime.workers=0", "runtime.threads=1",
    ],
    "gpu": [
        "model.name=vit_tiny16_ijepa", "model.predictor_embed_dim=192",
        "model.predictor_depth=4", "optim.batch_size=512", "mask.group_size=512",
        "optim.duration=20000 steps", "optim.precision=bf16", "runtime.workers=8",
    ],
}  # fmt: skip
SHARED = [
    "model.img_size=32", "model.patch_size=4", "data.held_out=4000", "data.crop_scale=0.3,1.0",
    "mask.min_keep=4", "log.keep=1",
]  # fmt: skip
COLUMNS = ("arm", "seed", "linear", "knn", "rankme", "loss", "step (ms)")
MAES_OWN = (
    *("optim.lr", "optim.start_lr", "optim.final_lr", "optim.warmup", "optim.duration"),
    *("optim.weight_decay", "optim.final_weight_decay", "data.crop_scale", "data.horizontal_flip"),
)  # what mae.py may have otherwise
SLOW = ["optim.lr=4e-4", "optim.start_lr=1e-4", "optim.final_weight_decay=0.1"]
VARIANCE = ["optim.regularizer_weight=0.1", "optim.regularizer_over=residuals"]
ARMS: dict[str, list[str]] = {
    "published": [],
    "slow": SLOW,
    "variance": [*SLOW, *VARIANCE],
    "variance_images": [*SLOW, "optim.regularizer_weight=0.1", "optim.regularizer_over=images"],
    "variance_strong": [*SLOW, "optim.regularizer_weight=1", "optim.regularizer_over=residuals"],
    "gaussian": [
        *SLOW, "optim.regularizer=isotropic_gaussian", "optim.regularizer_weight=0.02",
        "optim.regularizer_over=images",
    ],
    "unbiased": [*SLOW, *VARIANCE, "mask.mode=unbiased"],
    "small_targets": [*SLOW, *VARIANCE, "mask.mode=unbiased", "mask.target_scale=0.05,0.1"],
    "noise": [*SLOW, *VARIANCE, "optim.position_noise=0.25"],
    "fast_variance": VARIANCE,
    "ema_099": [*SLOW, *VARIANCE, "optim.momentum=0.99"],
    "layers_3": [*SLOW, *VARIANCE, "optim.target_layers=3"],
    "masks_4": [*SLOW, *VARIANCE, "mask.per_image=4"],
    "shared": [*SLOW, *VARIANCE, "model.predictor_context=shared"],
    "flip": [*SLOW, *VARIANCE, "data.horizontal_flip=true"],
    "l2": [*SLOW, *VARIANCE, "optim.loss=l2"],
}  # fmt: skip


def overrides(
    size: str, arm: str, seed: int, steps: int | None, more: Sequence[str] = ()
) -> list[str]:
    """The words of `ijepa-zoo pretrain vith14_in1k` for one run; `more` is for all arms."""
    words = [*SIZES[size], *SHARED, *ARMS[arm], f"seed={seed}"]
    if steps is not None:
        words.append(f"optim.duration={steps} steps")
    total = int(next(w for w in reversed(words) if "duration" in w).split("=")[1].split()[0])
    return [
        *words, f"optim.warmup={total // 8} steps", f"log.monitor_every={max(1, total // 10)}",
        f"log.save_every={max(1, total // 4)} steps", "log.log_every=10", *more,
    ]  # fmt: skip


def refuse_settings(given: Sequence[str], own: Mapping[str, str]) -> None:
    """End where `--set` changes what is not for it.

    Args:
        given: Its words.
        own: Names of settings, and what to do about each.

    Raises:
        ValueError: Which word, and what to do.
    """
    for word, name in zip(given, names(given)):
        if name in own:
            raise ValueError(f"--set {word}: {own[name]}")
    if any(word.replace(" ", "") == "data.held_out=0" for word in given):
        raise ValueError("--set data.held_out=0: the figures are those of images held out")


def names(words: Sequence[str]) -> list[str]:
    """The settings that words change."""
    return [word.partition("=")[0].strip() for word in words]


def start(args: argparse.Namespace, arm: str, seed: int, out: Path) -> subprocess.Popen[bytes]:
    """One run in a process of its own."""
    command = [
        *(sys.executable, "-m", "ijepa_zoo", "pretrain", "vith14_in1k"),
        *overrides(args.size, arm, seed, args.steps, args.set),
        *("--data", *args.data, "--out", str(out), "--quiet"),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".txt").open("ab")
    threads = {"OMP_NUM_THREADS": "1"} if args.size == "cpu" else {}
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **threads})


def figures(out: Path) -> dict[str, float] | None:
    """The last monitored figures of a finished run, and what it took; None if unfinished."""
    if not (out / "export" / "config.json").exists():
        return None
    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    monitored = [row for row in rows if row["linear"]]
    last, early = monitored[-1], monitored[len(monitored) // 4]
    named = {key: float(last[key]) for key in ("loss", "knn", "linear", "rankme", "spread")}
    return {
        **named,
        "early rankme": float(early["rankme"]),
        "early knn": float(early["knn"]),
        "early linear": float(early["linear"]),
        "step (ms)": statistics.median(float(row["time (ms)"]) for row in rows),
    }


def refuse_other_runs(args: argparse.Namespace) -> None:
    """End before anything runs where data have no classes or `--out` has runs of another kind.

    Raises:
        ValueError: Which run, and what differs.
    """
    own = {name: f"the arm {arm} sets it" for arm in args.arms for name in names(ARMS[arm])}
    refuse_settings(args.set, {**own, "seed": "use --seeds", "optim.duration": "use --steps"})
    images = open_images(args.data)
    if images.targets is None or len(images.classes) < 2:
        raise ValueError("images without a class: --data must be a folder of class folders")
    for arm, seed in itertools.product(args.arms, args.seeds):
        config = load_config("vith14_in1k", overrides(args.size, arm, seed, args.steps, args.set))
        out = args.out / f"{arm}-{seed}"
        if not (out / "config.yaml").exists():
            continue
        differing = differences(read_settings(out), config)
        if json.loads((out / "data.json").read_text())["fingerprint"] != images.fingerprint():
            differing.append("other images")
        if differing:
            raise ValueError(
                f"{out} is of another study ({'; '.join(differing)}): choose another --out"
            )


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is not finished, `--jobs` at a time; returns a row for each run."""
    waiting = [(arm, seed) for seed in args.seeds for arm in args.arms]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    rows: list[dict[str, Any]] = []
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                arm, seed = waiting.pop(0)
                out = args.out / f"{arm}-{seed}"
                found = figures(out)
                if found is None:
                    running[arm, seed] = start(args, arm, seed, out)
                else:
                    rows.append({"arm": arm, "seed": seed, **found})
            for (arm, seed), process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[arm, seed]
                found = figures(args.out / f"{arm}-{seed}")
                if found is None:
                    waiting.clear()  # what stops one run stops the others
                    print(f"{arm}-{seed} failed: see {args.out / f'{arm}-{seed}.txt'}")
                    continue
                rows.append({"arm": arm, "seed": seed, **found})
                print(f"{arm}-{seed}: linear {found['linear']:.1f}, kNN {found['knn']:.1f}")
            time.sleep(0.5 if running else 0)
    finally:
        for process in running.values():
            process.terminate()
    return rows


def correlations(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Spearman's rank correlation of early figures with the final linear accuracy."""
    wanted = ranks([row["linear"] for row in rows])
    return {
        key: float(np.corrcoef(ranks([row[key] for row in rows]), wanted)[0, 1])
        for key in ("early rankme", "early knn", "early linear", "rankme", "knn", "loss")
    }


def ranks(values: list[float]) -> np.ndarray:
    """Places in ascending order; equal values share the mean of theirs."""
    column = np.array(values)[:, None]
    return (column > column.T).sum(1) + (column == column.T).sum(1) / 2


def mae_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Finished runs of mae.py in the same folder, with the keys of the table.

    They may have seen more images than the others, or less: each says how many. Those of another
    model or of other data are left out and named.
    """
    fingerprint, rows = open_images(args.data).fingerprint(), []
    for file in sorted(args.out.glob("mae*/figures.json")):
        row = json.loads(file.read_text())
        words = overrides(args.size, "published", row["seed"], args.steps, args.set)
        theirs = load_config("vith14_in1k", row["settings"])
        apart = differences(theirs, load_config("vith14_in1k", words))
        apart = [text for text in apart if not text.startswith(MAES_OWN)]
        if row.get("data") != fingerprint:
            apart.append("other images")
        if apart:
            print(f"{file} is left out ({'; '.join(apart)})")
            continue
        arm = f"{row['arm']}, {row['images']:,} images"
        rows.append({**{key: row[key] for key in COLUMNS}, "arm": arm})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean over seeds (and range of the linear accuracy), the best arm first."""
    arms = {row["arm"] for row in rows}
    lines = [
        "| arm | seeds | linear | kNN | RankMe | loss | step (ms) |",
        "|---|---|---|---|---|---|---|",
    ]
    means = {}
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        mean = {key: statistics.fmean(row[key] for row in own) for key in COLUMNS[2:]}
        linear = [row["linear"] for row in own]
        spread = f" ({min(linear):.1f}-{max(linear):.1f})" if len(own) > 1 else ""
        means[arm] = (
            mean["linear"],
            (
                f"| {arm} | {len(own)} | {mean['linear']:.1f}{spread} | {mean['knn']:.1f} | "
                f"{mean['rankme']:.1f} | {mean['loss']:.3f} | {mean['step (ms)']:.0f} |"
            ),
        )
    return "\n".join([*lines, *(line for _, line in sorted(means.values(), reverse=True))])


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end too
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, help="folder of class folders")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="default: 1,000 on a CPU, 20,000 on a GPU")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SETTING",
        help="for all arms, such as optim.precision=bf16 or model.name=vit_small16_ijepa",
    )  # fmt: skip
    args = parser.parse_args()
    args.arms, args.seeds = ([*dict.fromkeys(given)] for given in (args.arms, args.seeds))
    if args.jobs < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--jobs and --steps must be at least 1")
    refuse_other_runs(args)
    rows = run_all(args)
    missing = len(args.arms) * len(args.seeds) - len(rows)
    if not rows:
        sys.exit("no run is finished")
    text = table([*rows, *mae_rows(args)])
    print(text)
    (args.out / "table.md").write_text(text + "\n")
    settings = {arm: overrides(args.size, arm, 0, args.steps, args.set) for arm in args.arms}
    summary: dict[str, Any] = {"rows": rows, "settings": settings}
    if len(rows) > 2:
        summary["rank correlation with linear"] = correlations(rows)
    (args.out / "study.json").write_text(json.dumps(summary, indent=1) + "\n")
    if missing:
        sys.exit(f"{missing} runs are not finished")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"study.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on")
