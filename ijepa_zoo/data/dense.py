"""Images with a depth map or a segmentation mask each: NYU Depth v2, ADE20K, VOC, folders of pairs.

NYU's own file has depths with missing values filled in by its authors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import DataError, ImageError, MissingPackageError
from ..progress import progress_bar
from ..seeds import Stream, numpy_generator
from .decode import Decoder, Pixels, Raw
from .dense_files import (
    DEPTH_WORDS,
    MASK_WORDS,
    Pair,
    Target,
    known_depth,
    pairs_by_name,
    read_depth,
    read_mask,
)
from .dense_files import IGNORE_INDEX as IGNORE_INDEX
from .loading import load_in_order
from .scenes import SEGMENTATION_CLASSES, render_splits
from .transforms import pixel_size

NYU_FILE, NYU_SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip

_UNPACKED_FOLDERS = ("ADEChallengeData2016", "VOCdevkit", "VOC2012")  # of the official archives
_TEST_SHARE = 0.2
_SPLIT_SEED = 0  # a run's seed must not change what it is tested on
_MAX_ASPECT_DIFFERENCE = 0.02  # relative; beyond it a target belongs to another image
_MOST_CLASSES = 4096  # masks of larger ids hold something else, such as instances


@dataclass(frozen=True)
class DenseDataset:
    """A map-style dataset: `dataset[i]` is an image, its target `[H, W]` and its name.

    Indexing raises `ImageError` if one of the two cannot be read or their aspect ratios differ.
    """

    names: Sequence[str]
    load: Callable[[int], tuple[Raw, Target]]  # undecoded image and target of an index; picklable
    fingerprint: str
    decoder: Decoder = field(default_factory=Decoder)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Pixels, Target, str]:
        name = self.names[index]
        raw, target = self.load(index)
        image = self.decoder(raw)
        (image_h, image_w), (height, width) = pixel_size(image), target.shape
        if abs(image_w * height / (image_h * width) - 1) > _MAX_ASPECT_DIFFERENCE:
            raise ImageError(
                f"the image is {image_w} x {image_h}, its target {width} x {height}, which is "
                "another aspect ratio"
            )
        return image, target, name


@dataclass(frozen=True)
class DenseData:
    """Training and test set."""

    train: DenseDataset
    test: DenseDataset
    name: str
    split: str  # the source of the test set
    unit: str = "m"
    max_depth: float | None = None  # the largest depth that counts, if the data have one
    crop: str | None = None  # 'eigen' where metrics are customarily computed in Eigen's crop
    num_classes: int | None = None  # of masks
    class_names: tuple[str, ...] | None = None


def open_depth(
    source: str | os.PathLike[str],
    *,
    depth_scale: float | None = None,
    workers: int = 0,
    progress: bool = False,
) -> DenseData:
    """Open images with depth maps.

    `source` is NYU Depth v2's `nyu_depth_v2_labeled.mat` or its folder, which also has
    `splits.mat`; `scenes:TRAIN,TEST[,SIZE]`, see `render_splits`; or a folder of pairs. There depth
    maps are `.npy` files or have the word `depth` in their own or a folder's name. An image has the
    same name except for such words and `rgb`, `image`, `color` or `sync`: `rgb/a/1.jpg` and
    `depth/a/1.png`. Folders `train` and `test` (or `val`) anywhere in the paths are the split;
    without them a fixed 20 % are the test set. `depth_scale` is stored units per meter, by default
    1000 (millimeters) in integer files of 16 bits or more and 1 in floating-point arrays.
    """
    source = os.fspath(source)
    if depth_scale is not None and not depth_scale > 0:
        raise DataError(f"depth_scale is {depth_scale}: give units per meter, such as 1000")
    if source.startswith("scenes:"):
        train, test = _rendered(source, "depth", workers, progress)
        limit = max(float(train[i][1].max()) for i in range(len(train)))
        return DenseData(train, test, "rendered scenes", "rendered", "scene units", limit)
    root = Path(source)
    file = root if root.suffix.lower() == ".mat" else root / NYU_FILE
    if file == root or file.is_file():
        train, test = _nyu_file(file)
        return DenseData(train, test, "NYU Depth v2, labelled", NYU_SPLITS, "m", 10.0, "eigen")
    return _folder(source, DEPTH_WORDS, partial(read_depth, depth_scale=depth_scale))


def open_segmentation(
    source: str | os.PathLike[str],
    *,
    reduce_zero_label: bool | None = None,
    workers: int = 0,
    progress: bool = False,
) -> DenseData:
    """Open images with segmentation masks.

    `source` is the unpacked archive of ADE20K (`ADEChallengeData2016`, 150 classes) or PASCAL VOC
    (`VOCdevkit` or `VOC2012`, 21 classes); a folder of pairs as for `open_depth`, with the word
    `mask`, `annotation`, `label` or `segmentation` instead of `depth`; or
    `scenes:TRAIN,TEST[,SIZE]`. `reduce_zero_label` ignores class 0 and subtracts 1 from the others,
    by default for ADE20K alone, whose class 0 is everything else.
    """
    source = os.fspath(source)
    if source.startswith("scenes:"):
        train, test = _rendered(source, "segmentation", workers, progress)
        data = DenseData(train, test, "rendered scenes", "rendered")
        names = SEGMENTATION_CLASSES
        return replace(data, num_classes=len(names), class_names=names)
    root = Path(source)
    for folder in _UNPACKED_FOLDERS:
        root = root / folder if (root / folder).is_dir() else root
    lists = root / "ImageSets" / "Segmentation"
    ade20k = any((root / "annotations" / "training").glob("ADE_train_*"))
    reduce = ade20k if reduce_zero_label is None else reduce_zero_label
    read = partial(read_mask, reduce_zero_label=reduce)
    if lists.is_dir():
        train, test = (_files(_voc_list(lists / f"{s}.txt"), read) for s in ("train", "val"))
        data = DenseData(train, test, "PASCAL VOC", "train.txt and val.txt")
        return replace(data, num_classes=len(VOC_CLASSES), class_names=VOC_CLASSES)
    data = _folder(str(root), MASK_WORDS, read)
    if ade20k:
        count = 150 if reduce else 151
        found = _ade20k_names(root, count)
        return replace(data, name="ADE20K", num_classes=count, class_names=found)
    return replace(data, num_classes=_count_classes(data, workers, progress))


def _largest_class(data: DenseDataset, index: int) -> tuple[int, str]:
    """The largest class id of a mask, and its source or why it cannot be read."""
    try:
        mask = data.load(index)[1]
    except ImageError as error:
        return 0, str(error)
    return int(mask.max(where=mask != IGNORE_INDEX, initial=0)), f"that of {data.names[index]}"


def _count_classes(data: DenseData, workers: int, progress: bool) -> int:
    """Number of classes, from all masks."""
    largest, where = 0, ""
    for part in (data.train, data.test):
        with progress_bar(progress, len(part), "classes of masks") as bar:
            for found, name in load_in_order(
                partial(_largest_class, part), range(len(part)), workers
            ):
                if found >= largest:
                    largest, where = found, name
                bar.update()
    if not 0 < largest < _MOST_CLASSES:
        raise DataError(
            f"the largest class of all masks is {largest} ({where}): masks hold class ids from 0 "
            f"to at most {_MOST_CLASSES - 1}, and {IGNORE_INDEX} for pixels without one"
        )
    return largest + 1


def _rendered(source: str, target: str, workers: int, progress: bool) -> list[DenseDataset]:
    sets = []
    splits = render_splits(source, workers, progress, dense=True)
    for split, scenes in zip(("train", "test"), splits):
        images, targets = scenes["images"], scenes[target]
        names = [f"{source} {split}[{index}]" for index in range(len(images))]
        digest = blake2b(images.tobytes() + targets.tobytes(), digest_size=8).hexdigest()
        sets.append(DenseDataset(names, partial(_load_arrays, images, targets), digest))
    return sets


def _load_arrays(images: npt.NDArray[np.uint8], targets: Target, index: int) -> tuple[Raw, Target]:
    return images[index], targets[index]


def _files(pairs: list[Pair], read_target: Callable[[str], Target]) -> DenseDataset:
    """Pairs of files, with a hash of their names, sizes and modification times."""
    digest = blake2b(digest_size=8)
    for path in (path for pair in pairs for path in pair):
        try:
            state = os.stat(path)
        except OSError as error:
            raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
        digest.update(os.fsencode(os.path.basename(path)))
        digest.update(f" {state.st_size} {state.st_mtime_ns}\n".encode())
    names = [image for image, _ in pairs]
    return DenseDataset(names, partial(_load_files, pairs, read_target), digest.hexdigest())


def _load_files(
    pairs: list[Pair], read_target: Callable[[str], Target], index: int
) -> tuple[Raw, Target]:
    image, target = pairs[index]
    try:
        content = Path(image).read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error
    return content, read_target(target)


def _nyu_file(file: Path) -> list[DenseDataset]:
    """The official 795 training and 654 test pairs: `images` `[n, 3, W, H]`, `depths` in meters."""
    splits = file.with_name(NYU_SPLITS)
    try:
        h5py, loadmat = import_module("h5py"), import_module("scipy.io").loadmat
    except ModuleNotFoundError as error:
        needs = f"{NYU_FILE} needs h5py and scipy: pip install h5py scipy"
        raise MissingPackageError(needs) from error
    path = file
    try:
        state = file.stat()
        with h5py.File(file, "r") as opened:
            opened["images"], opened["depths"]
        path = splits
        found = loadmat(splits)
        numbers = [found[name].ravel().astype(np.int64) for name in ("trainNdxs", "testNdxs")]
    except Exception as error:  # scipy raises anything on damaged bytes
        raise DataError(
            f"'{path}' is missing, damaged or not of NYU Depth v2 ({error}): put {NYU_FILE} and "
            f"{NYU_SPLITS} together"
        ) from error
    sets = []
    for part in numbers:
        digest = blake2b(f"{state.st_size} {state.st_mtime_ns}\n".encode(), digest_size=8)
        digest.update(part.astype("<i8").tobytes())
        names = [f"{file.name}[{number}]" for number in part]  # from 1, as in the split
        sets.append(DenseDataset(names, partial(_load_nyu, file, part - 1), digest.hexdigest()))
    return sets


def _load_nyu(file: Path, rows: npt.NDArray[np.int64], index: int) -> tuple[Raw, Target]:
    try:
        # Opened for each pair, since loader processes must not share a handle.
        with import_module("h5py").File(file, "r") as opened:
            image, depth = opened["images"][rows[index]], opened["depths"][rows[index]]
    except (OSError, RuntimeError, IndexError, ValueError) as error:
        raise ImageError(f"the file is damaged there ({error})") from error
    # MATLAB stores columns first.
    return np.ascontiguousarray(image.T), known_depth(depth.T)


def _voc_list(path: Path) -> list[Pair]:
    """The pairs of a list of names in `ImageSets/Segmentation`."""
    root, names = path.parents[2], _read(path).split()
    if not names:
        raise DataError(f"'{path}' is empty: each line is the name of an image")
    images, masks = root / "JPEGImages", root / "SegmentationClass"
    return [(str(images / f"{name}.jpg"), str(masks / f"{name}.png")) for name in names]


def _ade20k_names(root: Path, count: int) -> tuple[str, ...] | None:
    """Class names in the last column of the `objectInfo150.txt` of the official archive."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return None
    rows = [line.split("\t") for line in _read(path).splitlines()]
    names = [row[-1].strip() for row in rows if row[0].strip().isdigit()]
    names = [*["other"] * (count - len(names)), *names]  # class 0, unless it is left out
    return tuple(names) if len(set(names)) == count else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' cannot be read: {error}") from error


def _folder(source: str, target_words: set[str], read_target: Callable[[str], Target]) -> DenseData:
    """A folder of pairs."""
    splits = pairs_by_name(source, target_words)
    split = "folders named train and test (or val)"
    if splits.keys() == {""}:
        pairs = splits[""]
        order = numpy_generator(_SPLIT_SEED, Stream.EVAL_SPLIT).permutation(len(pairs))
        held_out = set(order[: max(1, round(_TEST_SHARE * len(pairs)))].tolist())
        splits["test"] = [pair for i, pair in enumerate(pairs) if i in held_out]
        splits["train"] = [pair for i, pair in enumerate(pairs) if i not in held_out]
        split = f"{len(held_out)} of {len(pairs)} pairs drawn by the fixed seed {_SPLIT_SEED}"
    for part in ("train", "test"):
        if not splits.get(part):
            raise DataError(
                f"'{source}' has no pairs for the {part} set: put images and targets below a "
                "folder train and a folder test"
            )
    train, test = (_files(splits[part], read_target) for part in ("train", "test"))
    return DenseData(train, test, "pairs", split)
