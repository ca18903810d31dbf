"""Features of every image, computed once and kept in files that know what they are of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..data.datasets import ArrayDataset, ImageDataset, Subset
from ..distributed import Distributed
from ..encode import Batch, hash_texts
from ..errors import RunError, SettingsError
from ..extract import Parts, whole_file
from ..progress import skip
from .representations import Representations

_SETTINGS, _ROWS, _REASONS = "settings.json", "rows.npy", "reasons.json"

# What reading a damaged file raises.
_DAMAGED = (ValueError, OSError, EOFError, TypeError, LookupError, RecursionError, SyntaxError)

Loader = Callable[[Sequence[int]], Iterable[Batch]]


@dataclass(frozen=True)
class CachedFeatures:
    """Features of a set of images, read from the disk as they are needed.

    Attributes:
        rows: float32 `[n, W]`.
        indices: int64 `[n]`, numbers of the images that could be decoded.
        broken: Number and reason of the others.
        computed: Images that were encoded now; 0 where all came from the cache.
    """

    rows: Tensor
    indices: npt.NDArray[np.int64]
    broken: dict[int, str]
    computed: int


def files_state(images: ImageDataset) -> str:
    """A hash of what the images' fingerprint does not tell.

    Sizes and times of files, every byte of arrays.
    """
    whole = images.dataset if isinstance(images, Subset) else images
    if isinstance(whole, ArrayDataset):
        digest = hashlib.blake2b(digest_size=8)
        for index in range(len(images)):
            digest.update(np.asarray(images.raw(index)).tobytes())
        return digest.hexdigest()
    return hash_texts(map(_file_state, images.files()))


def _file_state(path: str) -> str:
    try:
        state = os.stat(path)
    except (OSError, ValueError):  # such as a link to nowhere: a broken image
        return "missing"
    return f"{state.st_size} {state.st_mtime_ns}"


def cached_features(
    root: Path,
    load: Loader,
    images: tuple[int, int],
    source: Representations,
    about: Mapping[str, Any],
    distributed: Distributed,
    *,
    mirrored: bool,
    progress: Any,
) -> CachedFeatures:
    """Features of all images, from the cache or computed now.

    The folder's name is a hash of everything that decides the numbers: the network and its weights,
    precision, transform, list of images, view. Changed images or weights therefore find another
    folder. An interrupted pass goes on where it was.

    Args:
        root: Folder of all caches.
        load: Reads batches of the images by their numbers.
        images: How many there are, and how many slots a batch has.
        source: Makes the rows.
        about: What decides the pixels: images and transform.
        distributed: Those that share the work.
        mirrored: Take the mirror images in the place of the images.
        progress: Progress bar; `update` is called with numbers of images.

    Raises:
        RunError: Another process works on it, its files are of other features or cannot be
            written whole, or features are not finite.
    """
    settings = json.loads(
        json.dumps({**source.settings, **about, "mirrored": mirrored, "batch_size": images[1]})
    )
    folder = root / hash_texts([json.dumps(settings, sort_keys=True)])
    parts = Parts(folder, *images, 4 * source.row_width)
    shape = images[0], source.row_width
    with ExitStack() as stack:
        if not distributed.broadcast_object(_prepare(folder, settings, shape, distributed, stack)):
            computed = _compute(parts, load, source, distributed, mirrored, progress)
            if distributed.rank == 0:
                _merge(parts, source.row_width)
            distributed.barrier()
        else:
            computed = 0
            skip(progress, images[0])
    try:
        reasons, rows = _contents(folder, images[0], source.row_width)
    except _DAMAGED as error:
        raise RunError(f"the features in {folder} are damaged ({error}): remove it") from error
    good = np.array([i for i, reason in enumerate(reasons) if reason is None], np.int64)
    broken = {i: reason for i, reason in enumerate(reasons) if reason is not None}
    return CachedFeatures(torch.from_numpy(rows), good, broken, computed)


def _prepare(
    folder: Path,
    settings: dict[str, Any],
    shape: tuple[int, int],
    distributed: Distributed,
    stack: ExitStack,
) -> bool:
    """Process 0 locks the folder; True where everything is in it already."""
    if distributed.rank != 0:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    if _holds(folder, settings, shape):
        return True
    try:
        stack.enter_context(FileLock(folder / "lock", timeout=0))
    except Timeout:
        raise RunError(
            f"another process computes the features in {folder} now: wait for it, or name another "
            "folder with --out"
        ) from None
    if _holds(folder, settings, shape):  # another process has just finished them
        return True
    with whole_file(folder / _SETTINGS) as file:
        file.write(json.dumps(settings, indent=1).encode())
    for name in (_ROWS, _REASONS):  # damaged ones, if any: they are computed again
        (folder / name).unlink(missing_ok=True)
    return False


def _holds(folder: Path, settings: dict[str, Any], shape: tuple[int, int]) -> bool:
    """Whether everything is there and sound; what is damaged is as good as missing."""
    if not all((folder / name).is_file() for name in (_SETTINGS, _ROWS, _REASONS)):
        return False
    try:
        found = json.loads((folder / _SETTINGS).read_bytes())
    except _DAMAGED:
        return False
    if isinstance(found, dict) and found != settings:
        raise RunError(f"{folder} holds other features than its name says: remove it")
    try:
        _contents(folder, *shape, checked=True)
    except _DAMAGED:
        return False
    return isinstance(found, dict)


def _contents(
    folder: Path, images: int, width: int, checked: bool = False
) -> tuple[list[str | None], npt.NDArray[np.float32]]:
    """A reason or None for every image, and the rows of those with None.

    With `checked` the rows are read and compared with their checksum.

    Raises:
        ValueError: They do not agree; other errors of `_DAMAGED` where they cannot be read.
    """
    found = json.loads((folder / _REASONS).read_bytes())
    reasons = found["reasons"]
    known = isinstance(reasons, list) and all(r is None or isinstance(r, str) for r in reasons)
    if not known or len(reasons) != images:
        raise SettingsError(f"{_REASONS} has no null or reason for each of {images} images")
    path = folder / _ROWS
    # copy on write: torch wants writable memory
    rows: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="c")
    shape = (reasons.count(None), width)
    if rows.shape != shape or rows.dtype.str != "<f4" or not rows.flags.c_contiguous:
        raise SettingsError(f"{_ROWS} has {rows.shape} {rows.dtype}, not {shape} float32")
    if path.stat().st_size != rows.offset + rows.nbytes:
        raise SettingsError(f"{_ROWS} has more bytes than its rows")
    if checked and _checksum(path) != found["crc32"]:
        raise SettingsError(f"{_ROWS} is not what was written")
    return reasons, rows


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            total = zlib.crc32(piece, total)
    return total


def _compute(
    parts: Parts,
    load: Loader,
    source: Representations,
    distributed: Distributed,
    mirrored: bool,
    progress: Any,
) -> int:
    """Make the missing parts of this process; returns how many images all of them encoded."""
    done = distributed.broadcast_object(parts.sound())
    mine = [p for p in range(distributed.rank, len(parts), distributed.world_size) if p not in done]
    loaded = load([batch for part in mine for batch in parts.batches(part)])
    before = sum(map(parts.size, done))
    skip(progress, before)
    with closing(source.encode(_mirrored(loaded) if mirrored else loaded)) as encoded:
        for part in mine:
            rows, errors = [], []
            for _ in parts.batches(part):
                found, reasons = next(encoded)
                rows.append(found.float().cpu())
                errors += reasons
            if not all(bool(batch.isfinite().all()) for batch in rows):
                raise RunError(
                    f"features of images {part * parts.images_each} to "
                    f"{part * parts.images_each + parts.size(part) - 1} are not finite (NaN or "
                    "infinite)"
                    + (
                        ""
                        if source.settings.get("precision") == "float32"
                        else ": try --precision float32"
                    )
                )
            parts.write(part, rows, errors)
            progress.update(parts.size(part) * distributed.world_size)
    distributed.barrier()
    return parts.images - before


def _mirrored(loaded: Iterable[Batch]) -> Iterator[Batch]:
    return ((pixels.flip(-1), reasons) for pixels, reasons in loaded)


def _merge(parts: Parts, width: int) -> None:
    """Join the parts into one array that can be mapped into memory, and remove them."""
    reasons = [reason for part in range(len(parts)) for reason in parts.errors(part)]
    header = {"descr": "<f4", "fortran_order": False}
    shape = (reasons.count(None), width)
    with whole_file(parts.folder / _ROWS) as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
        for part in range(len(parts)):
            with parts.rows_file(part).open("rb") as rows:
                shutil.copyfileobj(rows, file, 1 << 20)
    content = {"crc32": _checksum(parts.folder / _ROWS), "reasons": reasons}
    with whole_file(parts.folder / _REASONS) as file:
        file.write(json.dumps(content).encode())
    for part in range(len(parts)):
        parts.rows_file(part).unlink()
        parts.rows_file(part).with_suffix(".json").unlink()
