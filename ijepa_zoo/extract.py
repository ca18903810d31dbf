"""Extract features of images into a file; resumable, the same bytes on any number of processes.

Batches are decoded in worker processes (`ImageBatches`), turned into rows by an `Encoder` and kept
in `Parts` until all of them can be merged into the final files.
"""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from .data.datasets import ImageDataset
from .data.decode import MAX_PIXELS, Decoder
from .data.loading import load_in_order
from .data.sources import open_images
from .data.transforms import ModelTransform, create_transform
from .distributed import Distributed, init_distributed
from .encode import DTYPES, Batch, Encoder, hash_texts
from .errors import ImageError, MissingPackageError, RunError, SettingsError
from .features import Layers
from .parts import Outputs, Parts, Writer, lock_outputs, merge
from .progress import progress_bar
from .weights.formats import safetensors_header

FORMATS = {".safetensors": "safetensors", ".npy": "npy", ".parquet": "parquet"}
_WEEK = 604_800.0  # seconds; ranks wait for the slowest one


@dataclass(frozen=True)
class ExtractionReport:
    """Result of an extraction.

    Attributes:
        features: The file of features, `[rows, *row]` in the order of the input.
        index: JSON lines, one per image.
        record: Settings and counts of the run, JSON.
        shape: Shape of the features.
        dtype: Their dtype.
        failed: Path and reason of each image without a row.
        skipped: Path and reason of each file in folders or shards that is not an image by its name.
        already_done: Whether a finished run with the same settings was found.
        settings: Settings of the run.
    """

    features: Path
    index: Path
    record: Path
    shape: tuple[int, ...]
    dtype: str
    failed: list[tuple[str, str]]
    skipped: list[tuple[str, str]]
    already_done: bool
    settings: dict[str, Any]


@dataclass(frozen=True)
class ExtractionOptions:
    """Options of :func:`extract_features` and :func:`ijepa_zoo.predict`, with the same names.

    Attributes:
        batch_size: Images per batch. Default: 32, on a CUDA GPU as many as have about 65,536
            patches.
        device: 'auto' for the GPU if there is one (under torchrun one each), or torch's name.
        workers: Processes that decode images; 0 decodes in this one. Default: one per CPU.
        threads: Threads of the computation on a CPU. Default: one per CPU.
        precision: Of the computation: 'float32', 'bfloat16' or 'float16' (autocast),
            'bfloat16-weights' (everything in bfloat16: a little faster, about twice the error), or
            'auto': on a CUDA GPU 'bfloat16', before compute capability 8.0 'float16', elsewhere
            'float32'.
        strict: Stop at the first image that fails.
        value_range: Values of 16-bit images that become black and white, see `Decoder`.
        bands: Bands or pages of image files that become channels, see `Decoder`.
        max_pixels: Images with more pixels are refused.
        overwrite: Replace finished files, and parts made with other settings.
        progress: Show progress: a bar in a terminal, a line every 30 s elsewhere.
    """

    batch_size: int | None = None
    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    precision: str = "auto"
    strict: bool = False
    value_range: tuple[float, float] | None = None
    bands: tuple[int, ...] | None = None
    max_pixels: int = MAX_PIXELS
    overwrite: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        counts = (self.batch_size, self.threads)
        if min(1 if count is None else count for count in counts) < 1 or (self.workers or 0) < 0:
            raise SettingsError("batch_size and threads must be at least 1, workers at least 0")


def extract_features(
    inputs: Any,
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    layers: Layers = "last",
    pool: str | None = "auto",
    dtype: str = "float32",
    **options: Any,
) -> ExtractionReport | None:
    """Extract the features of images into one file, with an index of the images and their rows.

    The images are split into fixed batches in the order of the input. Finished batches are kept in
    `<out>.parts` until the end, so the same call after an interruption resumes, and the files are
    byte-identical to those of an uninterrupted run for any number of workers, threads, and
    processes under `torchrun` (on a shared file system). A run is resumed, or taken for finished,
    by its settings and the paths of the images, not by their contents.

    Args:
        inputs: See :func:`ijepa_zoo.data.sources.open_images`.
        model: A timm model; it is moved to the device and left in its training or evaluation mode.
        out: File to write, ending in .safetensors, .npy or .parquet; `<stem>.index.jsonl` and
            `<stem>.run.json` are written next to it.
        layers: See :class:`~ijepa_zoo.features.FeatureExtractor`.
        pool: See :class:`~ijepa_zoo.features.FeatureExtractor`.
        dtype: Of the file: 'float32', 'float16' or 'bfloat16'.
        **options: Those of :class:`ExtractionOptions`: batch_size, device, workers, threads,
            precision, strict, value_range, bands, max_pixels, overwrite, progress.

    Returns:
        The result; failed images are listed in it and in the index. None on ranks other than 0.

    Raises:
        DataError: An input does not exist or there are no images.
        SettingsError: An argument is out of range.
        RunError: Other results exist, another process is writing, an image fails under `strict`,
            or features are not finite in the chosen precision.
    """
    features = {"layers": layers, "pool": pool, "dtype": dtype}
    outputs = _outputs(Path(out), dtype, pool)
    return run_extraction(inputs, model, features, outputs, _write_rows, **options)


