"""Features from an exported folder with onnxruntime only: no PyTorch, no timm, no ijepa_zoo.

    ijepa-zoo export vit_nano8_64_ijepa served --to onnx
    python examples/serve_onnx.py served examples/images/photos/*.jpg

`--compare vit_nano8_64_ijepa` also loads the model itself and compares the features.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def pixels(image: Image.Image, how: dict) -> np.ndarray:
    """The graph's input of one image, uint8 [3, H, W], by the preprocessing in serving.json."""
    image, size = image.convert(how["color"]), how["resize"]
    if isinstance(size, int):  # of the short side
        long = int(size * max(image.size) / min(image.size))
        size = (size, long) if image.height < image.width else (long, size)
    image = image.resize(size[::-1], Image.Resampling[how["interpolation"].upper()])
    height, width = how["center_crop"]
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height))).transpose(2, 0, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="of `ijepa-zoo export ... --to onnx`")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--compare", metavar="NAME", help="the model that was exported")
    args = parser.parse_args()
    record = json.loads((args.folder / "serving.json").read_text())
    session = onnxruntime.InferenceSession(args.folder / record["file"])
    batch = np.stack([pixels(Image.open(path), record["preprocessing"]) for path in args.images])
    (features,) = session.run(None, {"images": batch})
    for path, row in zip(args.images, features):
        print(f"norm {np.linalg.norm(row):6.2f}  {path}")
    print(f"{len(features)} images -> features {list(features.shape)}, {record['precision']}")
    if args.compare:
        import torch

        import ijepa_zoo

        model = ijepa_zoo.create_model(args.compare).eval()
        transform = ijepa_zoo.create_transform(model)
        images = torch.stack([transform(Image.open(path)) for path in args.images])
        extract = ijepa_zoo.FeatureExtractor(model, record["layers"], record["pool"])
        with torch.inference_mode():
            expected = extract(images).numpy()
        error = np.linalg.norm(features - expected) / np.linalg.norm(expected)
        allowed = record["checked"]["limit"]
        print(f"relative error to {args.compare} in PyTorch: {error:.1e}, allowed {allowed:g}")
        if error > allowed:
            raise SystemExit("the features differ: is it the model that was exported?")
