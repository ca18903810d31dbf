"""Image retrieval: the nearest pictures by the cosine of their features, drawn as a sheet.

    python examples/retrieve.py --gallery 1000 --queries 6 --out retrieval.png

Without `--folder` the gallery is rendered scenes of the package. Each row: query, then neighbors.
"""

import argparse

import torch
import torch.nn.functional as F
from PIL import Image

import ijepa_zoo
from ijepa_zoo.data.scenes import SPLIT_STARTS, render_scenes

parser = argparse.ArgumentParser()
parser.add_argument("--folder", help="gallery of your own images")
parser.add_argument("--model", default="vit_nano8_64_ijepa")
parser.add_argument("--gallery", type=int, default=1000, help="scenes to render without --folder")
parser.add_argument("--queries", type=int, default=6)
parser.add_argument("--neighbors", type=int, default=5)
parser.add_argument("--out", default="retrieval.png")
args = parser.parse_args()

if args.folder:
    found = ijepa_zoo.open_images(args.folder)
    images = [found.read(index) for index in range(len(found))]
else:
    scenes = render_scenes(0, SPLIT_STARTS["val"], args.gallery)
    images = [Image.fromarray(image) for image in scenes["images"]]

model = ijepa_zoo.create_model(args.model).eval()
transform = ijepa_zoo.create_transform(model)
extract = ijepa_zoo.FeatureExtractor(model, layers="last4", pool="avg")
with torch.inference_mode():
    batches = torch.stack([transform(image) for image in images]).split(64)
    features = torch.cat([extract(batch) for batch in batches])
features = F.normalize(features - features.mean(0), dim=1)

queries = features[: args.queries]
similar = queries @ features.T
similar.fill_diagonal_(-2)  # a query is not its own neighbor
best = similar.topk(min(args.neighbors, len(images) - 1)).indices
side, gap = 128, 6
sheet = Image.new("RGB", ((best.shape[1] + 1) * (side + gap) + gap * 3, len(best) * (side + gap)))
for row, neighbors in enumerate(best.tolist()):
    for column, index in enumerate([row, *neighbors]):
        left = column * (side + gap) + (gap * 3 if column else 0)
        sheet.paste(images[index].resize((side, side)), (left, row * (side + gap)))
sheet.save(args.out)
print(f"{len(best)} queries in a gallery of {len(images)} -> {args.out}")