def run_extraction(
    inputs: Any,
    model: nn.Module,
    features: dict[str, Any],
    outputs: Outputs,
    write: Writer,
    **options: Any,
) -> ExtractionReport | None:
    """Extract features or predictions; `features` are options of `Encoder`."""
    given = ExtractionOptions(**options)
    with init_distributed(given.device, timeout=_WEEK) as distributed:
        device, precision, threads = distributed.device, given.precision, given.threads
        encoder = Encoder(model, device=device, precision=precision, threads=threads, **features)
        decoder = Decoder(encoder.in_chans, given.value_range, given.bands, given.max_pixels)
        images = open_images(inputs, decoder=decoder, exclude=outputs.own)
        outputs.refuse_inputs(images)
        # Equal batches leave the fewest empty slots in the last one.
        batch_size = -(-len(images) // -(-len(images) // (given.batch_size or encoder.batch_size)))
        settings = {
            **encoder.settings,
            "format": outputs.format,
            "batch_size": batch_size,
            "value_range": given.value_range,
            "bands": given.bands,
            "max_pixels": given.max_pixels,
            "images": len(images),
            "inputs": images.fingerprint(),
            "paths": hash_texts(images.name(index) for index in range(len(images))),
        }
        transform = create_transform(model, normalize=False)
        already_done = extract_batches(
            images,
            ImageBatches(images, transform, batch_size, given.strict),
            encoder,
            outputs,
            settings,
            distributed,
            write=write,
            workers=given.workers,
            overwrite=given.overwrite,
            progress=given.progress,
        )
        if given.strict and already_done:
            distributed.run_on_main(lambda: _refuse_failures(outputs))
        return _report(outputs, already_done) if distributed.is_main else None


def _refuse_failures(outputs: Outputs) -> None:
    """Refuse a finished run that was not strict if an image failed."""
    for name, error in outputs.failures().values():
        raise RunError(f"{name!r}: {error} (strict: a finished run has left it out)")


def extract_batches(
    images: ImageDataset,
    batches: Any,
    encoder: Any,
    outputs: Outputs,
    settings: dict[str, Any],
    distributed: Distributed,
    *,
    write: Writer | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    is_cache: bool = False,
    progress: bool = False,
    title: str = "features",
) -> bool:
    """Turn batches of images into files, resumable; returns whether they were finished before.

    Every process must call this. `batches` gives a `Batch` by its number, see `ImageBatches`;
    `encoder` turns them into rows, see `Encoder`; `settings` are plain values that determine the
    numbers. With `is_cache`, files that are damaged or made with other settings are replaced.
    """
    settings = json.loads(json.dumps(settings))  # as they are read back
    with lock_outputs(outputs, settings, overwrite, is_cache, distributed) as finished:
        if not finished:
            parts = Parts(outputs.parts, len(images), batches.batch_size)
            show = progress and distributed.is_main
            _compute(parts, images, batches, encoder, distributed, workers, show, title)
            if distributed.is_main:
                merge(outputs, parts, images, encoder.row_shape, settings, write or _write_rows)
    return finished


def _compute(
    parts: Parts,
    images: ImageDataset,
    batches: Any,
    encoder: Any,
    distributed: Distributed,
    workers: int | None,
    show: bool,
    title: str,
) -> None:
    """Compute the missing parts of this rank."""
    done = distributed.broadcast_object(parts.complete() if distributed.is_main else set())
    if batches.strict:  # parts with failures are computed again, to raise the error
        done = {part for part in done if not any(parts.errors(part))}
    own = range(distributed.rank, len(parts), distributed.world_size)
    missing = [part for part in own if part not in done]
    order = [batch for part in missing for batch in parts.batches(part)]
    loaded = load_in_order(
        batches.__getitem__, order, workers, pin_memory=encoder.device.type == "cuda"
    )
    total = sum(map(parts.size, own))
    before = total - sum(map(parts.size, missing))
    with (
        closing(encoder.encode(loaded)) as encoded,
        progress_bar(show, total, title, "image", before) as bar,
    ):
        for part in missing:
            batches_of_part = islice(encoded, len(parts.batches(part)))
            found = [(rows.to("cpu", encoder.dtype), errors) for rows, errors in batches_of_part]
            rows = torch.cat([rows for rows, _ in found])
            if not rows.isfinite().all():
                name = images.name(part * parts.images_each)
                raise RunError(
                    f"features of the batches starting at {name!r} are NaN or infinite: use "
                    "float32 for dtype and precision; if that fails too, the weights are damaged"
                )
            parts.write(part, rows, [reason for _, reasons in found for reason in reasons])
            bar.update(parts.size(part))
    distributed.barrier()


class ImageBatches:
    """Batch `b` holds images `b * batch_size` to `(b + 1) * batch_size`, each in its own slot.

    Slots of broken images and those past the last image hold zeros: an image is in the same slot
    of the same shape whatever its neighbors are, so its features are the same to the last bit.
    """

    def __init__(
        self, images: Any, transform: ModelTransform, batch_size: int, strict: bool = False
    ) -> None:
        self.images, self.transform = images, transform
        self.batch_size, self.strict = batch_size, strict

    def __getitem__(self, batch: int) -> Batch:
        """Images, uint8 `[batch_size, C, H, W]`; for each, None or why it cannot be decoded."""
        shape = self.transform.input_size
        pixels = torch.zeros(self.batch_size, *shape, dtype=torch.uint8)
        first = batch * self.batch_size
        errors: list[str | None] = []
        for index in range(first, min(first + self.batch_size, len(self.images))):
            error = None
            try:
                pixels[index - first] = self.transform(self.images.read(index))
            except ImageError as reason:
                error = str(reason)
                if self.strict:
                    name = self.images.name(index)
                    raise RunError(f"{name!r}: {error} (strict: stopped here)") from None
            errors.append(error)
        return pixels, errors


def _outputs(path: Path, dtype: str, pool: str | None) -> Outputs:
    chosen = FORMATS.get(path.suffix.lower())
    if chosen is None:
        raise SettingsError(f"'{path}' has no known format: end its name in {', '.join(FORMATS)}")
    if path.is_dir():
        raise SettingsError(f"'{path}' is a directory: name a file, such as {path}/features.npy")
    if dtype not in DTYPES:
        raise SettingsError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    if chosen != "safetensors" and dtype == "bfloat16":
        raise SettingsError(f"{chosen} cannot hold bfloat16; use safetensors or float16")
    if chosen == "parquet" and pool is None:
        raise SettingsError("parquet holds one vector per image; use safetensors or npy for maps")
    if chosen == "parquet":
        require_pyarrow()
    return Outputs.beside(path, chosen)


def require_pyarrow() -> None:
    """Raise MissingPackageError if pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise MissingPackageError("parquet needs pyarrow: pip install pyarrow")


def _write_rows(
    file: BinaryIO,
    parts: Parts,
    outputs: Outputs,
    shape: tuple[int, ...],
    settings: dict[str, Any],
) -> None:
    """Write the features in one of `FORMATS`."""
    dtype = settings["dtype"]
    if outputs.format == "parquet":
        _write_parquet(file, parts, outputs.index, shape[1], dtype)
        return
    if outputs.format == "safetensors":
        metadata = {
            key: str(utf8(value)) if isinstance(value, str) else json.dumps(value)
            for key, value in settings.items()
        }
        file.write(safetensors_header({"features": (DTYPES[dtype], shape)}, metadata)[0])
    else:
        description = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**description, "shape": shape})
    for part in range(len(parts)):
        file.write(parts.rows(part).view(torch.uint8).numpy().data)


def _write_parquet(file: BinaryIO, parts: Parts, index: Path, width: int, dtype: str) -> None:
    """Columns path, label, features; one row group per part that has rows."""
    import pyarrow as pa
    from pyarrow import parquet

    features = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), width)
    schema = pa.schema([("path", pa.string()), ("label", pa.string()), ("features", features)])
    with index.open("rb") as lines, parquet.ParquetWriter(file, schema) as writer:
        rows = (line for line in map(json.loads, lines) if line["row"] is not None)
        for values in map(parts.rows, range(len(parts))):
            if named := [next(rows) for _ in values]:
                columns = [
                    pa.array([utf8(line["path"]) for line in named], pa.string()),
                    pa.array([utf8(line["label"]) for line in named], pa.string()),
                    pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), width),
                ]
                writer.write_table(pa.table(columns, schema=schema))


def utf8(text: str | None) -> str | None:
    r"""Text as UTF-8, which Parquet and safetensors require: other bytes become `\udcXX`."""
    return text and text.encode("utf-8", "backslashreplace").decode()


def _report(outputs: Outputs, already_done: bool) -> ExtractionReport:
    record = json.loads(outputs.record.read_bytes())
    return ExtractionReport(
        features=outputs.features,
        index=outputs.index,
        record=outputs.record,
        shape=tuple(record["shape"]),
        dtype=record["dtype"],
        failed=[*outputs.failures().values()],
        skipped=[(path, reason) for path, reason in record["skipped"]],
        already_done=already_done,
        settings=record["settings"],
    )
