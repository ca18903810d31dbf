"""Images that are one array: a `.npy` or `.npz` file, or an array in memory."""

from __future__ import annotations

import hashlib
import os
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .images import ImageError
from .pixels import Pixels, from_array, labels_or_none, refuse_channels_last
from .sources import InputError

_SAMPLED = 64  # images that the fingerprint reads
_CHANNELS = 4  # no image is so narrow: the last of three axes is channels


class ArraySet:
    """Images of one size.

    Args:
        images: uint8 `[n, H, W, C]` or `[n, H, W]`.
        in_chans: Channels of the images that are read, C.
        name: What messages call the array.
        labels: `[n]` class numbers, of any integer type.

    Raises:
        InputError: The array is of another type, shape or number of channels, or labels are no
            class numbers.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        in_chans: int,
        name: str = "array",
        labels: npt.NDArray[Any] | None = None,
    ) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
            raise InputError(
                f"{name} is {images.dtype} {list(images.shape)}; images are uint8 [n, H, W, C] or "
                "[n, H, W], with values from 0 to 255"
            )
        if images.ndim == 3 and (images.shape[2] <= _CHANNELS or images.shape[2] == in_chans):
            raise InputError(
                f"{name} is {list(images.shape)}, which looks like one image [H, W, C]; an array "
                "of images is [n, H, W, C] or [n, H, W]: stack the images with numpy.stack, or "
                "put a .npy file for each into a folder and name the folder"
            )
        try:
            from_array(images[0], in_chans)
        except ImageError as error:
            raise InputError(f"{name} holds {error}") from error
        if labels is not None and labels.shape != (len(images),):
            raise InputError(f"{name} has labels {list(labels.shape)} for {len(images)} images")
        if labels is not None and labels.dtype.kind not in "iub":
            raise InputError(
                f"the labels of {name} are {labels.dtype}; class numbers are whole numbers: "
                "convert them with numpy.unique(labels, return_inverse=True)[1], or leave them out"
            )
        self.images, self.in_chans, self._name = images, in_chans, name
        self.labels = None if labels is None else labels_or_none(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Pixels:
        """See :class:`~ijepa_zoo.data.image_sets.ImageSet`."""
        return from_array(np.asarray(self.images[index]), self.in_chans)

    def name(self, index: int) -> str:
        """File and number."""
        return f"{self._name}[{index}]"

    def fingerprint(self) -> str:
        """Hash of the shape and of some images."""
        digest = hashlib.blake2b(str(self.images.shape).encode(), digest_size=8)
        for index in np.unique(np.linspace(0, len(self) - 1, _SAMPLED).astype(int)):
            digest.update(self.images[index].tobytes())
        return digest.hexdigest()


def open_array(source: Any, in_chans: int) -> ArraySet | None:
    """The set of an array `[n, H, W, C]` or a tensor `[n, C, H, W]`; None for anything else."""
    if isinstance(source, torch.Tensor):
        try:
            refuse_channels_last(source, in_chans)
        except ImageError as error:
            raise InputError(str(error)) from None
        array = source.detach().cpu().numpy()
        return ArraySet(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array, in_chans)
    return ArraySet(source, in_chans) if isinstance(source, np.ndarray) else None


def open_array_file(path: str, in_chans: int) -> ArraySet:
    """The images of a `.npy` file, which stays on the disk, or of a `.npz` file.

    Raises:
        InputError: It cannot be read, or holds no images.
    """
    labels = None
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            images = found
        else:
            with found:
                if "images" not in found:
                    raise InputError(
                        f"'{path}' holds {', '.join(found) or 'nothing'}; the array of the images "
                        "must be called images (and their class numbers labels, if they have any)"
                    )
                images = found["images"]
                labels = found.get("labels")
    except InputError:
        raise
    except (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile) as error:
        raise InputError(f"'{path}' cannot be read as arrays: {error}") from error
    return ArraySet(images, in_chans, os.path.basename(path), labels)
