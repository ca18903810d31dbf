"""Extract features of images into a file; resumable, the same bytes on any number of processes.

Batches are decoded in worker processes (`ImageBatches`), turned into rows by an `Encoder` and kept
in `Parts` until all of them can be merged into the final files.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from .data.datasets import ImageDataset
from .data.decode import MAX_PIXELS, Decoder
from .data.loading import load_in_order
from .data.sources import open_images
from .data.transforms import create_transform, transform_config
from .distributed import Distributed, init_distributed
from .encode import DTYPES, Batch, Encoder, hash_texts
from .errors import ImageError, MissingPackageError, RunError, SettingsError
from .features import Layers
from .progress import progress_bar
from .weights.formats import safetensors_header

FORMATS = {".safetensors": "safetensors", ".npy": "npy", ".parquet": "parquet"}
_MOST_PARTS = 4096
_IMAGES = {"inputs", "paths"}  # settings that are hashes of the list of images
_WEEK = 604_800.0  # seconds; ranks wait for the slowest one
# File, parts, all outputs, shape of the rows, settings.
Writer: TypeAlias = "Callable[[BinaryIO, Parts, Outputs, tuple[int, ...], dict[str, Any]], None]"


@dataclass(frozen=True)
class ExtractionReport:
    """What a run did.

    Attributes:
        features: The file of features, `[rows, *row]` in the order of the input.
        index: JSON lines, one per input file.
        record: Settings and counts of the run, JSON.
        shape: Shape of the features.
        dtype: Their dtype.
        failed: Path and reason of each image without a row.
        skipped: Files in folders or shards that are not images by their names.
        images_per_second: Rate of all processes in this session; 0 if nothing was left to do.
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
    pool: str | None = "auto",
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
    """Extract the features of images into one file, with an index of the images and their rows.

    The images are split into fixed batches in the order of the input. Finished batches are kept in
    `<out>.parts` until the end, so the same call after an interruption resumes, and the files are
    byte-identical to those of an uninterrupted run for any number of workers, threads, and
    processes under `torchrun` (on a shared file system). A run is resumed, or taken for finished,
    by its settings and the paths of the images; the contents of the images are not compared.

    Args:
        inputs: See :func:`ijepa_zoo.data.sources.open_images`.
        model: A timm model; it is moved to the device and left in its training or evaluation mode.
        out: File to write; `<stem>.index.jsonl` and `<stem>.run.json` are written next to it.
        layers: See :class:`~ijepa_zoo.features.FeatureExtractor`.
        pool: See :class:`~ijepa_zoo.features.FeatureExtractor`.
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
        format: 'safetensors', 'npy' or 'parquet'; default: by the suffix of `out`.
        strict: Stop at the first image that fails.
        value_range: Values of 16-bit images that become black and white, see `Decoder`.
        bands: Bands or pages of image files that become channels, see `Decoder`.
        max_pixels: Images with more pixels are refused.
        overwrite: Replace finished files, and parts made with other settings.
        progress: Show progress: a bar in a terminal, a line every 30 s elsewhere.

    Returns:
        What was done; images that failed are in it and in the index. None on ranks other than 0.

    Raises:
        DataError: An input does not exist or there are no images.
        SettingsError: An argument is out of range.
        RunError: Other results are in the way, another process is at work, an image fails under
            `strict`, or features are not finite in the chosen precision.
    """
    if min(1 if batch_size is None else batch_size, threads or 1) < 1 or (workers or 0) < 0:
        raise SettingsError("batch_size and threads must be at least 1, workers at least 0")
    outputs = _outputs(Path(out), format, dtype, pool)

    def make_encoder(device: torch.device) -> Encoder:
        computed: dict[str, Any] = {"layers": layers, "pool": pool, "dtype": dtype}
        return Encoder(model, **computed, precision=precision, device=device, threads=threads)

    return run_extraction(
        *(inputs, model, make_encoder, outputs, _write_rows),
        batch_size=batch_size,
        device=device,
        workers=workers,
        strict=strict,
        value_range=value_range,
        bands=bands,
        max_pixels=max_pixels,
        overwrite=overwrite,
        progress=progress,
    )


