"""Pretrain the small model that ships with the package on rendered scenes, without labels.

The command that made it (one core; stop it with Ctrl-C, the same command goes on):

    python examples/pretrain_scenes/train.py runs/nano --scenes 40000 --steps 600

`runs/nano` receives checkpoints, `log.csv`, `curve.png` and `export`, the folder that ships; probe
it with probe.py.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ijepa_zoo import export
from ijepa_zoo.data.scenes import SPLIT_STARTS, render_scenes
from ijepa_zoo.train import PretrainConfig, pretrain


def recipe(steps: int, seed: int) -> PretrainConfig:
    """Settings of the shipped model; NOTES.md says why they differ from the published ones."""
    return PretrainConfig(
        "vit_nano8_64_ijepa",
        seed=seed,
        steps=steps,
        batch_size=64,
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        mask_mode="unbiased",
        target_scale=(0.06, 0.1),
        min_keep=1,
        warmup_steps=min(30, steps),
        start_lr=1e-4,
        lr=4e-4,
        final_lr=2e-5,
        final_weight_decay=0.1,
        momentum=0.99,
        regularizer_weight=0.1,
        regularizer_over="residuals",
        precision="fp32",
    )


def scenes(folder: Path, count: int, seed: int) -> np.ndarray:
    """Pictures of the training split, rendered once into `folder`."""
    path = folder / f"scenes-{seed}-{count}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        images = render_scenes(seed, SPLIT_STARTS["train"], count, 64, progress=True)["images"]
        np.save(path, images)
    return np.load(path, mmap_mode="r")


def draw_curve(log: Path, picture: Path) -> None:
    """Draw loss and RankMe over steps, one panel each."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    width, height, margin = 720, 240, 48
    last = int(rows[-1]["step"]) + 1
    image = Image.new("RGB", (width, 2 * height), "white")
    draw = ImageDraw.Draw(image)
    for panel, name in enumerate(("loss", "rankme")):
        points = [(int(row["step"]) + 1, float(row[name])) for row in rows if row[name]]
        top = 1.05 * max(value for _, value in points)
        floor = (panel + 1) * height - margin

        def place(
            step: float, value: float, top: float = top, floor: int = floor
        ) -> tuple[float, float]:
            x = margin + step / last * (width - 2 * margin)
            return x, floor - value / top * (height - 2 * margin)

        for share in (0, 0.5, 1):
            draw.line([place(0, share * top), place(last, share * top)], fill="#dddddd")
            draw.text((4, place(0, share * top)[1] - 6), f"{share * top:.3g}", fill="black")
            draw.text((place(share * last, 0)[0], floor + 6), f"{share * last:.0f}", fill="black")
        draw.line([place(*point) for point in points], fill="#1f5fa8", width=2)
        draw.circle(place(*points[-1]), 3, fill="#1f5fa8")
        draw.text((margin, floor - height + 2 * margin - 20), f"{name} over steps", fill="black")
    image.save(picture)


def main() -> None:
    """Train, or go on training, and draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="run folder; an unfinished run is continued")
    parser.add_argument("--scenes", type=int, default=40_000, help="pictures to render")
    parser.add_argument("--steps", type=int, default=600, help="updates of 64 images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = scenes(args.run, args.scenes, args.seed)
    try:
        config = recipe(args.steps, args.seed)
        ijepa = pretrain(config, images, args.run, monitor_every=20, checkpoint_every=100)
    except KeyboardInterrupt as stop:
        sys.exit(str(stop))
    draw_curve(args.run / "log.csv", args.run / "curve.png")
    folder = args.run / "export"
    export(ijepa, folder, dtype=torch.float16, license="Apache-2.0", overwrite=True)
    print(f"done: {args.run}; now: python examples/pretrain_scenes/probe.py {args.run}")


if __name__ == "__main__":
    main()
