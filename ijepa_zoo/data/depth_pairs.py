"""Images with a depth map each: NYU Depth v2, any folder of pairs, or rendered scenes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import DataError, ImageError
from ..seeds import Stream, numpy_generator
from .depth_names import ARRAY, Pair, folder_pairs, listed_pairs
from .image_sets import open_images
from .images import ImageReader
from .items import Item
from .pixels import ImageSet, Pixels, from_array

DepthMap = npt.NDArray[np.float32]

_RENDERED = re.compile(r"scenes:(\d+),(\d+)(?:,(\d+))?")
_RENDER_SEED = 0  # of the data set; a run's seed must not change what it is tested on
_LISTS = ("nyu_train.txt", "nyu_test.txt")
_MILLIMETRES = 1000.0  # steps of a 16-bit picture in a metre, unless the caller knows better
_SHAPES_DIFFER = 0.02  # relative difference of aspect up to which a map belongs to its image
_TEST_SHARE = 0.2
_DAMAGED = (ValueError, EOFError, MemoryError, SyntaxError, OSError)  # np.load and Pillow


class DepthSet(Protocol):
    """Images and their depth maps, readable in any order, by several processes at once."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Pixels, DepthMap]:
        """An RGB image and its depth `[H, W]` in metres (or scene units), 0 where unknown.

        Raises:
            ImageError: One of the two cannot be read, or they differ in shape.
        """

    def name(self, index: int) -> str:
        """The image's name for messages."""

    def fingerprint(self) -> str:
        """Some hexadecimal digits that are the same for the same data, and no other."""


@dataclass(frozen=True)
class DepthData:
    """What a user named, split into training and test data.

    Attributes:
        train, test: The two sets.
        max_depth: The largest depth that counts, where the data set says: 10 m for NYU, the
            largest of the training maps for rendered scenes; else None.
        crop: `eigen` where the figures are customarily taken in that part of the picture.
        split: In words, where the test set comes from.
        name: What the data are, in a word or two.
        unit: Of the depths.
    """

    train: DepthSet
    test: DepthSet
    max_depth: float | None
    crop: str | None
    split: str
    name: str = "pairs"
    unit: str = "m"


@dataclass(frozen=True)
class PairFiles:
    """Image files and depth files, 16-bit pictures or `.npy`.

    Attributes:
        images: The images.
        depths: Path of the depth map of each.
        depth_scale: Stored units in a metre; None for 1000 in 16-bit pictures (millimetres) and 1
            in floating-point arrays.
    """

    images: ImageSet
    depths: tuple[str, ...]
    depth_scale: float | None = None

    def __len__(self) -> int:
        return len(self.depths)

    def read(self, index: int) -> tuple[Pixels, DepthMap]:
        """See :class:`DepthSet`."""
        image, path = self.images.read(index), self.depths[index]
        depth = read_depth(path, self.depth_scale)
        assert isinstance(image, Image.Image)  # files of three channels always are
        if abs(image.width * depth.shape[0] / (image.height * depth.shape[1]) - 1) > _SHAPES_DIFFER:
            raise ImageError(
                f"the image is {image.width} x {image.height}, its depth map '{path}' "
                f"{depth.shape[1]} x {depth.shape[0]}: not of the same shape"
            )
        return image, depth

    def name(self, index: int) -> str:
        """The image's path."""
        return self.images.name(index)

    def fingerprint(self) -> str:
        """See :class:`DepthSet`; by names of the images, sizes and times of all files."""
        digest = blake2b(self.images.fingerprint().encode(), digest_size=8)
        for path in (*map(self.images.name, range(len(self))), *self.depths):
            state = os.stat(path)
            digest.update(f"{state.st_size} {state.st_mtime_ns}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class SceneDepths:
    """Rendered scenes with their depth, in memory.

    Attributes:
        images: uint8 `[n, H, W, 3]`.
        depth: float32 `[n, H, W]` in scene units.
        origin: What the scenes are, for names and the fingerprint.
    """

    images: npt.NDArray[np.uint8]
    depth: DepthMap
    origin: str

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Pixels, DepthMap]:
        """See :class:`DepthSet`."""
        return from_array(self.images[index], 3), self.depth[index]

    def name(self, index: int) -> str:
        """Number of the scene."""
        return f"scene {index} of {self.origin}"

    def fingerprint(self) -> str:
        """See :class:`DepthSet`."""
        return blake2b(self.images.tobytes() + self.depth.tobytes(), digest_size=8).hexdigest()


