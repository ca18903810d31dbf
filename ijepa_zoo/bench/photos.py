"""Photographs to measure with: the user's own, or made up ones of the usual size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

_SIZES = ((500, 375), (375, 500), (500, 333))  # width and height: those of ImageNet's photographs
_QUALITY = 90
_DECAY = 1.0  # amplitudes fall with the frequency, as those of photographs do


@contextmanager
def photographs(data: str | Path | None, count: int) -> Iterator[Path]:
    """A folder of photographs: `data`, or `count` made up JPEG files that are deleted afterwards.

    Args:
        data: The user's folder; None for made up ones.
        count: Number of made up ones.
    """
    if data is not None:
        yield Path(data)
        return
    with TemporaryDirectory(prefix="ijepa-zoo-bench-") as folder:
        write_photographs(Path(folder), count)
        yield Path(folder)


def write_photographs(folder: Path, count: int) -> None:
    """Write JPEG files of about 500 x 375 pixels and 100 KB, the same ones every time.

    They show noise with the spectrum of photographs, whose amplitudes fall with the frequency, in
    colours that go together; decoders and filters have as much to do as with photographs.

    Args:
        folder: An existing folder.
        count: Number of files.
    """
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = _SIZES[number % len(_SIZES)]
        brightness, *colours = (_clouds(rng, height, width) for _ in range(3))
        pixels = [
            brightness + 0.3 * colours[0],
            brightness,
            brightness - 0.2 * colours[0] + 0.3 * colours[1],
        ]
        levels = np.clip(128 + 52 * np.stack(pixels, axis=-1), 0, 255).astype(np.uint8)
        Image.fromarray(levels).save(folder / f"{number:05}.jpg", quality=_QUALITY)


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of mean 0 and standard deviation 1 whose amplitude falls with the frequency."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    waves = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**_DECAY
    clouds: np.ndarray = np.fft.irfft2(waves, s=(height, width))
    return clouds / clouds.std()
