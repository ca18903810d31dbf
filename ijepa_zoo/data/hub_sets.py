"""Hugging Face data sets: from the Hub, from a folder of theirs, or of parquet files."""

from __future__ import annotations

import hashlib
import io
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from .images import ImageError, ImageReader, decode
from .items import Item
from .jpeg import decode_pixels
from .pixels import Pixels, from_picture, labels_or_none
from .sources import InputError

_SAMPLED = 16  # images that the fingerprint reads
_SAVED = ("dataset_info.json", "dataset_dict.json")  # what `save_to_disk` leaves


class HubSet:
    """A data set of the `datasets` package with one column of images.

    Args:
        data: A `datasets.Dataset`.
        in_chans: Channels of the images that are read, 1 or 3.
        name: What messages call it.
        tensors: See :func:`~ijepa_zoo.data.image_sets.open_images`.

    Raises:
        InputError: It is a stream or a dictionary of splits, or has no single column of images.
    """

    def __init__(self, data: Any, in_chans: int, name: str, *, tensors: bool = False) -> None:
        import datasets

        if isinstance(data, datasets.DatasetDict):
            raise InputError(f"{name} has the splits {', '.join(data)}: choose one")
        if not isinstance(data, datasets.Dataset):
            raise InputError(
                f"{name} is a {type(data).__name__}, which cannot be read at random; load it "
                "without streaming"
            )
        if in_chans not in (1, 3):
            raise InputError(
                f"{name} is read with 1 or 3 channels, model.in_chans is {in_chans}: give images "
                "of other channels as arrays"
            )
        self.column = _image_column(data, name)
        self.labels = _labels(data)
        data = data.with_format(None).select_columns([self.column])
        self.data = data.cast_column(self.column, datasets.Image(decode=False))
        self.in_chans, self._name = in_chans, name
        self.tensors = tensors and in_chans == 3

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> Pixels:
        """See :class:`~ijepa_zoo.data.image_sets.ImageSet`."""
        stored = self.data[int(index)][self.column]
        if stored is None:
            raise ImageError("no image in this row")
        if stored["bytes"] is not None:
            file = io.BytesIO(stored["bytes"])
            return (
                decode_pixels(file) if self.tensors else from_picture(decode(file), self.in_chans)
            )
        return from_picture(ImageReader().read(Item(stored["path"])), self.in_chans)

    def name(self, index: int) -> str:
        """Data set and number."""
        return f"{self._name}[{index}]"

    def fingerprint(self) -> str:
        """Hash of number and of some images' bytes."""
        digest = hashlib.blake2b(str(len(self)).encode(), digest_size=8)
        for index in np.unique(np.linspace(0, len(self) - 1, _SAMPLED).astype(int)):
            stored = self.data[int(index)][self.column] or {}
            digest.update(
                stored.get("bytes") or os.path.basename(stored.get("path") or "").encode()
            )
        return digest.hexdigest()


def holds_data_set(folder: str) -> bool:
    """Whether a folder was written by `save_to_disk`, or has parquet files."""
    if any(os.path.isfile(os.path.join(folder, name)) for name in _SAVED):
        return True
    return _has_parquet(folder)


def open_hub(name: str, in_chans: int, *, tensors: bool = False) -> HubSet:
    """A data set by `NAME` or `NAME:SPLIT`; NAME is on the Hub or a folder, SPLIT train if absent.

    Parquet files are unpacked once into the cache of the `datasets` package, where images can be
    read at random.

    Raises:
        InputError: The package is missing, or there is no such data set or split.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise InputError(f"'{name}' needs the package datasets: pip install datasets") from None
    path, split = (name, None) if os.path.isdir(name) else _name_and_split(name)
    try:
        if os.path.isdir(path) and not _has_parquet(path):
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, split=split or "train")
    except (OSError, ValueError) as error:
        raise InputError(f"data set '{name}' cannot be loaded: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        found = _choose(found, split, name)
    return HubSet(found, in_chans, name, tensors=tensors)


def _name_and_split(name: str) -> tuple[str, str | None]:
    path, colon, split = name.rpartition(":")
    return (path, split) if colon else (name, None)


def _choose(splits: Any, split: str | None, name: str) -> Any:
    wanted = split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if wanted not in splits:
        base = name.removesuffix(f":{split}")
        raise InputError(
            f"data set '{name}' has no split {wanted!r}, it has {', '.join(splits)}: write "
            f"hf-dataset:{base}:{next(iter(splits))}"
        )
    return splits[wanted]


def _has_parquet(folder: str) -> bool:
    """Whether a folder, or its folder `data` as in repositories of the Hub, has parquet files."""
    for place in (folder, os.path.join(folder, "data")):
        if os.path.isdir(place):
            names = set(os.listdir(place)) - {"metadata.parquet"}  # of an image folder
            if any(name.endswith(".parquet") for name in names):
                return True
    return False


def _image_column(data: Any, name: str) -> str:
    import datasets

    def is_image(feature: Any) -> bool:
        if isinstance(feature, dict):
            return "bytes" in feature
        binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
        return isinstance(feature, datasets.Image) or binary

    columns = [column for column, feature in data.features.items() if is_image(feature)]
    if len(columns) != 1:
        raise InputError(
            f"{name} has {len(columns)} columns of images ({', '.join(data.features)}); it must "
            "have one: make a data set with that column alone and save it with save_to_disk"
        )
    return columns[0]


def _labels(data: Any) -> npt.NDArray[np.int64] | None:
    import datasets

    classes = [c for c, f in data.features.items() if isinstance(f, datasets.ClassLabel)]
    named = [c for c in ("label", "labels") if c in data.features]
    for column in classes + named:
        feature = data.features[column]
        if feature.dtype.startswith(("int", "uint")):
            values = data.select_columns([column]).with_format("numpy")[:][column]
            return labels_or_none(np.asarray(values, np.int64))
    return None
