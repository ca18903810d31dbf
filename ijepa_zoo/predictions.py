"""Predict the classes of images with a classifier, into a table; maps of dense heads as PNG files.

As :func:`ijepa_zoo.extract_features`, resumable and on any number of processes.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .data.files import refuse_inside
from .encode import class_names
from .errors import SettingsError
from .extract import ExtractionReport, require_pyarrow, run_extraction, utf8
from .features import FeatureExtractor
from .models.classifier import Classifier
from .parts import Outputs, Parts

TABLES = {".csv": "csv", ".parquet": "parquet"}
_LONGEST_STEM = 200  # bytes; file systems allow 255 for the whole name
_MILLI = 1000  # units of a map of one channel, such as meters, in a 16-bit PNG


def predict(
    inputs: Any,
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    topk: int = 1,
    **options: Any,
) -> ExtractionReport | None:
    """Predict the classes of images and write them as a table.

    Columns are `path`, `label` and `probability`, for `topk` above 1 also `label_2`,
    `probability_2`, ..., and `error`: why an image could not be read. The probabilities of a
    classifier for several labels per image are independent of each other. With a dense head, `out`
    is a folder of PNG files instead, one per image, of the size of the model's input: class
    numbers, or the values of a single channel times 1000 in 16 bits.

    Args:
        inputs: See :func:`ijepa_zoo.extract_features`.
        model: A classifier of :func:`ijepa_zoo.create_model`: a timm folder with a classifier, or a
            classifier folder of a probe.
        out: File ending in .csv or .parquet; a folder for a dense head.
        topk: Classes per image, the most probable first.
        **options: See :class:`ijepa_zoo.extract.ExtractionOptions`.

    Returns:
        The result; None on ranks other than 0.
    """
    names = class_names(model)
    if names is None:
        raise SettingsError(
            "the model has no classifier: name the folder of a fine-tuned model or of a probe, "
            "local-dir:RESULT/model"
        )
    is_dense = isinstance(model, Classifier) and model.is_dense
    if not is_dense and not 1 <= topk <= len(names):
        raise SettingsError(f"topk is {topk}: the model has {len(names)} classes")
    outputs, write = _outputs(Path(out), is_dense), _write_maps if is_dense else _write_table
    if is_dense:
        refuse_inside(out, inputs)
    predictions = {"extractor": Predictions(model, topk)}
    return run_extraction(inputs, model, predictions, outputs, write, **options)


class Predictions(nn.Module):
    """Predictions of a classifier, in an `Encoder`.

    Probabilities of all classes `[B, classes]`; with `topk`, the largest ones and their class
    numbers `[B, 2 topk]`. For a dense head: class numbers, or values of the only channel times
    1000, `[B, H, W]`.
    """

    def __init__(self, model: Any, topk: int | None = None) -> None:
        super().__init__()
        self.model, self.topk = model, topk
        self.settings = {"classes": class_names(model), "topk": topk}
        is_ours = isinstance(model, Classifier)
        self.is_dense = is_ours and model.is_dense
        features = model.extractor if is_ours else FeatureExtractor(model)
        self.layers, self.pool, self.grid = features.layers, features.pool, features.grid

    def row_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the predictions of one image of `size` pixels."""
        if self.is_dense:
            return size
        return (2 * self.topk if self.topk else self.model.num_classes,)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.model(images).float()
        if self.is_dense:
            one = logits.shape[1] == 1
            return logits[:, 0] * _MILLI if one else logits.argmax(dim=1).float()
        is_multi_label = getattr(self.model, "multi_label", False)
        found = logits.sigmoid() if is_multi_label else logits.softmax(dim=1)
        if self.topk is None:
            return found
        best = found.topk(self.topk)
        return torch.cat([best.values, best.indices.float()], dim=1)


def _outputs(path: Path, is_dense: bool) -> Outputs:
    """A table, or for a dense head a table in a folder of maps."""
    format = TABLES.get(path.suffix.lower())
    if is_dense:
        if format or path.is_file():
            raise SettingsError(f"'{path}' is not a folder: a dense head writes a map per image")
        return Outputs.beside(path / "maps.csv", "csv")
    if format is None or path.is_dir():
        raise SettingsError(f"'{path}' is not the name of a table: end it in {', '.join(TABLES)}")
    if format == "parquet":
        require_pyarrow()
    return Outputs.beside(path, format)


def _rows(parts: Parts, index: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every image with its row, or None if it could not be read."""
    with index.open("rb") as lines:
        for part in range(len(parts)):
            values = iter(parts.rows(part).numpy())
            for line in map(json.loads, itertools.islice(lines, parts.size(part))):
                yield line, None if "error" in line else next(values)


def _write_table(
    file: BinaryIO, parts: Parts, outputs: Outputs, shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    names, topk = settings["classes"], settings["topk"]
    endings = ["", *(f"_{rank}" for rank in range(2, topk + 1))]
    columns = ["path", *(f"{name}{end}" for end in endings for name in ("label", "probability"))]
    columns.append("error")

    def lines() -> Iterator[list[Any]]:
        for line, row in _rows(parts, outputs.index):
            found: list[Any] = [None] * 2 * topk
            if row is not None:
                found[0::2] = [names[int(number)] for number in row[topk:]]
                found[1::2] = row[:topk].tolist()
            yield [line["path"], *found, line.get("error")]

    write = _write_csv if outputs.format == "csv" else _write_parquet
    write(file, columns, lines())


def _write_csv(file: BinaryIO, columns: list[str], lines: Iterator[list[Any]]) -> None:
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in line] for line in lines)
    text.detach()  # flushes; the file stays open


def _write_parquet(file: BinaryIO, columns: list[str], lines: Iterator[list[Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = [pa.float32() if name.startswith("probability") else pa.string() for name in columns]
    schema = pa.schema(list(zip(columns, kinds)))
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(lines, 65_536)):
            values = ([utf8(v) if isinstance(v, str) else v for v in c] for c in zip(*group))
            writer.write_table(pa.table([*map(pa.array, values, kinds)], schema=schema))


def _write_maps(
    file: BinaryIO, parts: Parts, outputs: Outputs, shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    """PNG files in the folder, and the table of images and their maps."""
    folder = outputs.features.parent
    large = len(settings["classes"]) == 1 or len(settings["classes"]) > 256

    def lines() -> Iterator[list[Any]]:
        for number, (line, row) in enumerate(_rows(parts, outputs.index)):
            name = None
            if row is not None:
                stem = os.fsencode(Path(line["path"]).stem)[:_LONGEST_STEM].decode(errors="ignore")
                name = f"{number:06}-{stem}.png"
                dtype = np.uint16 if large else np.uint8
                values = row.clip(0, np.iinfo(dtype).max).round()
                Image.fromarray(values.astype(dtype)).save(folder / name)
            yield [line["path"], name, line.get("error")]

    _write_csv(file, ["path", "map", "error"], lines())
