"""Map-style data sets of the user's own: objects with a length whose items are images."""

from __future__ import annotations

import hashlib
import importlib
import os
import struct
import sys
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from .images import ImageError
from .pixels import ImageSet, Pixels, from_array, from_picture, from_tensor, labels_or_none
from .sources import InputError

# A data set reads files in ways of its own; these are what damaged ones lead to. Anything else is
# a fault of its code, and ends the run.
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    Image.DecompressionBombError,
)

_NOT_THEIRS = (__file__, importlib.__file__, "<frozen importlib")  # frames of ours


class ObjectSet:
    """A map-style data set.

    Args:
        data: Has `__len__` and `__getitem__`; items are Pillow images, arrays uint8 `[H, W, C]`,
            tensors uint8 `[C, H, W]`, or tuples and lists that begin with one of these. Its
            `targets` or `labels`, a class number for each image, are the labels.
        in_chans: Channels of the images that are read, C.
        name: What messages call the data set.

    Raises:
        InputError: Its length or labels cannot be told.
    """

    def __init__(self, data: Any, in_chans: int, name: str) -> None:
        self.data, self.in_chans, self._name = data, in_chans, name
        with _named(f"the length of {name} cannot be told"):
            self._length = len(data)
        with _named(f"the labels of {name} cannot be told"):
            self.labels = _labels(data, self._length, name)

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Pixels:
        """See :class:`~ijepa_zoo.data.image_sets.ImageSet`.

        Raises:
            InputError: The code of the data set failed, or the item is no image.
        """
        with _named(f"{self.name(index)} (of {self._length} items by its length) cannot be read"):
            return self._read(index)

    def _read(self, index: int) -> Pixels:
        try:
            item = self.data[index]
            if isinstance(item, tuple | list) and item:
                item = item[0]
            if isinstance(item, Image.Image):
                return from_picture(item, self.in_chans)
        except ImageError:
            raise
        except _DAMAGED as error:
            words = " ".join(str(error).split())
            raise ImageError(f"{type(error).__name__}: {words}") from error
        if isinstance(item, np.ndarray):
            return from_array(item, self.in_chans)
        if isinstance(item, torch.Tensor):
            return from_tensor(item, self.in_chans)
        raise InputError(
            f"{self.name(index)} is of type {type(item).__name__}; an item must be a Pillow image, "
            "an array uint8 [H, W, C], a tensor uint8 [C, H, W], or a tuple that begins with one"
        )

    def name(self, index: int) -> str:
        """Data set and number."""
        return f"{self._name}[{index}]"

    def fingerprint(self) -> str:
        """Hash of number and labels: what the items are may change from one reading to another."""
        labels = b"" if self.labels is None else self.labels.astype("<i8").tobytes()
        return hashlib.blake2b(f"{len(self)} ".encode() + labels, digest_size=8).hexdigest()


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say in words where foreign code failed, which may raise anything, or end the program."""
    try:
        yield
    except (ImageError, InputError):
        raise
    except (Exception, SystemExit) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if not f.filename.startswith(_NOT_THEIRS)]
        place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
        raise InputError(f"{what}: {words}{place}") from error


def open_object(source: Any, in_chans: int, name: str | None = None) -> ImageSet:
    """The set of a map-style data set; those of the `datasets` package are told by their module.

    Raises:
        InputError: It has no length, no items or cannot be read at random.
    """
    name = name or type(source).__name__
    if type(source).__module__.partition(".")[0] == "datasets":
        from .hub_sets import HubSet

        return HubSet(source, in_chans, name)
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        why = "it is iterable only" if hasattr(source, "__iter__") else "it has no length or items"
        raise InputError(
            f"{name} is no list of images: {why}. Training reads images by their numbers and needs "
            "__len__ and __getitem__ (a map-style Dataset)"
        )
    if isinstance(source, str | bytes | dict):
        raise InputError(f"{name} is a {type(source).__name__}, no list of images")
    images = ObjectSet(source, in_chans, name)
    if not len(images):
        raise InputError(f"{name} is empty")
    return images


def open_attribute(path: str, in_chans: int) -> ImageSet:
    """The set behind `module:attribute`; modules in the current folder are found too.

    Raises:
        InputError: There is no such module or attribute, its code fails, or it is no data set.
    """
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with _named(f"'{path}': module {module_name} cannot be imported"):
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module is there, and imports something that is not
            raise InputError(
                f"no such file or folder, and no module {error.name!r} for '{path}': run it in the "
                "folder that holds the module, or install the module"
            ) from None
    for part in attribute.split("."):
        with _named(f"'{path}': {attribute} cannot be looked up"):
            if not hasattr(found, part):
                raise InputError(f"'{path}': module {module_name} has no {attribute}")
            found = getattr(found, part)
    if isinstance(found, type) or (callable(found) and not hasattr(found, "__getitem__")):
        with _named(f"'{path}' cannot be called without arguments"):
            found = found()
    if isinstance(found, ImageSet):
        return found
    return open_object(found, in_chans, path)


def _labels(data: Any, length: int, name: str) -> npt.NDArray[np.int64] | None:
    for attribute in ("targets", "labels"):
        values = getattr(data, attribute, None)
        if isinstance(values, list | tuple | np.ndarray | torch.Tensor):
            try:
                labels = np.asarray(values)
            except ValueError as error:  # rows of different lengths
                raise InputError(
                    f"{name}.{attribute} are no class numbers, which are whole numbers, one for "
                    "each image: give them another name, or leave them out"
                ) from error
            if labels.shape == (length,) and np.issubdtype(labels.dtype, np.integer):
                return labels_or_none(labels.astype(np.int64))
    return None
