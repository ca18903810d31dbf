"""Small inputs that the tests of the data layer make themselves."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from ijepa_zoo.data import ImageDataset


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(level: int = 0, mode: str = "L", size: tuple[int, int] = (3, 2)) -> bytes:
    return encoded(Image.new(mode, size, level))


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class Photos:
    """A map-style dataset with attributes as given; the first value of an image is its number."""

    def __init__(self, length: int = 3, **attributes: object) -> None:
        self.length = length
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (2, 2), index), 0


def levels(images: ImageDataset) -> list[int]:
    """First value of every image."""
    return [int(np.asarray(images.read(i)).reshape(-1)[0]) for i in range(len(images))]


def labels(images: ImageDataset) -> list[str | None]:
    return [images.label(i) for i in range(len(images))]
