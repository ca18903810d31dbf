"""Pretrain the small model that ships with the package on photographs and rendered scenes.

The command that made it (one core; stop it with Ctrl-C, the same command resumes):

    python examples/pretrain_nano/train.py runs/nano --photos imagenette/train tiny-imagenet/train

Photographs: Imagenette (github.com/fastai/imagenette) and Tiny-ImageNet
(cs231n.stanford.edu/tiny-imagenet-200.zip); their labels are not read. `runs/nano` receives the
run (see `ijepa-zoo pretrain`) and `export`, the folder that ships.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import RandomResizedCrop
from tqdm import tqdm

from ijepa_zoo.data import open_images
from ijepa_zoo.data.scenes import SPLIT_STARTS, render_scenes
from ijepa_zoo.train import export_run, load_config, pretrain

SIZE = 64
NOTE = """
Trained without labels on photographs of ImageNet (Tiny-ImageNet and Imagenette), whose terms are
research use, and on rendered scenes.
"""


def photographs(folders: list[Path], crops: int) -> np.ndarray:
    """Random crops of the photographs: one of each, several if it is larger than `SIZE`."""
    torch.manual_seed(0)
    small = RandomResizedCrop(SIZE, scale=(0.4, 1.0))
    large = RandomResizedCrop(SIZE, scale=(0.2, 1.0))
    photos, images = open_images(folders), []
    for index in tqdm(range(len(photos)), desc="photographs"):
        image = photos.read(index)
        if min(image.size) > SIZE:
            images.extend(np.asarray(large(image)) for _ in range(crops))
        else:
            images.append(np.asarray(small(image)))
    return np.stack(images)


def training_set(run: Path, photos: list[Path], crops: int, scenes: int) -> Path:
    """One array of all images, made once; the scenes are those of the training split."""
    path = run / "images.npy"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        parts = [render_scenes(0, SPLIT_STARTS["train"], scenes, SIZE, progress=True)["images"]]
        if photos:
            parts.append(photographs(photos, crops))
        np.save(path, np.concatenate(parts))
    return path


def main() -> None:
    """Train, or go on training, and export in the precision that ships."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="run folder; an unfinished run is resumed")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders of photographs")
    parser.add_argument("--crops", type=int, default=16, help="crops of a large photograph")
    parser.add_argument("--scenes", type=int, default=70_000, help="scenes to render")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="changes: optim.duration='9 steps'")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config("nano", args.set)
    try:
        pretrain(config, training_set(args.run, args.photos, args.crops, args.scenes), args.run)
    except KeyboardInterrupt as stop:
        sys.exit(str(stop))
    export_run(args.run, dtype=torch.float16, license="Apache-2.0", overwrite=True)
    if args.photos:
        with (args.run / "export" / "README.md").open("a") as card:
            card.write(NOTE)
    print(f"done: {args.run / 'export'}")


if __name__ == "__main__":
    main()
