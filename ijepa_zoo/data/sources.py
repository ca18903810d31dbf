"""`open_images`: images from any source as one map-style dataset."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import DataError, ImageError, some
from .datasets import ArrayDataset, FileDataset, ImageDataset, evenly_spaced
from .decode import Decoder, deep_range
from .files import expand, list_files
from .huggingface import HFDataset, is_hf, open_hf, parse_options
from .labels import LabeledFiles
from .objects import ObjectDataset

_ARRAYS = (".npy", ".npz")
_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_HF_MODULES = tuple(
    f"datasets.{name}" for name in ("arrow_dataset", "dataset_dict", "iterable_dataset")
)
_TORCH_OPTIONS = ("root", "split", "download")
_TORCH_SPLITS = {  # that are not called train and test
    "oxfordiiitpet": ("trainval", "test"),
    "imagenet": ("train", "val"),
    "imagenette": ("train", "val"),
    "clevrclassification": ("train", "val"),
    "places365": ("train-standard", "val"),
    "inaturalist": ("2021_train", "2021_valid"),
}
_DEEP_SAMPLED = 16  # files whose range of values is checked
_log = logging.getLogger(__name__)


def open_images(
    source: Any,
    *,
    in_chans: int = 3,
    value_range: tuple[float, float] | None = None,
    bands: tuple[int, ...] | None = None,
    decoder: Decoder | None = None,
    exclude: Callable[[str], bool] | None = None,
) -> ImageDataset:
    """Open images from any source. They are listed, not decoded.

    Args:
        source: One of

            - paths, one or several: folders (everything below them), image files, `.npy` files of
              one image, globs, `{000..012}`, `.txt` lists of paths, `.tar` shards, also gzipped,
              folders of shards;
            - `.npy` files `[n, H, W, C]` or, for grayscale, `[n, H, W]`, which are memory-mapped,
              or an `.npz` file with `images` and optionally `labels`;
            - `hfds/NAME` or a local folder of the Hugging Face `datasets` package, a Parquet file
              or a folder of them; `hfds/NAME:split=test,image=COLUMN,label=COLUMN` chooses;
            - a `.csv` file with the columns `path` and `label`; see `LabeledFiles`;
            - `torch/NAME:root=DIR`, a dataset of torchvision by the name of its class, such as
              `torch/food101` or `torch/oxford_iiit_pet`, also `,split=NAME` and `,download=true`;
            - `module:attribute`, a map-style Dataset, or a callable that returns one;
            - such a Dataset, an array `[n, H, W, C]`, a tensor `[n, C, H, W]`, or an
              `ImageDataset`, which is returned unchanged.
        in_chans: See `Decoder`.
        value_range: See `Decoder`.
        bands: See `Decoder`.
        decoder: Replaces the three arguments before.
        exclude: Predicate on paths; files for which it is true are left out.

    Raises:
        DataError: An input does not exist, holds no images, or cannot be read by number.
    """
    decoder = decoder or Decoder(in_chans, value_range, bands)
    if isinstance(source, ImageDataset):
        return source
    if isinstance(source, str | os.PathLike):
        source = [source]
    if isinstance(source, list | tuple) and all(isinstance(s, str | os.PathLike) for s in source):
        paths = [path for given in source for path in expand(os.fspath(given))]
        images = _open_paths(paths, decoder, exclude)
    elif isinstance(source, torch.Tensor):
        array = source.detach().cpu().numpy()
        images = ArrayDataset([array.transpose(0, 2, 3, 1) if array.ndim == 4 else array], decoder)
    elif isinstance(source, np.ndarray):
        images = ArrayDataset([source], decoder)
    elif type(source).__module__ in _HF_MODULES:
        images = HFDataset(source, decoder, type(source).__name__, None, None)
    else:
        images = ObjectDataset(source, decoder, type(source).__name__)
    _warn_of_dark_files(images)
    return images


def _open_paths(
    paths: list[str], decoder: Decoder, exclude: Callable[[str], bool] | None
) -> ImageDataset:
    if not paths:
        raise DataError("no input is named: give a folder, files, shards or a dataset")
    for path in paths:
        if (opener := _opener(path)) is None:
            continue
        if len(paths) > 1:
            raise DataError(f"'{path}' cannot be joined with other inputs: give it alone")
        return opener(path, decoder)
    if all(path.lower().endswith(_ARRAYS) for path in paths):
        first = _open_array(paths[0])
        shape = first[0].shape
        if len(shape) == 4 or (len(shape) == 3 and shape[-1] != decoder.in_chans):
            arrays = [first, *map(_open_array, paths[1:])]
            targets = [labels for _, labels in arrays if labels is not None]
            joined = np.concatenate(targets) if len(targets) == len(arrays) else None
            names = [os.path.basename(path) for path in paths]
            is_mapped = all(isinstance(images, np.memmap) for images, _ in arrays)
            mapped = paths if is_mapped else ()
            return ArrayDataset([images for images, _ in arrays], decoder, names, joined, mapped)
    files = (file for file in list_files(paths) if exclude is None or not exclude(file.path))
    images = FileDataset(files, decoder)
    if not len(images):
        others = [f"'{path}': {reason}" for _, path, reason in images.skipped]
        found = f", but {len(others)} other files, for example {others[0]}" if others else ""
        raise DataError(f"no images found in {some(paths)}{found}")
    return images


def _opener(path: str) -> Callable[[str, Decoder], ImageDataset] | None:
    """The function that opens a path of a dataset; None for files."""
    if is_hf(path):
        return open_hf
    if path.startswith("torch/"):
        return _open_torch
    if path.lower().endswith(".csv"):
        return LabeledFiles
    if _ATTRIBUTE.fullmatch(path) and not os.path.lexists(path):
        return _open_attribute
    return None


def _open_array(path: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """The images of a `.npy` or `.npz` file, and their labels."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found, None
        with found:
            if "images" in found:
                return found["images"], found.get("labels")
            raise ValueError(f"it has {list(found)}, and needs images (and labels)")
    except Exception as error:  # damaged headers make NumPy raise almost anything
        raise DataError(f"'{path}' cannot be read as an array: {error}") from error


