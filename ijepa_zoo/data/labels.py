"""Labels of image files from a CSV, one or several per image."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping

import numpy as np

from ..errors import DataError
from .datasets import FileDataset, Targets, indicator_matrix
from .decode import Decoder
from .files import TEST, TRAIN, File

_SPLITS = {"training": "train", "testing": "test", "valid": "val", "validation": "val"}


class LabeledFiles(FileDataset):
    """The images of a CSV with the columns `path` and `label`, and optionally `split`.

    Paths are relative to the folder of the CSV. Several lines of a path, or `;` in a label, give an
    image several labels; then `targets` is a 0/1 matrix. An image with an empty label has no class.
    `splits` has the indices of each split; it is empty without such a column.
    """

    def __init__(self, path: str, decoder: Decoder) -> None:
        labels: dict[str, dict[str, None]] = {}
        split_of: dict[str, str] = {}
        folder = os.path.dirname(path)
        try:
            with open(path, encoding="utf-8-sig", newline="") as opened:
                rows = csv.DictReader(opened, restval="", skipinitialspace=True)
                header = [name.strip().lower() for name in rows.fieldnames or ()]
                counts = [header.count(name) for name in ("path", "label", "split")]
                if counts[:2] != [1, 1] or counts[2] > 1:
                    raise DataError(
                        f"'{path}' needs a header line with one column path and one label, not "
                        f"'{', '.join(header) or 'nothing'}'"
                    )
                rows.fieldnames = header
                for row in rows:
                    line = f"line {rows.line_num} of '{path}'"
                    if None in row:  # DictReader's key of cells beyond the header
                        raise DataError(
                            f"{line} has more cells than the first line: put names with commas in "
                            'quotes, "a, b"'
                        )
                    name, split = row["path"].strip(), row.get("split", "").strip().lower()
                    split = _SPLITS.get(split, split)
                    if not name:
                        raise DataError(f"{line} has no path")
                    if "split" in row and split not in (*TRAIN, *TEST):
                        raise DataError(f"{line} has the split '{split}': use train, val or test")
                    file = os.path.normpath(os.path.join(folder, name))
                    found = (label.strip() for label in row["label"].split(";"))
                    labels.setdefault(file, {}).update((label, None) for label in found if label)
                    if split_of.setdefault(file, split) != split:
                        raise DataError(
                            f"{line} has '{name}' in '{split}', an earlier line in "
                            f"'{split_of[file]}'"
                        )
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"'{path}' cannot be read as a CSV: {error}") from error
        if not labels:
            raise DataError(f"'{path}' lists no images")
        if missing := [file for file in labels if not os.path.isfile(file)]:
            raise DataError(
                f"{len(missing)} of {len(labels)} images of '{path}' are missing, such as "
                f"'{missing[0]}': give paths relative to the folder of the CSV"
            )
        root = os.path.join(folder, "") if folder else ""
        files = (File(file, root, next(iter(found), None)) for file, found in labels.items())
        super().__init__(files, decoder)
        if any(len(found) > 1 for found in labels.values()):
            names = sorted({label for found in labels.values() for label in found})
            number_of = {label: number for number, label in enumerate(names)}
            numbers = [[number_of[label] for label in found] for found in labels.values()]
            self.targets, self.classes = indicator_matrix(numbers), dict(enumerate(names))
        given = np.array([*split_of.values()])
        self.splits: Mapping[str, Targets] = {
            str(split): np.flatnonzero(given == split) for split in np.unique(given) if split
        }
