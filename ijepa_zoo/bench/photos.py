"""Photographs to measure with: the user's own, or made up ones of the usual size."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from ..data.images import ImageError, ImageReader
from ..data.items import Item
from ..data.sources import find_items
from ..extraction.encoder import usable_cpus
from ..progress import progress_bar

_SIZES = ((500, 375), (375, 500), (500, 333))  # width and height: those of ImageNet's photographs
_QUALITY = 90
_NAMED = 3  # files that are left out, in messages
_DECAY = 1.0  # amplitudes fall with the frequency, as those of photographs do


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Photographs:
    """Photographs that can be decoded.

    Attributes:
        folder: Holds them and nothing else.
        about: For the result: how many files were left out, and the first of them; empty if none.
    """

    folder: Path
    about: dict[str, Any] = field(default_factory=dict)


@contextmanager
def photographs(
    data: str | Path | None, count: int, most: int | None = None, *, progress: bool = False
) -> Iterator[Photographs]:
    """Photographs of `data`, or `count` made up JPEG files; what is made is deleted afterwards.

    All files of `data` are decoded first: what cannot be decoded takes no time, and other libraries
    end with an error at it. The others come as links in one folder, the same for all contenders.

    Args:
        data: The user's folder; None for made up ones.
        count: Number of made up ones.
        most: Photographs of `data` that are needed, taken evenly from a larger folder; None for
            all.
        progress: Show a progress bar, where standard error is a terminal.

    Raises:
        ValueError: `data` is no folder, or holds no image that can be decoded.
    """
    with TemporaryDirectory(prefix="ijepa-zoo-bench-") as scratch:
        if data is None:
            write_photographs(Path(scratch), count)
            yield Photographs(Path(scratch))
        else:
            yield _link_good(Path(data), Path(scratch), most, progress)


def _link_good(data: Path, folder: Path, most: int | None, progress: bool) -> Photographs:
    if data.exists() and not data.is_dir():
        raise ValueError(f"--data {data} is no folder: name one that holds photographs as files")
    items = [item for item in find_items(data) if item.skipped is None]
    if most is not None:
        items = items[:: -(-len(items) // most)]
    problems = []
    with (
        ThreadPoolExecutor(usable_cpus()) as pool,
        progress_bar(progress, len(items), "decoding") as bar,
    ):
        for problem in pool.map(_problem, items):
            problems.append(problem)
            bar.update()
    bad = [
        f"{os.path.relpath(item.path, data)} ({problem})"
        for item, problem in zip(items, problems)
        if problem is not None
    ]
    named = ", ".join(bad[:_NAMED]) + (", ..." if len(bad) > _NAMED else "")
    if len(bad) == len(items):
        raise ValueError(
            f"--data {data}: none of its {len(items)} image files can be decoded: {named}; name a "
            "folder of whole photographs, or leave --data out for made up ones"
        )
    good = (item for item, problem in zip(items, problems) if problem is None)
    for number, item in enumerate(good):
        # One suffix for all: timm lists few of them, and every decoder looks at the content.
        (folder / f"{number:07}.jpg").symlink_to(Path(item.path).resolve())
    if not bad:
        return Photographs(folder)
    _log.warning("left out %d of %d files of %s: %s", len(bad), len(items), data, named)
    return Photographs(folder, {"left_out": f"{len(bad)} of {len(items)} files: {named}"})


def _problem(item: Item) -> str | None:
    """Why a file cannot be decoded; None if it can."""
    try:
        ImageReader().read(item)
    except ImageError as error:
        return str(error)
    return None


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
