"""Decode image files, arrays and Pillow images to upright 8-bit pixels."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import ImageError, MissingPackageError, SettingsError
from .tiff import loses_bands, read_tiff, select_bands, stack_pages, tiff_bands, too_large

MAX_PIXELS = 178_956_970  # Pillow's limit, about 13,000 x 13,000
Pixels = Image.Image | torch.Tensor  # RGB or grayscale image, or uint8 [C, H, W]
Raw = bytes | Image.Image | npt.NDArray[Any] | torch.Tensor

# Formats of photos. Pillow reads more, some by starting other programs (EPS).
_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000",
    "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
_ROWS = 256  # of an image that are scaled at a time
_ORIENTATION = 0x0112  # EXIF tag
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoder:
    """Converts images of any kind to 8-bit pixels.

    EXIF orientation is applied, transparency composited over white, palettes and CMYK converted.

    Attributes:
        in_chans: Channels of the result: 3 is RGB, 1 is grayscale. Other numbers need arrays
            `[H, W, C]`, or files and `bands`.
        value_range: Values that become 0 and 255 in images and arrays of more than 8 bits; values
            beyond are clipped. None takes the range of the data type (see `to_uint8`).
        bands: Bands or pages of a file that become the channels, from 0.
        max_pixels: Images of more pixels are refused before they are decoded.
        as_tensor: Return color JPEG files as tensors of the same pixels where torchcodec is
            installed, which is faster.
    """

    in_chans: int = 3
    value_range: tuple[float, float] | None = None
    bands: tuple[int, ...] | None = None
    max_pixels: int = MAX_PIXELS
    as_tensor: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise SettingsError(
                f"value_range is {self.value_range}; the first value must be below the second"
            )
        if self.bands is not None and (len(self.bands) != self.in_chans or min(self.bands) < 0):
            raise SettingsError(
                f"bands {self.bands} do not fit a model of {self.in_chans} channels: name "
                f"{self.in_chans}, counted from 0"
            )
        if self.max_pixels < 1:
            raise SettingsError(f"max_pixels is {self.max_pixels}; it must be at least 1")

    def __call__(self, raw: Raw) -> Pixels:
        """Decode one image.

        Args:
            raw: The bytes of an image file or of a `.npy` file, a Pillow image, an array `[H, W]`
                or `[H, W, C]`, or a tensor `[H, W]` or `[C, H, W]`.

        Raises:
            ImageError: It is damaged, not an image, too large, or has other channels.
        """
        if isinstance(raw, Image.Image):
            return self._convert(_upright(raw))
        if isinstance(raw, torch.Tensor):
            array = raw.detach().cpu().numpy()
            return self._from_array(np.moveaxis(array, 0, -1) if array.ndim == 3 else array)
        if isinstance(raw, np.ndarray):
            return self._from_array(raw)
        if not raw:
            raise ImageError("empty file")
        if raw.startswith(np.lib.format.MAGIC_PREFIX):
            return self._from_array(_load_array(raw))
        with _pillow(self.max_pixels):
            if self.as_tensor and self.in_chans == 3 and self.bands is None:
                with suppress(Exception):  # damaged: Pillow's error is reported
                    if (pixels := _decode_jpeg(raw, self.max_pixels)) is not None:
                        return pixels
            return self._decode_file(raw)

    def _decode_file(self, content: bytes) -> Pixels:
        bands = tiff_bands(content)
        try:
            image: Image.Image = Image.open(io.BytesIO(content), formats=_known_formats())
        except UnidentifiedImageError:
            if bands > 1:
                return self._decode_bands(content, bands)
            raise
        if image.width * image.height > self.max_pixels:
            raise too_large(image.width * image.height, self.max_pixels)
        if 0 in image.size:
            raise ImageError(f"an image of {image.width} x {image.height} pixels")
        if loses_bands(image, bands):
            return self._decode_bands(content, bands)
        pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        deep = _is_deep_color(image)
        if self.bands is not None:
            array = _read_deep(content, image) if deep else stack_pages(image, pages)
            return self._from_array(select_bands(array, self.bands))
        if pages > 1:
            raise ImageError(f"a file of {pages} pages: choose some with --bands or data.bands")
        if deep and self.value_range is not None:
            return self._convert(_scale_color(content, image, self.value_range))
        image.load()
        return self._convert(_upright(image))

    def _decode_bands(self, content: bytes, bands: int) -> Pixels:
        """Decode a TIFF whose bands Pillow cannot read."""
        if self.bands is None:
            raise ImageError(f"an image of {bands} bands: choose some with --bands or data.bands")
        return self._from_array(select_bands(read_tiff(content, self.max_pixels), self.bands))

    def _convert(self, image: Image.Image) -> Image.Image:
        """A Pillow image as RGB or grayscale."""
        if self.in_chans not in (1, 3):
            raise ImageError(
                f"an image file, and the model takes {self.in_chans} channels: give arrays "
                "[H, W, C], or choose bands"
            )
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image)
            image = Image.fromarray(to_uint8(values, self.value_range))
        if self.in_chans == 1:
            return image if image.mode == "L" else _to_rgb(image).convert("L")
        return _to_rgb(image)

    def _from_array(self, array: npt.NDArray[Any]) -> Pixels:
        """An array as a Pillow image, or as a tensor if it does not have 1 or 3 channels."""
        channels = array.shape[2] if array.ndim == 3 else 1
        if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "uif":
            raise ImageError(
                f"an array of {array.dtype} {list(array.shape)}: images are numbers [H, W, C] or "
                "[H, W] (tensors [C, H, W])"
            )
        if channels != self.in_chans:
            raise ImageError(
                f"an array [H, W, C] of {list(array.shape)}, which has {channels} channels, and "
                f"the model takes {self.in_chans}"
            )
        pixels = array if array.dtype == np.uint8 else to_uint8(array, self.value_range)
        if channels == 1:
            return Image.fromarray(np.ascontiguousarray(pixels.reshape(pixels.shape[:2])))
        if channels == 3:
            return Image.fromarray(np.ascontiguousarray(pixels))
        return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def to_uint8(
    values: npt.NDArray[Any], value_range: tuple[float, float] | None = None
) -> npt.NDArray[np.uint8]:
    """Scale values of any type and shape from `value_range` to 0..255, clipped.

    The default range is 0..65,535 for integers within it, 0..1 or 0..255 for floats within them,
    else from the smallest to the largest value.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ImageError("an image with values that are not finite")
    low, high = value_range or _natural_range(values)
    scaled = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), _ROWS):  # in pieces: float64 is 8 times the result
        levels = (values[row : row + _ROWS].astype(np.float64) - low) * (255 / (high - low))
        scaled[row : row + _ROWS] = np.rint(levels.clip(0, 255))
    return scaled


