"""Which image and which depth map belong together, by their names."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import DataError
from .items import is_image_name
from .sources import list_items

ARRAY = ".npy"

_DEPTH_WORDS = frozenset(("depth", "depths", "depthmap"))
_IMAGE_WORDS = frozenset(("rgb", "image", "images", "img", "color", "colors", "colour", "sync"))
_TRAIN_WORDS = frozenset(("train", "training", "nyu2_train"))
_TEST_WORDS = frozenset(("test", "testing", "val", "validation", "nyu2_test"))
_LIST_ROOTS = ("", "sync", "train", "official_splits/test", "test")

Pair = tuple[str, str]  # paths of the image and of its depth map
_Found = tuple[tuple[str, ...], bool, str]  # key of the pair, whether a depth map, path


def folder_pairs(source: str) -> dict[str, list[Pair]]:
    """The pairs below a folder, by `train`, `test` or `""` for those below neither.

    Depth maps are `.npy` files or have `depth` as a word of a folder's or their own name; a pair
    has the same name without such words and `rgb`, `image`, `color`, `sync`.

    Raises:
        DataError: A file has no partner, or two.
    """
    return {name: _pairs(found, source) for name, found in _by_split(source).items()}


def listed_pairs(path: Path) -> list[Pair]:
    """The pairs of a list of NYU's, lines of image, depth map and focal length.

    Lines whose depth map is called `None` are left out. Paths are relative to the list's folder or
    to one of those that the usual copies have.

    Raises:
        DataError: It names no pairs, or its files are not there.
    """
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    named = [(line[0].lstrip("/"), line[1].lstrip("/")) for line in lines if len(line) > 1]
    named = [pair for pair in named if pair[1] != "None"]
    if not named:
        raise DataError(f"'{path}' names no pairs: each line is IMAGE DEPTH FOCAL_LENGTH")
    roots = [path.parent / root for root in _LIST_ROOTS]
    for root in roots:
        if (root / named[0][0]).is_file():
            return [(str(root / image), str(root / depth)) for image, depth in named]
    raise DataError(
        f"'{path}' names '{named[0][0]}', which is in none of "
        + ", ".join(f"'{root}'" for root in roots)
    )


def _by_split(source: str) -> dict[str, list[_Found]]:
    """Files by split (`""` where no folder names one): key of the pair, whether depth, path."""
    found: dict[str, list[_Found]] = {}
    for root, item in list_items([source], also=(ARRAY,)):
        if item.skipped is not None or item.shard is not None:
            continue
        stem, suffix = os.path.splitext(item.path.removeprefix(root))
        *folders, name = stem.split("/")
        words = [{word for word in re.split(r"[_\-. ]", part.lower())} for part in [*folders, name]]
        lower = {folder.lower() for folder in folders}
        split = "train" if lower & _TRAIN_WORDS else "test" if lower & _TEST_WORDS else ""
        depth = suffix.lower() == ARRAY or any(found & _DEPTH_WORDS for found in words)
        if not depth and not is_image_name(item.path):
            continue
        key = tuple(kept for part in [*folders, name] if (kept := _without_words(part)))
        found.setdefault(split, []).append((key, depth, item.path))
    return found


def _without_words(part: str) -> str:
    words = re.split(r"[_\-. ]", part.lower())
    return "_".join(word for word in words if word not in _DEPTH_WORDS | _IMAGE_WORDS)


def _pairs(files: list[_Found], source: str) -> list[Pair]:
    halves: dict[bool, dict[tuple[str, ...], str]] = {False: {}, True: {}}
    for key, depth, path in files:
        other = halves[depth].setdefault(key, path)
        if other != path:
            kind = "depth maps" if depth else "images"
            raise DataError(f"'{other}' and '{path}' are two {kind} of one pair by their names: "
                             "rename one, or name depth maps NAME_depth")  # fmt: skip
    images, depths = halves[False], halves[True]
    alone = sorted(images.keys() ^ depths.keys())
    if alone:
        path = images.get(alone[0]) or depths[alone[0]]
        raise DataError(
            f"{len(alone)} files below '{source}' have no partner, for example '{path}': an image "
            "and its depth map have the same name, such as rgb/a/1.jpg and depth/a/1.png, or "
            "1.jpg and 1_depth.png"
        )
    return [(images[key], depths[key]) for key in images]
