"""Features for probes, from a frozen encoder or raw pixels: computed in every epoch, or cached."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.datasets import Targets
from ..encode import Batch, Encoder, fast_precision, hash_texts
from ..errors import SettingsError
from ..extract import ImageBatches, extract_batches
from ..parts import Outputs
from .batches import TrainBatches, fixed_transform
from .models import EvalModel
from .sets import EvalSet

if TYPE_CHECKING:
    from .probe import Probe

Kind = Literal["vectors", "tokens", "maps"]

_SIDE = 32  # pixels of the images in `RawPixels`
_VALUES = 2**24  # of cached rows that are read at a time
PIECE = 128  # images of a forward pass
CACHED_AS_IS = (
    "cached: each image and its mirror image are encoded once, as the protocol has them (its only "
    "random transform is the flip)"
)
_CACHED_WITHOUT_CROPS = (
    "cached: each image and its mirror image are encoded once, with the test transform instead of "
    "the protocol's random crops"
)


class BlockFeatures(Encoder):
    """Features of a frozen encoder, from one pass over each image.

    The final LayerNorm is applied to the output of each block, and the patches are averaged
    (arXiv 2301.08243, appendix A.1). `last` is the end of `last4`, so rows hold the latter alone.
    They are pooled vectors `[B, D]`, maps `[B, D, h, w]`, or tokens, the patches of the last block
    `[B, N, D]`, which are kept in half precision if the encoder runs in half precision.
    """

    def __init__(
        self,
        model: EvalModel,
        pool: str | None = "auto",
        kind: Kind = "vectors",
        device: str | torch.device = "cpu",
        precision: str = "auto",
    ) -> None:
        blocks = getattr(model.model, "blocks", None)
        if blocks is not None and len(blocks) < 4:
            raise SettingsError(
                f"the model has {len(blocks)} blocks, and the paper's probes read the last four: "
                "use a model of at least four"
            )
        if pool == "auto" and getattr(model.model, "attn_pool", None) is not None:
            pool = "avg"  # the model's attention pooling takes its last block only
        if precision == "auto":
            precision = fast_precision(torch.device(device))
        super().__init__(
            model.model,
            layers="last" if kind == "tokens" else "last4",
            pool=pool if kind == "vectors" else None,
            dtype="float16" if kind == "tokens" and precision != "float32" else "float32",
            device=device,
            precision=precision,
        )
        self.kind, self.model, self.about = kind, model, model.describe()
        self.paper_name = model.paper_name
        width = self.row_shape[0]
        self.widths = {"last": width // 4, "last4": width}
        if kind == "tokens":
            self.widths = {"patches": width}

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """The representations in rows, without a copy."""
        if self.kind == "tokens":
            return {"patches": rows.flatten(2).transpose(1, 2)}
        return {"last": rows[:, -self.widths["last"] :], "last4": rows}


class RawPixels:
    """Images of 32 x 32 pixels, from 0 to 1, as features: a baseline without an encoder."""

    def __init__(self, size: tuple[int, int], in_chans: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.widths = {"pixels": in_chans * _SIDE * _SIDE}
        self.row_shape: tuple[int, ...] = (self.widths["pixels"],)
        self.dtype, self.paper_name = torch.float32, None
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
    """Decoder options that change the pixels."""
    decoder = part.images.decoder
    return {"value_range": decoder.value_range, "bands": decoder.bands}


@dataclass(frozen=True)
class CachedFeatures:
    """Features of the images of a set that could be decoded, read from the disk as needed."""

    rows: Tensor  # [n, ...]
    labels: Tensor  # [n]
    indices: npt.NDArray[np.int64]  # of the images

    def find(self, images: Targets) -> Targets:
        """The rows of images."""
        return np.flatnonzero(np.isin(self.indices, images))


class _Mirrored(ImageBatches):
    """Mirror images."""

    def __getitem__(self, batch: int) -> Batch:
        pixels, reasons = super().__getitem__(batch)
        return pixels.flip(-1), reasons


def cached_features(
    probe: Probe, part: EvalSet, source: Source, *, mirrored: bool = False
) -> CachedFeatures:
    """Features of all images of a set, from the cache or computed now.

    The folder's name is a hash of everything that changes the features: the network and its
    weights, precision, transform, list and state of the images. An interrupted pass resumes.
    """
    transform = probe.protocol.transform
    batches = (_Mirrored if mirrored else ImageBatches)(
        part,
        fixed_transform(transform, part.in_chans, source.size),
        min(PIECE, len(part)),  # without empty slots for small sets
    )
    settings = {
        **source.settings,
        "dtype": str(source.dtype).removeprefix("torch."),
        "images": part.images.fingerprint(),
        "files": part.files_state,
        **pixel_options(part),
        "transform": transform.describe(source.size, train=False),
        "mirrored": mirrored,
        "batch_size": batches.batch_size,
    }
    folder = Path(probe.config.out) / "cache" / hash_texts([json.dumps(settings, sort_keys=True)])
    outputs = Outputs.beside(folder / "rows.npy", "npy")
    extract_batches(
        part.images,
        batches,
        source,
        outputs,
        settings,
        probe.distributed,
        workers=probe.config.workers,
        is_cache=True,
        progress=probe.config.progress,
        title=f"features, {part.name}{', mirrored' if mirrored else ''}",
    )
    probe.distributed.barrier()  # rank 0 has written the files
    broken = [*outputs.failures()]
    if broken and not part.skip_broken:
        part.read(broken[0])  # raises the error that names the image
    # copy on write: torch wants writable memory
    rows: np.memmap[Any, Any] = np.lib.format.open_memmap(outputs.features, mode="c")
    good = np.setdiff1d(np.arange(len(part)), broken).astype(np.int64)
    return CachedFeatures(torch.from_numpy(rows), torch.from_numpy(part.targets[good]), good)


LabeledRows = tuple[Tensor, Tensor]  # rows [b, ...] of features and classes [b]


class OnlineLoader:
    """Every epoch encodes every image with another random crop, as in the protocols.

    Unless `gathered`, each process has its share of the training batches only.
    """

    name = "online"
    piece: int | None = PIECE  # images of a forward pass in training; None for whole batches
    notes: Sequence[str] = ()

    def __init__(self, probe: Probe, source: Source, bar: Any, *, gather: bool = True) -> None:
        self.probe, self.source, self.bar, self.gathered = probe, source, bar, gather
        self.device = source.device
        self.batches = self._batches(probe.train_rows, probe.distributed.world_size)
        self.batch_size, self.steps = self.batches.batch_size, self.batches.steps

    def _batches(self, rows: Targets, world: int) -> TrainBatches:
        protocol, rank = self.probe.protocol, self.probe.distributed.rank if world > 1 else 0
        return TrainBatches(
            self.probe.train,
            rows,
            protocol.transform,
            self.source.size,
            protocol.batch_size,
            seed=self.probe.config.seed,
            rank=rank,
            world=world,
            micro=self.piece or protocol.batch_size,
        )

    def training(self, first: int, last: int) -> Iterator[LabeledRows]:
        """The steps of the epochs from `first` up to `last`, exclusive."""
        gather = self.probe.distributed.all_gather_rows
        pieces = self._encode(self.batches, self.batches.numbers(first, last))
        while step := list(islice(pieces, self.batches.parts)):
            rows, labels = (torch.cat(column) for column in zip(*step))
            yield (gather(rows), gather(labels)) if self.gathered else (rows, labels)

    def validation(self) -> Iterator[LabeledRows]:
        """The images that choose the head, the share of this process."""
        return self._in_order(self.probe.train, self.probe.val_rows)

    def testing(self) -> Iterator[LabeledRows]:
        """The test images, the share of this process."""
        return self._in_order(self.probe.test, self.probe.test_rows)

    def _in_order(self, part: EvalSet, images: Targets) -> Iterator[LabeledRows]:
        batches = self.probe.in_order(part, images, self.source.size)
        return self._encode(batches, range(len(batches)))

    def _encode(self, batches: Any, numbers: Sequence[int]) -> Iterator[LabeledRows]:
        for rows, labels in encoded(self.probe, self.source, batches, numbers):
            self.bar.update(len(labels) * self.probe.distributed.world_size)
            yield rows.float(), labels


def encoded(
    probe: Probe, source: Source, batches: Any, numbers: Sequence[int]
) -> Iterator[LabeledRows]:
    """Rows and classes of the images of batches."""
    waiting: deque[Tensor] = deque()

    def pixels() -> Iterator[Batch]:
        for images, labels in probe.loaded(batches, numbers):
            waiting.append(labels)
            yield images, [None] * len(labels)

    for rows, _ in source.encode(pixels()):
        yield rows, waiting.popleft().to(rows.device, non_blocking=True)


class CachedLoader(OnlineLoader):
    """Features computed once, of every image and its mirror image.

    Random crops of the protocol, if it has any, are replaced by the test transform. Without `flips`
    there are no mirror images, for classifiers that are not trained in epochs.
    """

    name, piece = "cached", None

    def __init__(
        self, probe: Probe, source: Source, bar: Any, *, flips: bool = True, gather: bool = True
    ) -> None:
        super().__init__(probe, source, bar, gather=gather)
        self.train = self.mirrored = cached_features(probe, probe.train, source)
        if flips:
            self.mirrored = cached_features(probe, probe.train, source, mirrored=True)
            crops = probe.protocol.transform.crop_mode == "center"
            self.notes = [_CACHED_WITHOUT_CROPS if crops else CACHED_AS_IS]
        self.test = cached_features(probe, probe.test, source)
        self.train_rows = self.train.find(probe.train_rows)
        self.val_rows = self.train.find(probe.val_rows)
        world = 1 if gather else probe.distributed.world_size
        self.batches = self._batches(self.train_rows, world)
        self.batch_size, self.steps = self.batches.batch_size, self.batches.steps

    def share(self, rows: Targets) -> Targets:
        """Those that belong to this process."""
        return rows[self.probe.distributed.rank :: self.probe.distributed.world_size]

    def training(self, first: int, last: int) -> Iterator[LabeledRows]:
        """The same images and flips as in `OnlineLoader`."""
        for number in self.batches.numbers(first, last):
            plan = self.batches.plan(number)
            chosen = np.array([row for _, row, _ in plan])
            flips = np.array([draws[-1] < 0.5 for *_, draws in plan])
            rows = self.train.rows[chosen]
            rows[flips] = self.mirrored.rows[chosen[flips]]
            yield rows.to(self.device).float(), self.train.labels[chosen].to(self.device)
            self.bar.update(self.batch_size)

    def _in_order(self, part: EvalSet, images: Targets) -> Iterator[LabeledRows]:
        found = self.train if part is self.probe.train else self.test
        mine = self.share(found.find(images))
        count = max(1, _VALUES // math.prod(found.rows.shape[1:]))
        for start in range(0, len(mine), count):
            chosen = mine[start : start + count]
            yield found.rows[chosen].to(self.device).float(), found.labels[chosen].to(self.device)
            self.bar.update(len(chosen) * self.probe.distributed.world_size)