def _natural_range(values: npt.NDArray[Any]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    tops = (1.0, 255.0) if values.dtype.kind == "f" else (65535.0,)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is not None:
        return 0.0, top
    return low, high if high > low else low + 1.0


def deep_range(raw: Raw) -> tuple[int, int] | None:
    """Smallest and largest value of an image of integers of more than 8 bits; None for others."""
    deep = False
    try:
        if isinstance(raw, bytes) and not raw.startswith(np.lib.format.MAGIC_PREFIX):
            with _pillow(MAX_PIXELS):
                raw = Image.open(io.BytesIO(raw), formats=["PNG", "TIFF", "PPM"])
                deep = _is_deep_color(raw)
                raw = np.asarray(raw)
        values = _load_array(raw) if isinstance(raw, bytes) else np.asarray(raw)
    except ImageError:  # reported when it is read
        return None
    is_deep = deep or (values.dtype.kind in "ui" and values.dtype.itemsize > 1)
    if not is_deep or not values.size:
        return None
    scale = 257 if deep else 1  # Pillow keeps the upper 8 bits of color
    return int(values.min()) * scale, int(values.max()) * scale


def _is_deep_color(image: Image.Image) -> bool:
    """Whether a color file has 16 bits per channel, of which Pillow keeps the upper 8."""
    return len(image.getbands()) > 1 and ";16" in str(getattr(image, "tile", ""))


def _read_deep(content: bytes, image: Image.Image) -> npt.NDArray[Any]:
    """16-bit color `[H, W, C]`: Pillow keeps the upper 8 bits, in swapped byte order the lower."""
    lower = Image.open(io.BytesIO(content), formats=[image.format or ""])
    lower.tile = [tile._replace(args=_other_order(tile.args)) for tile in lower.tile]
    return np.asarray(image).astype(np.uint16) * 256 + np.asarray(lower)


def _other_order(args: Any) -> Any:
    """Swap the byte order in Pillow's decoder arguments, `RGB;16B` or a tuple that begins so."""
    if not isinstance(args, str):
        return (_other_order(args[0]), *args[1:])
    native = "L" if sys.byteorder == "little" else "B"
    mode, order = args[:-1], args[-1].replace("N", native)
    return mode + ("B" if order == "L" else "L")


def _scale_color(
    content: bytes, image: Image.Image, value_range: tuple[float, float]
) -> Image.Image:
    """Scale 16-bit color to 8 bits, with its transparency."""
    scaled = Image.fromarray(to_uint8(_read_deep(content, image)[..., :3], value_range))
    if "A" in image.getbands():
        scaled.putalpha(image.getchannel("A"))
    scaled.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
    return _upright(scaled)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(_ORIENTATION, 1) == 1:
            return image  # exif_transpose would copy it
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data, but intact pixels
        return image


def _load_array(content: bytes) -> npt.NDArray[Any]:
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # damaged headers make NumPy raise almost anything
        raise ImageError(f"broken array: {error}") from error


@contextmanager
def _pillow(max_pixels: int) -> Iterator[None]:
    """Set Pillow's process-wide limits, and raise its errors as `ImageError`."""
    limit, truncated = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # it raises above twice that
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about metadata and large images
            yield
    except (ImageError, MissingPackageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise too_large(int(re.findall(r"\d+", str(error))[0]), max_pixels) from None
    except UnidentifiedImageError:
        raise ImageError(
            "not an image, or in a format that the installed Pillow cannot read"
        ) from None
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        kind = "truncated" if "truncated" in reason.lower() else "broken"
        raise ImageError(f"{kind} image: {reason}") from error
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, truncated


@cache
def _known_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _decode_jpeg(content: bytes, max_pixels: int) -> torch.Tensor | None:
    """The pixels of a plain RGB JPEG file; None for other files, which Pillow decodes."""
    decoder = _torchcodec()
    # torchcodec would fill the rest of a truncated file with gray
    whole = content.startswith(b"\xff\xd8\xff") and content.endswith(b"\xff\xd9")
    if decoder is None or not whole:
        return None
    image = Image.open(io.BytesIO(content), formats=["JPEG"])
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    plain = image.format == "JPEG" and image.mode == "RGB" and upright
    if not plain or image.width * image.height > max_pixels:
        return None
    pixels = decoder(content)
    return pixels if pixels.shape == (3, image.height, image.width) else None


@cache
def _torchcodec() -> Callable[[bytes], torch.Tensor] | None:
    try:
        from torchcodec.decoders import decode_jpeg
    except ImportError:  # not installed, or older than 0.16
        return None
    except (OSError, RuntimeError) as error:
        _log.warning("torchcodec cannot be used, so Pillow decodes JPEG files: %s", error)
        return None
    return decode_jpeg
