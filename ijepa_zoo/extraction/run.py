"""The extraction run: images in, features and an index out; resumable, shared between processes."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.batches import ImageBatches
from ..data.images import MAX_PIXELS
from ..data.items import Item
from ..data.sources import Inputs, find_items
from ..data.transforms import create_transform
from ..errors import RunError, SettingsError
from ..features import Layers
from ..progress import progress_bar
from .claim import claim
from .encoder import Batch, Encoder, hash_texts, usable_cpus
from .outputs import DTYPES, Outputs, choose_outputs, merge
from .parts import Parts
from .ranks import Ranks, join_ranks


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
        skipped: Files in folders or shards that are no images by their names.
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
    inputs: Inputs,
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
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    progress: bool = False,
) -> ExtractionReport:
    """Extract the features of images into one file, with an index that says which row is whose.

    The images are cut into fixed batches in the order of the input. Finished batches are kept in
    ``<out>.parts`` until the end, so the same call after an interruption goes on where it was, and
    the files come out byte-identical to those of an uninterrupted run, whatever the number of
    workers, of threads, or of processes under ``torchrun`` (on a shared file system).

    Args:
        inputs: See :func:`ijepa_zoo.data.sources.find_items`.
        model: A timm ViT; it is moved to the device and left in its training or evaluation mode.
        out: File to write; ``<stem>.index.jsonl`` and ``<stem>.run.json`` come beside it.
        layers: See :class:`~ijepa_zoo.features.FeatureExtractor`.
        pool: 'avg' or None, see there.
        dtype: Of the file: 'float32', 'float16' or 'bfloat16'.
        batch_size: Images per batch. Default: 32, on a CUDA GPU as many as have about 65,536
            patches.
        device: 'auto' for the GPU if there is one (under torchrun one each), or torch's name.
        workers: Processes that decode images; 0 decodes in this one. Default: one per CPU, up to 8.
        threads: Threads of the computation on a CPU. Default: one per CPU.
        precision: Of the computation: 'float32', 'bfloat16' or 'float16' (autocast),
            'bfloat16-weights' (everything in bfloat16: a little faster, about twice the error), or
            'auto': on a CUDA GPU 'bfloat16', before compute capability 8.0 'float16', elsewhere
            'float32'.
        format: 'safetensors', 'npy' or 'parquet'; default: by the suffix of ``out``.
        strict: Stop at the first image that fails.
        max_pixels: Images with more pixels are refused.
        overwrite: Replace finished files, and parts made with other settings.
        progress: Show progress: a bar in a terminal, a line every 30 s elsewhere.

    Returns:
        What was done. Images that failed are in it and in the index, and the rest is complete.

    Raises:
        ijepa_zoo.data.sources.DataError: If an input does not exist or there are no images.
        ValueError: If an argument is out of range.
        RunError: If other results are in the way, another process is at work, an image
            fails under ``strict``, or features are not finite in the chosen precision.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    smallest = min(1 if batch_size is None else batch_size, max_pixels, threads or 1)
    if smallest < 1 or (workers or 0) < 0:
        raise SettingsError(
            "batch_size, max_pixels and threads must be at least 1, workers at least 0"
        )
    outputs = choose_outputs(out, format, dtype, pool)
    items = [i for i in find_items(inputs) if i.skipped is None or not outputs.own(i.path)]
    images = [item for item in items if item.skipped is None]
    outputs.refuse_inputs(images)
    encoder = Encoder(
        model,
        layers=layers,
        pool=pool,
        dtype=dtype,
        precision=precision,
        device=device,
        threads=threads,
    )
    # Equal batches waste the fewest slots of the last one, down to a run of a single image.
    batch_size = -(-len(images) // -(-len(images) // (batch_size or encoder.batch_size)))
    settings = {
        **encoder.settings,
        "format": outputs.format,
        "batch_size": batch_size,
        "max_pixels": max_pixels,
        "images": len(images),
        "inputs": hash_texts(f"{i.path}\0{i.label}\0{i.offset}" for i in images),
    }
    row_bytes = math.prod(encoder.row_shape) * encoder.dtype.itemsize
    parts = Parts(outputs.parts, len(images), batch_size, row_bytes)
    with join_ranks() as ranks, claim(outputs, settings, overwrite, ranks) as finished:
        rate = 0.0
        if not finished:
            transform = create_transform(model, normalize=False)
            batches = ImageBatches(images, transform, batch_size, encoder.size, max_pixels)
            rate = _work(parts, batches, encoder, ranks, workers, strict, progress)
            ranks.wait()
            if ranks.rank == 0:
                _check_complete(parts)
                merge(outputs, parts, items, encoder.row_shape, dtype, settings)
                shutil.rmtree(outputs.parts)
            ranks.wait()
        return _report(outputs, rate, finished)


def _work(
    parts: Parts,
    batches: ImageBatches,
    encoder: Encoder,
    ranks: Ranks,
    workers: int | None,
    strict: bool,
    progress: bool,
) -> float:
    """Make the missing parts of this rank; returns the images per second of all ranks."""
    done = parts.sound()
    if strict:
        for part in sorted(done):
            _stop_at_failure(parts, batches.items, part, parts.errors(part))
    mine = [p for p in range(ranks.rank, len(parts), ranks.world) if p not in done]
    order = [batch for part in mine for batch in parts.batches(part)]
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=min(len(order), min(8, usable_cpus()) if workers is None else workers),
        pin_memory=encoder.device.type == "cuda",
    )
    before, start = sum(map(parts.size, done)), time.perf_counter()
    with (
        closing(encoder.encode(_decoded(loader))) as encoded,
        progress_bar(
            progress and ranks.rank == 0, parts.images, "features", "image", before
        ) as bar,
    ):
        for part in mine:
            rows, errors = [], []
            for _ in parts.batches(part):
                features, reasons = next(encoded)
                rows.append(features)
                errors += reasons
            if strict:
                _stop_at_failure(parts, batches.items, part, errors)
            _check_finite(rows, batches.items[part * parts.images_each].path)
            parts.write(part, rows, errors)
            everyone = sum(map(parts.size, parts.done())) if ranks.world > 1 else 0
            bar.update(everyone - bar.n if everyone else parts.size(part))
    ranks.wait()
    return (parts.images - before) / (time.perf_counter() - start)


def _decoded(loader: Iterable[Batch]) -> Iterator[Batch]:
    try:
        yield from loader
    except RuntimeError as error:  # torch's word for a worker that was killed
        raise RunError(
            f"a process that decodes images ended ({error}): memory may be short, so try fewer "
            "workers (--workers). What is done is kept; the same command goes on from there"
        ) from error


def _stop_at_failure(
    parts: Parts, items: Sequence[Item], part: int, errors: Sequence[str | None]
) -> None:
    for position, reason in enumerate(errors):
        if reason is not None:
            path = items[part * parts.images_each + position].path
            raise RunError(f"{path!r}: {reason} (strict: stopped at the first failure)")


def _check_finite(rows: Sequence[Tensor], path: str) -> None:
    if not all(torch.isfinite(batch).all() for batch in rows):
        raise RunError(
            f"features in the batches from {path!r} on are not finite: use float32 for dtype and "
            "precision; if they are not finite then, the weights are broken"
        )


def _check_complete(parts: Parts) -> None:
    missing = sorted(set(range(len(parts))) - parts.done())
    if missing:
        raise RunError(
            f"{len(missing)} of {len(parts)} parts are missing in '{parts.folder}', the first is "
            f"{missing[0]}: do all processes see the same folder?"
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
