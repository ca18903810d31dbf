"""Pretrain the small model that ships with the package on rendered scenes, without labels.

The command that made it (one core; stop it with Ctrl-C, the same command goes on):

    python examples/pretrain_scenes/train.py runs/nano --scenes 40000

`runs/nano` receives the run (see `ijepa-zoo pretrain`) and `export`, the folder that ships; probe
it with probe.py, draw its curves with `ijepa-zoo plot runs/nano`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from ijepa_zoo.data.scenes import SPLIT_STARTS, render_scenes
from ijepa_zoo.train import export_run, load_config, pretrain


def scenes(folder: Path, count: int, seed: int) -> Path:
    """Pictures of the training split, rendered once into `folder`."""
    path = folder / f"scenes-{seed}-{count}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        images = render_scenes(seed, SPLIT_STARTS["train"], count, 64, progress=True)["images"]
        np.save(path, images)
    return path


def main() -> None:
    """Train, or go on training, and export in the precision that ships."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="run folder; an unfinished run is continued")
    parser.add_argument("--scenes", type=int, default=40_000, help="pictures to render")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="changes: optim.duration='9 steps'")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config("nano_scenes", [f"seed={args.seed}", *args.set])
    try:
        pretrain(config, scenes(args.run, args.scenes, args.seed), args.run)
    except KeyboardInterrupt as stop:
        sys.exit(str(stop))
    export_run(args.run, dtype=torch.float16, license="Apache-2.0", overwrite=True)
    print(f"done: {args.run}; now: python examples/pretrain_scenes/probe.py {args.run}")


if __name__ == "__main__":
    main()
