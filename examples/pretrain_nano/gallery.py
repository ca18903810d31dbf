"""What the predictor expects in a hidden region: the nearest patches of other scenes, as a picture.

A block of 3 x 3 patches of a rendered scene is hidden. For each hidden patch the predicted feature
is compared with the features of all patches of a gallery of other scenes, and the patch of the
nearest one is put in its place. Columns: the scene, what the model sees, the hidden block filled
with what it expects, and with the patches nearest to the true features (the best it could do).

A filled patch is a hit if it shows an object where the scene has one, or ground where it has
ground. Chance: gallery patches of the same place, so knowing where objects usually stand is no
merit.

    python examples/pretrain_nano/gallery.py --out gallery.png
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import ijepa_zoo
from ijepa_zoo.data.scenes import SPLIT_STARTS, render_scenes

SIDE, CAPTION = 192, 16  # pixels of a scene in the picture, and of the words above

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="vit_nano8_64_ijepa", help="also local-dir:RUN/export")
parser.add_argument("--gallery", type=int, default=600, help="scenes to choose patches from")
parser.add_argument("--scenes", type=int, default=200, help="scenes to predict")
parser.add_argument("--drawn", type=int, default=6, help="scenes in the picture")
parser.add_argument("--out", default="gallery.png")
args = parser.parse_args()
if min(args.gallery, args.scenes, args.drawn) < 1:
    parser.error("--gallery, --scenes and --drawn must be at least 1")

ijepa = ijepa_zoo.create_ijepa(args.model).eval()
transform = ijepa_zoo.create_transform(ijepa.encoder)
rows, columns = ijepa.encoder.patch_embed.grid_size
patch = ijepa.encoder.patch_embed.patch_size[0]
if rows != columns or rows < 5:
    parser.error(f"--model has a grid of {rows} x {columns} patches; it must be square, 5 or more")
grid = torch.arange(rows * columns).view(rows, columns)
hidden = grid[rows // 2 - 1 : rows // 2 + 2, columns // 2 - 1 : columns // 2 + 2].flatten()
seen = torch.tensor(sorted(set(grid.flatten().tolist()) - set(hidden.tolist())))


def on_objects(masks: np.ndarray) -> Tensor:
    """Whether half of a patch's pixels belong to objects, `[n, rows * columns]`."""
    pixels = torch.from_numpy(masks > 0).view(len(masks), rows, patch, columns, patch)
    return (pixels.float().mean((2, 4)) >= 0.5).flatten(1)


def patches(images: np.ndarray) -> np.ndarray:
    """Pixels of every patch, `[n, rows * columns, patch, patch, 3]`."""
    split = images.reshape(len(images), rows, patch, columns, patch, 3)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), -1, patch, patch, 3)


@torch.inference_mode()
def features(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """True features of all patches `[n, N, D]`, and predicted ones of the hidden block."""
    batch = torch.stack([transform(Image.fromarray(image)) for image in images])
    n = len(batch)
    truth = ijepa.target_tokens(batch, grid.flatten().expand(n, 1, -1).contiguous())[:, 0]
    context, targets = seen.expand(n, -1).contiguous(), hidden.expand(n, 1, -1).contiguous()
    return truth, ijepa.predict(batch, context, targets)[:, 0]


size, render = rows * patch, {"progress": True, "dense": True}
gallery = render_scenes(7, SPLIT_STARTS["train"], args.gallery, size, **render)
scenes = render_scenes(7, SPLIT_STARTS["val"], args.scenes, size, **render)
known, _ = features(gallery["images"])
truth, predicted = features(scenes["images"])
centre = known.mean((0, 1))
index = F.normalize((known - centre).flatten(0, 1), dim=-1)


def nearest(wanted: Tensor) -> Tensor:
    """Number of the gallery patch of highest cosine for features `[n, L, D]`."""
    return torch.stack([(F.normalize(w - centre, dim=-1) @ index.T).argmax(-1) for w in wanted])


expected, best = nearest(predicted), nearest(truth[:, hidden])
kind, gallery_kind = on_objects(scenes["masks"])[:, hidden], on_objects(gallery["masks"])
usual = gallery_kind[:, hidden].float().mean(0)  # how often a place shows an object
for name, place in (("objects", kind), ("ground", ~kind)):
    chance = torch.where(kind, usual, 1 - usual)[place].mean()
    hits = [
        (gallery_kind.flatten()[found] == kind)[place].float().mean() for found in (expected, best)
    ]
    print(
        f"{int(place.sum()):5} hidden patches show {name:7}: hit rate {100 * hits[0]:.1f} %, "
        f"chance {100 * chance:.1f} %, with the true features {100 * hits[1]:.1f} %"
    )

stock = patches(gallery["images"]).reshape(-1, patch, patch, 3)
drawn = min(args.drawn, len(kind))
sheet = Image.new("RGB", (4 * (SIDE + 8) - 8, CAPTION + drawn * (SIDE + 8) - 8), "white")
for column, word in enumerate(("scene", "seen", "predicted", "true features")):
    ImageDraw.Draw(sheet).text((column * (SIDE + 8), 2), word, fill="black")
frame = [int(c * SIDE / rows) for c in (rows // 2 - 1, rows // 2 - 1, rows // 2 + 2, rows // 2 + 2)]
chosen = kind.sum(1).topk(drawn).indices.tolist()  # scenes that hide most of an object
for row, scene in enumerate(chosen):
    pictures = [scenes["images"][scene].copy() for _ in range(4)]
    for number, place in enumerate(hidden.tolist()):
        top, left = place // columns * patch, place % columns * patch
        area = (slice(top, top + patch), slice(left, left + patch))
        pictures[1][area] = 128
        pictures[2][area] = stock[expected[scene, number]]
        pictures[3][area] = stock[best[scene, number]]
    for column, picture in enumerate(pictures):
        tile = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        ImageDraw.Draw(tile).rectangle(frame, outline="red", width=2)
        sheet.paste(tile, (column * (SIDE + 8), CAPTION + row * (SIDE + 8)))
sheet.save(args.out)
print(f"{drawn} scenes -> {args.out}")
