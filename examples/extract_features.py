"""Features of a folder of images, in a few lines: pooled, four blocks, and maps.

python examples/extract_features.py examples/images
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import ijepa_zoo

folder = sys.argv[1] if len(sys.argv) > 1 else "examples/images"
out = sys.argv[2] if len(sys.argv) > 2 else "last4.safetensors"

# All images of the folder into a file, as `ijepa-zoo features` does.
model = ijepa_zoo.create_model("vit_nano8_64_ijepa").eval()
report = ijepa_zoo.extract_features([folder], model, out, layers="last4")
features = load_file(out)["features"]
for line in map(json.loads, Path(report.index).read_text().splitlines()):
    if line["row"] is not None:
        norm = features[line["row"]].norm().item()
        print(f"row {line['row']:3d}  norm {norm:6.2f}  {line['label']}  {line['path']}")
print(f"{report.shape[0]} images -> {out}, features {list(features.shape)}")

# One image at a time, as a tensor.
transform = ijepa_zoo.create_transform(model)
path = json.loads(Path(report.index).read_text().splitlines()[0])["path"]
image = transform(Image.open(path)).unsqueeze(0)
with torch.inference_mode():
    tokens = model.encode(image)
    maps = ijepa_zoo.FeatureExtractor(model, pool=None)(image)
    few = model.encode(image, keep=torch.tensor([[0, 1, 8, 9]]))  # only the top left corner
print(f"tokens {list(tokens.shape)}, map {list(maps.shape)}, four patches {list(few.shape)}")
