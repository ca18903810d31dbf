"""Files of depth maps and segmentation masks, and which image each belongs to."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import DataError, ImageError
from .files import TEST, TRAIN, list_files

Target = npt.NDArray[Any]
Pair = tuple[str, str]  # paths of an image and of its target

IGNORE_INDEX = 255  # class id of pixels that do not count
_IMAGE_WORDS = {"rgb", "image", "images", "img", "color", "colors", "colour", "sync"}
DEPTH_WORDS = {"depth", "depths", "depthmap"}
MASK_WORDS = {"mask", "masks", "annotation", "annotations", "label", "labels", "segmentation"}


def read_depth(path: str, depth_scale: float | None = None) -> npt.NDArray[np.float32]:
    """Read a depth map, float32 `[H, W]` in meters, with 0 where the depth is unknown."""
    stored = _read_map(path, "uif")
    if depth_scale is None and stored.dtype.itemsize == 1:
        raise ImageError(
            f"the depth map '{path}' has 8 bits of an unknown unit: give the units per meter, "
            "depth_scale=25.5 where 255 is 10 m (--depth-scale)"
        )
    if depth_scale is None:
        depth_scale = 1.0 if stored.dtype.kind == "f" else 1000.0
    return known_depth(stored.astype(np.float32) / np.float32(depth_scale))


def read_mask(path: str, reduce_zero_label: bool = False) -> Target:
    """Read class ids `[H, W]` (of a palette image its indices), uint8 from 8-bit files, else int64.

    With `reduce_zero_label`, 0 becomes 255 (ignored), and 1 is subtracted from the others.
    """
    if path.lower().endswith((".jpg", ".jpeg")):
        raise ImageError("a JPEG file, which changes class ids: save masks as PNG")
    stored = _read_map(path, "uib")
    mask = stored.astype(np.uint8 if stored.dtype.itemsize == 1 else np.int64)
    if reduce_zero_label:
        ignored = (mask == 0) | (mask == IGNORE_INDEX)
        mask = np.where(ignored, mask.dtype.type(IGNORE_INDEX), mask - 1)
    return mask


def known_depth(depth: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Depths with 0 where they are unknown: not finite, or not positive."""
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)


def _read_map(path: str, kinds: str) -> Target:
    """The numbers `[H, W]` in a file, whose type must be one of NumPy's `kinds`."""
    try:
        is_array = path.lower().endswith(".npy")
        stored = np.load(path, allow_pickle=False) if is_array else np.asarray(Image.open(path))
    except Exception as error:  # damaged files make NumPy and Pillow raise almost anything
        raise ImageError(f"'{path}' is damaged: {error}") from error
    if stored.ndim == 3 and stored.shape[2] == 1:
        stored = stored[:, :, 0]
    if stored.ndim != 2 or stored.size == 0 or stored.dtype.kind not in kinds:
        raise ImageError(
            f"'{path}' is {stored.dtype} {list(stored.shape)}, but must have one number per pixel, "
            "a depth or a class id, not a color"
        )
    return stored


def pairs_by_name(source: str, target_words: set[str]) -> dict[str, list[Pair]]:
    """The pairs below a folder, by `train`, `test` or `""` for those below neither."""
    if not os.path.isdir(source):
        raise DataError(f"'{source}' is not a directory")
    found: dict[tuple[str, tuple[str, ...]], dict[bool, str]] = {}
    for path in (file.path for file in list_files([source]) if file.skipped is None):
        parts = os.path.splitext(os.path.relpath(path, source))[0].lower().split(os.sep)
        words = [re.split(r"[_\-. ]", part) for part in parts]
        is_target = path.lower().endswith(".npy") or any(target_words & set(w) for w in words)
        folders = set(parts[:-1])
        split = "train" if folders & {*TRAIN} else "test" if folders & {*TEST} else ""
        names = [
            "_".join(w for w in part if w not in target_words | _IMAGE_WORDS) for part in words
        ]
        pair = found.setdefault((split, tuple(filter(None, names))), {})
        if is_target in pair:
            raise DataError(f"'{pair[is_target]}' and '{path}' map to the same pair: rename one")
        pair[is_target] = path
    alone = [path for pair in found.values() if len(pair) == 1 for path in pair.values()]
    if alone:
        raise DataError(
            f"{len(alone)} files below '{source}' have no partner, for example '{alone[0]}': an "
            "image and its target have the same name, such as images/a/1.jpg and "
            f"{'masks' if 'masks' in target_words else 'depth'}/a/1.png"
        )
    splits: dict[str, list[Pair]] = {}
    for (split, _), pair in sorted(found.items(), key=lambda item: os.fsencode(item[1][False])):
        splits.setdefault(split, []).append((pair[False], pair[True]))
    return splits
