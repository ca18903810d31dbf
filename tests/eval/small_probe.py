"""A task of seconds: symmetric pictures of three classes, and an encoder of four blocks."""

import numpy as np
import torch
from PIL import Image

from ijepa_zoo import FeatureExtractor, create_model
from ijepa_zoo.eval.tasks import EvalTransform, Protocol, Task

SIZE = 32
OPTIONS = {"device": "cpu", "workers": 0}
SQUASH = EvalTransform("squash", "bilinear", crop_pct=1.0)
PROTOCOL = Protocol(epochs=3, transform=SQUASH, batch_size=64, schedule="cosine", lrs=(0.05, 0.5))
TASK = Task("small", "classes", None, PROTOCOL)


def encoder(seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"img_size": SIZE, "embed_dim": 48, "depth": 4, "num_heads": 3, **kwargs}
    return create_model("vit_tiny16_ijepa", pretrained=False, **sizes).eval()


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pictures(folder, train=12, test=7, classes=3):
    """Class folders; mirrored halves, so that a flip changes nothing."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for kind in range(classes):
            for number in range(count):
                half = rng.integers(0, 156, (SIZE, SIZE // 2, 3)) + 3 * kind
                pixels = np.concatenate([half, half[:, ::-1]], axis=1).astype(np.uint8)
                save(pixels, folder / split / f"class{kind}" / f"{number}.png")
    return folder


def pixels_of(folder):
    """Normalized images and classes of all pictures, in the order of their names."""
    files = sorted(folder.rglob("*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    return (pixels.permute(0, 3, 1, 2) / 255 - mean) / std, labels


@torch.no_grad()
def features_of(images, layers, pool="auto"):
    return FeatureExtractor(encoder(), layers, pool)(images)


def break_files(files):
    for file in files:
        file.write_bytes(b"no image")


def the_one(folder, pattern):
    (path,) = folder.glob(pattern)
    return path
