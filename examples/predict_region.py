"""Predicted and true features of a hidden region, as a picture.

A block of patches is hidden from the context encoder, and the predictor predicts the features of
the target encoder there. Upper row: the image with the hidden block grayed out. Lower row: cosine
of the prediction and the true feature of every patch, black for 0 or less, white for 0.6 or more.
A good prediction is bright inside the red frame and dark elsewhere.

    python examples/predict_region.py examples/images/scenes region.png
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import ijepa_zoo

parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?", type=Path, default="examples/images/scenes")
parser.add_argument("out", nargs="?", default="region.png")
args = parser.parse_args()

ijepa = ijepa_zoo.create_ijepa("vit_nano8_64_ijepa").eval()
transform = ijepa_zoo.create_transform(ijepa.encoder)
rows, columns = ijepa.encoder.patch_embed.grid_size
grid = torch.arange(rows * columns).view(rows, columns)
top, left, height, width = rows // 2 - 1, columns // 2 - 1, 3, 3
hidden = grid[top : top + height, left : left + width].flatten()
seen = torch.tensor([patch for patch in grid.flatten().tolist() if patch not in hidden.tolist()])

paths = sorted(p for p in args.folder.iterdir() if p.suffix in (".png", ".jpg", ".jpeg"))
images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
context = seen.expand(len(images), -1).contiguous()
targets = hidden.expand(len(images), 1, -1).contiguous()
everything = grid.flatten().expand(len(images), 1, -1).contiguous()
with torch.inference_mode():
    predicted = ijepa.predict(images, context, targets)[:, 0]  # [B, L, D]
    truth = ijepa.target_tokens(images, everything)[:, 0]  # [B, N, D]
center = truth.mean((0, 1))
closeness = F.cosine_similarity((predicted.mean(1) - center)[:, None], truth - center, dim=-1)

side = 192
cell = side // rows
frame = [left * cell, top * cell, (left + width) * cell - 1, (top + height) * cell - 1]
sheet = Image.new("RGB", (len(paths) * (side + 8), 2 * side + 8), "white")
for index, (path, score) in enumerate(zip(paths, closeness.view(-1, rows, columns))):
    picture = Image.open(path).convert("RGB").resize((side, side))
    ImageDraw.Draw(picture).rectangle(frame, fill="gray")
    heat = Image.fromarray((score.clamp(0, 0.6) * 425).byte().numpy()).resize(
        (side, side), Image.Resampling.BOX
    )
    for row, tile in enumerate((picture, heat.convert("RGB"))):
        ImageDraw.Draw(tile).rectangle(frame, outline="red", width=2)
        sheet.paste(tile, (index * (side + 8), row * (side + 8)))
sheet.save(args.out)
inside = closeness[:, hidden].mean() - closeness[:, seen].mean()
print(f"cosine inside the hidden block minus outside, {len(paths)} images: {inside:+.3f}")