def read_depth(path: str, depth_scale: float | None = None) -> DepthMap:
    """Read a depth map.

    Args:
        path: A picture of one channel of 16 bits or more, or a `.npy` array `[H, W]`.
        depth_scale: See :class:`PairFiles`.

    Returns:
        float32 `[H, W]` in metres; 0 where the file holds 0, a negative number, infinity or NaN.

    Raises:
        ImageError: It cannot be read, or its units are not known.
    """
    with ImageReader().open(Item(path)) as file:
        try:
            stored = np.load(file, allow_pickle=False) if path.lower().endswith(ARRAY) else None
            if stored is None:
                stored = np.asarray(Image.open(file))
        except _DAMAGED as error:
            raise ImageError(f"the depth map '{path}' is damaged: {error}") from error
    if stored.ndim == 3 and stored.shape[2] == 1:
        stored = stored[:, :, 0]
    if stored.ndim != 2 or stored.size == 0 or stored.dtype.kind not in "uif":
        raise ImageError(f"the depth map '{path}' is {stored.dtype} {list(stored.shape)}, not one "
                         "number a pixel [H, W]")  # fmt: skip
    if depth_scale is None:
        if stored.dtype.itemsize == 1:
            raise ImageError(
                f"the depth map '{path}' has 8 bits, and what they stand for is not known: give "
                "the units in a metre, depth_scale=25.5 where 255 is 10 m (--depth-scale)"
            )
        depth_scale = 1.0 if stored.dtype.kind == "f" else _MILLIMETRES
    depth = stored.astype(np.float32) / np.float32(depth_scale)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def open_depth(
    source: str | Path,
    *,
    seed: int = 0,
    depth_scale: float | None = None,
    workers: int = 0,
    progress: bool = False,
) -> DepthData:
    """Open what a user names.

    Args:
        source: One of

            - a folder in NYU Depth v2's usual layout, with `nyu_train.txt` and `nyu_test.txt`
              (lines of image, depth map and focal length);
            - any folder of pairs. Depth maps are `.npy` files or have `depth` as a word of a
              folder's or their own name; a pair has the same name without such words and `rgb`,
              `image`, `color`, `sync` (`rgb/a/1.jpg` and `depth/a/1.png`, `1_colors.png` and
              `1_depth.png`). A folder `train` and one `test` or `val` anywhere in the paths split
              it; without them the seed draws 20 % for the test;
            - `scenes:TRAIN,TEST` or `scenes:TRAIN,TEST,SIZE`, which renders so many scenes of
              SIZE x SIZE (64) pixels now.
        seed: Draws the split of a folder that has none.
        depth_scale: See :class:`PairFiles`.
        workers: Processes that render scenes.
        progress: Show a progress bar while rendering.

    Raises:
        DataError: There is no such input, it holds no pairs, or one of the two splits is empty.
    """
    if depth_scale is not None and not depth_scale > 0:
        raise DataError(f"depth_scale is {depth_scale}: units in a metre, 1000 for millimetres")
    source = os.fspath(source)
    if source.startswith("scenes:"):
        return _render(source, workers, progress)
    root = Path(source)
    if all((root / name).is_file() for name in _LISTS):
        train, test = (listed_pairs(root / name) for name in _LISTS)
        split = " and ".join(_LISTS)
        sets = (_files(train, depth_scale), _files(test, depth_scale))
        return DepthData(*sets, 10.0, "eigen", split, "NYU Depth v2")
    return _open_folder(source, seed, depth_scale)


def _render(source: str, workers: int, progress: bool) -> DepthData:
    from .scenes import SPLIT_STARTS, render_scenes

    asked = _RENDERED.fullmatch(source)
    if asked is None or min(int(asked[1]), int(asked[2])) < 2 or int(asked[3] or 64) < 32:
        raise DataError(
            f"'{source}': write scenes:TRAIN,TEST, such as scenes:2000,500, or "
            "scenes:TRAIN,TEST,SIZE for pictures of SIZE x SIZE pixels (64 if absent, at least 32)"
        )
    sets, size = [], int(asked[3] or 64)
    for split, count in (("train", int(asked[1])), ("test", int(asked[2]))):
        start = SPLIT_STARTS[split]
        drawn = render_scenes(_RENDER_SEED, start, count, size, workers, progress, dense=True)
        sets.append(SceneDepths(drawn["images"], drawn["depth"], f"the rendered {split} set"))
    train, test = sets
    limit = float(train.depth.max())
    return DepthData(train, test, limit, None, "rendered", "rendered scenes", "scene units")


def _files(pairs: list[Pair], depth_scale: float | None) -> PairFiles:
    images = open_images([Item(image) for image, _ in pairs])
    return PairFiles(images, tuple(depth for _, depth in pairs), depth_scale)


def _open_folder(source: str, seed: int, depth_scale: float | None) -> DepthData:
    splits = folder_pairs(source)
    if splits.keys() == {""}:
        pairs = splits[""]
        order = numpy_generator(seed, Stream.EVAL_SPLIT).permutation(len(pairs))
        held_out = set(order[: max(1, round(_TEST_SHARE * len(pairs)))].tolist())
        splits["test"] = [pair for i, pair in enumerate(pairs) if i in held_out]
        splits["train"] = [pair for i, pair in enumerate(pairs) if i not in held_out]
        split = f"{len(held_out)} of {len(pairs)} pairs drawn by seed {seed}"
    else:
        split = "folders named train and test (or val)"
    for name in ("train", "test"):
        if not splits.get(name):
            raise DataError(f"'{source}' has no pairs for the {name} set: put image and depth map "
                             "files below a folder train and a folder test")  # fmt: skip
    train, test = (_files(splits[name], depth_scale) for name in ("train", "test"))
    return DepthData(train, test, None, None, split)
