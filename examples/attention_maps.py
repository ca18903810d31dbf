"""Attention maps: where one patch looks, and where all patches look on average, as a picture.

    python examples/attention_maps.py examples/images/photos attention.png --size 192

Columns: image with the query patch framed, attention of that patch, mean attention of all patches.
Both are means over the heads of one block, relative to uniform attention (black 0, white 4 times).
"""

import argparse

import torch
from PIL import Image, ImageDraw
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract

import ijepa_zoo

parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?", default="examples/images/photos")
parser.add_argument("out", nargs="?", default="attention.png")
parser.add_argument("--model", default="vit_nano8_64_ijepa")
parser.add_argument("--size", type=int, default=192)
parser.add_argument("--block", type=int, default=-1)
parser.add_argument("--images", type=int, default=8, help="how many, from the first")
parser.add_argument("--query", type=float, nargs=2, default=(0.5, 0.5), help="row, column in 0..1")
args = parser.parse_args()

set_fused_attn(False)  # fused attention never stores the weights; set it before building the model
model = ijepa_zoo.create_model(args.model, img_size=args.size).eval()
images = ijepa_zoo.open_images(args.folder)
pictures = [images.read(index) for index in range(min(args.images, len(images)))]
normalize = ijepa_zoo.create_transform(model)
crop = ijepa_zoo.create_transform(model, normalize=False)

with torch.inference_mode():
    by_block = AttentionExtract(model)(torch.stack([normalize(p) for p in pictures]))
attention = list(by_block.values())[args.block].mean(1)  # [n, heads, N, N] -> [n, N, N]
attention = attention[:, :, model.num_prefix_tokens :]  # columns of patches only

rows, columns = model.patch_embed.grid_size
row, column = int(args.query[0] * (rows - 1)), int(args.query[1] * (columns - 1))
one = attention[:, model.num_prefix_tokens + row * columns + column]
side, gap = 192, 8
cell = side / rows
sheet = Image.new("RGB", (3 * (side + gap) - gap, len(pictures) * (side + gap) - gap), "white")
for index, picture in enumerate(pictures):
    tile = Image.fromarray(torch.as_tensor(crop(picture)).permute(1, 2, 0).numpy())
    tile = tile.resize((side, side))
    frame = [column * cell, row * cell, (column + 1) * cell, (row + 1) * cell]
    ImageDraw.Draw(tile).rectangle(frame, outline="red", width=2)
    sheet.paste(tile, (0, index * (side + gap)))
    for place, weights in enumerate((one[index], attention[index].mean(0)), 1):
        ratio = (weights.view(rows, columns) * rows * columns / 4).clamp(0, 1)
        heat = Image.fromarray((ratio * 255).byte().numpy()).resize((side, side))
        sheet.paste(heat, (place * (side + gap), index * (side + gap)))
sheet.save(args.out)
peak = one.amax(1).mean().item() * rows * columns
print(f"block {args.block}: the query's strongest patch has {peak:.1f} times uniform -> {args.out}")
