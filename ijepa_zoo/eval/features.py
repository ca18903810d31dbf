"""Features that probes read: of a frozen encoder or raw pixels, and their cache on disk."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.datasets import Targets
from ..encode import Batch, Encoder, fast_precision, hash_texts
from ..errors import DataError, RunError, SettingsError
from ..extract import extract_batches
from ..parts import Outputs
from .batches import OrderedBatches
from .models import Subject
from .sets import EvalSet

if TYPE_CHECKING:
    from .probe import Probe

_SIDE = 32  # pixels of the images that stand for themselves


class BlockFeatures:
    """Features of a frozen encoder, from one pass over each image.

    The final LayerNorm is applied to the output of each block, and the patches are averaged
    (arXiv 2301.08243, appendix A.1). `last` is the end of `last4`, so rows hold the latter alone.
    With `patches`, the patch tokens of the last block instead, as `patches` `[B, N, D]`, which are
    kept in half precision if the encoder runs in half precision.
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
        if precision == "auto":
            precision = fast_precision(torch.device(device))
        self.encoder = Encoder(
            subject.model,
            layers="last" if patches else "last4",
            pool=None if patches else pool,
            dtype="float16" if patches and precision != "float32" else "float32",
            device=device,
            precision=precision,
            host=False,
        )
        self.subject, self.patches = subject, patches
        self.row_shape, self.dtype = self.encoder.row_shape, self.encoder.dtype
        self.device, self.settings = self.encoder.device, self.encoder.settings
        self.size, self.about = self.encoder.size, subject.describe()
        self.paper_name = subject.paper_name
        width = self.row_shape[0]
        self.widths = {"patches": width} if patches else {"last": width // 4, "last4": width}

    def encode(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """Rows of the good images of each batch, in order; see :class:`Encoder`."""
        return self.encoder.encode(batches)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """The representations in rows, without a copy."""
        if self.patches:
            return {"patches": rows.flatten(2).transpose(1, 2)}
        return {"last": rows[..., -self.widths["last"] :], "last4": rows}


class RawPixels:
    """The pixels themselves, 32 x 32, from 0 to 1: what a probe reaches without any encoder."""

    paper_name: str | None = None

    def __init__(self, size: tuple[int, int], in_chans: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.widths = {"pixels": in_chans * _SIDE * _SIDE}
        self.row_shape: tuple[int, ...] = (self.widths["pixels"],)
        self.dtype = torch.float32
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
        """See :class:`BlockFeatures`."""
        for pixels, reasons in batches:
            good = [slot for slot, reason in enumerate(reasons) if reason is None]
            images = pixels[good].to(self.device).float().div_(255)
            if good:
                images = F.interpolate(images, (_SIDE, _SIDE), mode="bilinear", antialias=True)
            yield images.reshape(len(good), self.widths["pixels"]), reasons

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """See :class:`BlockFeatures`."""
        return {"pixels": rows}


Source = BlockFeatures | RawPixels


def pixel_options(part: EvalSet) -> dict[str, Any]:
    """What decides the pixels of its files, beside the files."""
    decoder = part.images.decoder
    return {"value_range": decoder.value_range, "bands": decoder.bands}


@dataclass(frozen=True)
class CachedFeatures:
    """Features of a set of images, read from the disk as they are needed."""

    rows: Tensor
    indices: npt.NDArray[np.int64]
    broken: dict[int, str]
    computed: int


class _Pixels:
    """Images of a set, or their mirror images, as the engine of extraction takes them."""

    strict = False

    def __init__(self, batches: OrderedBatches, mirrored: bool) -> None:
        self.batches, self.mirrored, self.batch_size = batches, mirrored, batches.batch_size

    def __getitem__(self, number: int) -> Batch:
        batch = self.batches[number]
        return batch.images.flip(-1) if self.mirrored else batch.images, batch.reasons


def cached_features(
    probe: Probe, part: EvalSet, source: Source, *, mirrored: bool = False
) -> CachedFeatures:
    """Features of all images of a set, from the cache or computed now.

    The folder's name is a hash of everything that decides the numbers: the network and its
    weights, precision, transform, list and state of the images. Changed images or weights
    therefore find another folder. An interrupted pass resumes.
    """
    batches = probe.in_order(part, np.arange(len(part)), source.size, shared=False)
    settings = {
        **source.settings,
        "dtype": str(source.dtype).removeprefix("torch."),
        "images": part.images.fingerprint(),
        "files": part.files_state,
        **pixel_options(part),
        "transform": probe.protocol.view.describe(source.size, train=False),
        "mirrored": mirrored,
        "batch_size": batches.batch_size,
    }
    folder = probe.out / "cache" / hash_texts([json.dumps(settings, sort_keys=True)])
    outputs = Outputs.beside(folder / "rows.npy", "rows", "npy")
    extracted = extract_batches(
        *(part.images, _Pixels(batches, mirrored), source, outputs, settings, probe.distributed),
        workers=probe.config.workers,
        is_cache=True,
        progress=probe.config.progress,
        title=f"features, {part.split}{', mirrored' if mirrored else ''}",
    )
    probe.distributed.barrier()  # rank 0 has written the files
    broken = {index: reason for index, (_, reason) in outputs.failures().items()}
    if broken and not part.skip_broken:
        part.read(next(iter(broken)))  # says which image, and what to do
    # copy on write: torch wants writable memory
    rows: np.memmap[Any, Any] = np.lib.format.open_memmap(outputs.features, mode="c")
    good = np.setdiff1d(np.arange(len(part)), [*broken]).astype(np.int64)
    return CachedFeatures(torch.from_numpy(rows), good, broken, extracted.computed)


def not_finite(source: Source) -> RunError:
    """The error of features that are NaN or infinite."""
    exact = source.settings.get("precision") == "float32"
    advice = "check the model's weights" if exact else "use --precision float32"
    return RunError(f"features of {source.about['name']} are NaN or infinite: {advice}")


def refuse_undecoded(
    what: str, part: EvalSet, rows: Targets, count: int, broken: Mapping[str, str]
) -> None:
    """Refuse images of a set, by their indices, if the count of those that were decoded is 0."""
    if count:
        return
    names = (part.images.name(row) for row in rows.tolist())
    first = next((f" (first: {name}: {broken[name]})" for name in names if name in broken), "")
    raise DataError(f"none of the {len(rows)} {what} images can be decoded{first}")
