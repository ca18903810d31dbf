"""Features of a folder of images, in a few lines: pooled, four blocks, and maps.

python examples/extract_features.py examples/images
"""

import sys

import torch
from PIL import Image
from safetensors.torch import load_file

import ijepa_zoo
from ijepa_zoo.data.sources import find_items

folder = sys.argv[1] if len(sys.argv) > 1 else "examples/images"
out = sys.argv[2] if len(sys.argv) > 2 else "features.safetensors"

# All images of the folder into a file, as `ijepa-zoo features` does.
model = ijepa_zoo.create_model("vit_nano8_64_ijepa").eval()
report = ijepa_zoo.extract_features(find_items([folder]), model, out, layers="last4")
print(f"{report.shape[0]} images -> {out}, features {list(load_file(out)['features'].shape)}")

# One image at a time, as a tensor.
transform = ijepa_zoo.create_transform(model)
path = next(item.path for item in find_items([folder]) if item.skipped is None)
image = transform(Image.open(path).convert("RGB")).unsqueeze(0)
with torch.inference_mode():
    tokens = model.encode(image)
    maps = ijepa_zoo.FeatureExtractor(model, pool=None)(image)
    few = model.encode(image, keep=torch.tensor([[0, 1, 8, 9]]))  # only the top left corner
print(f"tokens {list(tokens.shape)}, map {list(maps.shape)}, four patches {list(few.shape)}")