def run_extraction(
    inputs: Any,
    model: nn.Module,
    make_encoder: Callable[[torch.device], Encoder],
    outputs: Outputs,
    write: Writer,
    *,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    strict: bool = False,
    value_range: tuple[float, float] | None = None,
    bands: tuple[int, ...] | None = None,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    progress: bool = False,
) -> ExtractionReport | None:
    """Turn images into one file, resumable; the engine of features and predictions.

    Args:
        inputs: See :func:`extract_features`, as the options.
        model: The model whose transform is applied.
        make_encoder: Makes what turns pixels into rows, on a device.
        outputs: The files to write.
        write: Writes the file of all rows.
        device: See :func:`extract_features`.
        batch_size: See there.
        workers: See there.
        strict: See there.
        value_range: See there.
        bands: See there.
        max_pixels: See there.
        overwrite: See there.
        progress: See there.
    """
    with init_distributed(device, timeout=_WEEK) as distributed:
        encoder = make_encoder(distributed.device)
        decoder = Decoder(encoder.in_chans, value_range, bands, max_pixels)
        images = open_images(inputs, decoder=decoder, exclude=outputs.own)
        outputs.refuse_inputs(images)
        # Equal batches waste the fewest slots of the last one, down to a run of a single image.
        batch_size = -(-len(images) // -(-len(images) // (batch_size or encoder.batch_size)))
        settings = {
            **encoder.settings,
            "format": outputs.format,
            "batch_size": batch_size,
            "value_range": value_range,
            "bands": bands,
            "max_pixels": max_pixels,
            "images": len(images),
            "inputs": images.fingerprint(),
            "paths": hash_texts(images.name(index) for index in range(len(images))),
        }
        extracted = extract_batches(
            *(images, ImageBatches(images, model, batch_size, strict), encoder, outputs, settings),
            distributed,
            write=write,
            workers=workers,
            overwrite=overwrite,
            progress=progress,
        )
        return _report(outputs, extracted) if distributed.is_main else None


@dataclass(frozen=True)
class Extracted:
    """What one session of a run did.

    Attributes:
        already_done: Whether a finished run with the same settings was found.
        computed: Images of this session, of all processes.
        seconds: Time that they took.
    """

    already_done: bool
    computed: int = 0
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Rate of all processes; 0 if nothing was left to do."""
        return self.computed / self.seconds if self.computed else 0.0


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
) -> Extracted:
    """Turn batches of images into files, resumable; every process must call this.

    Args:
        images: The images.
        batches: Gives a `Batch` by its number, and has `batch_size` and `strict`; see
            `ImageBatches`.
        encoder: Has `row_shape`, `dtype`, `device` and `encode`; see `Encoder`.
        outputs: The files to write.
        settings: Everything that decides the numbers, plain values.
        distributed: The processes.
        write: Writes the file of all rows; default: in the format of `outputs`.
        workers: Processes that decode images.
        overwrite: Replace finished files, and parts made with other settings.
        is_cache: Replace files that are damaged or of other settings; a size above 1 GB is told.
        progress: Show progress.
        title: What the progress bar calls it.
    """
    settings = json.loads(json.dumps(settings))  # as they are read back
    with _lock_outputs(outputs, settings, overwrite, is_cache, distributed) as finished:
        if finished:
            return Extracted(already_done=True)
        row_bytes = math.prod(encoder.row_shape) * encoder.dtype.itemsize
        parts = Parts(outputs.parts, len(images), batches.batch_size, row_bytes)
        show = progress and distributed.is_main
        if show and is_cache and (size := parts.images * row_bytes / 1e9) >= 1:
            print(f"{title}: {size:.3g} GB in {outputs.features.parent}", file=sys.stderr)
        extracted = _work(parts, images, batches, encoder, distributed, workers, show, title)
        if distributed.is_main:
            _merge(outputs, parts, images, encoder.row_shape, settings, write or _write_rows)
    return extracted


def _work(
    parts: Parts,
    images: ImageDataset,
    batches: Any,
    encoder: Any,
    distributed: Distributed,
    workers: int | None,
    show: bool,
    title: str,
) -> Extracted:
    """Compute the missing parts, every rank its own."""
    done = distributed.broadcast_object(parts.complete() if distributed.is_main else set())
    if batches.strict:  # parts with failures are read again, to stop there
        done = {part for part in done if not any(parts.errors(part))}
    own = range(distributed.rank, len(parts), distributed.world_size)
    missing = [part for part in own if part not in done]
    order = [batch for part in missing for batch in parts.batches(part)]
    loaded = load_in_order(batches, order, workers, pin_memory=encoder.device.type == "cuda")
    total = sum(map(parts.size, own))
    before = total - sum(map(parts.size, missing))
    start = time.perf_counter()
    with (
        closing(encoder.encode(loaded)) as encoded,
        progress_bar(show, total, title, "image", before) as bar,
    ):
        for part in missing:
            rows, errors = [], []
            for _ in parts.batches(part):
                features, reasons = next(encoded)
                rows.append(features.to("cpu", encoder.dtype))
                errors += reasons
            if not all(torch.isfinite(batch).all() for batch in rows):
                name = images.name(part * parts.images_each)
                raise RunError(
                    f"features in the batches from {name!r} on are NaN or infinite: use float32 "
                    "for dtype and precision; if they are so then, the weights are damaged"
                )
            parts.write(part, rows, errors)
            bar.update(parts.size(part))
    distributed.barrier()
    computed = parts.images - sum(map(parts.size, done))
    return Extracted(False, computed, time.perf_counter() - start)


class ImageBatches:
    """Batch `b` holds images `b * batch_size` to `(b + 1) * batch_size`, each in its own slot.

    Slots of broken images and those past the last image hold zeros: an image is in the same slot
    of the same shape whatever its neighbors are, so its features are the same to the last bit.

    Args:
        images: What to decode.
        model: The model whose transform is applied.
        batch_size: Slots of a batch.
        strict: Raise at an image that cannot be decoded.
    """

    def __init__(
        self, images: ImageDataset, model: nn.Module, batch_size: int, strict: bool = False
    ) -> None:
        self.images, self.batch_size, self.strict = images, batch_size, strict
        self.transform = create_transform(model, normalize=False)
        self.shape = transform_config(model)["input_size"]

    def __getitem__(self, batch: int) -> Batch:
        """Decode one batch.

        Returns:
            Images, uint8 `[batch_size, C, H, W]`, and for each image of the batch None or the
            reason why it could not be decoded.
        """
        pixels = torch.zeros(self.batch_size, *self.shape, dtype=torch.uint8)
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


@dataclass(frozen=True)
class Outputs:
    """The files of a run.

    Attributes:
        features: The features, in the order of the input.
        index: One JSON line per input file: its row, or why it has none.
        record: Settings, counts and file sizes of the finished run; written last.
        parts: Folder of the unfinished run.
        format: One of the values of `FORMATS`.
    """

    features: Path
    index: Path
    record: Path
    parts: Path
    format: str

    @classmethod
    def beside(cls, path: Path, stem: str, format: str) -> Outputs:
        """The files of a run whose features are `path`."""
        index, record = path.with_name(f"{stem}.index.jsonl"), path.with_name(f"{stem}.run.json")
        return cls(path, index, record, path.with_name(f"{path.name}.parts"), format)

    def own(self, path: str) -> bool:
        """Whether a run wrote this file; without the traces of a run, a file is the user's."""
        folder, name = os.path.split(os.path.abspath(path))
        if name in (self.features.name, self.index.name, self.record.name):
            traces = self.record.exists() or self.parts.exists()
            return traces and folder == os.path.abspath(self.features.parent)
        inside = os.path.basename(folder) == self.parts.name
        return inside and folder == os.path.abspath(self.parts)

    def refuse_inputs(self, images: ImageDataset) -> None:
        """Refuse to write over a file that is read."""
        written = {os.path.abspath(path) for path in (self.features, self.index, self.record)}
        for path in images.files():
            if os.path.abspath(path) in written:
                raise SettingsError(f"'{path}' is an input and an output: choose another output")

    def sizes(self) -> list[int]:
        """Bytes of the features and of the index."""
        return [path.stat().st_size for path in (self.features, self.index)]


def _outputs(path: Path, format: str | None, dtype: str, pool: str | None) -> Outputs:
    by_suffix = FORMATS.get(path.suffix.lower())
    chosen = format or by_suffix
    if chosen is None or chosen not in FORMATS.values():
        raise SettingsError(
            f"the format of '{path}' is not clear: end its name in {', '.join(FORMATS)}, or give "
            f"the format as {', '.join(FORMATS.values())}"
        )
    if path.is_dir():
        raise SettingsError(f"'{path}' is a directory: name a file, such as {path}/features.npy")
    if dtype not in DTYPES:
        raise SettingsError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    if chosen != "safetensors" and dtype == "bfloat16":
        raise SettingsError(f"{chosen} cannot hold bfloat16; use safetensors or float16")
    if chosen == "parquet" and pool is None:
        raise SettingsError("parquet holds one vector per image; use safetensors or npy for maps")
    if chosen == "parquet" and find_spec("pyarrow") is None:
        raise MissingPackageError("parquet needs pyarrow: pip install pyarrow")
    return Outputs.beside(path, path.stem if by_suffix else path.name, chosen)


@contextmanager
def _lock_outputs(
    outputs: Outputs,
    settings: dict[str, Any],
    overwrite: bool,
    is_cache: bool,
    distributed: Distributed,
) -> Iterator[bool]:
    """Lock and prepare the outputs, as rank 0; yields whether such a run is finished already.

    Raises:
        RunError: Other results are in the way, or another process is at work; on every rank.
    """
    with ExitStack() as stack:
        refusal, finished = None, False
        if distributed.is_main:
            try:
                finished = not overwrite and _is_finished(outputs, settings, is_cache)
                if not finished:
                    outputs.parts.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(FileLock(outputs.parts / "lock", timeout=0))
                    _prepare(outputs, settings, overwrite or is_cache)
            except Timeout:
                refusal = (
                    f"another process is writing '{outputs.features}' now: wait for it, or choose "
                    "another output"
                )
            except RunError as error:
                refusal = str(error)
        refusal, finished, first = distributed.broadcast_object((refusal, finished, settings))
        if refusal is not None:
            raise RunError(refusal)
        if first != settings:
            different = _differences(first, settings)
            raise RunError(f"rank {distributed.rank} differs from rank 0: {different}")
        yield finished
        if distributed.is_main:
            _remove_parts(outputs)


def _is_finished(outputs: Outputs, settings: dict[str, Any], is_cache: bool) -> bool:
    """Whether the files are those of such a run; other files are refused, unless `is_cache`."""
    files = (outputs.features, outputs.index, outputs.record)
    found = [path for path in files if path.exists()]
    resumes = not outputs.record.exists() and (outputs.parts / "settings.json").exists()
    if not found or resumes:
        return False
    record = _read(outputs.record)
    before = record.get("settings", {})
    if before != settings:
        why = f"was made with other settings ({_differences(before, settings)})"
    elif len(found) < len(files) or outputs.sizes() != record.get("bytes", outputs.sizes()):
        why = "is from a run whose files have been changed or removed since"
    else:
        return True
    if is_cache:
        return False
    if not before:
        why = "is not from a finished run"
    raise RunError(
        f"'{found[0]}' {why}: choose another output, or --overwrite (overwrite=True) to replace it"
    )


def _prepare(outputs: Outputs, settings: dict[str, Any], overwrite: bool) -> None:
    """Keep the parts of a run with these settings, or start a new one."""
    before = _read(outputs.parts / "settings.json")
    if before != settings:
        has_parts = any(outputs.parts.glob("[0-9]*.json"))
        if before and has_parts and not overwrite:
            raise RunError(
                f"'{outputs.parts}' holds an unfinished run with other settings "
                f"({_differences(before, settings)}): use those settings to resume it, or "
                "--overwrite (overwrite=True) to start over"
            )
        _remove_part_files(outputs)
        with whole_file(outputs.parts / "settings.json") as file:
            file.write(json.dumps(settings).encode())
    outputs.record.unlink(missing_ok=True)  # from here on the old files are no finished run


def _remove_part_files(outputs: Outputs) -> None:
    for pattern in ("[0-9]*.rows*", "[0-9]*.json*", "merged.tmp"):
        for file in outputs.parts.glob(pattern):
            file.unlink(missing_ok=True)


def _remove_parts(outputs: Outputs) -> None:
    """Remove the parts of a finished run, then the settings that say whose they are."""
    _remove_part_files(outputs)
    for pattern in ("settings.json*", "*lock"):
        for file in outputs.parts.glob(pattern):
            file.unlink(missing_ok=True)
    with suppress(OSError):  # it does not exist, or a new run has just opened its lock in it
        outputs.parts.rmdir()


def _read(path: Path) -> dict[str, Any]:
    """JSON object in a file; empty where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    shown = [key for key in changed if key not in _IMAGES]
    texts = [f"{key}: was {before.get(key)}, is {now.get(key)}" for key in shown]
    return "; ".join(texts + ["other images"] * (len(shown) < len(changed)))


@dataclass(frozen=True)
class Parts:
    """Fixed ranges of a run's batches, each written as two files when it is complete.

    `000007.rows` holds the features of the good images, C order, little-endian; `000007.json`,
    renamed into place after it, null or a reason for each image.

    Attributes:
        folder: Their folder.
        images: Images of the whole run.
        batch_size: Images per batch.
        row_bytes: Bytes of the features of one image.
    """

    folder: Path
    images: int
    batch_size: int
    row_bytes: int

    @property
    def batches_each(self) -> int:
        """Batches per part: one, or more where there would be too many files."""
        batches = -(-self.images // self.batch_size)
        return -(-batches // _MOST_PARTS)

    @property
    def images_each(self) -> int:
        """Images per part; the last part may hold fewer."""
        return self.batches_each * self.batch_size

    def __len__(self) -> int:
        return -(-self.images // self.images_each)

    def size(self, part: int) -> int:
        """Images of a part."""
        return min(self.images, (part + 1) * self.images_each) - part * self.images_each

    def batches(self, part: int) -> range:
        """Batch numbers of a part."""
        first = part * self.batches_each
        return range(first, first + -(-self.size(part) // self.batch_size))

    def complete(self) -> set[int]:
        """Numbers of the complete parts whose two files agree; others are computed again."""
        return {part for part in range(len(self)) if self._is_complete(part)}

    def _is_complete(self, part: int) -> bool:
        try:
            errors, size = self.errors(part), self.rows_file(part).stat().st_size
        except (ValueError, FileNotFoundError):
            return False
        return len(errors) == self.size(part) and size == errors.count(None) * self.row_bytes

    def write(self, part: int, rows: Sequence[Tensor], errors: Sequence[str | None]) -> None:
        """Write a complete part; a half-written one is never taken for complete."""
        with whole_file(self.rows_file(part)) as file:
            for row in rows:
                file.write(row.contiguous().view(torch.uint8).numpy().tobytes())
        with whole_file(self._errors_file(part)) as file:
            file.write(json.dumps(errors).encode())

    def errors(self, part: int) -> list[str | None]:
        """For each image of a part, None or why it has no row."""
        errors: list[str | None] = json.loads(self._errors_file(part).read_bytes())
        return errors

    def rows_file(self, part: int) -> Path:
        """File of the features of a part."""
        return self.folder / f"{part:06}.rows"

    def _errors_file(self, part: int) -> Path:
        return self.folder / f"{part:06}.json"


@contextmanager
def whole_file(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file that appears under its name when it is complete and on disk, or not at all."""
    temporary = temporary or path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _merge(
    outputs: Outputs,
    parts: Parts,
    images: ImageDataset,
    row_shape: tuple[int, ...],
    settings: dict[str, Any],
    write: Writer,
) -> None:
    """Join the parts into the final files; each appears when it is complete, the record last."""
    counts = {"rows": 0, "failed": 0, "skipped": 0}
    temporary = outputs.parts / "merged.tmp"
    with whole_file(outputs.index, temporary) as file:
        for line in _index_lines(images, parts):
            kind = "failed" if "error" in line else "skipped" if "skipped" in line else "rows"
            counts[kind] += 1
            file.write(json.dumps(line).encode() + b"\n")
    shape, dtype = (counts["rows"], *row_shape), settings["dtype"]
    with whole_file(outputs.features, temporary) as file:
        write(file, parts, outputs, shape, settings)
    about = {"shape": list(shape), "dtype": dtype, "bytes": outputs.sizes(), "settings": settings}
    with whole_file(outputs.record, temporary) as file:
        file.write(json.dumps({**counts, **about}, indent=1).encode() + b"\n")


def _index_lines(images: ImageDataset, parts: Parts) -> Iterator[dict[str, Any]]:
    """The index of a run whose parts are complete, in the order of the input.

    Yields:
        `{"row": 17, "path": ..., "label": ...}` for a row, `row` None and `error` for an image
        without one, `row` None and `skipped` for a file that is not an image by its name.
    """
    reasons = (error for part in range(len(parts)) for error in parts.errors(part))
    skipped = deque(images.skipped)
    row = 0
    for index in range(len(images) + 1):
        while skipped and skipped[0][0] == index:
            _, path, why = skipped.popleft()
            yield {"row": None, "path": path, "label": None, "skipped": why}
        if index == len(images):
            return
        about = {"path": images.name(index), "label": images.label(index)}
        if (reason := next(reasons)) is not None:
            yield {"row": None, **about, "error": reason}
        else:
            yield {"row": row, **about}
            row += 1


def _write_rows(
    file: BinaryIO,
    parts: Parts,
    outputs: Outputs,
    shape: tuple[int, ...],
    settings: dict[str, Any],
) -> None:
    """The features in one of `FORMATS`."""
    dtype = settings["dtype"]
    if outputs.format == "parquet":
        return _write_parquet(file, parts, outputs.index, shape, dtype)
    file.write(_header(outputs.format, shape, dtype, settings))
    for part in range(len(parts)):
        with parts.rows_file(part).open("rb") as rows:
            shutil.copyfileobj(rows, file, 1 << 20)
    return None


def _header(format: str, shape: tuple[int, ...], dtype: str, settings: dict[str, Any]) -> bytes:
    if format == "safetensors":
        metadata = {
            key: str(_utf8(value)) if isinstance(value, str) else json.dumps(value)
            for key, value in settings.items()
        }
        return safetensors_header({"features": (DTYPES[dtype], shape)}, metadata)[0]
    buffer = io.BytesIO()
    description = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False}
    np.lib.format.write_array_header_1_0(buffer, {**description, "shape": shape})
    return buffer.getvalue()


