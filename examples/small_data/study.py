"""Which settings help I-JEPA on 10,000 to 100,000 images: one table of runs and their probes.

    python examples/small_data/study.py --train imagenette/train --val imagenette/val --out runs

Every arm is one recipe with some settings changed, and all arms see the same images as often.
`kNN` and `linear` are `ijepa-zoo eval knn` and `eval linear --cached` on the validation images,
the setting and the head chosen on held-out training images. A repeated command resumes. Arms,
seeds and length: `--arms term published --seeds 0 1 2 --epochs 200`; `--set` changes settings of
all arms, such as `--set model.name=vit_small16_ijepa model.img_size=128 optim.precision=bf16`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from mae import train_mae

from ijepa_zoo.errors import UserError
from ijepa_zoo.eval import evaluate_knn, evaluate_linear
from ijepa_zoo.train import PretrainConfig, load_config, pretrain
from ijepa_zoo.train.logger import read_log

BASE = [  # on the recipe of the model that ships
    "data.crop_scale=0.3,1.0", "data.crop_ratio=0.75,1.3333", "data.horizontal_flip=true",
    "data.held_out=1000", "mask.target_scale=0.15,0.2", "optim.warmup=600 steps", "optim.lr=4e-4",
    "log.log_every=50", "log.monitor_every=1000", "log.save_every=500 steps", "log.keep=1",
    "runtime.threads=1", "runtime.workers=0",
]  # fmt: skip
ARMS: dict[str, list[str]] = {
    "random": [],  # not trained
    "mae": [],  # transformers' MAE of the same encoder, on the same batches
    "published": [
        "mask.mode=published", "mask.min_keep=4", "data.horizontal_flip=false",
        "optim.start_lr=2e-4", "optim.lr=1e-3", "optim.final_lr=1e-6",
        "optim.final_weight_decay=0.4", "optim.momentum=0.996", "optim.regularizer_weight=0",
    ],
    "no_term": ["optim.regularizer_weight=0"],
    "term": [],
    "term_images": ["optim.regularizer_over=images"],
    "ema_0.95": ["optim.momentum=0.95"],
    "masks_4": ["mask.per_image=4"],
    "shallow": ["model.predictor_depth=1"],
    "wide": ["model.predictor_embed_dim=128"],
    "large_targets": ["mask.target_scale=0.25,0.35"],
    "lr_8e-4": ["optim.lr=8e-4"],
    "full_crops": ["data.crop_scale=0.08,1.0"],
}  # fmt: skip
COLUMNS = ("kNN", "linear", "RankMe", "position", "image", "images seen", "hours")


def settings(arm: str, seed: int, epochs: int, changes: list[str]) -> PretrainConfig:
    """The recipe of an arm."""
    own = [f"seed={seed}", f"optim.duration={epochs} epochs"]
    return load_config("nano", [*BASE, *own, *ARMS[arm], *changes])


def run(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train an arm and probe it; what is finished is not repeated."""
    config, out = settings(arm, seed, args.epochs, args.set), args.out / f"{arm}-{seed}"
    row: dict[str, Any] = {"arm": arm, "seed": seed}
    if arm == "random":
        model = config.model.name
    elif arm == "mae":
        model = f"timm:local-dir:{train_mae(config, args.train, out)}"
    else:
        model = f"local-dir:{pretrain(config, args.train, out)}"
        row |= monitored(config, out)
    options: dict[str, Any] = {
        "data": args.train,
        "test": args.val,
        "out": args.out / "probes",
        "random": arm == "random",
        "seed": seed if arm == "random" else 0,
        "progress": True,
    }
    row["kNN"] = evaluate_knn("classes", model, **options).value
    row["linear"] = evaluate_linear("classes", model, cached=True, **options).value
    return row


def monitored(config: PretrainConfig, out: Path) -> dict[str, float]:
    """What the log says of a finished run."""
    rows = read_log(out)
    last = next(row for row in reversed(rows) if "rankme" in row)
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    speed = statistics.median(speeds)
    seen = (rows[-1]["step"] + 1) * config.optim.batch_size
    return {
        "RankMe": last["rankme"],
        "position": 100 * last["position_variance"],
        "image": 100 * last["image_variance"],
        "images seen": seen,
        "hours": seen / speed / 3600,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds, with the range of the accuracies, the best arm first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["arm"], []).append(row)
    ordered = sorted(groups.values(), key=lambda own: -statistics.fmean(r["kNN"] for r in own))
    lines = [f"| arm | seeds | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for own in ordered:
        cells = [own[0]["arm"], str(len(own))]
        for column in COLUMNS:
            values = [row[column] for row in own if column in row]
            cells.append(cell(column, values) if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(column: str, values: list[float]) -> str:
    """The mean, and the range of accuracies."""
    mean = statistics.fmean(values)
    if column == "images seen":
        return f"{mean:,.0f}"
    ranged = column in ("kNN", "linear") and len(values) > 1
    return f"{mean:.1f}" + (f" ({min(values):.1f}-{max(values):.1f})" if ranged else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--val", type=Path, required=True, help="the same classes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING", help="for all arms")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        for arm in args.arms:
            rows.append(run(arm, seed, args))
            (args.out / "study.json").write_text(json.dumps(rows, indent=1) + "\n")
            (args.out / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"study.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command resumes")
