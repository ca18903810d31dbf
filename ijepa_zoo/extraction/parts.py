"""Finished pieces of an unfinished run, so that nothing is computed twice."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_MOST_PARTS = 4096


@dataclass(frozen=True)
class Parts:
    """Fixed ranges of a run's batches, each written as a pair of files when it is complete.

    ``000007.rows`` holds the features of the good images, one after the other; ``000007.json``,
    renamed into place after it, holds null or a reason for each image of the range.

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

    def done(self) -> set[int]:
        """Numbers of the parts that are complete, by the names of their files."""
        names = set(os.listdir(self.folder))
        return {part for part in range(len(self)) if self._errors_file(part).name in names}

    def sound(self) -> set[int]:
        """Numbers of the complete parts whose two files agree; others are made anew."""
        return {part for part in self.done() if self._agree(part)}

    def _agree(self, part: int) -> bool:
        try:
            errors, size = self.errors(part), self.rows_file(part).stat().st_size
        except (ValueError, FileNotFoundError):
            return False
        fits = isinstance(errors, list) and len(errors) == self.size(part)
        return fits and size == errors.count(None) * self.row_bytes

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
        """Raw features of a part, C order, little-endian."""
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
