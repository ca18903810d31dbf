"""JPEG files straight to tensors where torchcodec is installed: Pillow's pixels, sooner."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import BinaryIO

import torch
from PIL import Image

from .images import MAX_PIXELS, decode, plain_jpeg_size

__all__ = ["decode_pixels"]

_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_log = logging.getLogger(__name__)

Decoder = Callable[[bytes], torch.Tensor]


def decode_pixels(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image | torch.Tensor:
    """Decode an image file as :func:`~ijepa_zoo.data.images.decode` does; the pixels are the same.

    Args:
        file: The file, open for reading in binary mode, at its beginning.
        max_pixels: Limit of width x height.

    Returns:
        uint8 `[3, H, W]` for whole colour JPEG files that stand upright, where torchcodec is
        installed; an RGB image for all others.

    Raises:
        ijepa_zoo.data.images.ImageError: As for `decode`.
    """
    decoder = _torchcodec()
    if decoder is not None:
        pixels = _tensor(file, max_pixels, decoder)
        if pixels is not None:
            return pixels
        file.seek(0)
    return decode(file, max_pixels)


def _tensor(file: BinaryIO, max_pixels: int, decoder: Decoder) -> torch.Tensor | None:
    """The pixels of a file in which nothing is unusual; None leaves it to Pillow to say more."""
    if file.read(len(_START)) != _START:
        return None
    file.seek(0)
    size = plain_jpeg_size(file, max_pixels)
    if size is None:
        return None
    file.seek(0)
    content = file.read()
    if not content.endswith(_END):  # cut short: torchcodec would fill the rest with grey
        return None
    try:
        pixels = decoder(content)
    except RuntimeError:  # damaged
        return None
    return pixels if pixels.shape == (3, *size) else None


@cache
def _torchcodec() -> Decoder | None:
    try:
        from torchcodec.decoders import decode_jpeg
    except ImportError:  # not installed, or older than 0.16
        return None
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        _log.warning("torchcodec cannot be used, JPEG files are decoded by Pillow: %s", reason)
        return None
    return decode_jpeg
