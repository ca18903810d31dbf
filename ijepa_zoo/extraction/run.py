"""Extract features of images into a file: resumable, on any number of processes."""

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from ..data.datasets import ImageDataset
from ..data.decode import MAX_PIXELS, Decoder
from ..data.loading import load_in_order
from ..data.sources import open_images
from ..data.transforms import create_transform
from ..distributed import Distributed, init_distributed
from ..errors import ImageError, RunError, SettingsError
from ..features import Layers
from ..progress import progress_bar
from .claim import claim, lock_rank, remove_parts
from .encoder import Batch, Encoder, hash_texts
from .outputs import DTYPES, Outputs, choose_outputs, merge
from .parts import Parts


@dataclass(frozen=True)
class ExtractionReport:
    """What a run did.

    Attributes:
        features: The file of features, ``[rows, *row]`` in the order of the input.
        index: JSON lines, one per input file.
        record: Settings and counts of the run, JSON.
        shape: Shape of the features.
        dtype: Their dtype.
        failed: Path and reason of each image without a row.
        skipped: Files in folders or shards that are not images by their names.
        images_per_second: Rate of this process group in this session; 0 if nothing was left to do.
        already_done: Whether a finished run with the same settings was found.
        settings: What the run was made with.
    """

    features: Path
    index: Path
    record: Path
    shape: tuple[int, ...]
    dtype: str
    failed: list[tuple[str, str]]
    skipped: int
    images_per_second: float
    already_done: bool
    settings: dict[str, Any]


