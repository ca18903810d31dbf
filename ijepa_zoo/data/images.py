"""Decoding: one item to one upright RGB image of 8 bits, or a sentence that says why not."""

import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from .items import Item
from .shards import open_shard

MAX_PIXELS = 178_956_970  # the limit of Pillow, about 13,000 x 13,000

# What Pillow's decoders raise on damaged data. A file can be damaged in any way, so whole families
# of errors are named; only Pillow's own calls run under them.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,  # PNG and others: "broken PNG file"
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)

# Formats that hold photographs. Pillow reads more, some by starting other programs (EPS).
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000"),
    *("MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"),
)

_BYTES_PER_PIXEL = 8  # four channels of 16 bits: no photograph's file is larger
_METADATA = 1 << 26  # bytes that a file may hold beside its pixels
_OPEN_SHARDS = 64  # open files that random access to many shards may hold
_ROWS = 256  # of a greyscale image that are scaled at a time

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be decoded; the text is the reason, without the path."""


class ImageReader:
    """Reads items in a process of its own; keeps the last tar shards open.

    Args:
        max_pixels: Images with more pixels (width x height in the header) are refused.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        self.max_pixels = max_pixels
        self._shards: dict[str, BinaryIO] = {}

    def read(self, item: Item) -> Image.Image:
        """Decode an item.

        Returns:
            An upright RGB image.

        Raises:
            ImageError: If it cannot be read, is no image, is damaged or has too many pixels.
        """
        with self.open(item) as file:
            return decode(file, self.max_pixels)

    @contextmanager
    def open(self, item: Item) -> Iterator[BinaryIO]:
        """The bytes of an item; errors of the system while they are read become `ImageError`."""
        if item.problem is not None:
            raise ImageError(item.problem)
        try:
            with self._open(item) as file:
                yield file
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error

    def _open(self, item: Item) -> BinaryIO:
        if item.shard is not None:
            return io.BytesIO(self._member(item.shard, item.offset, item.size))
        if "\0" in item.path:
            raise ImageError("cannot be read: a path cannot hold a NUL character")
        if not stat.S_ISREG(os.stat(item.path).st_mode):  # opening a pipe would wait for ever
            raise ImageError("not a regular file")
        return open(item.path, "rb")

    def _member(self, shard: str, offset: int, size: int) -> bytes:
        file = self._shards.pop(shard, None) or open_shard(shard)
        self._shards[shard] = file  # the last one is the one used last
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.pop(next(iter(self._shards))).close()
        limit = _BYTES_PER_PIXEL * self.max_pixels + _METADATA
        if size > limit:  # what a header claims, or what a small gzip unfolds to
            raise ImageError(f"too large: {size:,} bytes in a tar shard, the limit is {limit:,}")
        try:
            file.seek(offset)
            return file.read(size)
        except (EOFError, zlib.error) as error:
            raise ImageError(f"damaged tar shard: {error}") from error


def decode(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of an image file to upright RGB.

    Transparency is laid over white, EXIF orientation is applied, greyscale of more than 8 bits is
    scaled (see :func:`_grey8`), CMYK and palettes are converted.

    Args:
        file: The file, open for reading in binary mode, at its beginning.
        max_pixels: Limit of width x height, checked in the header before anything is decoded.

    Returns:
        An RGB image.

    Raises:
        ImageError: If the file is empty, no image, damaged or above the limit.
    """
    if not file.read(1):
        raise ImageError("empty file")
    file.seek(0)
    with _pillow_limits(max_pixels):
        try:
            image: Image.Image = Image.open(file, formats=_known_formats())
        except UnidentifiedImageError:
            raise ImageError("not an image, or of a kind that Pillow cannot read here") from None
        except Image.DecompressionBombError as error:
            raise _too_large(int(re.findall(r"\d+", str(error))[0]), max_pixels) from None
        except _DECODE_ERRORS as error:
            raise ImageError(f"broken image: {_words(error)}") from error
        if image.width * image.height > max_pixels:
            raise _too_large(image.width * image.height, max_pixels)
        if 0 in image.size:
            raise ImageError(f"an image of {image.width} x {image.height} pixels")
        try:
            image.load()
            return to_rgb(_upright(image))
        except Image.DecompressionBombError as error:
            raise _too_large(int(re.findall(r"\d+", str(error))[0]), max_pixels) from None
        except ImageError:
            raise
        except _DECODE_ERRORS as error:
            kind = "truncated" if "truncated" in str(error).lower() else "broken"
            raise ImageError(f"{kind} image: {_words(error)}") from error


def plain_jpeg_size(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> tuple[int, int] | None:
    """Height and width of a JPEG file whose pixels :func:`decode` would take as they are.

    Args:
        file: The file, open for reading in binary mode, at its beginning.
        max_pixels: Limit of width x height.

    Returns:
        None for a file that has to be converted or turned, is above the limit, or is no JPEG.
    """
    with _pillow_limits(max_pixels):
        try:
            image = Image.open(file, formats=["JPEG"])
            upright = image.getexif().get(_ORIENTATION, 1) not in _UPRIGHT
        except (Image.DecompressionBombError, *_DECODE_ERRORS):
            return None
    plain = image.format == "JPEG" and image.mode == "RGB" and upright
    within = 0 < image.width * image.height <= max_pixels
    return (image.height, image.width) if plain and within else None


@contextmanager
def _pillow_limits(max_pixels: int) -> Iterator[None]:
    """Our limits instead of Pillow's process-wide ones: it refuses above twice its limit."""
    limit, truncated = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about metadata and large images
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, truncated


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except _DECODE_ERRORS:  # damaged EXIF: the pixels are fine, and every viewer shows them
        orientation = 1
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as RGB: transparency over white, more than 8 bits scaled, palettes resolved."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_grey8(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _grey8(values: np.ndarray) -> np.ndarray:
    """Scale greyscale of 16 or 32 bits, or floating point, to 8 bits; nothing is clipped.

    Integers within 0..65535 are taken as 16 bits (65535 is white), floats within 0..1 as shares of
    white and within 0..255 as 8-bit levels. Anything else is stretched from its smallest to its
    largest value.
    """
    if not np.isfinite(values).all():
        raise ImageError("floating-point image with values that are not finite")
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.integer):
        natural = 65535.0 if low >= 0 and high <= 65535 else None
    else:
        natural = next((top for top in (1.0, 255.0) if low >= 0 and high <= top), None)
    if natural is None:
        natural = (high - low) or 1.0
    else:
        low = 0.0
    grey = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), _ROWS):  # in pieces: float64 is 8 times the result
        levels = values[row : row + _ROWS].astype(np.float64) - low
        grey[row : row + _ROWS] = np.rint(levels * 255 / natural)
    return grey


def _too_large(pixels: int, limit: int) -> ImageError:
    return ImageError(f"too large: {pixels:,} pixels, the limit is {limit:,} (max_pixels)")


def _words(error: BaseException) -> str:
    """The error's text on one line, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
