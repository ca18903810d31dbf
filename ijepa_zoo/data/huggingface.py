"""Datasets of the Hugging Face `datasets` package: from the Hub, or from local folders."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, ImageError, MissingPackageError
from .datasets import ImageDataset, evenly_spaced, indicator_matrix
from .decode import Decoder, Raw
from .files import SHARD_SUFFIXES

_PREFIX = "hfds/"
_SAVED = ("dataset_info.json", "dataset_dict.json")  # written by `save_to_disk`
_SAMPLED = 16  # images that the fingerprint reads
_log = logging.getLogger(__name__)


class HFDataset(ImageDataset):
    """A `datasets.Dataset` of Hugging Face.

    The defaults are its only column of type Image and its column of class labels (or named
    `label`).
    """

    def __init__(
        self, data: Any, decoder: Decoder, name: str, image: str | None, label: str | None
    ) -> None:
        import datasets

        super().__init__(decoder, name)
        if not isinstance(data, datasets.Dataset):
            raise DataError(
                f"{name} is a {type(data).__name__}, which cannot be read by number: choose a "
                "split, and load it without streaming"
            )
        if not len(data):
            raise DataError(f"{name} has no rows")
        columns = [c for c, kind in data.features.items() if isinstance(kind, datasets.Image)]
        if image is None and len(columns) != 1:
            raise DataError(
                f"{name} has {len(columns)} columns of images among {', '.join(data.features)}: "
                "choose one with image=COLUMN"
            )
        self.column = image or columns[0]
        self._set_classes(data, label)
        try:
            rows = data.with_format(None).select_columns([self.column])
            self.data = rows.cast_column(self.column, datasets.Image(decode=False))
        except (ValueError, TypeError, NotImplementedError) as error:  # of datasets and Arrow
            raise DataError(f"{name} has no images in column '{self.column}': {error}") from error

    def _set_classes(self, data: Any, label: str | None) -> None:
        import datasets

        features = data.features
        if label is not None and label not in features:
            raise DataError(f"{self._name} has no column '{label}', but {', '.join(features)}")
        kinds = [c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        usual = [column for column in ("label", "labels", "fine_label") if column in features]
        column = label or next(iter([*kinds, *usual]), None)
        if column is None:
            return
        item = getattr(features[column], "feature", None)  # type of the items of a list
        several = item is not None
        item = item or features[column]
        dtype = getattr(item, "dtype", "")
        names = item.names if isinstance(item, datasets.ClassLabel) else []
        is_text = dtype in ("string", "large_string")
        # integers in a list may be class numbers, or 0 and 1 for each class
        is_number = dtype.startswith(("int", "uint")) and (bool(names) or not several)
        if not (is_text or is_number or dtype == "bool"):
            text = (
                f"{self._name}: column '{column}' is {features[column]}, not a class or a list of "
                "ClassLabel, of strings or of a bool for each class"
            )
            if label is not None:
                raise DataError(f"{text}: name another with label=COLUMN")
            _log.warning("%s, and is ignored; name another with label=COLUMN", text)
            return
        values = data.select_columns([column]).with_format(None)[:][column]
        if several and dtype == "bool":
            names = [str(number) for number in range(max(len(row or ()) for row in values))]
            values = [np.flatnonzero(row or ()).tolist() for row in values]
        rows = values if several else ([value] for value in values)
        lists = [[value for value in row or () if value not in (None, -1)] for row in rows]
        if is_text:
            names = sorted({value for row in lists for value in row})
            number_of = {name: number for number, name in enumerate(names)}
            lists = [[number_of[value] for value in row] for row in lists]
        if several:
            self.targets = indicator_matrix(lists, len(names))
        else:
            self.targets = np.array([row[0] if row else -1 for row in lists], np.int64)
        self.classes = dict(enumerate(names))

    def __len__(self) -> int:
        return len(self.data)

    def raw(self, index: int) -> Raw:
        """The bytes of an image."""
        stored = self.data[int(index)][self.column] or {}
        if stored.get("bytes") is not None:
            return bytes(stored["bytes"])
        if stored.get("path") is None:
            raise ImageError("no image in this row")
        try:
            return Path(stored["path"]).read_bytes()
        except OSError as error:
            raise ImageError(f"'{stored['path']}' cannot be read: {error.strerror}") from error

    def files(self) -> list[str]:
        """The Arrow files that hold the rows; none in memory."""
        return [file["filename"] for file in self.data.cache_files]

    def fingerprint(self) -> str:
        """Hash of the number of images and of some of them."""
        digest = hashlib.blake2b(str(len(self)).encode(), digest_size=8)
        for index in evenly_spaced(len(self), _SAMPLED):
            stored = self.data[index][self.column] or {}
            path = os.path.basename(stored.get("path") or "")
            digest.update(stored.get("bytes") or path.encode())
        return digest.hexdigest()


def is_hf(path: str) -> bool:
    """Whether a path is `hfds/NAME` or a local dataset, with or without `:OPTION=VALUE,...`."""
    name = path if os.path.lexists(path) else _split_options(path)[0]
    return path.startswith(_PREFIX) or _is_parquet(name) or _is_folder_of_data(name)


def _is_parquet(path: str) -> bool:
    return path.endswith(".parquet") and os.path.isfile(path)


def _is_folder_of_data(path: str) -> bool:
    """Whether a folder was written by `save_to_disk`, or has Parquet files but no shards."""
    data = os.path.join(path, "data")  # as in repositories of the Hub
    names = os.listdir(path) if os.path.isdir(path) else []
    below = os.listdir(data) if os.path.isdir(data) else []
    if any(name in _SAVED for name in names):
        return True
    has_shards = any(name.lower().endswith(SHARD_SUFFIXES) for name in names)
    parquet = {name for name in (*names, *below) if name.endswith(".parquet")}
    return bool(parquet - {"metadata.parquet"}) and not has_shards


def hf_splits(path: str) -> list[str]:
    """Names of the splits of a dataset; empty if a split is named."""
    name, options = _name_and_options(path)
    if "split" in options or _is_parquet(name) or os.path.isfile(os.path.join(name, _SAVED[0])):
        return []
    with _datasets(name) as datasets:
        if os.path.isfile(os.path.join(name, _SAVED[1])):
            return list(datasets.load_from_disk(name))
        return list(datasets.get_dataset_split_names(name, options.get("name")))


def open_hf(path: str, decoder: Decoder) -> ImageDataset:
    """Open a dataset; its split `train` unless another is named."""
    name, options = _name_and_options(path)
    split = options.get("split")
    with _datasets(name) as datasets:
        if any(os.path.isfile(os.path.join(name, file)) for file in _SAVED):
            found = datasets.load_from_disk(name)
        elif _is_parquet(name):
            found = datasets.load_dataset("parquet", data_files=name, split=split)
        else:
            found = datasets.load_dataset(name, options.get("name"), split=split)
    if isinstance(found, datasets.DatasetDict):
        split = split or ("train" if "train" in found else next(iter(found)))
        if split not in found:
            raise DataError(f"dataset '{name}' has no split '{split}', but {', '.join(found)}")
        found = found[split]
    return HFDataset(found, decoder, path, options.get("image"), options.get("label"))


@contextmanager
def _datasets(name: str) -> Iterator[Any]:
    """The package; its errors while it loads a dataset become `DataError`."""
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(f"'{name}' needs datasets: pip install datasets") from error
    try:
        yield datasets
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"dataset '{name}' cannot be loaded: {error}") from error


def _name_and_options(path: str) -> tuple[str, dict[str, str]]:
    if os.path.lexists(path):
        return path, {}
    name, options = parse_options(path, ("split", "name", "image", "label"))
    return name.removeprefix(_PREFIX), options


def parse_options(path: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """`NAME:key=value,key=value` as name and options."""
    name, text = _split_options(path)
    parts = re.split(r",(?=\w+=)", text)  # a path may have commas
    options = dict(part.partition("=")[::2] for part in parts if part)
    for key, value in options.items():
        if key not in known or not value:
            raise DataError(f"'{path}': '{key}' is not one of {'=..., '.join(known)}=...")
    return name, options


def with_split(path: str, split: str) -> str:
    """A path of a dataset with its split as one more option."""
    has_options = not os.path.lexists(path) and bool(_split_options(path)[1])
    return f"{path}{',' if has_options else ':'}split={split}"


def _split_options(path: str) -> tuple[str, str]:
    """Before and after the colon of the options; a path may have others, as of a Windows drive."""
    name, *options = re.split(r":(?=\w+=)", path, maxsplit=1)
    if not options:
        name, *options = re.split(r":(?=\w*$)", path, maxsplit=1)
    return name, "".join(options)