def extract_features(
    inputs: Any,
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    layers: Layers = "last",
    pool: str | None = "avg",
    dtype: str = "float32",
    batch_size: int | None = None,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    precision: str = "auto",
    format: str | None = None,
    strict: bool = False,
    value_range: tuple[float, float] | None = None,
    bands: tuple[int, ...] | None = None,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    progress: bool = False,
) -> ExtractionReport | None:
    """Extract the features of images into one file, with an index that says which row is whose.

    The images are cut into fixed batches in the order of the input. Finished batches are kept in
    ``<out>.parts`` until the end, so the same call after an interruption resumes, and the files are
    byte-identical to those of an uninterrupted run for any number of workers, of threads, and of
    processes under ``torchrun`` (on a shared file system).

    Args:
        inputs: See :func:`ijepa_zoo.data.sources.open_images`.
        model: A timm ViT; it is moved to the device and left in its training or evaluation mode.
        out: File to write; ``<stem>.index.jsonl`` and ``<stem>.run.json`` are written next to it.
        layers: See :class:`~ijepa_zoo.features.FeatureExtractor`.
        pool: 'avg' or None, see there.
        dtype: Of the file: 'float32', 'float16' or 'bfloat16'.
        batch_size: Images per batch. Default: 32, on a CUDA GPU as many as have about 65,536
            patches.
        device: 'auto' for the GPU if there is one (under torchrun one each), or torch's name.
        workers: Processes that decode images; 0 decodes in this one. Default: one per CPU.
        threads: Threads of the computation on a CPU. Default: one per CPU.
        precision: Of the computation: 'float32', 'bfloat16' or 'float16' (autocast),
            'bfloat16-weights' (everything in bfloat16: a little faster, about twice the error), or
            'auto': on a CUDA GPU 'bfloat16', before compute capability 8.0 'float16', elsewhere
            'float32'.
        format: 'safetensors', 'npy' or 'parquet'; default: by the suffix of ``out``.
        strict: Stop at the first image that fails.
        value_range: Values of 16-bit images that become black and white, see `Decoder`.
        bands: Bands or pages of image files that become channels, see `Decoder`.
        max_pixels: Images with more pixels are refused.
        overwrite: Replace finished files, and parts made with other settings.
        progress: Show progress: a bar in a terminal, a line every 30 s elsewhere.

    Returns:
        What was done. Images that failed are in it and in the index, and the rest is complete.
        None in all processes under torchrun but the last to finish, which writes the files.

    Raises:
        DataError: An input does not exist or there are no images.
        ValueError: An argument is out of range.
        RunError: Other results are in the way, another process is at work, an image fails under
            ``strict``, or features are not finite in the chosen precision.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    smallest = min(1 if batch_size is None else batch_size, threads or 1)
    if smallest < 1 or (workers or 0) < 0:
        raise SettingsError("batch_size and threads must be at least 1, workers at least 0")
    outputs = choose_outputs(out, format, dtype, pool)
    with init_distributed(device) as distributed:
        encoder = Encoder(
            model,
            layers=layers,
            pool=pool,
            dtype=dtype,
            precision=precision,
            device=distributed.device,
            threads=threads,
        )
        decoder = Decoder(encoder.in_chans, value_range, bands, max_pixels)
        images = open_images(inputs, decoder=decoder, exclude=outputs.own)
        outputs.refuse_inputs(images)
        # Equal batches waste the fewest slots of the last one, down to a run of a single image.
        batch_size = -(-len(images) // -(-len(images) // (batch_size or encoder.batch_size)))
        settings = {
            **encoder.settings,
            "format": outputs.format,
            "batch_size": batch_size,
            "value_range": value_range and list(value_range),
            "bands": bands and list(bands),
            "max_pixels": max_pixels,
            "images": len(images),
            "inputs": images.fingerprint(),
            "paths": hash_texts(images.name(index) for index in range(len(images))),
        }
        finished = claim(outputs, settings, overwrite, distributed)
        if finished:
            return _report(outputs, 0.0, finished)
    row_bytes = math.prod(encoder.row_shape) * encoder.dtype.itemsize
    parts = Parts(outputs.parts, len(images), batch_size, row_bytes)
    with lock_rank(outputs, distributed.rank):
        transform = create_transform(model, normalize=False)
        batches = ImageBatches(images, transform, batch_size, (encoder.in_chans, *encoder.size))
        rate = _work(parts, batches, encoder, distributed, workers, strict, progress)
    if not _merge_when_complete(outputs, parts, images, encoder.row_shape, settings):
        return None
    return _report(outputs, rate, finished=False)


class ImageBatches:
    """Batch `b` holds images `b * batch_size` to `(b + 1) * batch_size`, each in its own slot.

    Slots of broken images and those past the last image hold zeros: an image meets the same slot
    and the same shape whatever its neighbors are, so its features are the same to the last bit.

    Args:
        images: What to decode.
        transform: Decoded image to uint8 `[C, H, W]`.
        batch_size: Slots of a batch.
        shape: Of the transformed images, `(C, H, W)`.
    """

    def __init__(
        self, images: ImageDataset, transform: Any, batch_size: int, shape: tuple[int, int, int]
    ) -> None:
        self.images, self.transform = images, transform
        self.batch_size, self.shape = batch_size, shape

    def __getitem__(self, batch: int) -> Batch:
        """Decode one batch.

        Returns:
            Images, uint8 `[batch_size, C, H, W]`, and for each image of the batch None or the
            reason why it could not be decoded.
        """
        pixels = torch.zeros(self.batch_size, *self.shape, dtype=torch.uint8)
        first = batch * self.batch_size
        last = min(first + self.batch_size, len(self.images))
        errors: list[str | None] = []
        for slot, index in enumerate(range(first, last)):
            try:
                pixels[slot] = self.transform(self.images.read(index))
                errors.append(None)
            except ImageError as error:
                errors.append(str(error))
        return pixels, errors


def _work(
    parts: Parts,
    batches: ImageBatches,
    encoder: Encoder,
    distributed: Distributed,
    workers: int | None,
    strict: bool,
    progress: bool,
) -> float:
    """Make the missing parts of this process; returns its images per second."""
    done = parts.sound()
    if strict:
        for part in sorted(done):
            _stop_at_failure(parts, batches.images, part, parts.errors(part))
    own = range(distributed.rank, len(parts), distributed.world_size)
    missing = [part for part in own if part not in done]
    order = [batch for part in missing for batch in parts.batches(part)]
    loaded = load_in_order(batches, order, workers, pin_memory=encoder.device.type == "cuda")
    images = sum(map(parts.size, own))
    before = images - sum(map(parts.size, missing))
    start = time.perf_counter()
    with (
        closing(encoder.encode(loaded)) as encoded,
        progress_bar(progress and distributed.is_main, images, "features", "image", before) as bar,
    ):
        for part in missing:
            rows, errors = [], []
            for _ in parts.batches(part):
                features, reasons = next(encoded)
                rows.append(features)
                errors += reasons
            if strict:
                _stop_at_failure(parts, batches.images, part, errors)
            _check_finite(rows, batches.images.name(part * parts.images_each))
            parts.write(part, rows, errors)
            bar.update(parts.size(part))
    return (images - before) / (time.perf_counter() - start)


def _merge_when_complete(
    outputs: Outputs,
    parts: Parts,
    images: ImageDataset,
    row_shape: tuple[int, ...],
    settings: dict[str, Any],
) -> bool:
    """Write the files if all parts are complete; False while other processes have some to do."""
    try:
        with FileLock(outputs.parts / "merge.lock"):
            if outputs.record.exists() or len(parts.done()) < len(parts):
                return False  # another process has merged them, or will
            merge(outputs, parts, images, row_shape, settings)
    except FileNotFoundError:
        if not outputs.parts.exists():  # another process has merged and removed them
            return False
        raise
    remove_parts(outputs)
    return True


def _stop_at_failure(
    parts: Parts, images: ImageDataset, part: int, errors: Sequence[str | None]
) -> None:
    for position, reason in enumerate(errors):
        if reason is not None:
            path = images.name(part * parts.images_each + position)
            raise RunError(f"{path!r}: {reason} (strict: stopped at the first failure)")


def _check_finite(rows: Sequence[Tensor], path: str) -> None:
    if not all(torch.isfinite(batch).all() for batch in rows):
        raise RunError(
            f"features in the batches from {path!r} on are not finite: use float32 for dtype and "
            "precision; if they are not finite then, the weights are broken"
        )


def _report(outputs: Outputs, rate: float, finished: bool) -> ExtractionReport:
    record = json.loads(outputs.record.read_bytes())
    failed = []
    if record["failed"]:
        with outputs.index.open("rb") as lines:
            failed = [
                (line["path"], line["error"]) for line in map(json.loads, lines) if "error" in line
            ]
    return ExtractionReport(
        features=outputs.features,
        index=outputs.index,
        record=outputs.record,
        shape=tuple(record["shape"]),
        dtype=record["dtype"],
        failed=failed,
        skipped=record["skipped"],
        images_per_second=rate,
        already_done=finished,
        settings=record["settings"],
    )