def _write_parquet(
    file: BinaryIO, parts: Parts, index: Path, shape: tuple[int, ...], dtype: str
) -> None:
    """Columns path, label, features; one row group per part that has rows."""
    import pyarrow as pa
    from pyarrow import parquet

    width = int(np.prod(shape[1:]))
    features = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), width)
    schema = pa.schema([("path", pa.string()), ("label", pa.string()), ("features", features)])
    with index.open("rb") as lines, parquet.ParquetWriter(file, schema) as writer:
        rows = (line for line in map(json.loads, lines) if line["row"] is not None)
        for part in range(len(parts)):
            values = np.fromfile(parts.rows_file(part), dtype)
            named = [next(rows) for _ in range(len(values) // width)]
            if named:
                columns = [
                    pa.array([_utf8(line["path"]) for line in named], pa.string()),
                    pa.array([_utf8(line["label"]) for line in named], pa.string()),
                    pa.FixedSizeListArray.from_arrays(pa.array(values), width),
                ]
                writer.write_table(pa.table(columns, schema=schema))


def _utf8(text: str | None) -> str | None:
    r"""Parquet and safetensors hold UTF-8 only: other bytes of a name become `\udcXX`."""
    return text and text.encode("utf-8", "backslashreplace").decode()


def failures(outputs: Outputs) -> dict[int, tuple[str, str]]:
    """Path and reason of each image without a row, by its index, of a finished run."""
    if not json.loads(outputs.record.read_bytes())["failed"]:
        return {}
    with outputs.index.open("rb") as file:
        lines = [line for line in map(json.loads, file) if "skipped" not in line]
    return {i: (line["path"], line["error"]) for i, line in enumerate(lines) if "error" in line}


def _report(outputs: Outputs, extracted: Extracted) -> ExtractionReport:
    record = json.loads(outputs.record.read_bytes())
    return ExtractionReport(
        features=outputs.features,
        index=outputs.index,
        record=outputs.record,
        shape=tuple(record["shape"]),
        dtype=record["dtype"],
        failed=[*failures(outputs).values()],
        skipped=record["skipped"],
        images_per_second=extracted.images_per_second,
        already_done=extracted.already_done,
        settings=record["settings"],
    )
