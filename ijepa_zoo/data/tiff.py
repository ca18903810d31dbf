"""Bands and pages of TIFF files, beyond those that Pillow reads."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from ..errors import ImageError, MissingPackageError


def stack_pages(image: Image.Image, pages: int) -> npt.NDArray[Any]:
    """Bands, or grayscale pages, as `[H, W, C]`."""
    found = []
    for page in range(pages):
        image.seek(page)
        found.append(np.atleast_3d(np.asarray(image)))
    if len({array.shape for array in found}) > 1:
        raise ImageError(f"a file of {pages} pages that differ in size")
    return np.concatenate(found, axis=-1)


def select_bands(array: npt.NDArray[Any], bands: tuple[int, ...]) -> npt.NDArray[Any]:
    """Select bands on the last axis."""
    if max(bands) >= array.shape[-1]:
        raise ImageError(f"an image of {array.shape[-1]} bands or pages has no band {max(bands)}")
    return array[..., list(bands)]


def tiff_bands(content: bytes) -> int:
    """Number of bands of a TIFF file; 0 for other or damaged files."""
    if content[:4] not in (b"II*\0", b"MM\0*", b"II+\0"):
        return 0
    file = io.BytesIO(content)
    try:
        header = file.read(16 if content[2:3] == b"+" else 8)  # + is BigTIFF
        directory = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(directory.next)
        directory.load(file)
        return int(directory.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    except Exception:  # a damaged header can make it raise anything
        return 0


def loses_bands(image: Image.Image, bands: int) -> bool:
    """Whether Pillow drops bands of a TIFF, or misreads planar 16-bit bands as 8 bits."""
    tags = getattr(image, "tag_v2", {})
    planar = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
    deep = tags.get(TiffImagePlugin.BITSPERSAMPLE, (8,))[0] > 8
    return bands > len(image.getbands()) or (bands > 1 and planar and deep)


def read_tiff(content: bytes, max_pixels: int) -> npt.NDArray[Any]:
    """A TIFF as `[H, W, C]`."""
    try:
        import tifffile
    except ImportError as error:
        raise MissingPackageError(
            "TIFF files of many bands need tifffile: pip install tifffile"
        ) from error
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        pixels = file.pages.first.imagewidth * file.pages.first.imagelength
        if pixels > max_pixels:
            raise too_large(pixels, max_pixels)
        axes, array = file.series[0].axes, file.asarray()
    return np.moveaxis(array, 0, -1) if axes.startswith("S") else array


def too_large(pixels: int, limit: int) -> ImageError:
    """The error of an image of too many pixels."""
    return ImageError(f"too large: {pixels:,} pixels, the limit is {limit:,} (max_pixels)")
