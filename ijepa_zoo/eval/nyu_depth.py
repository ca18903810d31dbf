"""NYU Depth v2 as its authors publish it: one MATLAB file of 1,449 pairs, and the official split.

The depths are those of `depths`, in metres, whose holes the authors have filled. The copies with
lists (`nyu_train.txt`), which `open_depth` reads, usually have the camera's own (`rawDepths`), and
24,231 training images in the place of 795.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.depth_pairs import DepthData, DepthMap
from ..data.pixels import Pixels, from_array
from ..errors import DataError, ImageError, MissingPackageError

NYU_FILE, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
_NUMBERS = {"train": "trainNdxs", "test": "testNdxs"}
_LIST = "nyu_train.txt"  # of the copies with lists
_DAMAGED = (OSError, RuntimeError)  # h5py


@dataclass(frozen=True)
class LabelledNyu:
    """Some pairs of the labelled file.

    Attributes:
        file: The file, HDF5.
        rows: `[n]` int64, places of the pairs in it, from 0 on.
    """

    file: Path
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[Pixels, DepthMap]:
        """See :class:`~ijepa_zoo.data.depth_pairs.DepthSet`."""
        row = int(self.rows[index])
        try:
            # opened for each pair: loader processes must not share a handle
            with _package("h5py").File(self.file, "r") as opened:
                image, depth = opened["images"][row], opened["depths"][row]
        except _DAMAGED as error:
            raise ImageError(f"the file is damaged there ({error})") from error
        known = np.isfinite(depth) & (depth > 0)
        metres = np.where(known, depth, 0).astype(np.float32)
        return from_array(image.T, 3), metres.T  # MATLAB has the columns first

    def name(self, index: int) -> str:
        """File and number, from 1 on as in the split."""
        return f"{self.file.name}[{self.rows[index] + 1}]"

    def fingerprint(self) -> str:
        """See :class:`~ijepa_zoo.data.depth_pairs.DepthSet`; by the file's size and time."""
        state = self.file.stat()
        digest = blake2b(f"{state.st_size} {state.st_mtime_ns}\n".encode(), digest_size=8)
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()


def labelled_file(source: str | Path) -> Path | None:
    """The labelled file that a user names: itself, or a folder with it and without lists."""
    path = Path(source)
    if path.suffix.lower() == ".mat":
        return path
    inside = path / NYU_FILE
    named = inside.is_file() or (path / SPLITS).is_file()
    return inside if named and not (path / _LIST).is_file() else None


def open_labelled(file: Path) -> DepthData:
    """Open the labelled file with the official split, which lies beside it.

    Args:
        file: `nyu_depth_v2_labeled.mat`, MATLAB 7.3, which is HDF5: `images` uint8
            `[n, 3, W, H]` and `depths` float `[n, W, H]` in metres.

    Returns:
        The 795 training and 654 test pairs; figures are taken in Eigen's crop, up to 10 m.

    Raises:
        DataError: One of the two files is missing, damaged or another one.
        ImportError: h5py or scipy is not installed.
    """
    if not file.is_file():
        raise DataError(f"'{file}' does not exist: name {NYU_FILE}, or the folder that holds it")
    splits = file.with_name(SPLITS)
    if not splits.is_file():
        raise DataError(
            f"'{file}' needs the official split beside it, and '{splits}' does not exist: put "
            f"{SPLITS} there, from the page where the data set comes from"
        )
    train, test = _rows(splits, _count(file))
    sets = LabelledNyu(file, train), LabelledNyu(file, test)
    return DepthData(*sets, 10.0, "eigen", SPLITS, "NYU Depth v2, labelled")


def _count(file: Path) -> int:
    """Number of pairs in the file."""
    try:
        with _package("h5py").File(file, "r") as opened:
            found = {name: opened.get(name) for name in ("images", "depths")}
            arrays = {name: part for name, part in found.items() if hasattr(part, "shape")}
            if len(arrays) == 2 and _belong_together(**arrays):
                return len(arrays["images"])
            held = [f"{name} {part.dtype} {list(part.shape)}" for name, part in arrays.items()]
    except _DAMAGED as error:
        raise DataError(
            f"'{file}' is damaged or not the labelled file of NYU Depth v2 ({error}): fetch "
            f"{NYU_FILE} again"
        ) from error
    raise DataError(
        f"'{file}' is not the labelled file of NYU Depth v2, which has images uint8 [n, 3, W, H] "
        f"and depths float32 [n, W, H]; this one has {' and '.join(held) or 'neither'}"
    )


def _belong_together(images: Any, depths: Any) -> bool:
    colours = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] == 3
    metres = depths.dtype.kind == "f" and depths.ndim == 3
    return colours and metres and depths.shape == (len(images), *images.shape[2:])


def _rows(splits: Path, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of the training and of the test pairs."""
    load = _package("scipy.io").loadmat
    try:
        found = load(splits)
    except Exception as error:  # damaged bytes: whatever scipy stumbles over
        raise DataError(
            f"'{splits}' is damaged ({type(error).__name__}: {error}): fetch it again"
        ) from error
    missing = [name for name in _NUMBERS.values() if name not in found]
    if missing:
        raise DataError(
            f"'{splits}' is not the split of NYU Depth v2: it has no {' and no '.join(missing)}"
        )
    parts = [np.asarray(found[name]).ravel() for name in _NUMBERS.values()]
    numbers = np.concatenate(parts)
    whole = numbers.dtype.kind in "uif" and bool((numbers % 1 == 0).all())
    if not whole or min(map(len, parts)) == 0 or numbers.min() < 1 or numbers.max() > count:
        raise DataError(
            f"'{splits}' is not the split of these pairs: {' and '.join(_NUMBERS.values())} are "
            f"numbers from 1 to {count}"
        )
    if len(np.unique(numbers)) < len(numbers):
        raise DataError(
            f"'{splits}' is not the official split: it has a pair twice, and no training pair may "
            "be tested on"
        )
    train, test = (part.astype(np.int64) - 1 for part in parts)
    return train, test


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{NYU_FILE} needs h5py and scipy: pip install 'ijepa-zoo[nyu]'"
        ) from error
