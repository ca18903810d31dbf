"""Features that probes read: of a frozen encoder or raw pixels, and their cache on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor

from ..data.datasets import ArrayDataset, ImageDataset, Subset, Targets
from ..distributed import Distributed
from ..encode import Batch, Encoder, hash_texts
from ..errors import DataError, RunError, SettingsError
from ..extract import Parts, whole_file
from ..progress import skip
from .models import Subject
from .sets import EvalSet

if TYPE_CHECKING:
    from .probe import Probe

_SIDE = 32  # pixels of the images that stand for themselves


class Source(Protocol):
    """Turns pixels into rows that hold all features of an image.

    Attributes:
        widths: Width of each representation.
        device: Device of the rows.
        settings: Everything that decides the numbers.
        size: Height and width of the images in pixels.
        about: The model as results record it.
        paper_name: The name of the weights under which the paper has figures.
    """

    widths: dict[str, int]
    device: torch.device
    settings: dict[str, Any]
    size: tuple[int, int]
    about: dict[str, Any]
    paper_name: str | None

    def encode(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """Rows of the good images of each batch, in order; see :class:`Encoder`."""

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """The representations in rows, without a copy."""


class BlockFeatures:
    """Features of a frozen encoder, from one pass over each image.

    The final LayerNorm is applied to the output of each block, and the patches are averaged
    (arXiv 2301.08243, appendix A.1). `last` is the end of `last4`, so rows hold the latter alone.

    Args:
        subject: A timm ViT of at least four blocks.
        pool: See `FeatureExtractor`.
        patches: Read the patch tokens of the last block instead, as `patches` `[B, N, D]`.
        device: See :class:`Encoder`.
        precision: See :class:`Encoder`.

    Raises:
        SettingsError: The model has fewer blocks, or cannot be pooled like that.
    """

    def __init__(
        self,
        subject: Subject,
        pool: str | None = "auto",
        patches: bool = False,
        device: str | torch.device = "cpu",
        precision: str = "auto",
    ) -> None:
        blocks = getattr(subject.model, "blocks", None)
        if blocks is not None and len(blocks) < 4:
            raise SettingsError(
                f"the model has {len(blocks)} blocks, and the paper's probes read the last four: "
                "use a model of at least four"
            )
        if pool == "auto" and getattr(subject.model, "attn_pool", None) is not None:
            pool = "avg"  # the model's attention pooling is of its last block alone
        if not patches and pool is None:
            raise SettingsError("this probe reads one vector per image: use pool avg, cls, ...")
        self.encoder = Encoder(
            subject.model,
            layers="last" if patches else "last4",
            pool=None if patches else pool,
            device=device,
            precision=precision,
            host=False,
        )
        self.subject, self.patches = subject, patches
        self.device, self.settings = self.encoder.device, self.encoder.settings
        self.size, self.about = self.encoder.size, subject.describe()
        self.paper_name = subject.paper_name
        width = self.encoder.row_shape[0]
        self.widths = {"patches": width} if patches else {"last": width // 4, "last4": width}

    def encode(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """See :class:`Source`."""
        return self.encoder.encode(batches)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """See :class:`Source`."""
        if self.patches:
            return {"patches": rows.flatten(2).transpose(1, 2)}
        return {"last": rows[..., -self.widths["last"] :], "last4": rows}


class RawPixels:
    """The pixels themselves, 32 x 32, from 0 to 1: what a probe reaches without any encoder.

    Args:
        size: Height and width of the images that an encoder would get.
        device: Device of the rows.
    """

    paper_name: str | None = None

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        self.size, self.device = size, device
        self.widths = {"pixels": 3 * _SIDE * _SIDE}
        shown = f"{_SIDE} x {_SIDE} pixels"
        self.settings: dict[str, Any] = {"model": "raw pixels", "size": shown}
        self.about: dict[str, Any] = {
            "name": "raw pixels",
            "architecture": "none",
            "weights": shown,
            "weights_hash": "none",
            "image_size": list(size),
            "parameters": 0,
        }

    def encode(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """See :class:`Source`."""
        for pixels, reasons in batches:
            good = [slot for slot, reason in enumerate(reasons) if reason is None]
            images = pixels[good].to(self.device).float().div_(255)
            if good:
                images = F.interpolate(images, (_SIDE, _SIDE), mode="bilinear", antialias=True)
            yield images.reshape(len(good), self.widths["pixels"]), reasons

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """See :class:`Source`."""
        return {"pixels": rows}


@dataclass(frozen=True)
class CachedFeatures:
    """Features of a set of images, read from the disk as they are needed.

    Attributes:
        rows: float32 `[n, W]`.
        indices: int64 `[n]`, indices of the images that could be decoded.
        broken: Index and reason of the others.
        computed: Images that were encoded now; 0 where all were cached.
    """

    rows: Tensor
    indices: npt.NDArray[np.int64]
    broken: dict[int, str]
    computed: int


def files_state(images: ImageDataset) -> str:
    """A hash of sizes and times of files and of every byte of arrays."""
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
    probe: Probe, part: EvalSet, source: Source, *, mirrored: bool = False
) -> CachedFeatures:
    """Features of all images of a set, from the cache or computed now.

    The folder's name is a hash of everything that decides the numbers: the network and its
    weights, precision, transform, list and state of the images. Changed images or weights
    therefore find another folder. An interrupted pass resumes.

    Args:
        probe: The task.
        part: The set.
        source: Makes the rows.
        mirrored: Encode the mirror images instead.

    Raises:
        RunError: Another process works on it, or features are not finite.
    """
    batches = probe.in_order(part, np.arange(len(part)), source.size, shared=False)
    width, distributed = max(source.widths.values()), probe.distributed
    settings = {
        **source.settings,
        "images": part.images.fingerprint(),
        "files": files_state(part.images),
        "transform": probe.protocol.view.describe(source.size, train=False),
        "mirrored": mirrored,
        "batch_size": batches.batch_size,
    }
    text = json.dumps(settings, sort_keys=True)
    folder = probe.out / "cache" / hash_texts([text])
    parts = Parts(folder, len(part), batches.batch_size, 4 * width)
    computed = 0
    title = f"features, {part.split}{', mirrored' if mirrored else ''}"
    with ExitStack() as stack, probe.bar(len(part), title) as bar:
        if distributed.run_on_main(lambda: _claim(folder, text, stack)):
            skip(bar, len(part))
        else:

            def load(numbers: Iterable[int]) -> Iterator[Batch]:
                for batch in probe.loaded(batches, numbers):
                    yield batch.images.flip(-1) if mirrored else batch.images, batch.reasons

            computed = _compute(parts, load, source, distributed, bar)
            if distributed.is_main:
                _merge(parts, width)
            distributed.barrier()
    reasons = json.loads((folder / "reasons.json").read_bytes())["reasons"]
    # copy on write: torch wants writable memory
    rows: np.memmap[Any, Any] = np.lib.format.open_memmap(folder / "rows.npy", mode="c")
    good = np.array([i for i, reason in enumerate(reasons) if reason is None], np.int64)
    broken = {i: reason for i, reason in enumerate(reasons) if reason is not None}
    return CachedFeatures(torch.from_numpy(rows), good, broken, computed)


def _claim(folder: Path, settings: str, stack: ExitStack) -> bool:
    """Whether everything is cached; if not, the folder is locked."""
    folder.mkdir(parents=True, exist_ok=True)
    if _is_complete(folder):
        return True
    try:
        stack.enter_context(FileLock(folder / "lock", timeout=0))
    except Timeout:
        raise RunError(
            f"another process computes the features in {folder} now: wait for it, or use another "
            "--out"
        ) from None
    if _is_complete(folder):  # another process has just finished
        return True
    with whole_file(folder / "settings.json") as file:
        file.write(settings.encode())
    return False


def _is_complete(folder: Path) -> bool:
    """Whether both files are there, as long as they were written; else they are made again."""
    try:
        size = json.loads((folder / "reasons.json").read_bytes())["bytes"]
        return bool((folder / "rows.npy").stat().st_size == size)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _compute(
    parts: Parts, load: Any, source: Source, distributed: Distributed, progress: Any
) -> int:
    """Make the missing parts of this process; returns how many images all of them encoded."""
    done = distributed.broadcast_object(parts.complete() if distributed.is_main else set())
    mine = [p for p in range(distributed.rank, len(parts), distributed.world_size) if p not in done]
    loaded = load([batch for part in mine for batch in parts.batches(part)])
    before = sum(map(parts.size, done))
    skip(progress, before)
    with closing(source.encode(loaded)) as encoded:
        for part in mine:
            rows, errors = [], []
            for _ in parts.batches(part):
                found, reasons = next(encoded)
                rows.append(found.float().cpu())
                errors += reasons
            if not all(bool(batch.isfinite().all()) for batch in rows):
                raise not_finite(source)
            parts.write(part, rows, errors)
            progress.update(parts.size(part) * distributed.world_size)
    distributed.barrier()
    return parts.images - before


def not_finite(source: Source) -> RunError:
    """The error of features that are NaN or infinite."""
    exact = source.settings.get("precision") == "float32"
    advice = "check the model's weights" if exact else "use --precision float32"
    return RunError(f"features of {source.about['name']} are NaN or infinite: {advice}")


def _merge(parts: Parts, width: int) -> None:
    """Join the parts into one array that can be mapped into memory, and remove them."""
    reasons = [reason for part in range(len(parts)) for reason in parts.errors(part)]
    header = {"descr": "<f4", "fortran_order": False, "shape": (reasons.count(None), width)}
    with whole_file(parts.folder / "rows.npy") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in range(len(parts)):
            with parts.rows_file(part).open("rb") as rows:
                shutil.copyfileobj(rows, file, 1 << 20)
        size = file.tell()
    with whole_file(parts.folder / "reasons.json") as file:
        file.write(json.dumps({"bytes": size, "reasons": reasons}).encode())
    for part in range(len(parts)):
        parts.rows_file(part).unlink()
        parts.rows_file(part).with_suffix(".json").unlink()


def decoded(
    part: EvalSet, rows: Targets, broken: Mapping[str, str], distributed: Distributed
) -> int:
    """How many images all processes could decode; every process must call this.

    Args:
        part: Their set.
        rows: Their indices.
        broken: Names and reasons of those of this set that this process could not decode.
        distributed: The processes.
    """
    if not int(distributed.all_reduce(torch.tensor([len(broken)]))):
        return len(rows)  # the names of a million images are not looked up
    failed = torch.tensor([part.images.name(row) in broken for row in rows.tolist()])
    return len(rows) - int((distributed.all_reduce(failed.long()) > 0).sum())


def refuse_undecoded(
    what: str, part: EvalSet, rows: Targets, count: int, broken: Mapping[str, str]
) -> None:
    """Refuse images of which none could be decoded.

    Args:
        what: What they are for.
        part: Their set.
        rows: Their indices.
        count: How many of them could be decoded.
        broken: Name and reason of images that could not.

    Raises:
        DataError: The count is 0.
    """
    if count:
        return
    names = (part.images.name(row) for row in rows.tolist())
    first = next((f" (first: {name}: {broken[name]})" for name in names if name in broken), "")
    raise DataError(f"none of the {len(rows)} {what} images can be decoded{first}")
