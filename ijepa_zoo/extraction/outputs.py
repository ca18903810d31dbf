"""The files of a finished run: features, index and record."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..data.datasets import ImageDataset
from ..errors import MissingPackageError, SettingsError
from ..weights import safetensors_file
from .parts import Parts, whole_file

FORMATS = {".safetensors": "safetensors", ".npy": "npy", ".parquet": "parquet"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Outputs:
    """The files that a run writes, all in the folder of ``features``.

    Attributes:
        features: The features, in the order of the input.
        format: One of :data:`FORMATS`' values.
    """

    features: Path
    format: str

    @property
    def index(self) -> Path:
        """One JSON line per input file: its row, or why it has none."""
        return self._beside(".index.jsonl")

    @property
    def record(self) -> Path:
        """Settings and counts of the finished run; written last."""
        return self._beside(".run.json")

    @property
    def parts(self) -> Path:
        """Folder of the unfinished run."""
        return self.features.with_name(self.features.name + ".parts")

    def _beside(self, ending: str) -> Path:
        known = self.features.suffix.lower() in FORMATS
        return self.features.with_name(
            (self.features.stem if known else self.features.name) + ending
        )

    def own(self, path: str) -> bool:
        """Whether a run wrote this file: one of these, or one in the folder of parts.

        A file of the same name without the traces of a run is the user's.
        """
        path = os.path.abspath(path)
        parts = os.path.join(os.path.abspath(self.parts), "")
        if path in self._files():
            return os.path.exists(self.record) or os.path.exists(self.parts)
        return path.startswith(parts)

    def refuse_inputs(self, images: ImageDataset) -> None:
        """Refuse to write over a file that is to be read.

        Raises:
            SettingsError: An output is also an input.
        """
        files = self._files()
        for path in images.files():
            if os.path.abspath(path) in files:
                raise SettingsError(f"'{path}' is an input and an output: choose another output")

    def _files(self) -> set[str]:
        return {os.path.abspath(path) for path in (self.features, self.index, self.record)}


def choose_outputs(
    out: str | os.PathLike[str], format: str | None, dtype: str, pool: str | None
) -> Outputs:
    """Decide the format from the name of the output, and refuse what it cannot hold.

    Raises:
        ValueError: If the format is unknown or cannot hold the features, or ``out`` is a folder.
        ImportError: If parquet is asked for and pyarrow is missing.
    """
    path = Path(out)
    chosen = format or FORMATS.get(path.suffix.lower())
    if chosen is None or chosen not in FORMATS.values():
        raise SettingsError(
            f"the format of '{path}' is not clear: end its name in {', '.join(FORMATS)}, or give "
            f"the format as {', '.join(FORMATS.values())}"
        )
    if path.is_dir():
        raise SettingsError(
            f"the output '{path}' is a folder; name a file, like '{path}/features.npy'"
        )
    if path.exists() and not path.is_file():
        raise SettingsError(f"the output '{path}' is a device or a pipe; name a file")
    if chosen != "safetensors" and dtype == "bfloat16":
        raise SettingsError(
            f"{chosen} cannot hold bfloat16; use safetensors, or float16 or float32"
        )
    if chosen == "parquet" and pool is None:
        raise SettingsError("parquet holds one vector per image; use safetensors or npy for maps")
    if chosen == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise MissingPackageError("parquet needs pyarrow: pip install pyarrow") from error
    return Outputs(path, chosen)


def index_lines(images: ImageDataset, parts: Parts) -> Iterator[dict[str, Any]]:
    """The index of a run whose parts are complete, in the order of the input.

    Yields:
        `{"row": 17, "path": ..., "label": ...}` for a row, `row` None and `error` for an image
        without one, `row` None and `skipped` for a file that is not an image by its name.
    """
    reasons = (error for part in range(len(parts)) for error in parts.errors(part))
    skipped = iter([*images.skipped, (len(images), "", "")])
    position, path, why = next(skipped)
    row = 0
    for index in range(len(images) + 1):
        while path and position == index:
            yield {"row": None, "path": path, "label": None, "skipped": why}
            position, path, why = next(skipped)
        if index == len(images):
            return
        line: dict[str, Any] = {
            "row": None,
            "path": images.name(index),
            "label": images.label(index),
        }
        if (reason := next(reasons)) is not None:
            line["error"] = reason
        else:
            line["row"] = row
            row += 1
        yield line


def merge(
    outputs: Outputs,
    parts: Parts,
    images: ImageDataset,
    row_shape: tuple[int, ...],
    settings: dict[str, Any],
) -> None:
    """Join the parts into the final files, piece by piece.

    Args:
        outputs: The files to write; each appears when it is complete, the record last.
        parts: All complete.
        images: The input.
        row_shape: Shape of one row.
        settings: Kept in the record, and in the metadata of safetensors.
    """
    counts = {"rows": 0, "failed": 0, "skipped": 0}
    temporary = outputs.parts / "merged.tmp"
    with whole_file(outputs.index, temporary) as file:
        for line in index_lines(images, parts):
            kind = "failed" if "error" in line else "skipped" if "skipped" in line else "rows"
            counts[kind] += 1
            file.write(json.dumps(line).encode() + b"\n")
    shape, dtype = (counts["rows"], *row_shape), settings["dtype"]
    with whole_file(outputs.features, temporary) as file:
        if outputs.format == "parquet":
            _write_parquet(file, parts, outputs.index, shape, dtype)
        else:
            file.write(_header(outputs.format, shape, dtype, settings))
            for part in range(len(parts)):
                with parts.rows_file(part).open("rb") as rows:
                    shutil.copyfileobj(rows, file, 1 << 20)
    record = {**counts, "shape": list(shape), "dtype": dtype, "settings": settings}
    with whole_file(outputs.record, temporary) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")


def _header(format: str, shape: tuple[int, ...], dtype: str, settings: dict[str, Any]) -> bytes:
    if format == "safetensors":
        entry = safetensors_file.Entry("features", DTYPES[dtype], shape)
        metadata = {
            key: str(_utf8(value)) if isinstance(value, str) else json.dumps(value)
            for key, value in settings.items()
        }
        return safetensors_file.layout([entry], metadata).header
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
    r"""Parquet and safetensors hold UTF-8 only: other bytes of a name become ``\udcXX``."""
    return text and text.encode("utf-8", "backslashreplace").decode()
