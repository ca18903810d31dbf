"""What a set of images is, and pictures of any origin with the channels that a model takes."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from .images import ImageError, to_rgb

Pixels = Image.Image | torch.Tensor


@runtime_checkable
class ImageSet(Protocol):
    """Images that can be read in any order, by several processes at once."""

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """`[n]` class numbers, -1 for none, for monitors alone; None where they say nothing."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pixels:
        """An image as RGB or greyscale Pillow image, or uint8 `[C, H, W]`.

        Raises:
            ImageError: It cannot be decoded; the text is the reason, without the name.
        """

    def name(self, index: int) -> str:
        """The image's name for messages."""

    def fingerprint(self) -> str:
        """Some hexadecimal digits that are the same for the same images, wherever they lie."""


def labels_or_none(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """Labels that tell images apart; None where all are the same."""
    return labels if len(labels) and (labels != labels[0]).any() else None


def from_picture(image: Image.Image, in_chans: int) -> Image.Image:
    """A Pillow image as RGB (3 channels) or greyscale (1).

    Raises:
        ImageError: `in_chans` is neither 1 nor 3.
    """
    if in_chans == 3:
        return to_rgb(image)
    if in_chans == 1:
        return image if image.mode == "L" else to_rgb(image).convert("L")
    raise ImageError(
        f"a picture of 1 or 3 channels, the model takes {in_chans} (model.in_chans): images of "
        "other channels are given as arrays, for example .npy files [H, W, C]"
    )


def from_array(pixels: np.ndarray[Any, Any], in_chans: int) -> Pixels:
    """An array as a Pillow image, or as a tensor where Pillow has no such image.

    An array of 1 or 3 channels therefore gives the same crops as a file of the same pixels.

    Args:
        pixels: uint8 `[H, W, C]` or `[H, W]`.
        in_chans: Channels that are wanted, C.

    Returns:
        A greyscale or RGB image, or uint8 `[C, H, W]`.

    Raises:
        ImageError: The array is no image of that many channels.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise ImageError(
            f"an array of {pixels.dtype} {list(pixels.shape)}; an image is uint8 [H, W, C] or "
            "[H, W], with values from 0 to 255"
        )
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if channels != in_chans:
        raise ImageError(_other_channels(pixels.shape, in_chans))
    if channels == 1:
        return Image.fromarray(np.ascontiguousarray(pixels.reshape(pixels.shape[:2])))
    if channels == 3:
        return Image.fromarray(np.ascontiguousarray(pixels))
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def _other_channels(shape: tuple[int, ...], in_chans: int) -> str:
    """What to do about an array whose last axis does not have the model's channels."""
    if len(shape) == 3 and (shape[0] == in_chans or shape[0] < min(shape[1:])):
        use = "" if shape[0] == in_chans else f", and use model.in_chans={shape[0]}"
        return (
            f"an array {list(shape)}, which looks like [C, H, W]; an array is [H, W, C]: move its "
            f"channels to the end with numpy.moveaxis(array, -3, -1){use}"
        )
    channels = shape[2] if len(shape) == 3 else 1
    return (
        f"an array {list(shape)} [H, W{', C' if len(shape) == 3 else ''}] of {channels} channels, "
        f"the model takes {in_chans}: use model.in_chans={channels}"
    )


def from_tensor(pixels: torch.Tensor, in_chans: int) -> Pixels:
    """A tensor uint8 `[C, H, W]` or `[H, W]`, as `from_array` of its pixels.

    Raises:
        ImageError: The tensor is no image of `in_chans` channels.
    """
    if pixels.ndim not in (2, 3):
        raise ImageError(f"a tensor {list(pixels.shape)}; an image is uint8 [C, H, W]")
    refuse_channels_last(pixels, in_chans)
    array = pixels.detach().cpu().numpy()
    return from_array(array.transpose(1, 2, 0) if array.ndim == 3 else array, in_chans)


def refuse_channels_last(pixels: torch.Tensor, in_chans: int) -> None:
    """See that channels are not the last axis of a tensor `[C, H, W]` or `[n, C, H, W]`.

    Raises:
        ImageError: They seem to be.
    """
    if pixels.ndim > 2 and pixels.shape[-3] != in_chans == pixels.shape[-1]:
        raise ImageError(
            f"a tensor {list(pixels.shape)}, which looks like [H, W, C]; a tensor is [C, H, W]: "
            "move its channels with torch.movedim(tensor, -1, -3)"
        )