def _torch_class(path: str) -> tuple[Any, dict[str, str], Sequence[str]]:
    """Class of a torchvision dataset, options, and names of the training and the test split.

    There are none if a split is named, or if the dataset has none.
    """
    from torchvision import datasets

    name, options = parse_options(path, _TORCH_OPTIONS)
    plain = re.sub("torch/|[_-]", "", name.lower())
    found = {cls.lower(): getattr(datasets, cls) for cls in datasets.__all__}.get(plain)
    if found is None:
        raise DataError(f"torchvision has no dataset '{name}': use the name of its class")
    has_splits = not {"split", "train", "version"}.isdisjoint(signature(found).parameters)
    is_whole = "split" in options or not has_splits
    return found, options, () if is_whole else _TORCH_SPLITS.get(plain, ("train", "test"))


def torch_splits(path: str) -> Sequence[str]:
    """Names of the training and the test split of `torch/NAME`; empty if it has no splits."""
    return _torch_class(path)[2]


def _open_torch(path: str, decoder: Decoder) -> ImageDataset:
    cls, options, splits = _torch_class(path)
    if "root" not in options:
        raise DataError(f"'{path}' needs the folder of the data: {path}:root=DIR")
    split = options.get("split") or next(iter(splits), "train")
    arguments = {
        "root": options["root"],
        "download": options.get("download") == "true",
        "split": split,
        "version": split,  # of INaturalist
        "train": split == "train",
    }
    accepted = signature(cls).parameters
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    try:
        found = cls(**arguments)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be opened: {error}") from error
    return ObjectDataset(found, decoder, path)


def _open_attribute(path: str, decoder: Decoder) -> ImageDataset:
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one that it imports does not
        raise DataError(f"'{path}' does not exist, and there is no module '{error.name}'") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise DataError(f"'{path}': module {module_name} has no {attribute}")
        found = getattr(found, part)
    if isinstance(found, type) or (callable(found) and not hasattr(found, "__getitem__")):
        found = found()
    return found if isinstance(found, ImageDataset) else ObjectDataset(found, decoder, path)


def _warn_of_dark_files(images: ImageDataset) -> None:
    """Warn if 16-bit images use a small part of their range, which 8 bits would not resolve."""
    if images.decoder.value_range is not None or isinstance(images, ObjectDataset):
        return
    ranges: dict[str, tuple[int, int]] = {}
    for index in evenly_spaced(len(images), _DEEP_SAMPLED):
        with suppress(ImageError):
            if (limits := deep_range(images.raw(index))) is not None:
                ranges[images.name(index)] = limits
    low = min((low for low, _ in ranges.values()), default=0)
    high = max((high for _, high in ranges.values()), default=0)
    if ranges and high - low < 65536 // 8:
        _log.warning(
            "16-bit images such as %s hold values from %d to %d, less than an eighth of their "
            "range, of which 8 bits keep few levels: set the range of values (--value-range "
            "%d,%d or data.value_range)", next(iter(ranges)), low, high, low, high,
        )  # fmt: skip
