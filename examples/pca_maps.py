"""Dense maps as a picture: the first three principal components of patch features.

    python examples/pca_maps.py examples/images/scenes maps.png --size 192

`--size` runs the model at another image size than it was trained at (positions are resampled), so
the maps get finer.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

import ijepa_zoo
from ijepa_zoo.visualize import pca_picture

parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?", default="examples/images/scenes")
parser.add_argument("out", nargs="?", default="maps.png")
parser.add_argument("--model", default="vit_nano8_64_ijepa")
parser.add_argument("--size", type=int, default=128)
args = parser.parse_args()

model = ijepa_zoo.create_model(args.model, img_size=args.size).eval()
paths = sorted(p for p in Path(args.folder).iterdir() if p.suffix in (".png", ".jpg", ".jpeg"))
images = [Image.open(path).convert("RGB") for path in paths]
pixels = ijepa_zoo.create_transform(model, normalize=False)
normalized = ijepa_zoo.create_transform(model)

extract = ijepa_zoo.FeatureExtractor(model, layers="last", pool=None)
with torch.inference_mode():
    maps = extract(torch.stack([normalized(image) for image in images]))
as_seen = torch.stack([torch.as_tensor(pixels(image)) for image in images])
pca_picture(as_seen, maps).save(args.out)
print(f"{len(images)} maps of {maps.shape[-2]}x{maps.shape[-1]} patches -> {args.out}")
