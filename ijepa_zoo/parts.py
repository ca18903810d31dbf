"""Files of a resumable run: parts while it is unfinished, then features, index and record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from .data.datasets import ImageDataset
from .distributed import Distributed
from .errors import RunError, SettingsError

_MOST_PARTS = 4096
# File, parts, all outputs, shape of the rows, settings.
Writer: TypeAlias = "Callable[[BinaryIO, Parts, Outputs, tuple[int, ...], dict[str, Any]], None]"


@dataclass(frozen=True)
class Outputs:
    """The files of a run: `record` is written last, `parts` is the folder until then."""

    features: Path
    index: Path
    record: Path
    parts: Path
    format: str

    @classmethod
    def beside(cls, path: Path, format: str) -> Outputs:
        """The files of a run whose features are `path`."""
        try:
            os.fsencode(path).decode()
        except UnicodeDecodeError:
            raise SettingsError(f"{str(path)!r} is not UTF-8: safetensors cannot open it") from None
        index, record = path.with_suffix(".index.jsonl"), path.with_suffix(".run.json")
        return cls(path, index, record, path.with_name(f"{path.name}.parts"), format)

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """The files of a finished run."""
        return self.features, self.index, self.record

    def own(self, path: str) -> bool:
        """Whether a run wrote this file; without record or parts, a file is the user's."""
        path = os.path.abspath(path)
        if path in self._absolute[:-1]:
            return self.record.exists() or self.parts.exists()
        return os.path.dirname(path) == self._absolute[-1]

    @cached_property
    def _absolute(self) -> list[str]:
        return [os.path.abspath(path) for path in (*self.files, self.parts)]

    def refuse_inputs(self, images: ImageDataset) -> None:
        """Refuse to write over a file that is read."""
        written = {os.path.abspath(path) for path in self.files}
        for path in images.files():
            if os.path.abspath(path) in written:
                raise SettingsError(f"'{path}' is an input and an output: choose another output")

    def sizes(self) -> list[int]:
        """Bytes of the features and of the index."""
        return [path.stat().st_size for path in (self.features, self.index)]

    def failures(self) -> dict[int, tuple[str, str]]:
        """Path and reason of each image without a row, by its number, of a finished run."""
        with self.index.open("rb") as file:
            lines = enumerate(map(json.loads, file))
            return {i: (line["path"], line["error"]) for i, line in lines if "error" in line}


@dataclass(frozen=True)
class Parts:
    """Fixed ranges of a run's batches, each a file `000007.safetensors` when it is complete.

    The file has the `rows` of the good images and, as metadata, null or a reason for each image.
    """

    folder: Path
    images: int
    batch_size: int

    @property
    def batches_each(self) -> int:
        """Batches per part: one, or more to limit the number of files."""
        return -(-self.images // (self.batch_size * _MOST_PARTS))

    @property
    def images_each(self) -> int:
        """Images per part; the last part may have fewer."""
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
        """Numbers of the complete parts; those that are absent or damaged are computed again."""
        return {part for part in range(len(self)) if self._is_complete(part)}

    def _is_complete(self, part: int) -> bool:
        try:
            self.errors(part)
        except (SafetensorError, FileNotFoundError):
            return False
        return True

    def write(self, part: int, rows: Tensor, errors: Sequence[str | None]) -> None:
        """Write a complete part."""
        with whole_file(self._file(part)) as file:
            file.write(save({"rows": rows.contiguous()}, {"errors": json.dumps(errors)}))

    def rows(self, part: int) -> Tensor:
        """Features of the good images of a part."""
        return load_file(self._file(part))["rows"]

    def errors(self, part: int) -> list[str | None]:
        """For each image of a part, None or why it has no row."""
        with safe_open(self._file(part), "pt") as file:
            errors: list[str | None] = json.loads(file.metadata()["errors"])
        return errors

    def _file(self, part: int) -> Path:
        return self.folder / f"{part:06}.safetensors"


@contextmanager
def whole_file(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file atomically: it appears under its name when it is complete and on disk."""
    temporary = temporary or path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def lock_outputs(
    outputs: Outputs,
    settings: dict[str, Any],
    overwrite: bool,
    is_cache: bool,
    distributed: Distributed,
) -> Iterator[bool]:
    """Lock and prepare the outputs on rank 0; yields whether the run is finished already."""
    lock = FileLock(outputs.parts / "lock", timeout=0)

    def prepare() -> tuple[bool, dict[str, Any]]:
        finished = not overwrite and _is_finished(outputs, settings, is_cache)
        if not finished:
            outputs.parts.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise RunError(
                    f"another process is writing '{outputs.features}' now: wait for it, or choose "
                    "another output"
                ) from None
            # another process may have finished between the check and the lock
            finished = not overwrite and _is_finished(outputs, settings, is_cache)
        if not finished:
            _start_or_resume(outputs, settings, overwrite or is_cache)
        return finished, settings

    try:
        finished, first = distributed.run_on_main(prepare)
        if first != settings:
            different = _differences(first, settings)
            raise RunError(f"rank {distributed.rank} differs from rank 0: {different}")
        yield finished
        if distributed.is_main:
            _remove_parts(outputs)
    finally:
        lock.release()


def _is_finished(outputs: Outputs, settings: dict[str, Any], is_cache: bool) -> bool:
    """Whether the files are of a run with these settings; refuse others unless `is_cache`."""
    found = [path for path in outputs.files if path.exists()]
    resumes = not outputs.record.exists() and (outputs.parts / "settings.json").exists()
    if not found or resumes:
        return False
    record = _read(outputs.record)
    before = record.get("settings", {})
    is_whole = len(found) == len(outputs.files) and outputs.sizes() == record.get("bytes")
    finished = before == settings and is_whole
    if finished or is_cache:
        return finished
    why = "is not from a finished run, or was changed since"
    if before and before != settings:
        why = f"was made with other settings ({_differences(before, settings)})"
    raise RunError(
        f"'{found[0]}' {why}: choose another output, or --overwrite (overwrite=True) to replace it"
    )


def _start_or_resume(outputs: Outputs, settings: dict[str, Any], overwrite: bool) -> None:
    """Keep the parts of a run with these settings, or start a new one."""
    before = _read(outputs.parts / "settings.json")
    if before != settings:
        if before and any(outputs.parts.glob("[0-9]*")) and not overwrite:
            raise RunError(
                f"'{outputs.parts}' has an unfinished run with other settings "
                f"({_differences(before, settings)}): use those settings to resume it, or "
                "--overwrite (overwrite=True) to start over"
            )
        _remove(outputs, "[0-9]*", "merged.tmp")
        with whole_file(outputs.parts / "settings.json") as file:
            file.write(json.dumps(settings).encode())
    outputs.record.unlink(missing_ok=True)  # the old files no longer count as a finished run


def _remove_parts(outputs: Outputs) -> None:
    """Remove the parts of a finished run, then their settings."""
    _remove(outputs, "[0-9]*", "merged.tmp", "settings.json*", "*lock")
    with suppress(OSError):  # it does not exist, or a new run has just opened its lock in it
        outputs.parts.rmdir()


def _remove(outputs: Outputs, *patterns: str) -> None:
    for pattern in patterns:
        for file in outputs.parts.glob(pattern):
            file.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """JSON object in a file, or an empty one."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = (key for key in {**before, **now} if before.get(key) != now.get(key))
    return "; ".join(f"{key}: was {before.get(key)}, is {now.get(key)}" for key in changed)


def merge(
    outputs: Outputs,
    parts: Parts,
    images: ImageDataset,
    row_shape: tuple[int, ...],
    settings: dict[str, Any],
    write: Writer,
) -> None:
    """Join the parts into the final files, atomically, the record last."""
    rows = 0
    temporary = outputs.parts / "merged.tmp"
    errors = (error for part in range(len(parts)) for error in parts.errors(part))
    with whole_file(outputs.index, temporary) as file:
        for index, error in enumerate(errors):
            line: dict[str, Any] = {
                "row": None,
                "path": images.name(index),
                "label": images.label(index),
            }
            line |= {"row": rows} if error is None else {"error": error}
            rows += error is None
            file.write(json.dumps(line).encode() + b"\n")
    shape = (rows, *row_shape)
    with whole_file(outputs.features, temporary) as file:
        write(file, parts, outputs, shape, settings)
    record = {
        "rows": rows,
        "failed": len(images) - rows,
        "skipped": [(path, reason) for _, path, reason in images.skipped],
        "shape": shape,
        "dtype": settings["dtype"],
        "bytes": outputs.sizes(),
        "settings": settings,
    }
    with whole_file(outputs.record, temporary) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")
